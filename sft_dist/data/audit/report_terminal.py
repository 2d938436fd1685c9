"""An audit in a terminal: 100 columns, and nothing that only a colour says."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sft_dist.data.audit.catalogue import percent
from sft_dist.data.audit.findings import Audit, Finding, RenderDiff, SetFigures
from sft_dist.data.audit.language import LANGUAGES

STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}

MAX_SHOWN_EXAMPLES = 3
MAX_SHOWN_PREFIXES = 5
MAX_SHOWN_CLUSTERS = 3
MAX_SHOWN_DIFFS = 3

INDENT = 4


def show(audit: Audit, console: Console) -> None:
    """Figures, findings, prompts, and the verdict last, where it stays in sight."""
    for figures in audit.figures:
        _show_set(figures, audit, console)
    if audit.render_diffs:
        _show_prompts(audit, console)
    for finding in audit.findings:
        _show_finding(finding, console)
    console.print()
    console.print(Text(verdict(audit), style="bold"))
    console.print(Text(speed(audit)))


def verdict(audit: Audit) -> str:
    """``2 errors, 1 warning, 3 notes``."""
    words = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "info": ("note", "notes")}
    counts = {severity: audit.count(severity) for severity in ("error", "warning", "info")}
    said = [f"{count} {words[name][count != 1]}" for name, count in counts.items() if count]
    return ", ".join(said) if said else "nothing was found"


def speed(audit: Audit) -> str:
    """How many rows went by in what time, and what was left out."""
    rate = f"{audit.rows:,} rows in {audit.seconds:,.1f} s, {audit.rows / max(audit.seconds, 1e-9):,.0f} rows/s"
    return f"{rate}; near-duplicates were not looked for" if audit.is_cheap else rate


def printable(text: str) -> str:
    """``text`` without what moves a terminal's cursor or changes its colours."""
    return "".join(character if character.isprintable() or character == "\n" else "·" for character in text)


def _show_set(figures: SetFigures, audit: Audit, console: Console) -> None:
    table = Table(title=f"{figures.set}: {figures.rows:,} rows, {figures.tokens:,} tokens", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("rows", "tokens", "trained", "mean", "longest"):
        table.add_column(name, justify="right")
    for source in figures.sources:
        table.add_row(
            Text(printable(source.source)),
            f"{source.rows:,}",
            f"{source.tokens:,}",
            percent(source.supervised_tokens / source.tokens) if source.tokens else "-",
            f"{source.tokens / max(1, source.rows):,.0f}",
            f"{source.longest:,}" + (" !" if source.longest > audit.max_seq_len else ""),
        )
    console.print()
    console.print(table)
    for line in figure_lines(figures, audit):
        console.print(Padding(Text(printable(line)), (0, 0, 0, 2), expand=False))


def figure_lines(figures: SetFigures, audit: Audit) -> list[str]:
    """What is known of a set besides its sources, a line each."""
    lines = []
    if any(source.longest > audit.max_seq_len for source in figures.sources):
        lines.append(f"!  longer than max_seq_len, {audit.max_seq_len:,} tokens")
    if figures.packs is not None:
        packs = figures.packs
        lines.append(
            f"packs: {packs.sequences:,} of {packs.capacity:,} tokens, {percent(packs.fill)} full; "
            f"padding each row would waste {percent(packs.padding_if_unpacked)}"
        )
    lines.append(
        f"prompts: {figures.distinct_prompts:,} distinct; answers: distinct-1/2/3 "
        + "/".join(f"{value:.2f}" for value in figures.distinct_n.values())
    )
    for name, counts in (("asked", figures.question_languages), ("answered", figures.answer_languages)):
        if counts:
            total = sum(counts.values())
            said = ", ".join(f"{LANGUAGES[key]} {percent(count / total)}" for key, count in counts.items())
            lines.append(f"{name} in: {said}")
    for name, prefixes in (("prompts", figures.prompt_prefixes), ("answers", figures.answer_prefixes)):
        if prefixes:
            said = ", ".join(f"“{p.text}” {percent(p.share)}" for p in prefixes[:MAX_SHOWN_PREFIXES])
            lines.append(f"{name} begin with: {said}")
    if figures.num_clusters:
        lines.append(f"groups of near-duplicates: {figures.num_clusters:,}; the largest:")
        lines += [
            f"  {cluster.size:,} rows like {cluster.examples[0].origin}: {cluster.examples[0].text}"
            for cluster in figures.clusters[:MAX_SHOWN_CLUSTERS]
        ]
    return lines


def _show_finding(finding: Finding, console: Console) -> None:
    console.print()
    head = Text(finding.severity.upper(), style=STYLES[finding.severity])
    head.append(f"  {finding.check}", style="bold")
    head.append(f"  {printable(finding.place)}", style="default")
    console.print(head)
    limit = f" (limit {percent(finding.limit)})" if finding.limit is not None else ""
    _indented(f"{finding.what}{limit}", console)
    _indented(f"fix: {finding.fix}", console)
    for example in finding.examples[:MAX_SHOWN_EXAMPLES]:
        _indented(f"{example.origin}  {example.text}", console, style="dim", by=INDENT + 2)


def _show_prompts(audit: Audit, console: Console) -> None:
    different = [diff for diff in audit.render_diffs if diff.differs_at is not None]
    console.print()
    same = len(audit.render_diffs) - len(different)
    console.print(Text(f"prompts, trained and at inference: {same} the same, {len(different)} different", style="bold"))
    for diff in (different or list(audit.render_diffs[:1]))[:MAX_SHOWN_DIFFS]:
        _indented(f"{diff.origin}, answer {diff.answer}", console)
        if diff.differs_at is None:
            _indented(visible(diff.trained_text), console, by=INDENT + 2)
            continue
        head, trained, asked = split(diff)
        _indented(f"after {diff.differs_at:,} tokens: {visible(head[-60:])}", console, by=INDENT + 2)
        _indented(f"trained:   {visible(trained) or '(ends here, the answer follows)'}", console, by=INDENT + 2)
        _indented(f"inference: {visible(asked) or '(ends here, the answer follows)'}", console, by=INDENT + 2)


def split(diff: RenderDiff) -> tuple[str, str, str]:
    """What both prompts begin with, and the rest of the trained one and of that at inference."""
    trained, asked = diff.trained_text, diff.inference_text
    place = next((i for i, (a, b) in enumerate(zip(trained, asked, strict=False)) if a != b), None)
    place = min(len(trained), len(asked)) if place is None else place
    return trained[:place], trained[place:], asked[place:]


def visible(text: str) -> str:
    """On one line, line breaks as ⏎."""
    return text.replace("\n", "⏎")


def _indented(text: str, console: Console, *, style: str = "", by: int = INDENT) -> None:
    # fold: Japanese has no spaces at which Rich would break a line.
    console.print(Padding(Text(printable(text), style=style, overflow="fold"), (0, 0, 0, by), expand=False))
