"""A dry run in a terminal: at most 120 columns, at least 80, and nothing that only a colour says. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sft_dist.plan import words
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.result import Assumption, Change, MemoryPlan, Offer, Part, Phase, Plan, TimePlan, Verdict
from sft_dist.plan.terminal_bar import bar, end_label, scale_of, share_bar, swatch_style
from sft_dist.plan.units import gib, percent, ranged, step_seconds

# Narrower terminals break the lines themselves.
MIN_COLUMNS, MAX_COLUMNS = 80, 120

STYLES: dict[Verdict, str] = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}

LABEL_COLUMNS = 10
PHASE_COLUMNS = 17
BYTES_COLUMNS = 10

# The shortest that still says what matters; ``verbose`` shows all.
MAX_OFFERS = 4
MAX_ASSUMPTIONS = 3
STEP_BAR_COLUMNS = 24
MIN_NAME_COLUMNS = 32


def render_plan(plan: Plan, console: Console, *, verbose: bool = False) -> None:
    """Prints a plan: verdict, memory, data, time, money, and what they rest on; what to change last, where it is seen.

    Args:
        verbose: with the parts of every phase, all offers and all assumptions with their sources.
    """
    columns = max(MIN_COLUMNS, min(console.width, MAX_COLUMNS))
    fill_letters = console.color_system is None or console.no_color
    parts: list[RenderableType] = [
        _headline(plan),
        Text(""),
        _phases(plan.memory, columns, fill_letters=fill_letters),
        _parts_by_phase(plan.memory) if verbose else _parts_at_peak(plan.memory, columns),
        Text(""),
        _sections(plan, columns, verbose=verbose),
    ]
    for part in parts:
        console.print(part, width=columns, highlight=False)
    for line in _proposals(plan.proposals, columns):
        # An argument that is longer than the line is left to the terminal to break, or it could not be pasted.
        console.print(line, soft_wrap=True, highlight=False)


def _headline(plan: Plan) -> RenderableType:
    style = STYLES[plan.memory.verdict]
    said = [Text(words.headline(plan), style), Text(words.peak_line(plan.memory), "bold")]
    said.append(Text(words.run_line(plan), "bold"))
    said.append(Text(words.subject_line(plan), "dim", overflow="fold"))
    return Group(*said)


def _phases(memory: MemoryPlan, columns: int, *, fill_letters: bool) -> Table:
    """A bar for each phase."""
    scale = scale_of(memory, columns - PHASE_COLUMNS - 2 * BYTES_COLUMNS - 3)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=PHASE_COLUMNS, no_wrap=True)
    table.add_column(width=scale.columns, no_wrap=True)
    table.add_column(width=BYTES_COLUMNS, no_wrap=True, justify="right")
    table.add_column(width=BYTES_COLUMNS, no_wrap=True, justify="right")
    table.add_row(Text("Memory of a GPU", "bold"), "", Text("allocated", "dim"), Text("in all", "dim"))
    for phase in memory.phases:
        is_peak = phase is memory.peak
        over = phase.total_bytes > memory.usable_bytes
        style = "bold red" if over else "bold" if is_peak else ""
        table.add_row(
            Text(words.PHASES[phase.name], style),
            bar(phase, scale, fill_letters=fill_letters),
            Text(gib(phase.allocated_bytes), style),
            Text(gib(phase.total_bytes) + ("!" if over else ""), style),
        )
    table.add_row("", end_label(memory, scale), "", "")
    return table


def _parts_at_peak(memory: MemoryPlan, columns: int) -> RenderableType:
    """The parts at the peak, side by side; also the legend of the bars."""
    peak = memory.peak
    side_by_side = 3 if columns >= 110 else 2
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(side_by_side):
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    shown = _parts_of(memory)
    lines = -(-len(shown) // side_by_side)
    for line in range(lines):
        cells: list[RenderableType] = []
        for part in shown[line::lines]:
            size = peak.parts.get(part)
            cells += [_named(part), gib(size) if size else "-", percent(size / peak.total_bytes) if size else ""]
        table.add_row(*cells)
    return Group(Text(f"At the peak, {words.moment_line(memory)}"), Padding(table, (0, 0, 0, 2)))


def _parts_by_phase(memory: MemoryPlan) -> RenderableType:
    """All parts of all phases."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_row(Text("GiB", "dim"), *(Text(_short(phase), "dim") for phase in memory.phases))
    for column in table.columns[1:]:
        column.justify = "right"
    for part in _parts_of(memory):
        sizes = [phase.parts.get(part, 0) for phase in memory.phases]
        table.add_row(_named(part), *(gib(size).removesuffix(" GiB") if size else "-" for size in sizes))
    said: list[RenderableType] = [table]
    said += [Text(f"{words.PHASES[each.name]}: {each.moment}", "dim") for each in memory.phases if each.moment]
    return Group(*said)


def _short(phase: Phase) -> str:
    return {"forward_backward": "fwd, bwd", "optimizer_step": "optimizer"}.get(phase.name, words.PHASES[phase.name])


def _parts_of(memory: MemoryPlan) -> list[Part]:
    """Those that any phase has."""
    return [part for part in words.PARTS if any(phase.parts.get(part) for phase in memory.phases)]


def _named(part: Part) -> Text:
    letter, name = words.PARTS[part]
    return Text.assemble((letter, swatch_style(part)), f" {name}")


