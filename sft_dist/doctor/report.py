"""The verdict as a table, for a terminal and for the log of a job."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.doctor.finding import Finding, Verdict, worst_first

# Logs have no width of their own.
LOG_WIDTH = 110

STYLE = {"failed": "bold red", "warning": "yellow", "ok": "green"}


def render(verdict: Verdict, console: Console) -> None:
    """What is wrong, with what to do about it, then in few lines what is right, then the verdict."""
    wrong = [finding for finding in worst_first(verdict.findings) if finding.level != "ok"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in wrong:
        node = finding.node or ("" if len(verdict.nodes) == 1 else "all")
        told = Text(finding.what)
        table.add_row(Text(finding.level, style=STYLE[finding.level]), node, finding.check, told)
        table.add_row("", "", "", Text.assemble(("fix: ", "bold green"), finding.fix))
    for check, what in _collapsed([finding for finding in verdict.findings if finding.level == "ok"], verdict.nodes):
        table.add_row(Text("ok", style=STYLE["ok"]), "", check, what)
    console.print(table)
    console.print(_summary(verdict))


def _collapsed(fine: Iterable[Finding], nodes: tuple[str, ...]) -> list[tuple[str, str]]:
    """A line for each check: that of all nodes where they say the same, else the first one's."""
    by_check: dict[str, list[Finding]] = {}
    for finding in fine:
        by_check.setdefault(finding.check, []).append(finding)
    lines = []
    for check, found in by_check.items():
        first, others = found[0], [f for f in found[1:] if f.what != found[0].what]
        whose = f"{first.node}: " if first.node and len(nodes) > 1 and (others or len(found) == 1) else ""
        more = f"; {len(others)} more" if others else ""
        lines.append((check, f"{whose}{first.what}{more}"))
    return lines


def _summary(verdict: Verdict) -> Text:
    count = f"{len(verdict.nodes)} nodes" if len(verdict.nodes) > 1 else verdict.nodes[0]
    number = {
        level: sum(f.level == level for f in verdict.findings) for level in ("failed", "warning")
    }  # of findings, not of checks: two nodes with one fault are two
    parts = [("verdict: ", ""), (verdict.level, STYLE[verdict.level]), (f"  {count}, {verdict.seconds:.1f} s", "")]
    if number["failed"]:
        parts.append((f", {number['failed']} failed", ""))
    if number["warning"]:
        parts.append((f", {_plural(number['warning'], 'warning')}", ""))
    if verdict.failed_nodes:
        parts.append((f"; at fault: {', '.join(verdict.failed_nodes)}", ""))
    return Text.assemble(*parts)


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def console_for_output() -> Console:
    """As wide as the terminal; in a log as wide as its lines may be."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(LOG_WIDTH, console.width))
