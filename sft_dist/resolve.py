"""``resolve(config, world) -> Run``: everything that follows from the configuration, derived once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sft_dist.config.deepspeed import load_knobs
from sft_dist.config.schema import AutoSharding, Config, MethodConfig, Zero1Sharding, Zero2Sharding, Zero3Sharding
from sft_dist.errors import ConfigError
from sft_dist.model.spec import Dtype, ModelSpec
from sft_dist.run import ZERO_STAGES, BatchPlan, Precision, Run
from sft_dist.runtime.world import WorldShape

Describe = Callable[[str, str | None, MethodConfig, Dtype, Sequence[str]], ModelSpec]


def resolve(config: Config, world: WorldShape, *, describe: Describe | None = None) -> Run:
    """A pure function of the configuration, the model's ``config.json`` and the world's shape.

    Needs no process group, no GPU and no weights. Also reads the DeepSpeed file that ``sharding`` names, and the
    tokenizer where tokens are added or trained by themselves.

    Args:
        describe: in place of ``describe_model``, where many runs of one model are resolved.

    Raises:
        ConfigError: the model's configuration cannot be read, or asks for what is not supported; the DeepSpeed file is
            wrong; the parts of the run do not go together.
        ValueError: something is still ``auto``; ``plan.choose`` makes it concrete.
    """
    from sft_dist.model.describe import describe_model
    from sft_dist.sharding import registry
    from sft_dist.sharding.optim import check_no_decay

    sharding = config.sharding
    micro_batch_size = config.train.micro_batch_size
    if (
        isinstance(sharding, AutoSharding)
        or config.activation_checkpointing.mode == "auto"
        or micro_batch_size == "auto"
    ):
        keys = "sharding.strategy, activation_checkpointing.mode or train.micro_batch_size"
        raise ValueError(f"{keys} is auto: call plan.choose first")
    deepspeed = None
    if isinstance(sharding, Zero1Sharding | Zero2Sharding | Zero3Sharding):
        deepspeed = load_knobs(sharding.deepspeed_config, ZERO_STAGES[sharding.strategy])
    final, best = config.final_state, config.best_goal
    run = Run(
        model=(describe or describe_model)(
            config.model.path,
            config.model.revision,
            config.method,
            config.precision.compute,
            config.model.add_tokens,
        ),
        world=world,
        sharding=sharding,
        deepspeed=deepspeed,
        precision=Precision(
            compute=config.precision.compute,
            master=config.precision.master,
            reduce=config.precision.reduce,
            optimizer_state=config.precision.optimizer_state or config.precision.master,
        ),
        batch=BatchPlan(
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=micro_batch_size,
            world_size=world.size // sharding.sequence_parallel,
            max_seq_len=config.data.max_seq_len,
            sequence_parallel=sharding.sequence_parallel,
        ),
        optim=config.optim,
        activation_checkpointing=config.activation_checkpointing,
        data=config.data,
        spikes=config.spikes,
        eval=config.eval,
        early_stopping=config.early_stopping,
        checkpoint=config.checkpoint.model_copy(
            update={
                "final": final,
                "keep_best": config.checkpoint.keep_best or final == "best",
                "best_metric": best.metric,
                "best_mode": best.mode,
            }
        ),
        logging=config.logging,
        num_epochs=config.train.num_epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        neftune_alpha=config.train.neftune_alpha,
        label_smoothing=config.train.label_smoothing,
        compile=config.train.compile,
        output_dir=config.output_dir,
    )
    if run.optim.no_decay:
        check_no_decay(run)
    refusal = registry.unsupported(run)
    if refusal is not None:
        raise ConfigError(refusal.why, fix=refusal.fix)
    return run


def described_once(describe: Describe | None = None) -> Describe:
    """``describe_model``, or what stands in its place, called once for all runs of one model."""
    from sft_dist.model.describe import describe_model

    known: dict[tuple[str, ...], ModelSpec] = {}

    def described(
        path: str, revision: str | None, method: MethodConfig, compute: Dtype, add_tokens: Sequence[str]
    ) -> ModelSpec:
        key = (path, revision or "", method.model_dump_json(), compute, *add_tokens)
        if key not in known:
            known[key] = (describe or describe_model)(path, revision, method, compute, add_tokens)
        return known[key]

    return described
