"""What the views of a dry run say in the same words: names of parts, and the lines that hold its figures.

Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.result import (
    Basis,
    Change,
    CostPlan,
    DataPlan,
    MemoryPlan,
    Offer,
    Part,
    PhaseName,
    Plan,
    TimePlan,
    Verdict,
)
from sft_dist.plan.units import (
    count,
    duration,
    duration_range,
    gib,
    gib_range,
    percent,
    ranged,
    rate,
    step_range,
    step_seconds,
)

# In the order in which they are drawn, each with a letter of its own for where there is no colour.
PARTS: dict[Part, tuple[str, str]] = {
    "weights": ("W", "weights"),
    "quantization_state": ("Q", "quantization state"),
    "adapters": ("D", "adapters"),
    "buffers": ("B", "buffers"),
    "gradients": ("G", "gradients"),
    "optimizer": ("O", "optimizer"),
    "gather_buffers": ("U", "unsharded weights"),
    "activations": ("A", "activations"),
    "logits": ("L", "logits"),
    "answers": ("K", "keys and values of answers"),
    "communication": ("N", "communication"),
    "temporaries": ("T", "temporaries"),
    "context": ("C", "CUDA and NCCL"),
}

PHASES: dict[PhaseName, str] = {
    "load": "load",
    "forward_backward": "forward, backward",
    "optimizer_step": "optimizer step",
    "eval": "evaluation",
    "save": "save",
}

VERDICTS: dict[Verdict, str] = {"fits": "Fits", "tight": "Tight", "does not fit": "Does not fit"}

BASES: dict[Basis, str] = {
    "calibrated here": "calibrated on this machine",
    "published": "published measurements",
    "assumed": "assumed, not measured",
}

DATA_BASES = {
    "prepared": "counted in the prepared data",
    "sampled": "estimated from a sample",
    "estimated": "estimated from the text; the tokenizer is not here",
    "assumed": "as stated, not counted",
}


def headline(plan: Plan) -> str:
    """``Fits on 4 x A100 SXM 80 GB``."""
    return f"{VERDICTS[plan.memory.verdict]} on {plan.num_gpus} x {plan.gpu}"


def subject_line(plan: Plan) -> str:
    """What is planned, each part by itself but for the mode of activation checkpointing, which is a bare word."""
    label = {"recomputed": "activation checkpointing "}
    return " · ".join(f"{label.get(name, '')}{value}" for name, value in plan.subject.items())


def peak_line(memory: MemoryPlan) -> str:
    """The highest allocation against what can be used. What is left is what CUDA and NCCL leave too."""
    spare = memory.usable_bytes - memory.peak.total_bytes
    rest = f"{gib(spare)} left beside CUDA and NCCL" if spare >= 0 else f"{gib(-spare)} too much"
    return f"peak allocated {gib_range(memory.allocated)} of {gib(memory.usable_bytes)} usable, {rest}"


def run_line(plan: Plan) -> str:
    """Time and money of the whole run: ``1.5 (1.3-1.6) days, $390.26 (...), ¥58,540 (...) on demand``."""
    condition = "if it fitted: " if plan.memory.verdict == "does not fit" else ""
    money = no_price_line(plan) if plan.cost.chosen is None else offer_line(plan.cost.chosen)
    return f"{condition}{duration_range(plan.time.total)}, {money}"


def reserved_line(memory: MemoryPlan) -> str:
    """What nvidia-smi will show, and what stays between steps."""
    return f"{gib_range(memory.reserved)} with the allocator's slack; {gib(memory.resident_bytes)} stay between steps"


def moment_line(memory: MemoryPlan) -> str:
    """Which phase takes most, and when in it."""
    peak = memory.peak
    return f"{PHASES[peak.name]}: {peak.moment}" if peak.moment else PHASES[peak.name]


def with_parts(said: str, parts: Mapping[str, int]) -> str:
    """``...: 4 processes 22.4 GiB, weights on their way 2.1 GiB``, the largest first."""
    named = [f"{name} {gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1])]
    return f"{said}: {', '.join(named)}" if named else said


def host_line(memory: MemoryPlan) -> str:
    """Host memory of a node, and whether it has that much."""
    needed, available = sum(memory.host_parts.values()), memory.host_available_bytes
    if available is None:
        there = "a node; what it has is not known"
    elif needed <= available:
        there = f"of the {gib(available)} of a node"
    else:
        there = f"a node, too much: it has {gib(available)}"
    return with_parts(f"{gib(needed)} {there}", memory.host_parts)


def disk_line(memory: MemoryPlan) -> str:
    """Disk by what takes it."""
    return with_parts(gib(sum(memory.disk_parts.values())), memory.disk_parts)


def data_lines(data: DataPlan) -> list[str]:
    """How much is trained on, and how it is dealt into steps."""
    supervised = percent(data.supervised_tokens / data.tokens.value) if data.tokens.value else "-"
    steps = [
        f"{plural(data.steps, 'step')} of {count(data.tokens_per_step)} tokens",
        f"{plural(data.epochs, 'epoch')} of {count(data.sequences)} sequences",
        f"{plural(data.micro_batches_per_step, 'micro-batch', 'micro-batches')} a step and rank",
    ]
    if data.fill < 1:
        steps.append(f"packs {percent(data.fill)} full")
    if data.idle_fraction > 0:
        steps.append(f"ranks {percent(data.idle_fraction)} idle")
    if data.evaluations:
        steps.append(f"{plural(data.evaluations, 'evaluation')} of {count(data.eval_tokens)} tokens")
    return [
        f"{plural(data.rows, 'row')}, {ranged(data.tokens, count)} tokens, {supervised} of them trained; "
        f"{DATA_BASES[data.basis]} ({data.source})",
        ", ".join(steps),
    ]


def plural(number: float, one: str, more: str | None = None) -> str:
    """``1 epoch``, ``1.5 epochs``, ``2 micro-batches``."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{text} {one if number == 1 else more or one + 's'}"


