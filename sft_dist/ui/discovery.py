"""Runs and configurations below a folder. Links are not followed, so that no circle of them is walked."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from sft_dist.cluster.attempts import FOLDER as SLURM
from sft_dist.cluster.job_of_run import SUBMISSION
from sft_dist.cluster.watch import SWEEP
from sft_dist.export.provenance import RECEIPT
from sft_dist.metrics.heartbeat import HEARTBEAT
from sft_dist.metrics.logger import METRICS
from sft_dist.train.run_files import CONFIG

MAX_DEPTH, MAX_FOLDERS = 8, 20_000

# Of other programs, or of no run that is to be found by itself.
NEVER_IN = ("__pycache__", "node_modules", "site-packages", "venv", "checkpoints", "wandb")

# What a run keeps for itself.
OWN = ("data", "diverged", "eval", "final", "final.unfinished", "heartbeats", "logs", "stalls", SLURM)

# A configuration names its model and its data; other YAML files do not have both.
_KEYS = [re.compile(rf"^[\"']?{key}[\"']?\s*:".encode(), re.MULTILINE) for key in ("model", "data")]
HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Found:
    """
    Args:
        runs: folders. configs: files that are no run's own.
        is_cut: there are more folders than were looked into.
    """

    runs: tuple[Path, ...]
    configs: tuple[Path, ...]
    is_cut: bool = False


def discover(root: Path) -> Found:
    """Walks the folder."""
    runs, configs = list[Path](), list[Path]()
    for number, (folder, files, folders) in enumerate(_folders(root)):
        if number == MAX_FOLDERS:
            return Found(tuple(runs), tuple(configs), is_cut=True)
        if _is_run(folder, files, folders):
            runs.append(folder)
        else:
            named = (folder / name for name in sorted(files) if name.endswith((".yaml", ".yml")))
            configs += [path for path in named if _is_config(path)]
    return Found(tuple(runs), tuple(configs))


def _folders(root: Path) -> Iterator[tuple[Path, set[str], set[str]]]:
    """Each folder with the names of its files and of its folders, those above before those below."""
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        files, folders = set[str](), set[str]()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.add(entry.name)
                    elif entry.is_file():
                        files.add(entry.name)
        except OSError:
            continue  # not ours to read, or gone meanwhile
        yield folder, files, folders
        if depth == MAX_DEPTH:
            continue
        left_out = {*NEVER_IN, *OWN} if _is_run(folder, files, folders) else NEVER_IN
        below = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        waiting += [(folder / name, depth + 1) for name in reversed(below)]


def _is_run(folder: Path, files: set[str], folders: set[str]) -> bool:
    """Stricter than for a folder that was named: others have a config.yaml too."""
    if HEARTBEAT in files or RECEIPT in files or {METRICS, CONFIG} <= files:
        return True
    if SLURM not in folders:
        return False
    submissions = folder / SLURM
    # The folder of a sweep holds its runs, and is none.
    is_sweep = any(submissions.glob(f"submission-*/{SWEEP}"))
    return not is_sweep and any(submissions.glob(f"submission-*/{SUBMISSION}"))


def _is_config(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return all(key.search(head) for key in _KEYS)


class Finder:
    """Looks again where enough time has passed: ten times as long as looking takes, and at least ``every_s``."""

    def __init__(self, root: Path, *, every_s: float = 4.0) -> None:
        self._root, self._every_s = root, every_s
        self._lock, self._found, self._again = Lock(), Found((), ()), 0.0

    def found(self) -> Found:
        with self._lock:
            began = time.monotonic()
            if began >= self._again:
                self._found = discover(self._root)
                took_s = time.monotonic() - began
                self._again = began + took_s + max(self._every_s, 10 * took_s)
            return self._found
