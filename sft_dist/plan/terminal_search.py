"""What a search found, in a terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.plan import words
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.result import ParetoPoint, Search
from sft_dist.plan.terminal import MAX_COLUMNS, MIN_COLUMNS, STYLES, argument_lines
from sft_dist.plan.units import HOUR_S, duration, gib

# Of the front and of the reasons; ``verbose`` shows all.
MAX_FRONT = 12
MAX_REASONS = 6


def render_search(search: Search, console: Console, *, verbose: bool = False) -> None:
    """Prints the front of money and time, the answers with their overrides, and why the rest is out."""
    columns = max(MIN_COLUMNS, min(console.width, MAX_COLUMNS))
    console.print(
        Text(
            f"\nSearch: {search.looked_at:,} configurations in {search.seconds:.1f} s, {search.fitting:,} fit, "
            f"{len(search.front)} on the front of money and time",
            "bold",
        ),
        width=columns,
    )
    shown = search.front if verbose else _spread(search.front, MAX_FRONT)
    if shown:
        console.print(_table(shown, columns), width=columns, highlight=False)
    if len(shown) < len(search.front):
        console.print(Text(f"and {len(search.front) - len(shown)} between them with --verbose", "dim"))
    for pick in search.picks:
        point = pick.point
        numbers = f"{duration(point.hours * HOUR_S)}, {format_usd(point.usd)}, {format_jpy(point.jpy)}"
        console.print(Text(f"\n{pick.question[0].upper()}{pick.question[1:]}: {point.label}: {numbers}", "bold green"))
        for line in argument_lines(words.overrides(point.overrides), columns):
            # A line that is too long is left to the terminal to break, or it could not be pasted.
            console.print(Text(f"{line}"), soft_wrap=True, highlight=False)
        if not point.overrides:
            console.print(Text("the configuration as it is", "dim"))
    reasons = search.refused if verbose else search.refused[:MAX_REASONS]
    if reasons:
        console.print(Text("\nNot among them:", "bold"))
        for refused in reasons:
            console.print(Text(f"{refused.number:>8,}  {refused.reason}", overflow="fold"), width=columns)
    if len(reasons) < len(search.refused):
        rest = sum(refused.number for refused in search.refused[len(reasons) :])
        console.print(Text(f"{rest:>8,}  for other reasons, with --verbose", "dim"))


def _spread(points: Sequence[ParetoPoint], most: int) -> Sequence[ParetoPoint]:
    """Both ends, and as many between them, evenly."""
    if len(points) <= most:
        return points
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]


def _table(points: Sequence[ParetoPoint], columns: int) -> Table:
    """Labels are cut where they have to be, figures never."""
    rows = [("time", "USD", "JPY", "of a GPU", "")]
    rows += [
        (
            duration(point.hours * HOUR_S),
            format_usd(point.usd),
            format_jpy(point.jpy),
            f"{gib(point.peak_bytes).removesuffix(' GiB')} of {gib(point.usable_bytes)}",
            point.verdict,
        )
        for point in points
    ]
    taken = sum(1 + max(len(cell) for cell in column) for column in zip(*rows, strict=True))
    table = Table.grid(padding=(0, 1, 0, 0))
    for justify in ("left", "right", "right", "right", "right", "left"):
        table.add_column(no_wrap=True, justify=justify)
    table.add_row("", *(Text(name, "dim") for name in rows[0]))
    for point, (*figures, verdict) in zip(points, rows[1:], strict=True):
        label = Text(point.label)
        label.truncate(columns - taken, overflow="ellipsis")
        table.add_row(label, *figures, Text(verdict, STYLES[point.verdict]))
    return table
