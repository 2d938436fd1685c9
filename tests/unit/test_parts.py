"""Parts of the tests: together all of them, none twice, about equally long; and what a quick run has of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.parts import OTHERS, SECONDS, files_of_part
from tests.helpers.quick import is_left_to_ci, missing

TESTS = [
    *[Path("tests/dist/test_a.py")] * 60,
    *[Path("tests/unit/test_b.py")] * 20,
    *[Path(f"tests/e2e/test_{number}.py") for number in range(20)],
    *[Path("tests/dist/test_c.py")] * 40,
]


def all_parts(parts: int) -> list[set[Path]]:
    dealt = [files_of_part(TESTS, part, parts) for part in range(1, parts + 1)]
    assert sum(map(len, dealt)) == len(set(TESTS))
    assert set().union(*dealt) == set(TESTS)
    return dealt


def seconds(files: set[Path]) -> int:
    return sum(SECONDS.get(file.parent.name, OTHERS) for file in TESTS if file in files)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_file_is_in_one_part(parts: int) -> None:
    dealt = all_parts(parts)
    assert max(map(seconds, dealt)) - min(map(seconds, dealt)) <= max(SECONDS.values())


def test_files_longer_than_a_part_are_parts_of_their_own() -> None:
    dealt = all_parts(7)
    others = [files for files in dealt if len(files) > 1]
    assert [files for files in dealt if files not in others] == [
        {Path("tests/dist/test_a.py")},
        {Path("tests/dist/test_c.py")},
    ]
    assert max(map(seconds, others)) - min(map(seconds, others)) <= max(SECONDS.values())


def test_the_order_of_tests_changes_nothing() -> None:
    assert files_of_part(TESTS, 2, 3) == files_of_part(TESTS[::-1], 2, 3)


@pytest.mark.parametrize(
    ("test", "is_left"),
    [
        ("tests/launch/test_same_losses.py::test_the_same_losses[torchrun]", False),
        ("tests/launch/test_same_losses.py::test_the_same_losses[accelerate-fsdp2]", True),
        ("tests/unit/test_compiled.py::test_without_a_compiler", True),
        ("tests/unit/test_parts.py::test_every_file_is_in_one_part[1]", False),
    ],
)
def test_what_a_quick_run_leaves_out(test: str, is_left: bool) -> None:
    assert is_left_to_ci(test) == is_left


def test_a_cell_whose_name_has_changed_is_missed() -> None:
    test = "tests/launch/test_same_losses.py::test_the_same_losses"
    assert missing([f"{test}[torchrun]", f"{test}[accelerate]"]) == []
    assert missing([f"{test}[torch run]", f"{test}[accelerate]"]) == [f"{test}[torchrun]"]
    assert missing(["tests/unit/test_parts.py::test_the_order_of_tests_changes_nothing"]) == []
