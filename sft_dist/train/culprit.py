"""What a step was whose loss went wrong: which rank, micro-batch and rows it was; kept in ``diverged/step-N/``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.checkpoint.naming import name_of
from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import Step, passes_of
from sft_dist.data.prepared import PreparedData, origins
from sft_dist.train.spikes import Trouble

DIVERGED, BATCH, ABOUT = "diverged", "batch.jsonl", "about.json"

# Named in a message (``batch.jsonl`` has all rows), and in ``about.json``.
MAX_NAMED_ROWS = 2
MAX_NAMED_PARAMETERS = 10

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Seen:
    """What one rank knows of a step.

    Args:
        loss_sums: of its micro-batches.
        parameters: names of those whose gradient is not finite in this rank's part.
        host: that it is on.
    """

    loss_sums: list[float]
    parameters: list[str]
    host: str


@dataclass(frozen=True)
class MicroBatchLoss:
    """
    Args:
        number: 0-based, of the rank's.
        sequences: that it trained; none: an empty one.
        loss_sum: of this rank's tokens.
        loss: ``loss_sum`` by the supervised tokens of the sequences.
    """

    rank: int
    number: int
    sequences: tuple[int, ...]
    loss_sum: float
    loss: float

    @property
    def badness(self) -> float:
        return abs(self.loss) if math.isfinite(self.loss) else math.inf


@dataclass(frozen=True)
class Culprit:
    """
    Args:
        micro_batches: of all ranks.
        parameters: names of those whose gradient is not finite, in the model's order as each rank has it.
        hosts: by rank.
    """

    trouble: Trouble
    step: Step
    lr: float
    micro_batches: tuple[MicroBatchLoss, ...]
    parameters: tuple[str, ...]
    hosts: tuple[str, ...]

    @property
    def ranks(self) -> list[int]:
        """That saw a loss that is not finite; of a spike, the one with the largest loss."""
        if self.trouble.kind == "spike":
            return [self.worst.rank]
        return sorted({each.rank for each in self.micro_batches if not math.isfinite(each.loss_sum)})

    @property
    def worst(self) -> MicroBatchLoss:
        """The first with the largest loss."""
        return max(self.micro_batches, key=lambda each: each.badness)


def culprit_of(
    trouble: Trouble, data: PreparedData, plan: BatchPlan, step: Step, lr: float, seen: Sequence[Seen]
) -> Culprit:
    """
    Args:
        seen: by rank.
    """
    found = []
    for rank, told in enumerate(seen):
        for number, (chosen, loss_sum) in enumerate(
            zip(passes_of(plan, step.sequences, rank), told.loss_sums, strict=True)
        ):
            supervised = max(1, int(data.num_supervised[chosen].sum()))
            found.append(MicroBatchLoss(rank, number, tuple(chosen.tolist()), loss_sum, loss_sum / supervised))
    names = dict.fromkeys(name for told in seen for name in told.parameters)
    return Culprit(trouble, step, lr, tuple(found), tuple(names), tuple(told.host for told in seen))


def described(culprit: Culprit, data: PreparedData) -> str:
    """Which ranks and rows it was, for people."""
    ranks = culprit.ranks
    if not ranks:
        first = f", {culprit.parameters[0]} first" if culprit.parameters else ""
        return f"every loss is finite, the gradient is not{first}"
    who = ", ".join(f"rank {rank} on {culprit.hosts[rank]}" for rank in ranks)
    rows = [row for sequence in culprit.worst.sequences for row in data.packs[sequence]]
    places = list(dict.fromkeys(origins(data, rows).values()))
    more = f" and {len(places) - MAX_NAMED_ROWS} more" if len(places) > MAX_NAMED_ROWS else ""
    return f"seen by {who}, first in " + ", ".join(places[:MAX_NAMED_ROWS]) + more


def keep(culprit: Culprit, data: PreparedData, decode: Decode, folder: Path) -> Path:
    """Writes ``folder/step-N/``, over what an earlier start has left of the same step.

    Raises:
        OSError: it cannot be written.
    """
    place = folder / name_of(culprit.trouble.step)
    place.mkdir(parents=True, exist_ok=True)
    with (place / BATCH).open("w", encoding="utf-8") as file:
        for each in culprit.micro_batches:
            for sequence in each.sequences:
                line = {
                    "sequence": sequence,
                    "rank": each.rank,
                    "micro_batch": each.number,
                    "rows": _rows(data, data.packs[sequence].tolist(), decode),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    (place / ABOUT).write_text(json.dumps(_about(culprit, data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return place


def _rows(data: PreparedData, rows: Sequence[int], decode: Decode) -> list[dict[str, Any]]:
    places = origins(data, rows)
    found = []
    for row in rows:
        ids, mask = data.row(row)
        edges = np.flatnonzero(np.diff(mask, prepend=np.uint8(0), append=np.uint8(0)).astype(bool)).tolist()
        spans = [(edges[n], edges[n + 1]) for n in range(0, len(edges), 2)]
        found.append(
            {
                "row": int(row),
                "origin": places[row],
                "input_ids": ids.tolist(),
                "supervised": spans,
                "text": decode(ids.tolist()),
                "supervised_text": [decode(ids[start:stop].tolist()) for start, stop in spans],
            }
        )
    return found


def _about(culprit: Culprit, data: PreparedData) -> dict[str, Any]:
    trouble, worst = culprit.trouble, culprit.worst
    rows = [row for sequence in worst.sequences for row in data.packs[sequence]]
    return {
        "step": trouble.step,
        "epoch": culprit.step.epoch,
        "because": trouble.kind,
        "remedy": trouble.remedy,
        "loss": _number(trouble.loss),
        "grad_norm": None if trouble.grad_norm is None else _number(trouble.grad_norm),
        "median_loss": trouble.median,
        "lr": culprit.lr,
        "ranks": culprit.ranks,
        "hosts": [culprit.hosts[rank] for rank in culprit.ranks],
        "largest_loss": _told(worst) | {"rows": list(origins(data, rows).values())},
        "non_finite_gradients": list(culprit.parameters[:MAX_NAMED_PARAMETERS]),
        "micro_batches": [_told(each) for each in culprit.micro_batches],
    }


def _told(each: MicroBatchLoss) -> dict[str, Any]:
    return {
        "rank": each.rank,
        "micro_batch": each.number,
        "sequences": list(each.sequences),
        "loss_sum": _number(each.loss_sum),
        "loss": _number(each.loss),
    }


def _number(value: float) -> float | str:
    """JSON has no NaN: its name."""
    return value if math.isfinite(value) else str(value)
