"""A comparison of runs in a terminal: a column a run."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sft_dist.metrics.train_loss import LOSS_OF_STEPS
from sft_dist.report.compare import Comparison
from sft_dist.report.compare_words import facts


def comparison_table(comparison: Comparison) -> RenderableType:
    """What came of each run, and the settings that differ."""
    parts: list[RenderableType] = [_table(comparison, "", facts(comparison.rows))]
    if any(row.train_loss is not None for row in comparison.rows):
        parts.append(Text(f"train loss: mean of the last {LOSS_OF_STEPS} steps", "dim"))
    if comparison.differences:
        texts = [(key, ["-" if v is None else v for v in values]) for key, values in comparison.differences.items()]
        parts += [Text(), _table(comparison, "settings that differ", texts)]
    else:
        parts.append(Text("their settings do not differ"))
    return Group(*parts)


def _table(comparison: Comparison, title: str, lines: list[tuple[str, list[str]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title or None, title_justify="left")
    table.add_column("", style="bold", overflow="fold")
    for row in comparison.rows:
        table.add_column(escape(row.name), justify="right", overflow="fold")
    for what, texts in lines:
        table.add_row(escape(what), *map(escape, texts))
    return table
