"""A whole training run, in the order a person would explain it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from rich.markup import escape

from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import Identity, Manifest, Position
from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.errors import Preempted
from sft_dist.metrics.heartbeat import Heartbeat
from sft_dist.metrics.logger import RunLogger
from sft_dist.run import Run
from sft_dist.runtime.memory import most_allocated_bytes
from sft_dist.runtime.process_group import process_group, run_on_main_first
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World
from sft_dist.sharding import registry
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.artefact import proven, write_artefact
from sft_dist.train.books import Books
from sft_dist.train.control import require_metrics
from sft_dist.train.early_stopping import has_fired
from sft_dist.train.evaluations import EvaluationFiles, evaluations_of
from sft_dist.train.final_state import take_final_state
from sft_dist.train.from_mirror import replace_damaged
from sft_dist.train.guard import Guard
from sft_dist.train.loading import loading
from sft_dist.train.loop import Training
from sft_dist.train.outlook import Outlook, look_ahead
from sft_dist.train.position import position_after
from sft_dist.train.preflight import NEVER
from sft_dist.train.profiling import Profiling
from sft_dist.train.ready import Inputs, Process, make_ready, warn
from sft_dist.train.receipt import identity_values, made_with
from sft_dist.train.rehearsal import rehearse
from sft_dist.train.rehearsal_items import Stage
from sft_dist.train.rehearsed import was_rehearsed
from sft_dist.train.resume import changed_settings, check_position, checkpoints_folder
from sft_dist.train.resume_receipt import differences, resume_receipt
from sft_dist.train.run_files import CONFIG, keep_file, writing_into
from sft_dist.train.starting_point import newest_valid
from sft_dist.train.summary import summary
from sft_dist.watchdog.watch import Watchdog

FP32_BYTES = 4

# Whether a run is rehearsed: not, before it, or without it.
Rehearsing = Literal["no", "first", "only"]


def run_training(
    config: Config,
    *,
    resume: str = NEVER,
    allowed: Collection[str] = (),
    rehearsing: Rehearsing = "no",
    profiled_steps: int = 0,
    on_news: Callable[[], None] = lambda: None,
    on_identity: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> None:
    """Trains as ``config`` says, in this process and its peers; returns when ``final/`` is written and proven.

    Args:
        resume: ``never``, ``auto`` or the path of a checkpoint.
        allowed: names of the identity (``checkpoint/identity.py``) in which the checkpoint may differ.
        profiled_steps: to be traced.
        on_news: called on rank 0 when the run directory has more to be looked at: when training begins, and after each
            evaluation.
        on_identity: called on every rank with what the run is (``receipt.identity_values``), before the model is built;
            what it raises on all of them ends the run.

    Raises:
        SftError: one of its kinds for every mistake in configuration, data or model, when training diverges, and when
            what was saved is not what was trained.
        Preempted: a signal ended training. This process is then to end: it no longer heeds such signals.
    """
    world, rules = World.from_environment(), config.watchdog
    if rehearsing == "only":
        rules = rules.model_copy(update={"enabled": False})  # it would leave something in the run directory
    with (
        Signals(is_main=world.is_main) as signals,
        Heartbeat() as heartbeat,
        Watchdog(rules, Path(config.output_dir), world, heartbeat) as watchdog,
    ):
        _run_training(
            config,
            signals,
            heartbeat,
            watchdog,
            resume=resume,
            allowed=allowed,
            rehearsing=rehearsing,
            profiled_steps=profiled_steps,
            on_news=on_news,
            on_identity=on_identity,
        )


def _run_training(
    config: Config,
    signals: Signals,
    heartbeat: Heartbeat,
    watchdog: Watchdog,
    *,
    resume: str,
    allowed: Collection[str],
    rehearsing: Rehearsing,
    profiled_steps: int,
    on_news: Callable[[], None],
    on_identity: Callable[[Mapping[str, Any]], None],
) -> None:
    # A rehearsal alone leaves the folder as it was.
    ready = make_ready(config, resume=resume, heartbeat=None if rehearsing == "only" else heartbeat, watchdog=watchdog)
    run, process, inputs = ready.run, ready.process, ready.inputs
    # Before there is a process group: a plan of ranks that share sequences makes one of its own.
    outlook = None
    if process.world.is_main:
        outlook = look_ahead(ready.config, run, process.device, inputs.train_data, inputs.eval_data)
    _set_limits(watchdog, run, process, outlook)
    with process_group(process.world, process.device, ready.store):
        start = newest_valid(
            ready.checkpoints,
            own=checkpoints_folder(run.output_dir),
            replace=_by_its_copy(ready.config, process),
        )
        try:
            train(
                run, ready.config, process, inputs, outlook, signals,
                start=start, allowed=allowed, rehearsing=rehearsing, profiled_steps=profiled_steps, on_news=on_news,
                on_identity=on_identity,
            )  # fmt: skip
        except Preempted:
            # A launcher may end the others as soon as one has ended, and rank 0 has more to do.
            dist.barrier()
            raise
        dist.barrier()


def _set_limits(watchdog: Watchdog, run: Run, process: Process, outlook: Outlook | None) -> None:
    """What the run's size and its plan, which rank 0 alone has, say of how long things take."""

    def planned() -> str | None:
        expected = None if outlook is None else outlook.expected
        return None if expected is None or expected.step_s is None else str(expected.step_s)

    step_s = run_on_main_first(process.world, process.store, "planned step", planned)
    watchdog.limits.planned(
        model_bytes=FP32_BYTES * run.model.num_parameters,
        saved_bytes=3 * FP32_BYTES * run.model.num_trainable // run.world.size,  # with two moments
        step_s=None if step_s is None else float(step_s),
    )


