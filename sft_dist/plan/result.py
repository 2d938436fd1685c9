"""What a dry run says, as data. Terminal, page and JSON are three views of it; ``plan.json`` is its fields.

Bytes are of one rank unless a name says otherwise, seconds are wall time, money is in USD and JPY. A range is what the
figure rests on: with (low, high) the true value is expected between the two in nine of ten runs. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["fits", "tight", "does not fit"]

PhaseName = Literal["load", "forward_backward", "optimizer_step", "eval", "save"]

# What device memory is taken by, in the order in which it is drawn.
Part = Literal[
    "weights",  # frozen and trainable parameters of the base
    "quantization_state",  # scales of quantised weights, whole on every rank
    "adapters",  # parameters that the method adds
    "buffers",  # the model's other buffers: rotary frequencies
    "gradients",
    "optimizer",  # states, and masters that are not the parameters themselves
    "gather_buffers",  # whole weights beside the shards, or casts of them
    "activations",  # kept from forward to backward, and what one block needs at work
    "logits",  # of the loss, with their gradient
    "answers",  # keys and values of the rows that are being answered at an evaluation
    "communication",  # buckets and reduce-scatter buffers
    "temporaries",  # of the optimizer's step
    "context",  # CUDA and NCCL, outside torch's allocator
]

Basis = Literal["calibrated here", "published", "assumed"]


@dataclass(frozen=True)
class Range:
    """A figure and what it may turn out to be."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Phase:
    """Device memory at the moment of a phase when most is taken.

    Args:
        parts: bytes of each part at that moment; parts of no bytes are left out.
        moment: where in the phase that is, for people, e.g. ``backward of block 31``.
    """

    name: PhaseName
    parts: dict[Part, int]
    moment: str = ""

    @property
    def allocated_bytes(self) -> int:
        """What torch's allocator hands out: everything but the context."""
        return sum(size for part, size in self.parts.items() if part != "context")

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the rank that needs most.

    Args:
        phases: in the order of a run.
        device_bytes: of the GPU, as sold.
        usable_bytes: of them, before the driver's own.
        allocated: the highest ``allocated_bytes`` of all phases, with its error band.
        reserved: what the allocator may have taken from the device for it, and the context; nvidia-smi shows this.
        host_parts: bytes of host memory of one node, all its ranks, by what takes them.
        host_available_bytes: of a node, where it is known.
        disk_parts: bytes on disk by what takes them: cache, checkpoints, final.
        resident_bytes: what a rank holds between steps.
    """

    phases: tuple[Phase, ...]
    device_bytes: int
    usable_bytes: int
    allocated: Range
    reserved: Range
    verdict: Verdict
    host_parts: dict[str, int]
    host_available_bytes: int | None
    disk_parts: dict[str, int]
    resident_bytes: int

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total_bytes)


@dataclass(frozen=True)
class DataPlan:
    """What is trained on, counted or estimated.

    Args:
        basis: ``prepared``: counted in the prepared cache; ``sampled``: a sample was tokenised; ``estimated``: rows
            were counted and tokens told from the text, because the tokenizer is not here; ``assumed``: stated by the
            user, because the files are not here.
        rows, tokens, supervised_tokens: of the training set after mixing.
        sequences: packs, or rows where nothing is packed; one epoch.
        sum_squared_lengths: over the segments of one epoch, of their squared token counts: what attention costs.
        fill: share of the packs' capacity that holds tokens; 1.0 where nothing is packed.
        idle_fraction: share of the ranks' micro-batches that are empty, because sequences do not divide.
        steps: optimizer steps of the whole run; epochs: passes over the data.
        micro_batches_per_step: of a rank, in a full step.
        tokens_per_step: mean over all ranks.
        eval_tokens: tokens of one evaluation; evaluations: how many there are.
        cache_bytes: of the prepared data on disk.
        lost_share: of all tokens, that ``data.over_length`` cuts off or drops with their rows; 0 where preparing told.
    """

    basis: Literal["prepared", "sampled", "estimated", "assumed"]
    rows: int
    tokens: Range
    supervised_tokens: float
    sequences: float
    sum_squared_lengths: float
    fill: float
    idle_fraction: float
    steps: int
    epochs: float
    micro_batches_per_step: int
    tokens_per_step: float
    eval_tokens: float
    evaluations: int
    cache_bytes: int
    source: str
    lost_share: float = 0.0


@dataclass(frozen=True)
class TimePlan:
    """How long it takes.

    Args:
        step_parts: seconds of one optimizer step by what takes them; communication is what is not hidden.
        step: seconds of one step.
        hidden_communication_s: of a step, behind computation.
        phases: seconds of load, prepare, train, eval, save; of answers, where evaluations have questions answered.
        total: seconds of the whole run.
        tokens_per_s: all GPUs; tokens_per_s_per_gpu: one.
        mfu: model FLOPs (no recomputation) over peak; hfu: with recomputation.
        flops_per_token: model FLOPs, forward and backward.
        efficiency: share of ideal rates (``plan/rates.py``: best product, memory's rate) that all of the GPU's work
            reaches; fused kernels come close to 1.0. basis, source: what that rests on.
    """

    step_parts: dict[str, float]
    step: Range
    hidden_communication_s: float
    phases: dict[str, float]
    total: Range
    tokens_per_s: Range
    tokens_per_s_per_gpu: float
    mfu: float
    hfu: float
    flops_per_token: float
    efficiency: float
    basis: Basis
    source: str


@dataclass(frozen=True)
class Offer:
    """A price for the whole run.

    Args:
        name: provider, machine and region, with what is particular about it; kind: how it is paid.
        usd_per_gpu_hour: of a GPU that the machines have, whether the run uses it or not.
        machines, gpus_billed: how many are rented for the run; whole machines, so GPUs may be more than it uses.
        usd, jpy: of the whole run, with the range of its time.
        as_of: date or version of the price.
    """

    name: str
    kind: Literal["on demand", "spot", "owned", "yours"]
    usd_per_gpu_hour: float
    machines: int
    gpus_billed: int
    usd: Range
    jpy: Range
    as_of: str
    source: str


@dataclass(frozen=True)
class CostPlan:
    """What it costs.

    Args:
        offers: cheapest first; chosen: the one that the figures below are of, None where the GPU has no known price.
        usd_per_epoch, usd_per_million_tokens: at the chosen offer.
        energy_kwh: of all GPUs and their hosts, without what cools them.
        jpy_per_usd, fx_as_of: the rate.
    """

    gpu_hours: Range
    offers: tuple[Offer, ...]
    chosen: Offer | None
    usd_per_epoch: float | None
    usd_per_million_tokens: float | None
    energy_kwh: float | None
    jpy_per_usd: float
    fx_as_of: str


@dataclass(frozen=True)
class Assumption:
    """Something that the plan takes for granted, and where it comes from."""

    text: str
    source: str


@dataclass(frozen=True)
class Change:
    """A change of the configuration, ready to paste.

    Args:
        overrides: e.g. ``train.micro_batch_size=1``; also ``--gpus 4`` where the machine changes.
        reason: what it does, with numbers.
        fits: whether the run fits with it.
    """

    overrides: tuple[str, ...]
    reason: str
    fits: bool


@dataclass(frozen=True)
class ParetoPoint:
    """One of the configurations that a search looked at.

    Args:
        label: what sets it apart from the others, for people and short.
        usd, hours: of the whole run.
        on_front: whether no other that fits is both faster and cheaper.
        overrides: of the configuration that was searched from, as in ``Change``.
        peak_bytes: of a GPU, CUDA's context with it; usable_bytes: of them.
        host_bytes: of host memory of a node.
        jpy: of the whole run.
    """

    label: str
    gpu: str
    num_gpus: int
    usd: float
    hours: float
    fits: bool
    on_front: bool
    overrides: tuple[str, ...]
    verdict: Verdict = "fits"
    peak_bytes: int = 0
    usable_bytes: int = 0
    host_bytes: int = 0
    jpy: float = 0.0


@dataclass(frozen=True)
class Refused:
    """Configurations that a search ruled out for one reason."""

    reason: str
    number: int


@dataclass(frozen=True)
class Pick:
    """An answer of a search.

    Args:
        question: e.g. ``fastest under $50``.
    """

    question: str
    point: ParetoPoint


@dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        looked_at: configurations; fitting: of them.
        seconds: that it took.
        front: of money and time: none that fits is both cheaper and faster; the cheapest first.
        picks: cheapest and fastest, and what was asked for.
        points: the fastest of each GPU, number of GPUs and way to shard, and the front.
        refused: the others by reason, the commonest first.
    """

    looked_at: int
    fitting: int
    seconds: float
    front: tuple[ParetoPoint, ...]
    picks: tuple[Pick, ...]
    points: tuple[ParetoPoint, ...]
    refused: tuple[Refused, ...]


@dataclass(frozen=True)
class Plan:
    """A whole dry run.

    Args:
        subject: what was planned: model, method, strategy, GPU and counts, for people and in this order.
        gpu, num_gpus: the same as data: programs read these, and the verdict names them.
        choices: every ``auto`` that was made concrete, with its reason.
        proposals: smallest changes that make the run fit; empty where it does.
        warnings: what the user should know before the run starts.
        search: what else there is, where it was asked for.
    """

    subject: dict[str, str]
    gpu: str
    num_gpus: int
    choices: tuple[str, ...]
    memory: MemoryPlan
    data: DataPlan
    time: TimePlan
    cost: CostPlan
    assumptions: tuple[Assumption, ...]
    proposals: tuple[Change, ...]
    warnings: tuple[str, ...]
    search: Search | None = None
