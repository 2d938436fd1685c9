"""``samples.jsonl`` of a run directory: what the model answered to the same prompts as it learned."""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_dist.evaluation.examiner import Reply
from sft_dist.metrics.line_file import LineFile
from sft_dist.metrics.logger import keep_lines

# A line for each reply to a fixed prompt, {"step", "sample", "prompt", "answer", "reference", "source",
# "finish_reason"}.
SAMPLES = "samples.jsonl"

COLUMNS = ("step", "prompt", "answer", "reference")


class SamplesFile:
    """Rank 0's. A file that cannot be written ends no run: what it lacks waits in memory and comes when it can.

    So it has no reply twice: where what belongs to steps that are trained again cannot be removed, their new replies
    are not written behind it, but wait until it can.

    Args:
        folder: the run directory.
        completed: steps behind a resumed run; what an earlier process wrote about later ones is removed.

    Attributes:
        problem: why it is not as it should be; None where it is.
    """

    def __init__(self, folder: Path, *, completed: int) -> None:
        self.path = folder / SAMPLES
        self.problem: str | None = None
        self._waiting: deque[str] = deque()
        self._changing = threading.Lock()  # trackers read rows in threads of their own
        # While the file has more: the last step that is to stay. A run that begins anew keeps not even the start.
        self._keeps: int | None = completed or -1
        self._shorten()

    def add(self, step: int, replies: tuple[Reply, ...]) -> None:
        """Appends those of an evaluation, after all that wait."""
        with self._changing:
            self._waiting.extend(
                json.dumps({"step": step, "sample": number, **asdict(reply)}, ensure_ascii=False)
                for number, reply in enumerate(replies)
            )
            self._shorten()
            if self._keeps is None:
                self._append()

    def go_back(self, completed: int) -> None:
        """Removes what belongs to steps behind the first ``completed``: they are trained again."""
        with self._changing:
            self._waiting = deque(line for line in self._waiting if json.loads(line)["step"] <= completed)
            self._keeps = completed if self._keeps is None else min(self._keeps, completed)
            self._shorten()

    def rows(self, step: int) -> list[list[Any]]:
        """Of ``COLUMNS``, of all starts of the run, up to a step. Any thread may call it.

        Raises:
            OSError: the file cannot be read.
        """
        with self._changing:
            last = step if self._keeps is None else min(step, self._keeps)
            lines = [line for line in self._written() if line["step"] <= last]
            lines += [line for line in map(json.loads, self._waiting) if line["step"] <= step]
        return [[line[name] for name in COLUMNS] for line in lines]

    def _written(self) -> list[dict[str, Any]]:
        """Whole lines of the file."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:  # left by a process that was killed, in a file that cannot be shortened
                continue
        return found

    def _shorten(self) -> None:
        if self._keeps is None:
            return
        try:
            keep_lines(self.path, completed=max(self._keeps, 0), began=self._keeps >= 0)
        except OSError as error:
            self.problem = error.strerror or str(error)
        else:
            self._keeps = self.problem = None

    def _append(self) -> None:
        try:
            file = LineFile(self.path)
        except OSError as error:
            self.problem = error.strerror or str(error)
            return
        file.waiting.extend(self._waiting)
        file.close()
        self._waiting, self.problem = file.waiting, file.problem
