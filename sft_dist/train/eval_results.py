"""What ``sft-dist eval`` found of each state: compared, written and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sft_dist.config.schema import Config
from sft_dist.scores.answered import Answered
from sft_dist.scores.compare import NUM_RESAMPLES, Compared, compare_judged, notes_on_intervals
from sft_dist.scores.judge import judge
from sft_dist.train.eval_subject import Subject
from sft_dist.train.evaluations import Evaluated

if TYPE_CHECKING:
    # lm-eval need not be installed.
    from sft_dist.evaluation.harness_tasks import TaskScores

BASE, TUNED = "base", "tuned"

# In the folder of the results.
RESULT = "eval.json"


@dataclass(frozen=True)
class Results:
    """By the name of the state, in the order in which they were asked. Args: of_tasks: of lm-eval."""

    found: dict[str, Evaluated] = field(default_factory=dict)
    of_tasks: dict[str, TaskScores] = field(default_factory=dict)


def compared(found: Mapping[str, Evaluated], config: Config) -> tuple[dict[str, Compared], list[str]]:
    """Scores of the base and of what became of it, with their intervals; and what a reader of these must know.

    Args:
        found: by the name of the state.
    """
    scores = config.eval.scores
    if scores is None or len(found) < 2 or any(each.findings is None for each in found.values()):
        return {}, []
    base, tuned = (judge(_answered(found[name]), scores) for name in (BASE, TUNED))
    return compare_judged(base, tuned, seed=config.train.seed), notes_on_intervals(base)


def _answered(evaluated: Evaluated) -> list[Answered]:
    assert evaluated.findings is not None
    return [Answered(r.prompt, r.answer, r.reference or "", r.source) for r in evaluated.findings.judged]


def write(
    folder: Path, subject: Subject, results: Results, compared: Mapping[str, Compared], record: Mapping[str, Any]
) -> None:
    """Writes ``eval.json`` and the answers of each state.

    Args:
        record: of how it was asked, see ``eval_record``.
    """
    found = results.found
    signature = {
        name: value
        for each in found.values()
        if each.findings is not None and each.findings.scores is not None
        for name, value in each.findings.scores.signature.items()
    }
    document = {
        "model": subject.config.model.path,
        "checkpoint": None if subject.checkpoint is None else str(subject.checkpoint),
        "adapter": None if subject.adapter is None else str(subject.adapter),
        "metrics": {name: each.metrics for name, each in found.items()},
        "compared": {name: asdict(each) for name, each in compared.items()},
        "signature": signature,
        **record,
    }
    if results.of_tasks:
        document["lm_eval"] = {
            "standard_errors": {name: scores.standard_errors for name, scores in results.of_tasks.items()},
            **next(iter(results.of_tasks.values())).about,
        }
    (folder / RESULT).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, each in found.items():
        findings = each.findings
        replies = () if findings is None else (*findings.samples, *findings.judged)
        if replies:
            lines = (json.dumps(asdict(reply), ensure_ascii=False) + "\n" for reply in replies)
            (folder / f"answers-{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def show(console: Console, results: Results, compared: Mapping[str, Compared]) -> None:
    found = results.found
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for name in found:
        table.add_column(name, justify="right", no_wrap=True)
    if compared:
        table.add_column("difference, 95 % interval", justify="right", no_wrap=True)
        table.add_column("better in", justify="right", no_wrap=True)
    keys = dict.fromkeys(key for each in found.values() for key in each.metrics)
    for key in keys:
        cells = [_cell(name, key, results) for name in found]
        one = compared.get(key.removeprefix("eval_scores/"))
        if one is not None:
            low, high = one.difference_interval
            cells += [f"{one.difference:+,.4f}  ({low:+,.4f} to {high:+,.4f})", f"{one.tuned_better:.0%}"]
        table.add_row(key.removeprefix("eval_").removeprefix("scores/"), *cells)
    console.print(table)
    if compared:
        console.print(
            f"better in: share of {NUM_RESAMPLES:,} resamples in which the run has the higher score", style="dim"
        )
    for name, each in found.items():
        for note in () if each.findings is None else each.findings.notes:
            console.print(f"{name}: {note}", markup=False, soft_wrap=True)
    for name, scores in results.of_tasks.items():
        for note in scores.notes:
            console.print(f"{name}: lm-eval: {note}", markup=False, soft_wrap=True)


def _cell(name: str, key: str, results: Results) -> str:
    """A metric of a state, with lm-eval's standard error where it has one."""
    metrics = results.found[name].metrics
    if key not in metrics:
        return ""
    error = results.of_tasks[name].standard_errors.get(key) if name in results.of_tasks else None
    return _shown(metrics[key]) + ("" if error is None else f" ± {_shown(error)}")


def _shown(value: float) -> str:
    if abs(value) >= 1e9:
        return f"{value:.4e}"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
