"""Two runs never work in one directory; a process that is gone, however it ended, keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_dist.errors import ConfigError
from sft_dist.train import run_lock
from sft_dist.train.run_lock import hold, look

# Holds the lock, starts what a training run starts beside itself, says so, and waits to be killed.
HOLDER = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
from sft_dist.train.run_lock import hold

def sleep():
    time.sleep(60)

if __name__ == "__main__":
    hold(Path(sys.argv[1]), say=print)
    started = [subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid]
    for method in ("fork", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=sleep)
        process.start()
        started.append(process.pid)
    print("holding", *started, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that holds the lock of a folder, and those that it has started; all of them are gone at the end."""
    script = folder.with_name("holder.py")
    script.write_text(HOLDER)
    children: list[int] = []
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first, *pids = process.stdout.readline().split()
        assert first == "holding"
        children += map(int, pids)
        yield process, children
    finally:
        for pid in (process.pid, *children):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run directory; whatever of it this process holds is let go at the end."""
    (tmp_path / "run").mkdir()
    before = dict(run_lock._held)
    yield tmp_path / "run"
    for key in run_lock._held.keys() - before.keys():
        os.close(run_lock._held.pop(key))


def is_free(folder: Path) -> bool:
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_second_process_is_refused_until_the_first_is_killed(folder: Path) -> None:
    said: list[str] = []
    with holder(folder) as (process, children):
        about = json.loads((folder / ".lock").read_text())
        assert about["pid"] == process.pid
        what = f"output_dir: {folder} is in use by process {process.pid} on {socket.gethostname()} since {about['started']}"
        with pytest.raises(ConfigError) as caught:
            look(folder)
        assert (caught.value.what, caught.value.fix) == (
            what,
            "wait for the end of that run or stop it, or set another output_dir",
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(what)}\n"):
            hold(folder, say=said.append, patience_s=0.3)
        assert said == [f"{what}: waiting 0 s for its end"]
        process.kill()
        process.wait()
        assert all(Path(f"/proc/{pid}").exists() for pid in children), "what it started lives on"
        look(folder)
        hold(folder, say=said.append, patience_s=0)
    assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert len(said) == 1


def test_a_process_that_is_about_to_end_is_waited_for(folder: Path) -> None:
    said: list[str] = []
    with holder(folder) as (process, _):
        threading.Timer(0.5, process.kill).start()
        started = time.monotonic()
        hold(folder, say=said.append)
        assert 0.3 < time.monotonic() - started < 5
    assert [line.endswith(": waiting 10 s for its end") for line in said] == [True]


def test_who_holds_it_may_begin_again(folder: Path) -> None:
    for _ in range(2):
        hold(folder, say=pytest.fail, patience_s=0)
        look(folder)
    assert not is_free(folder)


def test_looking_holds_nothing_and_leaves_nothing(folder: Path) -> None:
    look(folder)
    assert list(folder.iterdir()) == []
    (folder / ".lock").touch()
    look(folder)
    assert is_free(folder)


def test_a_holder_on_another_machine_is_left_to_rank_0(folder: Path) -> None:
    """It may be rank 0 of the launch that a second node is about to join."""
    with holder(folder):
        about = json.loads((folder / ".lock").read_text())
        (folder / ".lock").write_text(json.dumps(about | {"host": "elsewhere"}))
        look(folder)
        with pytest.raises(ConfigError, match="on elsewhere since"):
            hold(folder, say=str, patience_s=0)
        (folder / ".lock").write_text('{"host"')
        with pytest.raises(ConfigError, match="is in use by another process\n"):
            look(folder)


def test_a_folder_that_was_made_again_is_locked_again(folder: Path) -> None:
    hold(folder, say=pytest.fail, patience_s=0)
    shutil.rmtree(folder)
    folder.mkdir()
    hold(folder, say=pytest.fail, patience_s=0)
    assert not is_free(folder)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_of(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    hold(folder, say=said.append, patience_s=0)
    look(folder)
    assert said == [
        f"output_dir: {folder} is on a file system that cannot lock ({os.strerror(number)}): see to it that no other run "
        "writes there"
    ]


def test_the_command_is_refused_at_once(folder: Path) -> None:
    """Before anything is imported, prepared or written, by the command itself and by a launcher."""
    (folder.parent / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder.parent / "run.yaml").write_text(
        f"model: {{path: {folder.parent}}}\ndata: {{train: [{{path: {folder.parent}/rows.jsonl, format: text}}]}}\n"
        f"train: {{global_batch_size: 1, max_steps: 1}}\noutput_dir: {folder}\n"
    )
    with holder(folder) as (process, _):
        for program in (["sft_dist"], ["sft_dist.launch.torchrun", "--nproc-per-node", "2"]):
            command = [sys.executable, "-m", *program, "train", str(folder.parent / "run.yaml"), "--resume", "auto"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 2
            assert re.fullmatch(
                rf"error: output_dir: \S+ is in use by process {process.pid} on \S+ since \S+\n  fix: wait .*\n",
                done.stderr,
            )
    assert [path.name for path in folder.iterdir()] == [".lock"]
