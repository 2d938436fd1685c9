"""``heartbeat.json``: what it says while a process works and after its end, and that no failure of it stops anything."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from sft_dist.errors import DataError, Preempted, Stalled
from sft_dist.metrics import heartbeat
from sft_dist.metrics.heartbeat import HEARTBEAT, Beat, Heartbeat, tell_end
from tests.helpers.disks import locked
from tests.helpers.small_disk import small_disk

PATIENCE_S = 20


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LEAST_S", 0.001)
    monkeypatch.setattr(heartbeat, "BEAT_S", 60.0)


def begin(beats: Heartbeat, folder: Path, say: Callable[[str], None] = pytest.fail) -> None:
    beats.begin(folder, strategy="ddp", world_size=2, say=say)


def seen(folder: Path, wanted: Callable[[Beat], bool]) -> Beat:
    """The file as soon as it says what is wanted."""
    until = time.monotonic() + PATIENCE_S
    while (beat := Beat.read(folder)) is None or not wanted(beat):
        assert time.monotonic() < until, beat
        time.sleep(0.002)
    return beat


def test_each_phase_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with Heartbeat() as beats:
        with beats.phase("preparing"):
            begin(beats, tmp_path)
            first = seen(tmp_path, lambda beat: beat.phase == "preparing")
            assert (first.job_id, first.restart, first.step, first.world_size) == ("4711", 2, None, 2)
            assert first.launch_restarts == 1
        seen(tmp_path, lambda beat: beat.phase == "loading")
        beats.at(10, 100)
        with beats.phase("rehearsing"), beats.phase("proving"):
            seen(tmp_path, lambda beat: beat.phase == "rehearsing")
        with beats.phase("training"):
            for step in (11, 12, 13):
                beats.completed(step)
                time.sleep(0.01)
            with beats.phase("evaluating"):
                beat = seen(tmp_path, lambda beat: beat.phase == "evaluating")
                assert (beat.step, beat.num_steps) == (13, 100)
                assert beat.step_s is not None
                assert 0.01 <= beat.step_s < 1
                assert beat.step_at is not None
                assert beat.step_at <= beat.written_at
            seen(tmp_path, lambda beat: beat.phase == "training")
            beats.completed(14)
    last = Beat.read(tmp_path)
    assert last is not None
    assert (last.phase, last.exit_code, last.step) == ("done", 0, 14)
    assert last.step_at is not None
    assert last.step_at > beat.step_at, "of the last step"
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT]


def test_it_beats_while_something_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    with Heartbeat() as beats, beats.phase("saving"):
        begin(beats, tmp_path)
        first = seen(tmp_path, lambda beat: beat.phase == "saving")
        later = seen(tmp_path, lambda beat: beat.written_at > first.written_at)
    assert later.phase_since == first.phase_since


@pytest.mark.parametrize(
    ("error", "phase", "code", "what"),
    [
        (DataError("row 7 is none\nand more", fix="x"), "failed", 4, "row 7 is none"),
        (Preempted("preempted by SIGUSR1 at step 3", fix="x"), "stopped", 75, "preempted by SIGUSR1 at step 3"),
        (KeyboardInterrupt(), "stopped", 130, "interrupted"),
        (RuntimeError("gloo: connection closed"), "failed", 1, "RuntimeError: gloo: connection closed"),
    ],
)
def test_how_it_ended(tmp_path: Path, error: BaseException, phase: str, code: int, what: str) -> None:
    with pytest.raises(type(error)), Heartbeat() as beats:  # noqa: PT012
        begin(beats, tmp_path)
        with beats.phase("evaluating"):
            raise error
    last = Beat.read(tmp_path)
    assert last is not None
    assert (last.phase, last.during, last.exit_code, last.what) == (phase, "evaluating", code, what)
    assert last.phase_since == last.written_at, "it ended now"


def test_the_end_of_one_that_does_not_run_is_told_by_another(tmp_path: Path) -> None:
    stalled = Stalled("rank 0 on n0 gives no sign of life\nand more", fix="x")
    tell_end(tmp_path, stalled)
    assert not list(tmp_path.iterdir()), "no heartbeat, no end"
    with Heartbeat() as beats, beats.phase("evaluating"):
        begin(beats, tmp_path)
        alive = seen(tmp_path, lambda beat: beat.phase == "evaluating")
    ended = (tmp_path / HEARTBEAT).read_text()
    tell_end(tmp_path, stalled)
    assert (tmp_path / HEARTBEAT).read_text() == ended, "what it said of its end itself stays"
    (tmp_path / HEARTBEAT).write_text(json.dumps(asdict(alive)))
    tell_end(tmp_path, stalled)
    last = Beat.read(tmp_path)
    assert last is not None
    assert (last.phase, last.during, last.exit_code, last.what) == (
        "failed", "evaluating", 8, "rank 0 on n0 gives no sign of life"
    )  # fmt: skip
    assert last.written_at > alive.written_at


def test_one_that_has_not_begun_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks, and a start that was refused because the folder is another run's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError), Heartbeat() as beats, beats.phase("training"):  # noqa: PT012
        beats.completed(1)
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_may_write(tmp_path: Path) -> None:
    said: list[str] = []
    with Heartbeat() as beats:
        begin(beats, tmp_path, said.append)
        seen(tmp_path, lambda beat: beat.phase == "loading")
        with locked(tmp_path):
            with beats.phase("training"):
                until = time.monotonic() + PATIENCE_S
                while not said:
                    assert time.monotonic() < until
                    time.sleep(0.002)
            with beats.phase("saving"):
                time.sleep(0.02)
        with beats.phase("exporting"):
            seen(tmp_path, lambda beat: beat.phase == "exporting")
    assert len(said) == 1, "once"
    assert said[0].startswith(f"{tmp_path / HEARTBEAT} cannot be written (")


def test_a_full_disk_still_takes_the_time(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk") as small:
        with Heartbeat() as beats:
            begin(beats, small.folder, said.append)
            seen(small.folder, lambda beat: beat.phase == "loading")
            small.fill(small.folder / "none")
            before = (small.folder / HEARTBEAT).stat().st_mtime_ns
            with beats.phase("training"):
                until = time.monotonic() + PATIENCE_S
                while (small.folder / HEARTBEAT).stat().st_mtime_ns == before:
                    assert time.monotonic() < until
                    time.sleep(0.002)
        beat = Beat.read(small.folder)
        small.free()
    assert beat is not None
    assert beat.phase == "loading", "the file is whole, if old"
    assert len(said) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"phase": "dancing"}'])
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    assert Beat.read(tmp_path) is None
    (tmp_path / HEARTBEAT).write_text(text)
    with pytest.raises(ValueError):
        Beat.read(tmp_path)


def test_it_can_be_read_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.0)
    with Heartbeat() as beats:
        begin(beats, tmp_path)
        seen(tmp_path, lambda beat: True)
        for _ in range(300):
            json.loads((tmp_path / HEARTBEAT).read_bytes())
