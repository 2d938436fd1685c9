"""A whole training run, in the order a person would explain it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.data.chat_template import ChatRenderer, load_renderer
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.prepared import PreparedData, open_prepared, prepare
from sft_dist.errors import ConfigError
from sft_dist.metrics.logger import RunLogger
from sft_dist.model.build import build_model, check_weights
from sft_dist.model.export import export
from sft_dist.plan.accelerate import check_accelerate
from sft_dist.plan.choose import choose
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import read_accelerate_environment
from sft_dist.runtime.memory import least_memory_bytes
from sft_dist.runtime.process_group import device_of, process_group, run_on_main_first
from sft_dist.runtime.world import World
from sft_dist.sharding import registry
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.loop import Training
from sft_dist.train.preflight import check_run_directory
from sft_dist.train.summary import notices, summary


def run_training(config: Config) -> None:
    """Trains as ``config`` says, in this process and its peers; returns when ``final/`` is written.

    Raises:
        SftError: one of its kinds for every mistake in configuration, data or model, and when training diverges.
    """
    world = World.from_environment()
    device = device_of(world)
    with process_group(world, device) as store:
        config, run = decide(config, world, device)
        renderer = load_renderer(run.model.path, run.model.revision, run.data.chat_template)
        run_on_main_first(world, store, "prepare", lambda: prepare_run(run, renderer))
        train_data, eval_data = open_data(run)
        train(run, world, device, train_data, eval_data, renderer, config)
        dist.barrier()


def decide(config: Config, world: World, device: torch.device) -> tuple[Config, Run]:
    """Makes every ``auto`` concrete, the same on all ranks, and compares the result with what accelerate said."""
    accelerate = read_accelerate_environment()
    memory_bytes = least_memory_bytes(world, device)
    choice = choose(config, world.shape, memory_bytes=memory_bytes, accelerate=accelerate)
    run = resolve(choice.config, world.shape)
    if accelerate is not None:
        check_accelerate(accelerate, run)
    if world.is_main:
        for line in choice.reasons:
            Console(highlight=False).print(line, soft_wrap=True, markup=False)
    return choice.config, run


def train(
    run: Run,
    world: World,
    device: torch.device,
    train_data: PreparedData,
    eval_data: PreparedData | None,
    renderer: ChatRenderer,
    config: Config,
) -> None:
    """Build -> shard -> verify -> loop -> export."""
    strategy = registry.apply(run, build_model(run.model, seed=run.seed), device)
    spec = registry.describe(run, world.rank)
    verify_sharding(strategy, spec)
    order = TrainingOrder(train_data, run.batch, run.seed)
    num_steps = run.num_steps(train_data.num_sequences)
    # Dropout is drawn per rank; everything that all ranks must agree on was drawn before.
    torch.manual_seed(run.seed + world.rank)
    with _logger(run, world, config, num_steps) as logger:
        if logger is not None:
            logger.say(summary(run, spec, train_data, eval_data, num_steps=num_steps))
        Training(run, world, device, strategy, spec, order, eval_data, logger, num_steps=num_steps).train()
        final = Path(run.output_dir) / "final"
        trainable_only = run.model.method.type != "full"
        parameters = strategy.full_parameters(trainable_only=trainable_only)
        export(final, run.model, strategy.model, parameters, renderer.tokenizer, is_main=world.is_main)
        if logger is not None:
            logger.say(f"saved {final}")
    strategy.close()


@contextmanager
def _logger(run: Run, world: World, config: Config, num_steps: int) -> Iterator[RunLogger | None]:
    """The run's logger on rank 0, None elsewhere. From here on the run directory is taken."""
    if not world.is_main:
        yield None
        return
    folder = Path(run.output_dir)
    settings = config.model_dump(mode="json")
    with RunLogger(folder, run.logging.wandb, settings, num_steps=num_steps) as logger:
        (folder / "config.yaml").write_text(dump_config(config))
        yield logger


def prepare_run(run: Run, renderer: ChatRenderer) -> None:
    """Everything that can be found wrong without a GPU, and the data; on rank 0.

    Raises:
        ConfigError, CheckpointError, DataError: the run directory, the weights, the data.
    """
    check_run_directory(Path(run.output_dir), may_hold_a_run=False)
    check_weights(run.model)
    for name, sources in (("train", run.data.train), ("eval", run.data.eval)):
        if sources:
            _prepare_data(run, renderer, name)


def _prepare_data(run: Run, renderer: ChatRenderer, name: str) -> None:
    """Tokenises, masks and packs one set into the run directory, showing how far it is."""
    columns = SpinnerColumn(), TextColumn("{task.description} {task.completed:,.0f} rows"), TimeElapsedColumn()
    console = Console(highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"preparing data.{name}", total=None)
        counts = prepare(
            run.data.train if name == "train" else run.data.eval,
            run.data,
            renderer,
            _data_folder(run, name),
            key=f"data.{name}",
            on_row=lambda: progress.advance(task),
        )
    for line in notices(counts, run.data.max_seq_len):
        console.print(f"[yellow]data.{name}: {line}", soft_wrap=True)


def open_data(run: Run) -> tuple[PreparedData, PreparedData | None]:
    """Maps what rank 0 prepared: the training rows, and the held-out rows if there are any.

    Raises:
        ConfigError: this node does not see the files.
    """
    try:
        train_data = open_prepared(_data_folder(run, "train"))
        return train_data, open_prepared(_data_folder(run, "eval")) if run.data.eval else None
    except FileNotFoundError as e:
        raise ConfigError(
            f"output_dir: {run.output_dir} lacks the data that rank 0 prepared ({e.filename})",
            fix="set output_dir to a folder that all nodes share",
        ) from e


def _data_folder(run: Run, name: str) -> Path:
    return Path(run.output_dir) / "data" / name
