"""Parts of the tests: together all of them, none twice, about equally long; and what a quick run has of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.parts import OTHERS, SECONDS, files_of_part
from tests.helpers.quick import KEPT, is_left_to_ci

TESTS = [
    *[Path("tests/dist/test_a.py")] * 60,
    *[Path("tests/unit/test_b.py")] * 20,
    *[Path(f"tests/e2e/test_{number}.py") for number in range(20)],
    *[Path("tests/dist/test_c.py")] * 40,
]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_file_is_in_one_part(parts: int) -> None:
    dealt = [files_of_part(TESTS, part, parts) for part in range(1, parts + 1)]
    assert sum(map(len, dealt)) == len(set(TESTS))
    assert set().union(*dealt) == set(TESTS)
    seconds = [sum(SECONDS.get(file.parent.name, OTHERS) for file in TESTS if file in part) for part in dealt]
    assert max(seconds) - min(seconds) <= max(SECONDS.values())


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


@pytest.mark.ci
def test_what_a_quick_run_keeps_is_there() -> None:
    """A cell whose name has changed would be left out as well, and its test with it."""
    files = sorted({test.partition("::")[0] for test in KEPT})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *files]
    collected, quick = (
        subprocess.run(
            [*command, *selected], cwd=Path(__file__).parents[2], env=os.environ | {"COLUMNS": "400"},
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()
        for selected in ([], ["-m", "not ci and not full and not slurm"])
    )  # fmt: skip
    for test, cells in KEPT.items():
        assert any(line.partition("[")[0] == test for line in collected), test
        assert {line for line in quick if line.partition("[")[0] == test} == {f"{test}[{cell}]" for cell in cells}
