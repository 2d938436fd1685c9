"""The numbers of a finished run: read from its ``metrics.jsonl``, drawn as one picture."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from sft_dist.errors import DataError

# The first steps also pay for warming up allocators and caches.
NUM_WARM_UP_STEPS = 3
NUM_LAST_STEPS = 20


@dataclass(frozen=True)
class Curve:
    """Training loss by step, held-out perplexity by step, and the median speed over all ranks."""

    steps: list[int]
    losses: list[float]
    eval_steps: list[int]
    perplexities: list[float]
    tokens_per_s: float

    @property
    def last_loss(self) -> float:
        """Mean over the last steps: one step has a few rows only, and their loss differs by task."""
        return statistics.fmean(self.losses[-NUM_LAST_STEPS:])


def read_curve(metrics_file: Path) -> Curve:
    """The curve of a run.

    Raises:
        DataError: the file holds no training step or no evaluation.
    """
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_perplexity" in line]
    if not train or not evaluations:
        raise DataError(f"{metrics_file} holds no training step or no evaluation", fix="run the demo again")
    return Curve(
        steps=[line["step"] for line in train],
        losses=[line["loss"] for line in train],
        eval_steps=[line["step"] for line in evaluations],
        perplexities=[line["eval_perplexity"] for line in evaluations],
        tokens_per_s=statistics.median(line["tokens_per_s"] for line in train[NUM_WARM_UP_STEPS:] or train),
    )


def draw(curve: Curve, picture: Path) -> None:
    """Training loss (left axis) and held-out perplexity (right axis, logarithmic) by optimizer step, as a PNG."""
    # The object interface needs no display and leaves the caller's Matplotlib backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    right = left.twinx()
    left.plot(curve.steps, curve.losses, color="tab:blue", linewidth=1.2, label="training loss")
    right.plot(curve.eval_steps, curve.perplexities, "o-", color="tab:orange", label="held-out perplexity")
    for step, perplexity in zip(curve.eval_steps, curve.perplexities, strict=True):
        right.annotate(
            _plain(perplexity), (step, perplexity), xytext=(6, 7), textcoords="offset points", color="tab:orange"
        )
    right.set_yscale("log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    left.set(xlabel="optimizer step", ylabel="training loss (nats per supervised token)", ylim=(0, None))
    low, high = min(curve.perplexities), max(curve.perplexities)
    right.set_ylim(low / 1.5, high * 2)
    left.set_xlim(0, max(curve.steps[-1], curve.eval_steps[-1]) * 1.06)
    right.set_ylabel("held-out perplexity")
    left.grid(alpha=0.25)
    left.legend(handles=[*left.lines, *right.lines], loc="upper right")
    figure.savefig(picture)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
