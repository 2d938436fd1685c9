"""Parts of the tests: together all of them, none twice, about equally long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.parts import OTHERS, SECONDS, files_of_part

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
