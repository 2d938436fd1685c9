"""``accelerate launch`` starts processes; what it says about the training must not contradict the run."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config.deepspeed import Zero3Knobs, load_knobs, one_error
from sft_dist.config.schema import Fsdp2Sharding, Zero1Sharding, Zero2Sharding, Zero3Sharding
from sft_dist.errors import ConfigError
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.runtime.accelerate_environment import AccelerateChoice

Finding = tuple[str, str]

# What ``accelerate config`` writes where nothing was wanted; stated or not, it contradicts nothing.
DEFAULT_ACCUMULATION, DEFAULT_CLIPPING = 1, 1.0


def check_accelerate(chosen: AccelerateChoice, run: Run) -> None:
    """Compares what accelerate chose with what will be trained; a value that is accelerate's default says nothing.

    Raises:
        ConfigError: naming both sides of every contradiction, and everything that is not supported at all.
    """
    findings = [(f"accelerate's {name} is not supported", fix) for name, fix in chosen.unsupported]
    findings += [*_strategy(chosen, run), *_fsdp(chosen, run), *_deepspeed(chosen, run), *_numbers(chosen, run)]
    if findings:
        raise one_error(findings)


def _against(name: str, ours: str, fix: str) -> Finding:
    return f"accelerate's {name} contradicts {ours}", fix


def _strategy(chosen: AccelerateChoice, run: Run) -> Iterator[Finding]:
    ours = f"sharding.strategy {run.strategy}"
    other = f"start with configs/accelerate's file for {run.strategy}" if run.strategy in ("ddp", "fsdp2") else ""
    if chosen.family == "fsdp" and run.strategy != "fsdp2":
        other = other or "start with --use_deepspeed"
        yield _against("--use_fsdp", ours, f"set sharding.strategy to fsdp2 or auto, or {other}")
    if chosen.family == "deepspeed" and run.strategy not in ZERO_STAGES:
        wanted = f"zero{chosen.zero_stage}" if chosen.zero_stage else "zero1, zero2 or zero3"
        yield _against("--use_deepspeed", ours, f"set sharding.strategy to {wanted} or auto, or {other}")


def _fsdp(chosen: AccelerateChoice, run: Run) -> Iterator[Finding]:
    sharding = run.sharding
    if isinstance(sharding, Fsdp2Sharding) and sharding.reshard_after_forward and chosen.reshard_after_forward is False:
        fix = "set sharding.reshard_after_forward to false"
        back = "fsdp_sharding_strategy to FULL_SHARD"
        if chosen.reshard_name.startswith("fsdp_reshard"):
            back = "fsdp_reshard_after_forward to true"
        yield _against(chosen.reshard_name, "sharding.reshard_after_forward true", f"{fix}, or {back}")
    mode = run.activation_checkpointing.mode
    if chosen.activation_checkpointing and mode != "full":
        yield _against(
            "fsdp_activation_checkpointing true",
            f"activation_checkpointing.mode {mode}",
            "set activation_checkpointing.mode to full or auto, or fsdp_activation_checkpointing to false",
        )


def _deepspeed(chosen: AccelerateChoice, run: Run) -> Iterator[Finding]:
    knobs = run.deepspeed
    if chosen.family != "deepspeed" or knobs is None:
        return
    stage = ZERO_STAGES[run.strategy]
    if chosen.zero_stage is not None and chosen.zero_stage != stage:
        yield _against(
            f"deepspeed zero_stage {chosen.zero_stage}",
            f"sharding.strategy {run.strategy}",
            f"set sharding.strategy to zero{chosen.zero_stage} or auto, or zero_stage to {stage}",
        )
    param_on_host = isinstance(knobs, Zero3Knobs) and knobs.offload_param.device == "cpu"
    parts = (
        ("optimizer", chosen.offload_optimizer, knobs.offload_optimizer.device == "cpu"),
        ("param", chosen.offload_param, param_on_host),
    )
    for part, theirs, ours in parts:
        if theirs and not ours:
            yield _against(
                f"deepspeed offload_{part}_device cpu",
                f"sharding.strategy {run.strategy}, whose knobs have no zero_optimization.offload_{part} on cpu",
                f"name a file with it as sharding.deepspeed_config, or set offload_{part}_device to none",
            )
    if chosen.deepspeed_config_file is not None:
        yield from _file(chosen.deepspeed_config_file, run, stage)


def _file(file: str, run: Run, stage: int) -> Iterator[Finding]:
    try:
        theirs = load_knobs(file, stage)
    except ConfigError as error:
        yield f"accelerate's deepspeed_config_file: {error.what}", error.fix
        return
    if theirs != run.deepspeed:
        assert isinstance(run.sharding, Zero1Sharding | Zero2Sharding | Zero3Sharding)
        ours = run.sharding.deepspeed_config
        named = "null, which is the shipped file" if ours is None else ours if isinstance(ours, str) else "its own keys"
        yield _against(
            f"deepspeed_config_file {file}",
            f"sharding.deepspeed_config ({named})",
            f"set sharding.deepspeed_config to {file}, or leave deepspeed_config_file out",
        )


def _numbers(chosen: AccelerateChoice, run: Run) -> Iterator[Finding]:
    compute = run.precision.compute
    if chosen.mixed_precision not in (None, compute):
        yield _against(
            f"--mixed_precision {chosen.mixed_precision}",
            f"precision.compute {compute}",
            f"set precision.compute to {chosen.mixed_precision}, or --mixed_precision to no",
        )
    steps, derived = chosen.gradient_accumulation_steps, run.batch.gradient_accumulation_steps
    if steps not in (None, DEFAULT_ACCUMULATION, derived):
        batch = run.batch
        sharing = f", sharding.sequence_parallel {batch.sequence_parallel}" if batch.sequence_parallel > 1 else ""
        yield _against(
            f"gradient_accumulation_steps {steps}",
            f"train.global_batch_size {batch.global_batch_size}: with {run.world.size} processes{sharing} and "
            f"train.micro_batch_size {batch.micro_batch_size} that makes {derived}",
            f"leave gradient_accumulation_steps out, or set it to {derived}",
        )
    clipping, norm = chosen.gradient_clipping, run.optim.max_grad_norm
    if clipping not in (None, DEFAULT_CLIPPING, norm or 0.0):
        yield _against(
            f"gradient_clipping {clipping}",
            f"optim.max_grad_norm {'null' if norm is None else norm}",
            f"set optim.max_grad_norm to {clipping or 'null'}, or leave gradient_clipping out",
        )
