"""How long a run takes: one step from the tape of a micro-batch, then steps, evaluations, saving and loading."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sft_dist.config.schema import ActivationCheckpointingConfig
from sft_dist.errors import PlanError
from sft_dist.hardware.gpus import ComputeDtype, Gpu
from sft_dist.hardware.networks import Network
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.activations import trace
from sft_dist.plan.calibration import Calibration
from sft_dist.plan.efficiency import Efficiency, efficiency_of
from sft_dist.plan.launches import (
    FOREACH_TENSOR_S,
    FSDP2,
    FUSED_TENSOR_S,
    LAUNCH_S,
    OPERATOR_S,
    WHOLE,
    Units,
    host_of,
)
from sft_dist.plan.offload import at_rate, update_seconds
from sft_dist.plan.rates import DISK_BYTES_PER_S, Rates, gpu_rates
from sft_dist.plan.result import Assumption, DataPlan, Range, TimePlan
from sft_dist.plan.schedule import StepTime, step_time
from sft_dist.plan.tape import Tape
from sft_dist.plan.typical import as_content
from sft_dist.plan.workload import Answers, Evaluation, Workload, workload
from sft_dist.run import Run

# Imports, the process group and CUDA's first kernels; assumed.
START_S = 30.0
# Rendered, tokenised and packed by all processors of a host; assumed.
PREPARED_TOKENS_PER_S = 1e6
# Links are no better known than this share of their seconds.
LINK_ERROR = 0.3
# Nine of ten published steps on 2 to 4 GPUs took no more than this much longer than planned from one:
# docs/plan_accuracy.md.
SEVERAL_GPUS_ERROR = 0.16


@dataclass(frozen=True)
class RunTime:
    """How long a GPU takes for a workload, in seconds."""

    step: StepTime
    step_range: Range
    phases: dict[str, float]
    total: Range
    efficiency: Efficiency


def run_time(
    work: Workload, *, gpu: Gpu, network: Network | None = None, calibration: Calibration | None = None
) -> RunTime:
    """
    Args:
        network: between nodes; needed where there are several.
        calibration: what a run of this kind measured on this GPU.

    Raises:
        PlanError: the GPU lacks the compute dtype, or the network between nodes is not known.
    """
    run = work.run
    dtype: ComputeDtype = run.precision.compute
    _check(run, gpu, dtype, network)
    found = efficiency_of(gpu, method=run.model.method.type, calibration=calibration)
    rates = gpu_rates(
        gpu,
        dtype=dtype,
        gpus_per_node=run.world.ranks_per_node,
        network=network,
        efficiency=found.range.value,
    )
    if calibration is not None:  # which of GPU and host was slower is not known
        rates = replace(rates, host=replace(rates.host, slowdown=rates.host.slowdown * calibration.time_ratio))
    step = full_step(work, rates)
    seconds = _step_range(run, step, found)
    phases = _phases(work, rates, seconds.value)
    rest = sum(phases.values()) - phases["train"]
    share = phases["train"] / seconds.value if seconds.value else 0.0
    tokens = work.data.tokens
    fewer, more = (tokens.low / tokens.value, tokens.high / tokens.value) if tokens.value else (1.0, 1.0)
    # What is beside training is assumed: half or twice of it.
    total = Range(
        phases["train"] + rest, seconds.low * share * fewer + rest / 2, seconds.high * share * more + rest * 2
    )
    return RunTime(step, seconds, phases, total, found)


def plan_time(
    run: Run,
    tape: Tape,
    *,
    data: DataPlan,
    gpu: Gpu,
    network: Network | None = None,
    eval_tape: Tape | None = None,
    answer_tape: Tape | None = None,
    calibration: Calibration | None = None,
    model_tape: Tape | None = None,
) -> TimePlan:
    """
    Args:
        tape, eval_tape, answer_tape: as of ``workload``.
        network, calibration: as of ``run_time``.
        model_tape: like ``tape`` and without recomputation, where that is at hand.

    Raises:
        PlanError: as ``run_time``.
    """
    work = workload(run, tape, data=data, eval_tape=eval_tape, answer_tape=answer_tape)
    timed = run_time(work, gpu=gpu, network=network, calibration=calibration)
    plain = as_content(run, _without_recomputation(run, tape, model_tape), work.content)
    per_rank = work.content.tokens / run.batch.sequence_parallel
    model_flops = plain.work().flops / per_rank
    seconds, tokens = timed.step_range, work.step_tokens
    tokens_per_s_per_gpu = tokens / seconds.value / run.world.size
    peak = gpu.flops[run.precision.compute]
    return TimePlan(
        step_parts=dict(sorted(timed.step.parts.items(), key=lambda part: -part[1])),
        step=seconds,
        hidden_communication_s=timed.step.hidden_s,
        phases=timed.phases,
        total=timed.total,
        tokens_per_s=Range(tokens / seconds.value, tokens / seconds.high, tokens / seconds.low),
        tokens_per_s_per_gpu=tokens_per_s_per_gpu,
        mfu=model_flops * tokens_per_s_per_gpu / peak,
        hfu=work.tape.work().flops / per_rank * tokens_per_s_per_gpu / peak,
        flops_per_token=model_flops,
        efficiency=timed.efficiency.range.value,
        basis=timed.efficiency.basis,
        source=timed.efficiency.source,
    )


def time_assumptions(gpu: Gpu, time: TimePlan) -> tuple[Assumption, ...]:
    """What the time of a plan takes for granted."""
    host = host_of(gpu)
    return (
        Assumption(f"a step reaches {time.efficiency:.0%} of what {gpu.name} achieves at best", time.source),
        Assumption(gpu.achievable_basis, "hardware/gpus.yaml"),
        Assumption(
            f"the host takes {1e6 * host.slowdown * OPERATOR_S:.1f} us for an operator and "
            f"{1e6 * host.slowdown * LAUNCH_S:.1f} to start a kernel, {host.slowdown:g} times what was measured "
            f"({host.processor})",
            host.source,
        ),
        Assumption(
            f"starting takes {START_S:g} s, disks {DISK_BYTES_PER_S / 1e9:g} GB/s, preparing "
            f"{PREPARED_TOKENS_PER_S:,.0f} tokens/s",
            "assumed",
        ),
    )


def full_step(work: Workload, rates: Rates) -> StepTime:
    """A step of whole micro-batches on the rank that has most."""
    return step_time(
        work.tape,
        rates=rates,
        collectives=work.collectives,
        transfers=at_rate(work.copies, rates),
        micro_batches=work.data.micro_batches_per_step,
        update_s=update_seconds(work.run, rates),
        update_host_s=_update_host_seconds(work.run, rates),
        units=_units(work.run),
    )


def _units(run: Run) -> Units:
    """ZeRO-3 gathers and releases each block from hooks as well; taken to be as quick as FSDP2."""
    return FSDP2 if run.strategy in ("fsdp2", "zero3") else WHOLE


def _update_host_seconds(run: Run, rates: Rates) -> float:
    tensors = sum(parameter.trainable for parameter in run.model.parameters)
    return rates.host.slowdown * tensors * (FUSED_TENSOR_S if run.optim.type == "adamw" else FOREACH_TENSOR_S)


def _check(run: Run, gpu: Gpu, dtype: ComputeDtype, network: Network | None) -> None:
    if dtype not in gpu.flops:
        raise PlanError(
            f"{gpu.name} has no matrix products in {dtype}",
            fix="set precision.compute to fp32, or plan for another GPU",
        )
    if run.world.num_nodes > 1 and network is None:
        raise PlanError(
            "a run on several nodes needs a network, and none is known", fix="set hardware.network, e.g. infiniband-ndr"
        )


def _step_range(run: Run, step: StepTime, found: Efficiency) -> Range:
    """Slow and fast computation, and links that are slower or faster; what cannot hide, or all of it can."""
    total, waited = step.total_s, step.parts.get("communication", 0.0)
    computed = total - waited
    fastest = computed * found.range.value / found.range.high + waited * (1 - LINK_ERROR)
    slowest = computed * found.range.value / found.range.low + waited * (1 + LINK_ERROR)
    if run.world.size > 1:
        slowest = slowest * (1 + SEVERAL_GPUS_ERROR) + LINK_ERROR * step.hidden_s
    return Range(total, fastest, slowest)


def _phases(work: Workload, rates: Rates, step_s: float) -> dict[str, float]:
    """Seconds of the whole run by phase."""
    run, data = work.run, work.data
    weights = run.model.num_parameters * DTYPE_BYTES[run.precision.compute]
    steps = data.steps * min(1.0, data.tokens_per_step / work.step_tokens)
    answers = {}
    if work.answers is not None:
        each = answers_seconds(work.answers, rates, units=_units(work.run))
        answers["answers"] = work.answers.planned.evaluations * each
    return {
        "load": START_S + weights / DISK_BYTES_PER_S,
        "prepare": 0.0 if data.basis == "prepared" else data.tokens.value / PREPARED_TOKENS_PER_S,
        "train": steps * step_s,
        "eval": 0.0
        if work.evaluation is None
        else data.evaluations * evaluation_seconds(work.evaluation, rates, units=_units(work.run)),
        **answers,
        "save": work.written_bytes / DISK_BYTES_PER_S,
    }


def evaluation_seconds(evaluation: Evaluation, rates: Rates, *, units: Units = WHOLE) -> float:
    """Of one pass over the evaluation set."""
    forward = step_time(
        evaluation.tape,
        rates=rates,
        collectives=evaluation.collectives,
        transfers=at_rate(evaluation.copies, rates),
        micro_batches=1,
        units=units,
        backward=False,
    )
    return evaluation.batches * forward.total_s


def answers_seconds(answers: Answers, rates: Rates, *, units: Units = WHOLE) -> float:
    """Of the questions of one evaluation, where every answer is as long as it may be."""
    planned = answers.planned
    prompts_s = evaluation_seconds(answers.prompts, rates, units=units)
    token_s = max(evaluation_seconds(answers.tokens, rates, units=units), rates.copy_seconds(round(answers.read_bytes)))
    return planned.groups * (prompts_s + (planned.max_new_tokens - 1) * token_s)


def _without_recomputation(run: Run, tape: Tape, known: Tape | None) -> Tape:
    if known is not None or run.activation_checkpointing.mode == "none":
        return known or tape
    return trace(replace(run, activation_checkpointing=ActivationCheckpointingConfig(mode="none")))
