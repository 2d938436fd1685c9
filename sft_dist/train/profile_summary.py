"""Where the time of a traced step went: by part, by kind of work and by operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch.autograd import DeviceType

from sft_dist.plan.terminal_bar import share_bar
from sft_dist.plan.units import percent, step_seconds
from sft_dist.runtime.spans import PARTS, PREFIX

TOP = 12
BAR_COLUMNS = 30
REST = "rest"

# The kind of work of an operator, by the first of these that its name contains.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ranks", ("c10d::", "gloo:", "nccl:", "record_param_comms", "_c10d_functional")),
    ("attention", ("attention", "flash", "varlen", "sdpa")),
    ("dequantisation", ("bitsandbytes::",)),
    ("optimizer", ("Optimizer.", "fused_adam", "_foreach_", "fused_sgd")),
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")),
    ("loss", ("log_softmax", "LinearCrossEntropy", "aten::gather", "aten::scatter")),
    ("copies and casts", ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_", "_to_copy")),
    ("elementwise and sums", ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::sum", "aten::mean",
                              "aten::pow", "aten::rsqrt", "aten::exp", "silu", "gelu", "norm", "addc", "neg", "sqrt")),
)  # fmt: skip

# What the host calls to wait for a device, as when a value is read from it.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Operator:
    """A step's. Args: seconds: of its own, without what it calls."""

    name: str
    kind: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class ProfileSummary:
    """Means of the traced steps of one rank.

    Args:
        step_s: from the begin of a step to its end, the trace's own cost included.
        parts: seconds of each part of a step on the host; what belongs to none is the rest.
        kinds: seconds by kind of work, on the device where there is one.
        operators: all of them, the longest first.
        waits: times that the host waited for the device.
    """

    rank: int
    device: str
    steps: int
    step_s: float
    parts: dict[str, float]
    kinds: dict[str, float]
    operators: list[Operator]
    waits: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(averages: Iterable[Any], step_s: Sequence[float], *, rank: int, device: str) -> ProfileSummary:
    """
    Args:
        averages: ``profile.key_averages()``.
        step_s: of each traced step.
    """
    steps, on_device = len(step_s), device != "cpu"
    of_part: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    operators, waits = [], 0.0
    for event in averages:
        if event.device_type != DeviceType.CPU:
            continue  # kernels: their operators have their time
        if event.key.startswith(PREFIX):
            of_part[event.key.removeprefix(PREFIX)] = event.cpu_time_total / 1e6 / steps
            continue
        if event.key in WAITS:
            waits += event.count / steps
        seconds = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6 / steps
        if seconds:
            operators.append(Operator(event.key, kind_of(event.key), seconds, event.count / steps))
    mean_s = sum(step_s) / steps
    kinds: dict[str, float] = defaultdict(float)
    for operator in operators:
        kinds[operator.kind] += operator.seconds
    named = {kind: kinds[kind] for kind, _ in KINDS if kind in kinds}
    return ProfileSummary(
        rank, device, steps, mean_s,
        parts={**of_part, REST: max(0.0, mean_s - sum(of_part.values()))},
        kinds={**named, REST: max(0.0, mean_s - sum(named.values()))},
        operators=sorted(operators, key=lambda operator: -operator.seconds),
        waits=waits if on_device else 0.0,
    )  # fmt: skip


def kind_of(name: str) -> str:
    return next((kind for kind, marks in KINDS if any(mark in name for mark in marks)), REST)


def shown(summary: ProfileSummary) -> RenderableType:
    """For a terminal."""
    steps = "step" if summary.steps == 1 else "steps"
    title = f"a step of rank {summary.rank}: {step_seconds(summary.step_s)}, mean of {summary.steps} {steps}, traced"
    lines: list[RenderableType] = [Text(title, style="bold")]
    where = "on the CPU" if summary.device == "cpu" else "on the GPU; the rest, it waits or is idle"
    for heading, figures in (("on the host, by part", summary.parts), (f"{where}, by kind of work", summary.kinds)):
        table = Table(box=None, padding=(0, 1), show_header=False, title=heading, title_justify="left", title_style="")
        for name, seconds in figures.items():
            if seconds >= 5e-5:
                share = seconds / summary.step_s
                table.add_row(f"  {name}", share_bar(share, BAR_COLUMNS), step_seconds(seconds), percent(share))
        lines.append(table)
    table = Table(
        box=None, padding=(0, 1), title="operators, without what they call", title_justify="left", title_style=""
    )
    for column in ("  operator", "time", "share", "calls"):
        table.add_column(column, justify="left" if column.strip() == "operator" else "right", header_style="dim")
    for operator in summary.operators[:TOP]:
        share = operator.seconds / summary.step_s
        table.add_row(f"  {operator.name}", step_seconds(operator.seconds), percent(share), f"{operator.calls:,.0f}")
    lines.append(table)
    if summary.device != "cpu":
        lines.append(Text(f"the host waits {summary.waits:,.1f} times a step for the device"))
    return Group(*lines)
