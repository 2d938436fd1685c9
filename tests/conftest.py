from __future__ import annotations

import os
import signal
import tempfile

# Read when huggingface_hub is imported: no test may reach out.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import figures
from tests.helpers.parts import files_of_part
from tests.helpers.pool import WorldPool
from tests.helpers.quick import is_left_to_ci, missing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="run the files of part K of N alone, of what is selected")


def pytest_itemcollected(item: pytest.Item) -> None:
    if is_left_to_ci(item.nodeid):
        item.add_marker("ci")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    lost = missing(node.nodeid for node in report.result if isinstance(node, pytest.Item))
    if lost:
        raise pytest.UsageError(f"tests/helpers/quick.py keeps what is not there: {', '.join(sorted(lost))}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Behind the selection by markers."""
    if config.getoption("--part") is None:
        return
    part, parts = (int(number) for number in config.getoption("--part").split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--part {part}/{parts}: there is no such part")
    wanted = files_of_part((item.path for item in items), part, parts)
    left_out = [item for item in items if item.path not in wanted]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.path in wanted]


def pytest_configure(config: pytest.Config) -> None:
    """What dry runs and compilers keep goes with the session; its processes and those that they start share it."""
    if "SFT_DIST_CACHE" not in os.environ:
        kept = tempfile.TemporaryDirectory(prefix="sft-dist-tests-")
        os.environ["SFT_DIST_CACHE"] = kept.name
        config.add_cleanup(kept.cleanup)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{kept.name}/inductor")
    # A shell without job control starts what it puts into the background with Ctrl-C ignored; processes that a test is
    # to end by it would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes that run tests: hands its figures to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = (
            figures.cell_seconds, figures.differences, figures.lines, figures.faults
        )  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    cell_seconds, differences, lines, faults = getattr(node, "workeroutput", {}).get("figures", ([], [], [], []))
    figures.cell_seconds.extend((duration, function) for duration, function in cell_seconds)
    figures.differences.extend((kind, value) for kind, value in differences)
    figures.lines.extend(lines)
    figures.faults.extend((planted, seconds, codes, told) for planted, seconds, codes, told in faults)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in figures.summary():
        terminalreporter.write_line(line)


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
