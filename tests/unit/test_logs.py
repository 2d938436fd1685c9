"""What ``sft-dist logs`` shows: the right file, its last lines byte by byte, and what is added to it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.cluster import logs
from sft_dist.cluster.logs import Choice, show_logs, start_of_last_lines
from sft_dist.errors import ConfigError
from tests.helpers.terminal import Terminal

RED = "\x1b[31mred\x1b[0m"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two starts of a job on two ranks."""
    (tmp_path / "metrics.jsonl").write_text("")
    for ago_s, attempt in ((500, "4711-0"), (5, "4711-1")):
        for rank in (0, 1):
            write(tmp_path, attempt, rank, "".join(f"{attempt} rank {rank} line {n} {RED}\n" for n in range(5)), ago_s)
    return tmp_path


def write(run: Path, attempt: str, rank: int, text: str, ago_s: float = 0.0) -> Path:
    path = run / "logs" / attempt / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    moment = time.time() - ago_s
    os.utime(path, (moment, moment))
    os.utime(path.parent, (moment, moment))
    return path


def shown(run: Path, **choice: object) -> str:
    out = io.BytesIO()
    show_logs(run, Choice(**choice), out=out)  # type: ignore[arg-type]
    return out.getvalue().decode()


def test_rank_0_of_the_newest_start_as_it_was_printed(run: Path) -> None:
    assert shown(run) == "".join(f"4711-1 rank 0 line {n} {RED}\n" for n in range(5))
    assert shown(run, lines=2, rank=1) == "".join(f"4711-1 rank 1 line {n} {RED}\n" for n in (3, 4))
    assert shown(run, attempt="4711-0", lines=1) == f"4711-0 rank 0 line 4 {RED}\n"


def test_a_start_of_ten_restarts_is_newer_than_one_of_nine(run: Path) -> None:
    write(run, "4711-9", 0, "nine\n", ago_s=2)
    write(run, "4711-10", 0, "ten\n", ago_s=1)
    assert shown(run) == "ten\n"


def test_all_ranks_with_their_number(run: Path) -> None:
    write(run, "4711-1", 1, "a\nb")
    write(run, "4711-1", 10, "c\n")
    assert shown(run, rank=None, lines=1) == f"[ 0] 4711-1 rank 0 line 4 {RED}\n[ 1] b\n[10] c\n"


def test_the_output_of_the_job(run: Path) -> None:
    (run / "slurm").mkdir()
    with pytest.raises(ConfigError, match="no output of a job"):
        shown(run, of_job=True)
    (run / "slurm" / "train-4711.out").write_text("doctor\ntrain")
    assert shown(run, of_job=True) == "doctor\ntrain"


def test_what_is_not_there(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match="has no start 4712-0") as no_start:
        shown(run, attempt="4712-0")
    assert no_start.value.fix == "give one of 4711-0, 4711-1"
    with pytest.raises(ConfigError, match="has no log of rank 7") as no_rank:
        shown(run, rank=7)
    assert no_rank.value.fix == "give one of 0 to 1, or all"
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match="holds no run"):
        shown(empty)
    (empty / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="has no logs: nothing has started yet"):
        shown(empty)


@pytest.mark.parametrize("text", ["", "a", "a\n", "a\nb", "\n\n\n", "a\nb\n\nc\n", "x" * 50 + "\n" + "y" * 50])
@pytest.mark.parametrize("block", [1, 2, 3, 64])
def test_the_last_lines(text: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "BLOCK_BYTES", block)
    whole = text.splitlines(keepends=True)
    for count in range(6):
        expected = "".join(whole[-count:]) if count else ""
        assert text[start_of_last_lines(io.BytesIO(text.encode()), count) :] == expected


def follow(run: Path, *looks: Callable[[], object], **choice: object) -> tuple[str, list[str]]:
    """Follows; before each further look the next of ``looks`` happens."""
    out, said, left = io.BytesIO(), list[str](), list(looks)

    def goes_on() -> bool:
        if left:
            left.pop(0)()
            return True
        return False

    show_logs(run, Choice(follow=True, **choice), out=out, say=said.append, goes_on=goes_on)  # type: ignore[arg-type]
    return out.getvalue().decode(), said


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "POLL_S", 0.0)


@pytest.mark.usefixtures("at_once")
def test_following_goes_on_with_the_next_start(run: Path) -> None:
    old = run / "logs" / "4711-1" / "rank-0.log"

    def add() -> None:
        with old.open("a") as file:
            file.write("more")

    def last_words_and_a_new_start() -> None:
        add()
        moment = time.time() - 3
        for path in (old, old.parent):
            os.utime(path, (moment, moment))
        write(run, "4711-2", 0, "again\nand again\n")

    text, said = follow(run, add, last_words_and_a_new_start, lines=1)
    assert text == f"4711-1 rank 0 line 4 {RED}\nmoremoreagain\nand again\n", "all of a start that begins meanwhile"
    assert said == [f"==> {run / 'logs' / '4711-2' / 'rank-0.log'} <=="]


@pytest.mark.usefixtures("at_once")
def test_following_waits_for_the_first_start(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    text, said = follow(tmp_path, lambda: None, lambda: write(tmp_path, "1-0", 0, "first\n"))
    assert text == "first\n"
    assert said[0] == f"nothing is in {tmp_path / 'logs'} yet: waiting"
    assert len(said) == 2


@pytest.mark.usefixtures("at_once")
def test_following_all_ranks_never_cuts_a_line(run: Path) -> None:
    first, second = (run / "logs" / "4711-1" / f"rank-{rank}.log" for rank in (0, 1))

    def half() -> None:
        with first.open("a") as file:
            file.write("one ")
        with second.open("a") as file:
            file.write("two\n")

    def rest() -> None:
        with first.open("a") as file:
            file.write("line\n")

    text, _ = follow(run, half, rest, rank=None, lines=0)
    assert text == "[1] two\n[0] one line\n"


@pytest.mark.usefixtures("at_once")
def test_the_last_words_of_a_rank_that_was_killed(run: Path) -> None:
    """Without the end of their line: they come before the next start."""

    def killed_and_started_again() -> None:
        write(run, "4711-1", 0, "last wor", ago_s=3)
        write(run, "4711-2", 0, "again\n")

    text, said = follow(run, killed_and_started_again, lambda: None, rank=None, lines=0)
    assert text == "[0] last wor\n[0] again\n"
    assert said[-1] == f"==> {run / 'logs' / '4711-2'} <=="


@pytest.mark.usefixtures("at_once")
def test_a_file_that_is_written_anew(run: Path) -> None:
    path = run / "logs" / "4711-1" / "rank-0.log"
    text, _ = follow(run, lambda: path.write_text("anew\n"), lines=0)
    assert text == "anew\n"


def test_ctrl_c_ends_quietly(run: Path) -> None:
    with Terminal([sys.executable, "-m", "sft_dist", "logs", str(run), "-f", "-n", "1"]) as terminal:
        terminal.wait_for("line 4")
        terminal.type("\x03")
        assert terminal.wait_for_exit() == 128 + signal.SIGINT
    assert terminal.text.replace("^C", "") == "4711-1 rank 0 line 4 red\n"


def test_a_reader_that_has_enough(run: Path) -> None:
    write(run, "4711-1", 0, "line\n" * 1_000_000)
    command = f"{sys.executable} -m sft_dist logs {run} -n 1000000 | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "line\n0\n"
    assert done.stderr == ""
