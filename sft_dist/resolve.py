"""``resolve(config, world) -> Run``: everything that follows from the configuration, derived once."""

from __future__ import annotations

from sft_dist.config.schema import Config
from sft_dist.run import BatchPlan, Precision, Run
from sft_dist.runtime.world import WorldShape


def resolve(config: Config, world: WorldShape) -> Run:
    """A pure function of the configuration, the model's ``config.json`` and the world's shape.

    Needs no process group, no GPU and no weights.

    Raises:
        ConfigError: the model's configuration cannot be read, or asks for what is not supported.
    """
    from sft_dist.model.build import describe_model

    return Run(
        model=describe_model(config.model.path, config.model.revision, config.method, config.precision.compute),
        world=world,
        sharding=config.sharding,
        precision=Precision(
            compute=config.precision.compute, master=config.precision.master, reduce=config.precision.reduce
        ),
        batch=BatchPlan(
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            world_size=world.size,
            max_seq_len=config.data.max_seq_len,
        ),
        optim=config.optim,
        activation_checkpointing=config.activation_checkpointing,
        data=config.data,
        eval=config.eval,
        checkpoint=config.checkpoint,
        logging=config.logging,
        num_epochs=config.train.num_epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        output_dir=config.output_dir,
    )
