"""A whole training run, in the order a person would explain it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist
from rich.markup import escape

from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.errors import Preempted
from sft_dist.metrics.heartbeat import Heartbeat
from sft_dist.metrics.logger import RunLogger
from sft_dist.run import Run
from sft_dist.runtime.memory import most_allocated_bytes
from sft_dist.runtime.process_group import process_group, run_on_main_first
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World
from sft_dist.train.artefact import proven, write_artefact
from sft_dist.train.asked import ALONE, Asked
from sft_dist.train.books import Books
from sft_dist.train.control import require_metrics
from sft_dist.train.course import Built, Course, build, course_of
from sft_dist.train.evaluations import EvaluationFiles, evaluations_of
from sft_dist.train.final_state import take_final_state
from sft_dist.train.from_mirror import replace_damaged
from sft_dist.train.guard import Guard
from sft_dist.train.loop import Training
from sft_dist.train.outlook import Outlook, look_ahead
from sft_dist.train.position import position_after
from sft_dist.train.profiling import Profiling
from sft_dist.train.ready import Inputs, Process, make_ready, warn
from sft_dist.train.receipt import made_with
from sft_dist.train.rehearsal import rehearse
from sft_dist.train.rehearsal_items import Stage
from sft_dist.train.rehearsed import was_rehearsed
from sft_dist.train.resume import changed_settings, checkpoints_folder
from sft_dist.train.resume_receipt import differences, resume_receipt
from sft_dist.train.run_files import CONFIG, keep_file, writing_into
from sft_dist.train.starting_point import newest_valid
from sft_dist.train.summary import summary
from sft_dist.watchdog.watch import Watchdog

FP32_BYTES = 4


def run_training(config: Config, asked: Asked = ALONE) -> None:
    """Trains as ``config`` says, in this process and its peers; returns when ``final/`` is written and proven.

    Raises:
        SftError: one of its kinds for every mistake in configuration, data or model, when training diverges, and when
            what was saved is not what was trained.
        Preempted: a signal ended training. This process is then to end: it no longer heeds such signals.
    """
    world, rules = World.from_environment(), config.watchdog
    if asked.rehearsing == "only":
        rules = rules.model_copy(update={"enabled": False})  # it would leave something in the run directory
    with (
        Signals(is_main=world.is_main) as signals,
        Heartbeat() as heartbeat,
        Watchdog(rules, Path(config.output_dir), world, heartbeat) as watchdog,
    ):
        _run_training(config, asked, signals, heartbeat, watchdog)


def _run_training(config: Config, asked: Asked, signals: Signals, heartbeat: Heartbeat, watchdog: Watchdog) -> None:
    # A rehearsal alone leaves the folder as it was.
    beat = None if asked.rehearsing == "only" else heartbeat
    ready = make_ready(config, resume=asked.resume, before=asked.before, heartbeat=beat, watchdog=watchdog)
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
            train(run, ready.config, process, inputs, outlook, signals, asked, start=start)
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
    asked: Asked = ALONE,
    *,
    start: Path | None = None,
) -> None:
    """Build -> shard -> verify -> resume -> rehearsal -> loop -> export -> proof.

    Args:
        config: that ``run`` was resolved from.
        outlook: on rank 0; None elsewhere.
        start: the checkpoint to go on from.
    """
    course = course_of(run, config, process, inputs, asked, start=start)
    process.heartbeat.at(course.completed, course.num_steps)
    require_metrics(run, inputs.eval_data)
    if course.is_finished:
        if process.world.is_main:
            print(_finished(course))
        return
    # Before ``metrics.jsonl`` is shortened.
    books = None if outlook is None else _books(course, outlook)
    built = build(course)
    if asked.rehearsing != "no" and course.completed < course.num_steps and not was_rehearsed():
        with process.heartbeat.phase("rehearsing"):
            rehearsed_s = rehearse(_stage(course, built, outlook))
        if books is not None:
            books.account.rehearsed(rehearsed_s)
    if asked.rehearsing == "only":
        built.checkpointer.close()
        built.strategy.close()
        return
    with _logger(course, asked.on_news) as logger:
        if logger is not None and books is not None:
            _tell_of_the_start(logger, course, built)
            books.begin(logger)
            asked.on_news()
        training = _training(course, built, signals, logger, books, profiled_steps=asked.profiled_steps)
        try:
            with process.heartbeat.phase("training"), signals.while_training():
                training.train()
        except Preempted:
            if logger is not None and books is not None:
                books.break_off(logger)
            raise
        with process.heartbeat.phase("exporting"):
            _export(course, built, training, logger, books)
    built.strategy.close()


def _stage(course: Course, built: Built, outlook: Outlook | None) -> Stage:
    return Stage(
        run=course.run,
        world=course.process.world,
        device=course.process.device,
        strategy=built.strategy,
        spec=built.spec,
        order=course.order,
        eval_data=course.inputs.eval_data,
        checkpointer=built.checkpointer,
        outlook=outlook,
        write_final=lambda folder: write_artefact(
            folder, course.run, course.config, course.process, course.inputs, built.strategy
        ),
        num_steps=course.num_steps,
        position=built.position,
    )


def _training(
    course: Course,
    built: Built,
    signals: Signals,
    logger: RunLogger | None,
    books: Books | None,
    *,
    profiled_steps: int,
) -> Training:
    run, process, inputs = course.run, course.process, course.inputs
    folder = Path(run.output_dir)
    decode = partial(inputs.renderer.tokenizer.decode, skip_special_tokens=False)
    profiling = None
    if profiled_steps:
        profiling = Profiling(folder, rank=process.world.rank, device=process.device, steps=profiled_steps)
    return Training(
        run,
        process.world,
        process.device,
        built.strategy,
        built.spec,
        course.order,
        evaluations_of(run, course.config, process, inputs, say=warn if logger is None else logger.say),
        logger,
        None if logger is None else EvaluationFiles(folder, logger, completed=course.completed),
        None if books is None else books.account,
        built.checkpointer,
        signals,
        process.heartbeat,
        Guard(run, course.order, built.strategy, built.checkpointer, logger, decode, built.position),
        num_steps=course.num_steps,
        position=built.position,
        profiling=profiling,
    )


def _export(
    course: Course,
    built: Built,
    training: Training,
    logger: RunLogger | None,
    books: Books | None,
) -> None:
    """The state that the run ends with becomes ``final/``, and is proven; the books are closed."""
    run, process = course.run, course.process
    peak_bytes = most_allocated_bytes(process.device)
    state = take_final_state(
        run,
        built.checkpointer,
        built.strategy,
        completed=training.completed,
        num_steps=course.num_steps,
        waiting=training.control.waiting,
    )
    built.checkpointer.close()
    weights = write_artefact(course.final, run, course.config, process, course.inputs, built.strategy, state=state)
    if logger is not None and books is not None:
        logger.say(f"saved {course.final}{proven(run)}: the state {escape(state.told())}")
        books.close(logger, state, weights, peak_allocated_bytes=peak_bytes, ranks=training.ranks)
    _require_metrics(process, logger)


def _finished(course: Course) -> str:
    folder = course.run.output_dir
    if course.completed == course.num_steps:
        return f"{folder} is finished: all {course.num_steps:,} steps are trained, final/ is there"
    return (
        f"{folder} is finished: it stopped early at step {course.completed:,} of {course.num_steps:,}, final/ is "
        "there; to go on, raise early_stopping.patience or set early_stopping to null"
    )


def _tell_of_the_start(logger: RunLogger, course: Course, built: Built) -> None:
    """What the run is; of a resumed one, where it is, and everything that is not what it was."""
    run, start, manifest = course.run, course.start, built.manifest
    train_data, eval_data = course.inputs.train_data, course.inputs.eval_data
    logger.say(summary(run, built.spec, train_data, eval_data, num_steps=course.num_steps))
    if start is None or manifest is None:
        return
    now = position_after(run, course.order, course.completed, num_steps=course.num_steps)
    for line in resume_receipt(start, manifest, run, now, num_steps=course.num_steps):
        logger.say(escape(line))
    then = manifest.identity
    allowed = [then.told(name, course.identity) for name in then.differences(course.identity)]
    for line in (*allowed, *differences(manifest, now), *changed_settings(start, course.config)):
        logger.say(f"[yellow]changed   {escape(line)}")
    if course.final.exists():
        logger.say(f"{course.final} is of the shorter run, until this one ends")


def _books(course: Course, outlook: Outlook) -> Books:
    """The account of this session."""
    return Books.open(
        course.run,
        course.inputs.train_data,
        outlook,
        made_with(course.run, course.config, course.who, course.process.device),
        num_steps=course.num_steps,
        completed=course.completed,
        started=course.process.started,
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
def _logger(course: Course, on_news: Callable[[], None]) -> Iterator[RunLogger | None]:
    """The run's logger on rank 0, None elsewhere. From here on the run directory is taken."""
    if not course.process.world.is_main:
        yield None
        return
    folder, settings = Path(course.run.output_dir), course.config.model_dump(mode="json")
    with writing_into(folder):
        logger = RunLogger(
            folder,
            course.run.logging,
            settings,
            num_steps=course.num_steps,
            completed=course.completed,
            on_news=on_news,
        )
    with logger:
        with writing_into(folder):
            keep_file(folder / CONFIG, dump_config(course.config))
        yield logger