def train(
    run: Run,
    config: Config,
    process: Process,
    inputs: Inputs,
    outlook: Outlook | None,
    signals: Signals,
    *,
    start: Path | None = None,
    allowed: Collection[str] = (),
    rehearsing: Rehearsing = "no",
    profiled_steps: int = 0,
    on_news: Callable[[], None] = lambda: None,
    on_identity: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> None:
    """Build -> shard -> verify -> resume -> rehearsal -> loop -> export -> proof.

    Args:
        config: that ``run`` was resolved from.
        outlook: on rank 0; None elsewhere.
        start: the checkpoint to go on from.
        allowed: in what it may differ from this run.
        profiled_steps, on_news, on_identity: as ``run_training`` has them.
    """
    world, heartbeat, final = process.world, process.heartbeat, Path(run.output_dir) / "final"
    order = TrainingOrder(inputs.train_data, run.batch, run.seed)
    num_steps = run.num_steps(inputs.train_data.num_sequences)
    identity = identity_of(run, inputs.train_data)
    who = identity_values(identity, str(inputs.renderer.tokenizer.chat_template))
    on_identity(who)
    completed = 0 if start is None else check_position(start, identity, order, num_steps=num_steps, allowed=allowed)
    heartbeat.at(completed, num_steps)
    require_metrics(run, inputs.eval_data)
    is_stopped = start is not None and has_fired(run.early_stopping, Manifest.read(start).position.waiting)
    if (completed == num_steps or is_stopped) and final.exists():
        if world.is_main:
            print(_finished(run, completed, num_steps))
        return
    books = None if outlook is None else _books(run, config, process, inputs, outlook, who, num_steps, completed)
    with loading(world, on_read=process.limits.read) as on_bytes:
        strategy = registry.apply(run, process.device, on_bytes=on_bytes)
    spec = registry.describe(run, world.rank)
    verify_sharding(strategy, spec)
    checkpointer = Checkpointer(
        checkpoints_folder(run.output_dir),
        rules=run.checkpoint,
        identity=identity,
        strategy_name=run.strategy,
        settings=dump_config(config),
        on_file=process.limits.saved,
    )
    manifest = None if start is None else checkpointer.load(start, strategy)
    position = Position(completed_steps=0) if manifest is None else manifest.position
    if rehearsing != "no" and completed < num_steps and not was_rehearsed():
        stage = Stage(
            run, world, process.device, strategy, spec, order, inputs.eval_data, checkpointer, outlook,
            lambda folder: write_artefact(folder, run, config, process, inputs, strategy), num_steps, position,
        )  # fmt: skip
        with heartbeat.phase("rehearsing"):
            rehearsed_s = rehearse(stage)
        if books is not None:
            books.account.rehearsed(rehearsed_s)
    if rehearsing == "only":
        checkpointer.close()
        strategy.close()
        return
    with _logger(run, world, config, num_steps, completed, on_news) as logger:
        if logger is not None and books is not None:
            logger.say(summary(run, spec, inputs.train_data, inputs.eval_data, num_steps=num_steps))
            if start is not None and manifest is not None:
                now = position_after(run, order, completed, num_steps=num_steps)
                _tell_of_the_start(logger, run, config, start, manifest, identity, now, num_steps=num_steps)
                if final.exists():
                    logger.say(f"{final} is of the shorter run, until this one ends")
            books.begin(logger)
            on_news()
        evaluations = evaluations_of(run, config, process, inputs, say=warn if logger is None else logger.say)
        files = None if logger is None else EvaluationFiles(Path(run.output_dir), logger, completed=completed)
        guard = Guard(
            run, order, strategy, checkpointer, logger,
            partial(inputs.renderer.tokenizer.decode, skip_special_tokens=False), position,
        )  # fmt: skip
        profiling = None
        if profiled_steps:
            profiling = Profiling(Path(run.output_dir), rank=world.rank, device=process.device, steps=profiled_steps)
        training = Training(
            run, world, process.device, strategy, spec, order, evaluations, logger, files,
            None if books is None else books.account, checkpointer, signals, heartbeat, guard,
            num_steps=num_steps, position=position, profiling=profiling,
        )  # fmt: skip
        try:
            with heartbeat.phase("training"), signals.while_training():
                training.train()
        except Preempted:
            if logger is not None and books is not None:
                books.break_off(logger)
            raise
        peak_bytes = most_allocated_bytes(process.device)
        with heartbeat.phase("exporting"):
            state = take_final_state(
                run, checkpointer, strategy,
                completed=training.completed, num_steps=num_steps, waiting=training.control.waiting,
            )  # fmt: skip
            checkpointer.close()
            weights = write_artefact(final, run, config, process, inputs, strategy, state=state)
            if logger is not None and books is not None:
                logger.say(f"saved {final}{proven(run)}: the state {escape(state.told())}")
                books.close(logger, state, weights, peak_allocated_bytes=peak_bytes, ranks=training.ranks)
            _require_metrics(process, logger)
    strategy.close()


def _finished(run: Run, completed: int, num_steps: int) -> str:
    if completed == num_steps:
        return f"{run.output_dir} is finished: all {num_steps:,} steps are trained, final/ is there"
    return (
        f"{run.output_dir} is finished: it stopped early at step {completed:,} of {num_steps:,}, final/ is there; "
        "to go on, raise early_stopping.patience or set early_stopping to null"
    )


def _tell_of_the_start(
    logger: RunLogger,
    run: Run,
    config: Config,
    start: Path,
    manifest: Manifest,
    identity: Identity,
    now: Position,
    *,
    num_steps: int,
) -> None:
    """Where a resumed run is, and everything that is not what it was."""
    for line in resume_receipt(start, manifest, run, now, num_steps=num_steps):
        logger.say(escape(line))
    allowed = [manifest.identity.told(name, identity) for name in manifest.identity.differences(identity)]
    for line in (*allowed, *differences(manifest, now), *changed_settings(start, config)):
        logger.say(f"[yellow]changed   {escape(line)}")


def _books(
    run: Run,
    config: Config,
    process: Process,
    inputs: Inputs,
    outlook: Outlook,
    who: Mapping[str, Any],
    num_steps: int,
    completed: int,
) -> Books:
    """The account of this session, opened before ``metrics.jsonl`` is shortened."""
    return Books.open(
        run,
        inputs.train_data,
        outlook,
        made_with(run, config, who, process.device),
        num_steps=num_steps,
        completed=completed,
        started=process.started,
    )


def _by_its_copy(config: Config, process: Process) -> Callable[[Path], bool]:
    """Replaces a damaged checkpoint. The others wait on the store, where nothing times out while rank 0 fetches."""

    def replace(checkpoint: Path) -> bool:
        def fetch() -> str | None:
            return "whole" if replace_damaged(config, checkpoint, say=warn) else None

        if config.checkpoint.mirror is None:
            return False
        return run_on_main_first(process.world, process.store, f"copy of {checkpoint.name}", fetch) is not None

    return replace


def _require_metrics(process: Process, logger: RunLogger | None) -> None:
    """Ends the run on every rank with the error of the one that writes its metrics, if it could not."""

    def require() -> None:
        assert logger is not None
        logger.require_written()

    run_on_main_first(process.world, process.store, "metrics", require)


@contextmanager
def _logger(
    run: Run, world: World, config: Config, num_steps: int, completed: int, on_news: Callable[[], None]
) -> Iterator[RunLogger | None]:
    """The run's logger on rank 0, None elsewhere. From here on the run directory is taken."""
    if not world.is_main:
        yield None
        return
    folder = Path(run.output_dir)
    settings = config.model_dump(mode="json")
    with writing_into(folder):
        logger = RunLogger(folder, run.logging, settings, num_steps=num_steps, completed=completed, on_news=on_news)
    with logger:
        with writing_into(folder):
            keep_file(folder / CONFIG, dump_config(config))
        yield logger