def total_line(time: TimePlan) -> str:
    """``1.5 (1.3-1.7) days: load 7 min, ...``; phases that take no time are left out."""
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in time.phases.items() if seconds > 0)
    return f"{duration_range(time.total)}: {phases}"


def speed_line(time: TimePlan) -> str:
    """Tokens a second of all and of one GPU, and what that is of the GPU's peak."""
    return (
        f"{ranged(time.tokens_per_s, rate)} tokens/s, {rate(time.tokens_per_s_per_gpu)} a GPU; "
        f"MFU {percent(time.mfu)}, with recomputation {percent(time.hfu)}"
    )


def step_line(time: TimePlan) -> str:
    """Seconds of a step, and what costs none because it is hidden."""
    hidden = time.hidden_communication_s
    behind = f", {step_seconds(hidden)} of communication hidden in it" if hidden > 0 else ""
    return f"a step of {step_range(time.step)}{behind}"


def time_basis_line(time: TimePlan) -> str:
    """What the times rest on."""
    return f"rests on: {BASES[time.basis]} ({time.source})"


def no_price_line(plan: Plan) -> str:
    """Said where nothing can be priced."""
    return "no offer is chosen" if plan.cost.offers else f"no price of {plan.gpu} is known"


def gpu_hours(hours: float) -> str:
    return f"{hours:,.1f}"


def offer_line(offer: Offer) -> str:
    """Both currencies with their ranges."""
    return f"{ranged(offer.usd, format_usd)}, {ranged(offer.jpy, format_jpy)} {offer.kind}"


def unit_costs_line(cost: CostPlan) -> str:
    """What an epoch and a million tokens cost at the chosen offer, the energy and the rate."""
    said = [f"{ranged(cost.gpu_hours, gpu_hours)} GPU-hours"]
    for amount, unit in ((cost.usd_per_epoch, "an epoch"), (cost.usd_per_million_tokens, "a million tokens")):
        if amount is not None:
            said.append(f"{format_usd(amount)} ({format_jpy(amount * cost.jpy_per_usd)}) {unit}")
    if cost.energy_kwh is not None:
        said.append(f"{cost.energy_kwh:,.1f} kWh")
    if cost.offers:
        said.append(f"¥{cost.jpy_per_usd:,.2f} a dollar as of {cost.fx_as_of}")
    return ", ".join(said)


def shown_offers(cost: CostPlan, most: int) -> tuple[Offer, ...]:
    """The chosen offer, the cheapest of each kind and then the cheapest of all, in the plan's order."""
    wanted = [cost.chosen] if cost.chosen is not None else []
    for offer in cost.offers:
        if offer.kind not in {other.kind for other in wanted}:
            wanted.append(offer)
    wanted += [offer for offer in cost.offers if offer not in wanted][: max(0, most - len(wanted))]
    return tuple(offer for offer in cost.offers if offer in wanted)


def overrides(values: tuple[str, ...]) -> list[str]:
    """Arguments for a shell, each quoted where it has to be; options such as ``--gpus 4`` are two words already."""
    return [value if value.startswith("--") else shlex.quote(value) for value in values]


def change_note(change: Change) -> str:
    return f"{'fits' if change.fits else 'does not fit'}: {change.reason}"
