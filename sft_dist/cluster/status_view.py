"""A status in a terminal: 80 to 120 columns, and nothing that only a colour says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_dist.cluster.attempts import Attempt
from sft_dist.cluster.evidence import Evidence, Measured
from sft_dist.cluster.job_of_run import JobOfRun
from sft_dist.cluster.status import Status
from sft_dist.cluster.verdict import Kind, clock_time
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.units import duration, percent, rate, step_seconds

MIN_COLUMNS, MAX_COLUMNS = 80, 120
LABEL_COLUMNS = 10
BAR_COLUMNS = 40

# The last ones say why a job waits or gave up.
MAX_STARTS = 5

BLOCKS = "▁▂▃▄▅▆▇█"

STYLES: dict[Kind, str] = {
    "finished": "bold green",
    "working": "bold green",
    "starting": "bold cyan",
    "waiting": "bold cyan",
    "stopped": "bold yellow",
    "ended": "bold yellow",
    "unknown": "bold yellow",
    "stuck": "bold red",
    "silent": "bold red",
    "failed": "bold red",
}


def headline(status: Status) -> Text:
    """The verdict, in one line however long."""
    return Text(status.verdict.line, "bold red" if status.verdict.is_trouble else STYLES[status.verdict.kind])


def details(status: Status, console: Console) -> RenderableType:
    """A line or two for each thing that is known."""
    columns = max(MIN_COLUMNS, min(console.width, MAX_COLUMNS))
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=LABEL_COLUMNS, no_wrap=True, style="bold")
    table.add_column(overflow="fold", max_width=columns - LABEL_COLUMNS - 1)
    for name, lines in sections(status):
        table.add_row(name, Text("\n").join(lines))
    for number, note in enumerate(status.notes):
        table.add_row(Text("" if number else "Note", "bold yellow"), Text(note))
    return Group(Text(str(status.folder), "dim", overflow="fold"), table)


def sweep_view(points: Mapping[str, Status | None]) -> RenderableType:
    """A line a point; None: nothing of it has begun."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, status in points.items():
        table.add_row(name, Text("not begun", "dim") if status is None else headline(status))
    return table


def sections(status: Status) -> list[tuple[str, list[Text]]]:
    """What is known, by name, a line or more each."""
    found = status.found
    known = {
        "Progress": _progress(status),
        "Loss": [] if found.measured is None else _loss(found.measured),
        "Events": _events(found),
        "Time": _time(status),
        "Bill": _bill(status),
        "Saved": _saved(found),
        "Heartbeat": _heartbeat(found),
        "Job": [] if status.job is None else _job(status.job, status.clock.now),
        "Starts": [] if status.job is None else _starts(status.job.attempts, status.clock.now),
    }
    return [(name, lines) for name, lines in known.items() if lines]


def _progress(status: Status) -> list[Text]:
    found, step = status.found, status.step
    if step is None:
        return []
    if not found.num_steps:
        return [Text(f"step {step:,}")]
    filled = round(BAR_COLUMNS * min(1.0, step / found.num_steps))
    bar = Text.assemble(("━" * filled, "green"), ("─" * (BAR_COLUMNS - filled), "dim"))
    bar.append(f"  {step:,} / {found.num_steps:,}")
    speed = []
    if found.pulse is not None and found.pulse.beat.step_s is not None:
        speed.append(f"{step_seconds(found.pulse.beat.step_s)} a step with all pauses")
    if found.measured is not None and found.measured.tokens_per_s is not None:
        speed.append(f"{rate(found.measured.tokens_per_s)} tokens/s in the last")
        if found.measured.mfu is not None:
            speed.append(f"MFU {percent(found.measured.mfu)}")
    return [bar, *([Text(", ".join(speed))] if speed else [])]


def _loss(measured: Measured) -> list[Text]:
    curve = measured.curve
    ends = [f"{value:.4f}" if value is not None else "not finite" for value in (curve[0], measured.loss)]
    lines = [Text(f"{ends[0]} {sparkline(curve)} {ends[1]}" if len(curve) > 1 else ends[1])]
    if measured.eval_last is not None and measured.eval_best is not None:
        step, loss = measured.eval_last
        text = f"evaluation {loss:.4f} at step {step:,}"
        if measured.eval_best[0] != step:
            text += f", best {measured.eval_best[1]:.4f} at step {measured.eval_best[0]:,}"
        elif step:
            text += ", the best so far"
        lines.append(Text(text))
    return lines


def _events(found: Evidence) -> list[Text]:
    lines = []
    for each in found.happened:
        often = "" if each.times == 1 else f" ({each.times} of these, this is the last)"
        at = "" if each.step is None or each.kind == "stalled" else f"step {each.step:,}: "
        lines.append(Text(f"{at}{each.told}{often}", "yellow"))
    return lines


def sparkline(values: Sequence[float | None]) -> str:
    """A letter a value; a cross where there is none."""
    finite = [value for value in values if value is not None]
    if not finite:
        return "×" * len(values)
    low, high = min(finite), max(finite)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join("×" if value is None else BLOCKS[round((value - low) * scale)] for value in values)


