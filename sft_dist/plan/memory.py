"""Device memory of a run, phase by phase: what is held between steps, and what a step puts on top of it."""

from __future__ import annotations

from collections import Counter

from sft_dist.config.deepspeed import Zero3Knobs
from sft_dist.hardware.gpus import Gpu
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.answers import cache_bytes
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.result import Assumption, Part, Phase, PhaseName, Range, Verdict
from sft_dist.plan.states import state_bytes
from sft_dist.plan.tape import Tape
from sft_dist.plan.timeline import Timeline
from sft_dist.plan.timeline_ddp import DdpTimeline
from sft_dist.plan.timeline_fsdp2 import Fsdp2Timeline
from sft_dist.plan.timeline_zero import Bf16OptimizerTimeline, ZeroTimeline
from sft_dist.plan.update import update_bytes
from sft_dist.run import Run
from sft_dist.sharding import registry
from sft_dist.sharding.ddp import has_reducer
from sft_dist.sharding.spec import ShardingSpec

GIB = 2**30

# CUDA's context and what NCCL adds at the first collective (fms-acceleration, 269 runs: the tightest that
# ran had 1.07 GiB beside what was allocated; stas00/ml-engineering: 0.5-0.9 and 1.45 GiB).
CONTEXT_BYTES = int(1.1 * GIB)
NCCL_BYTES = int(0.9 * GIB)

# Beyond this share of the usable memory runs ended for want of it: of 198 published ones the fullest that ran is at
# 0.922, the emptiest that did not at 0.938 (benchmarks/plan_accuracy.py).
MOST_SHARE = 0.93
# Beyond this share the allocator starts to flush and retry: Llama 3 8B on four A100 went from 3,202 to 2,264 tokens/s.
TIGHT_SHARE = 0.9

# Nine of ten published peaks lie within this share of what is computed (benchmarks/plan_accuracy.py).
ALLOCATED_ERROR = 0.03
# Reserved over allocated where there is room: median and ninth decile of 269 runs. Slack that is given back in need.
RESERVED_MEDIAN, RESERVED_HIGH = 1.15, 1.5

PHASES: tuple[PhaseName, ...] = ("load", "forward_backward", "optimizer_step", "eval", "save")


def memory_phases(run: Run, tape: Tape, eval_tape: Tape | None, answer_tape: Tape | None = None) -> tuple[Phase, ...]:
    """The highest moment of each phase, on rank 0, which holds no less than any other rank.

    Args:
        tape: of the longest micro-batch.
        eval_tape: of the longest evaluation batch, without gradients; None where nothing is evaluated.
        answer_tape: likewise, of the longest prompts that are read together; None where nothing is answered.
    """
    ledger = Ledger()
    ledger.now["context"] = context_bytes(run)
    _load(run, ledger)
    held = resident_parts(run)
    ledger.now = Counter({**held, "context": ledger.now["context"]})
    steps = timeline(run, tape)
    ledger.begin("forward_backward")
    steps.step(ledger)
    for gone in ("activations", "logits"):  # a scalar of the loss may be left
        del ledger.now[gone]
    ledger.begin("optimizer_step")
    ledger.touch("temporaries", update_bytes(run), "update")
    ledger.now["gradients"] = held["gradients"]
    if eval_tape is not None:
        ledger.begin("eval")
        before = Counter(ledger.now)
        timeline(run, eval_tape).evaluation(ledger, eval_tape)
        ledger.now = before
        if answer_tape is not None:
            before = Counter(ledger.now)
            ledger.add("answers", cache_bytes(run), "answers are generated")
            timeline(run, answer_tape).evaluation(ledger, answer_tape)
            ledger.now = before
    ledger.begin("save")
    ledger.touch("gather_buffers", _save_bytes(run), "gathering the largest parameter")
    return tuple(ledger.highest[name] for name in PHASES if name in ledger.highest)


def timeline(run: Run, tape: Tape) -> Timeline:
    """That of the run's strategy."""
    match run.strategy:
        case "ddp":
            return DdpTimeline(run, tape)
        case "fsdp2":
            return Fsdp2Timeline(run, tape)
        case "zero1" if run.precision.compute == "bf16":
            return Bf16OptimizerTimeline(run, tape)
        case _:
            return ZeroTimeline(run, tape)


def context_bytes(run: Run) -> int:
    """Of CUDA and NCCL, outside torch's allocator."""
    return CONTEXT_BYTES + (NCCL_BYTES if run.world.size > 1 else 0)


