"""Processes that prepare data, forked from one that has imported everything: starting each anew takes seconds.

Usage: python -m tests.helpers.forked_prepare {kill|together|orphan} FOLDER BASE

FOLDER has rows.jsonl; the cache is made in FOLDER/cache.
kill: ten times a process that is killed at a random moment of its own time, by a signal that nobody handles, so that
it ends as by ``kill -9``; then one that is not. Prints the exit codes and how many chunks there were before the last.
A machine's speed is no matter: moments are counted in the time that loading the tokenizer takes.
together: two processes at once; prints their exit codes.
orphan: one with two workers, which is killed when they are there; prints the processes below it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

from sft_dist.config.data_schema import DataConfig
from sft_dist.data import prepare, token_store, tokenising
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import load_renderer

ALIVE = 4  # a tracker of resources, the fork server and two workers


def begin(folder: Path, base: str, workers: int, killed_after_s: float = 0.0) -> int:
    """The pid of a child that prepares the data and then ends, or is killed after so much time of the processor."""
    pid = os.fork()
    if pid:
        return pid
    signal.setitimer(signal.ITIMER_PROF, killed_after_s)
    load = partial(load_renderer, base, None, None)
    data = DataConfig.model_validate({"train": [{"path": str(folder / "rows.jsonl")}], "max_seq_len": 256})
    prepare.prepare_sets(data, Cache(folder / "cache", load(), load, num_workers=workers))
    os._exit(0)


def loading_s(base: str) -> float:
    """Time of the processor that a child takes for what is before the first chunk."""
    pid = os.fork()
    if not pid:
        load_renderer(base, None, None)
        os._exit(0)
    used = os.wait4(pid, 0)[2]
    return used.ru_utime + used.ru_stime


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def descendants(pid: int) -> list[int]:
    found, queue = [], [pid]
    while queue:
        children = Path(f"/proc/{queue[0]}/task/{queue.pop(0)}/children")
        below = [int(child) for child in children.read_text().split()] if children.exists() else []
        found += below
        queue += below
    return found


def main(what: str, folder: Path, base: str) -> object:
    tokenising.CHUNK_ROWS, token_store.SECONDS_BETWEEN_SYNCS, prepare.MIN_BYTES_FOR_WORKERS = 8, 0.0, 1
    load_renderer(base, None, None)  # imports what a child needs
    if what == "together":
        return [end(pid) for pid in [begin(folder, base, 0), begin(folder, base, 0)]]
    if what == "orphan":
        pid = begin(folder, base, 2)
        while len(below := descendants(pid)) < ALIVE and not (folder / "cache" / "sets").exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        end(pid)
        return below
    draw, codes, unit_s = random.Random(5), [], loading_s(base)
    for _ in range(10):
        codes.append(end(begin(folder, base, 0, killed_after_s=draw.uniform(0.3, 4) * unit_s)))
    chunks = [path.read_bytes().count(b"\n") for path in (folder / "cache").rglob("chunks.jsonl")]
    return [*codes, end(begin(folder, base, 0)), *chunks]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
