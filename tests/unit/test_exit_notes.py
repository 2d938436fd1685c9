"""Exit codes that launchers leave for the job: written and read by the same module."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.runtime import exit_notes


def test_nodes_and_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "notes" / "17-0"
    exit_notes.begin(folder, 0)
    exit_notes.write(folder, 0, 75)
    exit_notes.begin(folder, 10)
    for task in (0, 1):
        exit_notes.begin(folder, 2, task=task)
    exit_notes.write(folder, 2, 137, task=1)
    assert exit_notes.read(folder) == {0: [75], 2: [None, 137], 10: [None]}
    assert exit_notes.hosts(folder) == dict.fromkeys((0, 2, 10), socket.gethostname())
    exit_notes.begin(folder, 0)
    assert exit_notes.read(folder)[0] == [None]  # what an earlier launcher left does not count
    assert exit_notes.read(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("statement", "code"),
    [("pass", 0), ("sys.exit(6)", 6), ("sys.exit('why')", 1), ("raise KeyboardInterrupt", 130), ("1 / 0", 1),
     ("exit_notes.leave(75)", 75), ("os._exit(3)", None)],
)  # fmt: skip
def test_however_a_process_ends(tmp_path: Path, statement: str, code: int | None) -> None:
    program = f"import os, sys; from sft_dist.runtime import exit_notes\nwith exit_notes.noting(1):\n    {statement}"
    subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {exit_notes.FOLDER: str(tmp_path)}, capture_output=True
    )
    assert exit_notes.read(tmp_path) == {1: [code]}


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(exit_notes.FOLDER, str(tmp_path / "file"))
    with exit_notes.noting(0):
        pass
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.delenv(exit_notes.FOLDER)
    with exit_notes.noting(0):
        pass
    assert capsys.readouterr().err == ""
