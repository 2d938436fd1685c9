"""A whole training run, in the order a person would explain it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sft_dist.checkpoint.artefact import prove_artefact, take_probes
from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.fresh_process import digest
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.store import sweep
from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.data.chat_template import ChatRenderer, TemplateSample, load_renderer
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.prepared import PreparedData, open_prepared, prepare
from sft_dist.data.sources import read_source
from sft_dist.errors import ConfigError
from sft_dist.metrics.logger import RunLogger
from sft_dist.model.build import build_model, check_weights
from sft_dist.model.export import UNFINISHED, export, publish
from sft_dist.plan.accelerate import check_accelerate
from sft_dist.plan.choose import choose
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import read_accelerate_environment
from sft_dist.runtime.memory import least_memory_bytes
from sft_dist.runtime.process_group import device_of, process_group, run_on_main_first
from sft_dist.runtime.world import World
from sft_dist.sharding import registry
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.loop import Training
from sft_dist.train.preflight import NEVER, check_run_directory
from sft_dist.train.resume import check_position, checkpoints_folder, find_checkpoint
from sft_dist.train.summary import notices, summary


def run_training(config: Config, *, resume: str = NEVER) -> None:
    """Trains as ``config`` says, in this process and its peers; returns when ``final/`` is written and proven.

    Args:
        resume: ``never``, ``auto`` or the path of a checkpoint.

    Raises:
        SftError: one of its kinds for every mistake in configuration, data or model, when training diverges, and when
            what was saved is not what was trained.
    """
    world = World.from_environment()
    device = device_of(world)
    with process_group(world, device) as store:
        config, run = decide(config, world, device)
        renderer = load_renderer(run.model.path, run.model.revision, run.data.chat_template)
        found = run_on_main_first(world, store, "prepare", lambda: prepare_run(run, renderer, resume))
        train_data, eval_data = open_data(run)
        start = None if found is None else Path(found)
        # Now, because after days of training the file may be gone.
        sample = renderer.sample(next(read_source(run.data.train[0]))) if world.is_main else None
        train(run, world, device, store, train_data, eval_data, renderer, config, sample, start=start)
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
    store: dist.Store,
    train_data: PreparedData,
    eval_data: PreparedData | None,
    renderer: ChatRenderer,
    config: Config,
    sample: TemplateSample | None,
    *,
    start: Path | None = None,
) -> None:
    """Build -> shard -> verify -> resume -> loop -> export -> proof.

    Args:
        sample: a row through the chat template, on rank 0.
        start: the checkpoint to go on from.
    """
    order = TrainingOrder(train_data, run.batch, run.seed)
    num_steps = run.num_steps(train_data.num_sequences)
    identity = identity_of(run, train_data)
    if start is not None:
        manifest = Manifest.read(start)
        manifest.identity.require_same(identity, checkpoint=start)
        if _is_finished(run, manifest, num_steps):
            if world.is_main:
                print(f"{run.output_dir} is finished: all {num_steps} steps are trained, final/ is there")
            return
    strategy = registry.apply(run, build_model(run.model, seed=run.seed), device)
    spec = registry.describe(run, world.rank)
    verify_sharding(strategy, spec)
    checkpointer = Checkpointer(
        checkpoints_folder(run.output_dir),
        keep_last=run.checkpoint.keep_last,
        identity=identity,
        strategy_name=run.strategy,
        settings=dump_config(config),
    )
    completed = 0
    if start is not None:
        manifest = checkpointer.load(start, strategy)
        check_position(manifest, order, num_steps=num_steps, checkpoint=start)
        completed = manifest.completed_steps
    with _logger(run, world, config, num_steps, completed) as logger:
        if logger is not None:
            logger.say(summary(run, spec, train_data, eval_data, num_steps=num_steps))
            if start is not None:
                logger.say(f"resumed   {start}: {completed:,} steps are behind it")
        Training(
            run, world, device, strategy, spec, order, eval_data, logger, checkpointer,
            num_steps=num_steps, completed=completed,
        ).train()  # fmt: skip
        _finish(run, world, device, store, strategy, train_data, renderer, sample)
        if logger is not None:
            logger.say(f"saved {Path(run.output_dir) / 'final'}" + _proven(run))
    strategy.close()


def _is_finished(run: Run, manifest: Manifest, num_steps: int) -> bool:
    return manifest.completed_steps == num_steps and (Path(run.output_dir) / "final").exists()


def _proven(run: Run) -> str:
    return ", proven in a fresh process" if run.checkpoint.prove_final else ", not proven (checkpoint.prove_final)"


def _finish(
    run: Run,
    world: World,
    device: torch.device,
    store: dist.Store,
    strategy: Strategy,
    train_data: PreparedData,
    renderer: ChatRenderer,
    sample: TemplateSample | None,
) -> None:
    """Writes ``final/``, which gets its name when a fresh process has found the trained model in it.

    Raises:
        CheckpointError: it cannot be written, or is not the trained model; it then stays as ``final.unfinished``.
    """
    final = Path(run.output_dir) / "final"
    probes = take_probes(strategy, train_data, device) if run.checkpoint.prove_final else []
    parameters = strategy.full_parameters(trainable_only=run.model.method.type != "full")
    saved = export(final, run.model, strategy.model, parameters, renderer.tokenizer, is_main=world.is_main)
    weights = {name: digest(tensor) for name, tensor in saved.items()}
    saved.clear()  # the fresh process needs the room

    def prove_and_publish() -> None:
        if run.checkpoint.prove_final:
            assert sample is not None
            prove_artefact(final.with_name(final.name + UNFINISHED), run.model, weights, probes, sample)
        publish(final)

    run_on_main_first(world, store, "final", prove_and_publish)


@contextmanager
def _logger(run: Run, world: World, config: Config, num_steps: int, completed: int) -> Iterator[RunLogger | None]:
    """The run's logger on rank 0, None elsewhere. From here on the run directory is taken."""
    if not world.is_main:
        yield None
        return
    folder = Path(run.output_dir)
    settings = config.model_dump(mode="json")
    with RunLogger(folder, run.logging.wandb, settings, num_steps=num_steps, completed=completed) as logger:
        (folder / "config.yaml").write_text(dump_config(config))
        yield logger


def prepare_run(run: Run, renderer: ChatRenderer, resume: str) -> str | None:
    """Everything that can be found wrong without a GPU, and the data; on rank 0.

    Returns:
        the checkpoint to go on from, or None.

    Raises:
        ConfigError, CheckpointError, DataError: the run directory, the checkpoint, the weights, the data.
    """
    check_run_directory(Path(run.output_dir), may_hold_a_run=resume != NEVER)
    checkpoint = find_checkpoint(resume, run.output_dir)
    sweep(checkpoints_folder(run.output_dir))
    check_weights(run.model)
    for name, sources in (("train", run.data.train), ("eval", run.data.eval)):
        if sources:
            _prepare_data(run, renderer, name)
    return None if checkpoint is None else str(checkpoint)


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
