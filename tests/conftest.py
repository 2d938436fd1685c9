from __future__ import annotations

import os
import statistics

# Read when huggingface_hub is imported: no test may reach out.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import pool
from tests.helpers.pool import WorldPool


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells how long the cells of the warm worlds took."""
    if pool.cell_seconds:
        seconds = sorted(duration for duration, _ in pool.cell_seconds)
        slowest, where = max(pool.cell_seconds)
        terminalreporter.write_line(
            f"warm worlds: {len(seconds)} cells, median {statistics.median(seconds):.2f} s, "
            f"{sum(s <= 2 for s in seconds) / len(seconds):.0%} within 2 s, slowest {slowest:.1f} s ({where})"
        )


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], WorldPool]]:
    """``world(n)``: the warm pool of n processes, started at first use and again after a failure."""
    pools: dict[int, WorldPool] = {}

    def get(size: int) -> WorldPool:
        if size not in pools or not pools[size].alive:
            pools[size] = WorldPool(size)
        return pools[size]

    yield get
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tokenizer."""
    from tests.helpers.tiny_model import build_base

    return build_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the output layer tied to the embedding."""
    from tests.helpers.tiny_model import build_base

    return build_base(tmp_path_factory.mktemp("tied-base"), tied=True)
