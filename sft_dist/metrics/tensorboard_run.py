"""TensorBoard's files of a run, in ``tensorboard/`` of its directory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sft_dist.config.measured import SCORES
from sft_dist.errors import ConfigError
from sft_dist.metrics.tracker import Lines, Table

FOLDER = "tensorboard"


class TensorboardRun:
    """Takes metrics as scalars: those of training below ``train/``, those of evaluations below ``eval/``,
    but for scores, which keep their names (``eval_scores/NAME``).

    Each start writes a file of its own, which takes back what an earlier one wrote of steps that are trained again.

    Args:
        folder: the run directory.
        completed: steps behind a resumed run.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    name = "TensorBoard"
    patience_s = 20.0

    def __init__(self, folder: Path, *, completed: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logging.tensorboard: TensorBoard cannot be imported ({error})",
                fix="pip install 'sft-dist[tensorboard]', or set logging.tensorboard to false",
            ) from error
        # Earlier starts have written their own files, unless the folder was deleted meanwhile. Looked at before the
        # file of this start is there, which is not empty either: it takes back.
        self._has_earlier = any(file.stat().st_size > _EMPTY_BYTES for file in (folder / FOLDER).glob("events.*"))
        # A run of no steps begins anew, its evaluation before the first one, too.
        purge_step = completed + 1 if completed else 0
        self._new_writer = partial(SummaryWriter, str(folder / FOLDER))
        self._writer = self._new_writer(purge_step=purge_step)  # type: ignore[no-untyped-call]

    def log(self, metrics: Mapping[str, Any], *, lines: Lines) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all: `add_scalar` would write one for each, at ten times the work.
        values = [
            Summary.Value(tag=_tag(name), simple_value=value)
            for name, value in metrics.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._writer._get_file_writer().add_summary(  # type: ignore[no-untyped-call]
            Summary(value=values), int(metrics["step"])
        )

    def replay(self, lines: list[str]) -> None:
        if self._has_earlier:
            return
        for line in lines:
            metrics = json.loads(line)
            names = metrics.pop("non_finite", [])
            self.log(metrics | dict.fromkeys(names, math.nan), lines=lambda: lines)

    def go_back(self, completed: int, lines: list[str]) -> None:
        """A new file takes back what was written of later steps."""
        self._writer.close()  # type: ignore[no-untyped-call]
        self._writer = self._new_writer(purge_step=completed + 1)  # type: ignore[no-untyped-call]
        self._has_earlier = True

    def table(self, table: Table, *, lines: Lines) -> None:
        """As Markdown, which is what TensorBoard shows texts as."""
        if table.is_known and self._has_earlier:
            return
        rows = [table.columns, ["---"] * len(table.columns), *table.rows()]
        text = "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)
        self._writer.add_text(table.name, text, table.step)  # type: ignore[no-untyped-call]

    def conclude(self, results: Mapping[str, Any], artefact: Path, *, lines: Lines) -> None:
        about = {**results, "artefact": str(artefact)}
        text = "\n".join(f"- {name}: {value}" for name, value in about.items())
        self._writer.add_text("results", text)  # type: ignore[no-untyped-call]

    def finish(self, *, code: int, is_preempted: bool, lines: Lines) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]

    def give_up(self) -> None:
        """Its thread ends with this process."""


# A file that has nothing but its own version in it, and what it takes back.
_EMPTY_BYTES = 180


def _tag(name: str) -> str:
    if name.startswith(SCORES):
        return name
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