def _sections(plan: Plan, columns: int, *, verbose: bool) -> Table:
    """Everything below the memory of the GPU: a name on the left, what is to say on the right."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=LABEL_COLUMNS, no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    table.add_row("nvidia-smi", Text(words.reserved_line(plan.memory)))
    table.add_row("Host RAM", _host(plan.memory))
    table.add_row("Disk", Text(words.disk_line(plan.memory)))
    table.add_row("Data", _lines(words.data_lines(plan.data)))
    table.add_row("Time", _time(plan.time))
    table.add_row("Money", _money(plan, columns - LABEL_COLUMNS - 1, verbose=verbose))
    if plan.choices:
        table.add_row("Choices", _lines(plan.choices))
    if plan.assumptions:
        table.add_row("Assumed", _assumptions(plan.assumptions, verbose=verbose))
    if plan.warnings:
        table.add_row(Text("Warnings", "bold yellow"), _lines(f"! {warning}" for warning in plan.warnings))
    return table


def _host(memory: MemoryPlan) -> Text:
    available = memory.host_available_bytes
    over = available is not None and sum(memory.host_parts.values()) > available
    return Text(words.host_line(memory), "bold red" if over else "")


def _lines(lines: Iterable[str]) -> Text:
    return Text("\n").join(Text(line) for line in lines)


def _time(time: TimePlan) -> RenderableType:
    """The whole run, its speed, and what a step consists of."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    whole = sum(time.step_parts.values())
    for name, seconds in time.step_parts.items():
        share = seconds / whole if whole else 0.0
        table.add_row(Text(f"  {name}"), share_bar(share, STEP_BAR_COLUMNS), step_seconds(seconds), percent(share))
    return Group(
        Text(words.total_line(time)),
        Text(words.speed_line(time)),
        Text(words.step_line(time)),
        table,
        Text(words.time_basis_line(time), "dim"),
    )


def _money(plan: Plan, columns: int, *, verbose: bool) -> RenderableType:
    """Offers in both currencies; what is known of the rest where there is none."""
    cost = plan.cost
    shown = cost.offers if verbose else words.shown_offers(cost, MAX_OFFERS)
    said: list[RenderableType] = [_offers(shown, cost.chosen, columns)] if shown else []
    if not shown:
        said.append(Text(words.no_price_line(plan), "yellow"))
    if len(shown) < len(cost.offers):
        said.append(Text(f"  and {len(cost.offers) - len(shown)} more with --verbose", "dim"))
    said.append(Text(words.unit_costs_line(cost)))
    return Group(*said)


def _offers(offers: Sequence[Offer], chosen: Offer | None, columns: int) -> Table:
    """A line an offer; the chosen one has a star. Names are cut, never amounts."""
    figures, room = _amounts(offers, columns, with_range=True)
    if room < MIN_NAME_COLUMNS:
        figures, room = _amounts(offers, columns, with_range=False)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=1, no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(no_wrap=True, justify="right")
    for offer, texts in zip(offers, figures, strict=True):
        style = "bold" if offer == chosen else ""
        name = Text(offer.name, style)
        name.truncate(room, overflow="ellipsis")
        star = Text("*" if offer == chosen else "", style)
        table.add_row(star, Text(offer.kind, style), name, *(Text(text, style) for text in texts))
    return table


def _amounts(offers: Sequence[Offer], columns: int, *, with_range: bool) -> tuple[list[tuple[str, str, str]], int]:
    """What each offer costs by the hour and in all, and how many columns that leaves for the names.

    Where ranges leave no room for names they are left out: the chosen one's stands at the top.
    """
    figures = [
        (
            f"{format_usd(each.usd_per_gpu_hour)}/GPU-h",
            ranged(each.usd, format_usd) if with_range else format_usd(each.usd.value),
            format_jpy(each.jpy.value),
        )
        for each in offers
    ]
    taken = len("* on demand ") + sum(1 + max(map(len, column)) for column in zip(*figures, strict=True))
    return figures, columns - taken


def _assumptions(assumptions: tuple[Assumption, ...], *, verbose: bool) -> Text:
    """One after the other; unless ``verbose`` the first few, a line each."""
    shown = assumptions if verbose else assumptions[:MAX_ASSUMPTIONS]
    said = Text("\n").join(Text.assemble(each.text, (f" [{each.source}]", "dim")) for each in shown)
    if len(shown) < len(assumptions):
        said.append(f"\nand {len(assumptions) - len(shown)} more with --verbose", "dim")
    if not verbose:
        said.no_wrap, said.overflow = True, "ellipsis"
    return said


def _proposals(proposals: tuple[Change, ...], columns: int) -> list[Text]:
    """Arguments to paste, each followed by what it does."""
    said = [Text("\nTry, ready to paste behind the command:", "bold green")] if proposals else []
    for change in proposals:
        style = "bold" if change.fits else ""
        said += [Text(line, style) for line in argument_lines(words.overrides(change.overrides), columns)]
        note = Text(f"  {words.change_note(change)}", "dim")
        said += note.wrap(Console(width=columns), columns - 2)
    return said


def argument_lines(arguments: Sequence[str], columns: int) -> list[str]:
    """The arguments in lines of at most so many columns, broken between them as a shell allows it."""
    lines = [""]
    for argument in arguments:
        longer = f"{lines[-1]} {argument}".lstrip()
        if lines[-1] and len(longer) > columns - len(" \\"):
            lines[-1] += " \\"
            lines.append(argument)
        else:
            lines[-1] = longer
    return lines
