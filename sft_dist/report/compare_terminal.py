"""A comparison of runs in a terminal: a column a run."""

from __future__ import annotations

import re

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sft_dist.metrics.train_loss import LOSS_OF_STEPS
from sft_dist.report.compare import Comparison
from sft_dist.report.compare_words import facts

# Of a key of the settings; of 80 columns the rest is for the values of two or three runs.
KEY_COLUMNS = 30


def comparison_table(comparison: Comparison) -> RenderableType:
    """What came of each run, and the settings that differ."""
    parts: list[RenderableType] = [_table(comparison, "", facts(comparison.rows))]
    if any(row.train_loss is not None for row in comparison.rows):
        parts.append(Text(f"train loss: mean of the last {LOSS_OF_STEPS} steps", "dim"))
    if comparison.differences:
        texts = [(key, ["-" if v is None else v for v in values]) for key, values in comparison.differences.items()]
        lines = [(_broken_at_dots(key), values) for key, values in texts]
        parts += [Text(), _table(comparison, "settings that differ", lines, keeps_words=True)]
    else:
        parts.append(Text("their settings do not differ"))
    return Group(*parts)


def _broken_at_dots(key: str) -> str:
    """A long key on lines that end at its dots, so that no name in it is broken."""
    lines = [""]
    for part in re.findall(r"[^.]+\.?", key):
        if lines[-1] and len(lines[-1]) + len(part) > KEY_COLUMNS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _table(
    comparison: Comparison, title: str, lines: list[tuple[str, list[str]]], *, keeps_words: bool = False
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title or None, title_justify="left")
    table.add_column("", style="bold", overflow="fold", no_wrap=keeps_words)
    for row in comparison.rows:
        table.add_column(escape(row.name), justify="right", overflow="fold")
    for what, texts in lines:
        table.add_row(escape(what), *map(escape, texts))
    return table
