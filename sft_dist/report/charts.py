"""Which charts a run has, and what each says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from sft_dist.report.axes import short
from sft_dist.report.chart import Chart, Dots, Line, Mark
from sft_dist.report.metrics import Metrics, Value, plain
from sft_dist.report.model import ReportData
from sft_dist.report.series import curve, evenly

# Beside the loss: column, title, hue, whether it is noisy.
COLUMNS = (
    ("lr", "Learning rate", 3, False),
    ("grad_norm", "Gradient norm", 5, True),
    ("tokens_per_s", "Tokens a second", 2, True),
    ("peak_memory_gib", "Peak memory of rank 0, GiB", 4, False),
)

# Of scores, and of moments on the axis of one chart: more would be a smear.
MAX_SCORES, MAX_MARKS = 12, 300

# Of scores, those that are shares (docs/evaluation.md).
SHARES = {"exact_match", "accuracy", "macro_f1", "json_valid", "json_schema", "rouge1", "rouge2", "rougeL"}

# Keys of an evaluation that are drawn with the loss, or say the same.
WITH_THE_LOSS = ("eval_loss", "eval_perplexity")


def charts_of(data: ReportData) -> list[Chart]:
    """The loss first; what the run has not measured has no chart."""
    metrics, ends = data.metrics, ends_of(data.metrics)
    if ends is None:
        return []
    marks, x = _marks(data), {"steps": metrics.steps}
    charts = [_loss(metrics, ends, marks)]
    for column, title, hue, is_noisy in COLUMNS:
        values = metrics.column(column)
        if any(value is not None for value in values):
            line = Line(title, curve(x, values, smooths=is_noisy), hue=hue)
            charts.append(
                Chart(column, title, told_of(metrics.steps, values), ends, [line], marks=marks, is_small=True)
            )
    return charts


def score_charts(metrics: Metrics) -> list[Chart]:
    """A small one for each score that was taken more than once."""
    ends, charts = ends_of(metrics), list[Chart]()
    for key in metrics.score_keys():
        taken = metrics.scores(key)
        if ends is None or key in WITH_THE_LOSS or len(taken) < 2:
            continue
        steps, values = [step for step, _ in taken], [value for _, value in taken]
        dots = Dots(key, {"steps": tuple(map(float, steps))}, tuple(values))
        told, is_share = told_of(steps, values), is_share_score(key)
        charts.append(
            Chart(f"score-{len(charts)}", score_title(key), told, ends, dots=[dots], is_small=True, is_share=is_share)
        )
    return charts[:MAX_SCORES]


def score_name(key: str) -> str:
    """``eval_scores/bleu`` is ``bleu``, ``eval_loss/manuals`` is ``loss: manuals``."""
    head, _, rest = key.removeprefix("eval_").partition("/")
    if not rest:
        return head.replace("_", " ")
    return rest if head in ("scores", "score") else f"{head.replace('_', ' ')}: {rest}"


def score_title(key: str) -> str:
    """For people: ``eval_scores/exact_match/manuals`` is ``exact match: manuals``."""
    return titled(score_name(key))


def titled(name: str) -> str:
    """A name of ``score_name``, in words; the name of a source stays as it is."""
    if ": " in name:
        return name
    head, slash, source = name.partition("/")
    return head.replace("_", " ") + (f": {source}" if slash else "")


def is_share_score(key: str) -> bool:
    return key.startswith("eval_scores/") and key.split("/")[1] in SHARES


def ends_of(metrics: Metrics) -> dict[str, tuple[float, float]] | None:
    """Of the horizontal axis: completed steps, from before the first to the last; None: nothing was measured."""
    steps = [*metrics.steps, *(each.step for each in metrics.evaluations)]
    if not steps:
        return None
    # A run that went on from another one's checkpoint begins there.
    first = min([step - 1 for step in metrics.steps[:1]] + [each.step for each in metrics.evaluations])
    return {"steps": (float(first), float(max(*steps, first + 1)))}


def _loss(metrics: Metrics, ends: dict[str, tuple[float, float]], marks: Sequence[Mark]) -> Chart:
    values, taken = metrics.column("loss"), metrics.scores("eval_loss")
    told = told_of(metrics.steps, values)
    lines = [Line("loss", curve({"steps": metrics.steps}, values))] if values else []
    dots = []
    if taken:
        dots = [Dots("evaluation", {"steps": tuple(float(s) for s, _ in taken)}, tuple(v for _, v in taken))]
        told += f"{' ' if told else ''}Evaluation: {told_of([s for s, _ in taken], [v for _, v in taken], lower=True)}"
    return Chart("loss", "Loss", told, ends, lines, dots, marks)


def told_of(steps: Sequence[int], values: Sequence[Value], *, lower: bool = False) -> str:
    """First, least and last value, in a sentence."""
    known = [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]
    finite = [(step, v) for step, v in known if math.isfinite(v)]
    if not known:
        return ""
    broken = len(known) - len(finite)
    said = []
    if finite:
        said.append(f"{'first' if lower else 'First'} {figure(finite[0][1])}")
        if len(finite) > 1:
            least, most = min(finite, key=lambda each: each[1]), max(finite, key=lambda each: each[1])
            said.append(f"least {figure(least[1])} at step {least[0]:,}")
            said.append(f"most {figure(most[1])} at step {most[0]:,}")
            said.append(f"last {figure(finite[-1][1])}")
    if broken:
        said.append(f"{broken:,} not finite")
    return ", ".join(said) + "."


def figure(value: float) -> str:
    """Four digits that count."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000 or (value and abs(value) < 0.001):
        return short(value)
    return f"{value:.4g}"


def _marks(data: ReportData) -> list[Mark]:
    restarts = [
        Mark("restart", {"steps": float(step)}, f"start {number}") for number, step in enumerate(data.restarts, 2)
    ]
    events = [
        Mark("event", {"steps": float(each.step)}, f"{plain(each.name)}{': ' if each.told else ''}{each.told}")
        for each in data.metrics.events
    ]
    saved = [Mark("checkpoint", {"steps": float(step)}, "checkpoint") for step in data.checkpoints]
    return [kind[i] for kind in (saved, restarts, events) for i in evenly(len(kind), MAX_MARKS)]


def cumulative(metrics: Metrics) -> dict[str, tuple[float, ...]]:
    """For each step what a run had done with it: steps, tokens and hours; a kind that a line lacks is left out."""
    x: dict[str, tuple[float, ...]] = {"steps": tuple(map(float, metrics.steps))}
    tokens, elapsed_s = metrics.column("num_tokens"), metrics.column("elapsed_s")
    if tokens and all(value is not None for value in tokens):
        x["tokens"] = tuple(accumulate(value or 0.0 for value in tokens))
    if elapsed_s and all(value is not None for value in elapsed_s):
        # A step that was trained again was paid twice: time never goes back.
        x["hours"] = tuple(accumulate(((value or 0.0) / 3600 for value in elapsed_s), max))
    return x