def _time(status: Status) -> list[Text]:
    found, ahead = status.found, status.forecast
    lines = []
    if found.bill is not None:
        starts = "" if found.bill.starts == 1 else f" in {found.bill.starts} starts"
        so_far = f"{duration(found.bill.elapsed_s)} so far{starts}"
        if found.finished:
            so_far = f"{duration(found.bill.elapsed_s)} in all{starts}"
        elif ahead is not None:
            so_far += f", about {duration(ahead.left_s)} left: {duration(ahead.total_s)} in all"
        lines.append(Text(so_far))
    if found.planned is not None:
        plan = found.planned
        on = "" if plan.machines is None else f", on {plan.machines}"
        lines.append(Text(f"planned {duration(plan.total_s)}, {step_seconds(plan.step_s)} a step{on}", "dim"))
    return lines


def _bill(status: Status) -> list[Text]:
    bill, ahead, planned = status.found.bill, status.forecast, status.found.planned
    if bill is None:
        return []
    if bill.spent_usd is None:
        return [Text("no price is known: hardware.price_per_hour says one", "dim")]
    text = f"{in_both(bill.spent_usd, bill.jpy_per_usd)} {'in all' if status.found.finished else 'so far'}"
    if ahead is not None and ahead.total_usd is not None and not status.found.finished:
        text += f", about {in_both(ahead.total_usd, bill.jpy_per_usd)} in all"
    lines = [Text(text)]
    if bill.usd_per_hour is not None:
        price = f"{format_usd(bill.usd_per_hour)} an hour ({bill.price_name})"
        if planned is not None and planned.usd is not None and planned.jpy is not None:
            price += f"; planned {format_usd(planned.usd)} ({format_jpy(planned.jpy)})"
        lines.append(Text(price, "dim"))
    return lines


def in_both(usd: float, jpy_per_usd: float | None) -> str:
    """An amount in dollars, and in yen where the rate is known."""
    return format_usd(usd) + ("" if jpy_per_usd is None else f" ({format_jpy(usd * jpy_per_usd)})")


def _saved(found: Evidence) -> list[Text]:
    saved, parts = found.saved, []
    if saved.newest is not None and saved.age_s is not None:
        parts.append(f"checkpoint of step {saved.newest:,}, {duration(saved.age_s)} ago")
        if saved.count > 1:
            parts.append(f"{saved.count} in all")
    elif found.measured is not None:
        parts.append("no complete checkpoint yet")
    parts += [f"that of step {step:,} is being written" for step in saved.writing]
    final = {
        "proven": "final/ is proven",
        "not proven": "final/ is there, not proven (checkpoint.prove_final)",
        "unfinished": "final.unfinished/ is not proven yet, or failed its proof",
        "there": "final/ is there",
    }
    if found.final is not None:
        parts.append(
            final[found.final] + ("" if found.finished or found.final == "unfinished" else ", of a shorter run")
        )
    return [Text(", ".join(parts))] if parts else []


def _heartbeat(found: Evidence) -> list[Text]:
    if found.pulse is None:
        return []
    pulse, beat = found.pulse, found.pulse.beat
    if beat.phase in ("done", "stopped", "failed"):
        first = f"the last one {duration(pulse.age_s)} ago from {beat.host}: {beat.phase}"
    else:
        first = f"{duration(pulse.age_s)} ago from {beat.host} (process {beat.pid}): {beat.phase}"
        if pulse.step_age_s is not None and beat.step_at is not None:
            first += f", last step {duration(pulse.step_age_s)} ago"
    ranks = "1 process" if beat.world_size == 1 else f"{beat.world_size} processes"
    again = f", started again {beat.launch_restarts} times by its launcher" if beat.launch_restarts else ""
    return [Text(first), Text(f"{beat.strategy} on {ranks}{again}", "dim")]


def _job(job: JobOfRun, now: float) -> list[Text]:
    state = job.state
    lines = [Text(job.job_id)]
    if state is not None:
        nodes = ", ".join(state.nodes[:4]) + (f" and {len(state.nodes) - 4} more" if len(state.nodes) > 4 else "")
        parts = [f"{state.job_id} is {state.state}" + (f" ({state.reason})" if state.reason != "None" else "")]
        if nodes and state.state != "PENDING":
            parts.append(f"on {nodes}")
        if state.restarts:
            parts.append(f"start {state.restarts + 1}")
        if state.state == "PENDING" and state.started is not None:
            parts.append(f"expected to start at {clock_time(state.started.timestamp(), now)}")
        if state.state == "RUNNING" and state.ended is not None:
            parts.append(f"{duration(max(0.0, state.ended.timestamp() - now))} left in this start")
        lines = [Text(", ".join(parts))]
        if state.excluded:
            lines.append(Text(f"without {', '.join(state.excluded)}", "dim"))
    return lines


def _starts(attempts: Sequence[Attempt], now: float) -> list[Text]:
    """The last ones, and why each ended."""
    lines = []
    for number, each in list(enumerate(attempts, 1))[-MAX_STARTS:]:
        text = f"{number}. {clock_time(each.began, now)}"
        if each.is_open:
            text += f" on {', '.join(each.nodes[:4])}, from step {each.step_before:,}"
        else:
            took = "" if each.ended is None else f", {duration(each.ended - each.began)}"
            text += f"{took}, step {each.step_before:,} to {each.step_after:,}: {each.reason}"
            if each.blamed:
                text += f" ({', '.join(each.blamed)} failed)"
        lines.append(Text(text))
    if len(attempts) > MAX_STARTS:
        lines.insert(0, Text(f"{len(attempts) - MAX_STARTS} before these", "dim"))
    return lines