def resident_parts(run: Run) -> Counter[Part]:
    """Bytes by part that a rank's device holds between steps."""
    spec = registry.describe(run, 0)
    states = state_bytes(run)
    parts: Counter[Part] = Counter(_parameters(run, spec))
    parts["quantization_state"] = run.model.quantization_bytes
    parts["buffers"] = run.model.buffer_bytes - run.model.quantization_bytes
    # FSDP2 makes gradients as it reduces them and a single rank as backward comes to them; the update drops them.
    are_dropped = run.strategy == "fsdp2" or (run.strategy == "ddp" and not has_reducer(run))
    parts["gradients"] = 0 if are_dropped else states.gradients
    # Paged states leave the device when it is full: they are counted where they go, in host memory.
    parts["optimizer"] = states.optimizer
    return parts


def _parameters(run: Run, spec: ShardingSpec) -> dict[Part, int]:
    if "parameters" in spec.on_host:
        return {"weights": 0, "adapters": 0}
    adapters = sum(p.local_bytes for p in spec.parameters if is_adapter(p.name))
    return {"weights": spec.parameter_bytes - adapters, "adapters": adapters}


def is_adapter(name: str) -> bool:
    """Whether a parameter is none of the base's: the method added it."""
    return ".lora_" in name or name.startswith("prompt.") or ".token_rows." in name


def _load(run: Run, ledger: Ledger) -> None:
    """Weights are read one by one into the shards; the largest one is on its way."""
    held = resident_parts(run)
    loaded: tuple[Part, ...] = ("weights", "adapters", "quantization_state", "buffers")
    for part in loaded:
        ledger.now[part] = held[part]
    largest = max(p.local_bytes for p in registry.describe(run, 0).parameters)
    ledger.begin("load")
    ledger.touch("gather_buffers", largest, "the largest parameter is read")


def _save_bytes(run: Run) -> int:
    """What one parameter takes when it is gathered to be saved or exported; under DDP it is there."""
    if run.strategy == "ddp":
        return 0
    width = DTYPE_BYTES[run.precision.master] if run.strategy == "fsdp2" else DTYPE_BYTES["fp32"]
    return 2 * max(p.numel for p in run.model.trainable) * width


def allocated_range(phases: tuple[Phase, ...]) -> Range:
    """The peak of all phases, with the error of published peaks."""
    peak = max(phase.allocated_bytes for phase in phases)
    return Range(peak, peak * (1 - ALLOCATED_ERROR), peak * (1 + ALLOCATED_ERROR))


def reserved_range(allocated: Range, context_bytes: int, usable_bytes: int) -> Range:
    """What the allocator takes from the device for it, context included; never more than there is, unless needed."""
    at_most = max(usable_bytes, allocated.value + context_bytes)
    return Range(
        min(allocated.value * RESERVED_MEDIAN + context_bytes, at_most),
        min(allocated.low + context_bytes, at_most),
        min(allocated.high * RESERVED_HIGH + context_bytes, at_most),
    )


def verdict(needed_bytes: float, usable_bytes: int) -> Verdict:
    """Of allocated and context together."""
    if needed_bytes > MOST_SHARE * usable_bytes:
        return "does not fit"
    return "tight" if needed_bytes > TIGHT_SHARE * usable_bytes else "fits"


def assumptions_of_memory(run: Run, gpu: Gpu) -> tuple[Assumption, ...]:
    """What the memory of a plan takes for granted."""
    context = context_bytes(run)
    found = [
        Assumption(
            f"every micro-batch may have {run.batch.micro_batch_size} full "
            f"{'sequence' if run.batch.micro_batch_size == 1 else 'sequences'}, all of whose tokens are trained",
            "data.max_seq_len, train.micro_batch_size",
        ),
        Assumption(
            f"CUDA and NCCL take {context / GIB:.1f} GiB beside what is allocated", "fms-acceleration, ml-engineering"
        ),
        Assumption(
            f"{gpu.usable_bytes / GIB:.1f} GiB of the GPU can be used; a run ends for want of memory beyond "
            f"{MOST_SHARE:.1%} of it",
            "hardware/gpus.yaml; 204 published runs",
        ),
    ]
    if isinstance(run.deepspeed, Zero3Knobs):
        found.append(
            Assumption("gathered weights are the most that DeepSpeed's knobs allow", "stage3_max_live_parameters")
        )
    return tuple(found)
