"""A whole training run, in the order a person would explain it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from sft_dist.checkpoint.artefact import prove_artefact, take_probes
from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.fresh_process import digest
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import Identity
from sft_dist.checkpoint.store import sweep
from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.data.chat_template import ChatRenderer, TemplateSample
from sft_dist.data.files import is_url
from sft_dist.data.fingerprint import is_offline
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.messages import Conversation
from sft_dist.data.prepare import Cache, cache_folder, prepare_sets
from sft_dist.data.prepared import PreparedData, open_prepared
from sft_dist.data.sources import read_source
from sft_dist.errors import CheckpointError, ConfigError, DataError, Preempted, RowError
from sft_dist.export.provenance import training_section
from sft_dist.metrics.logger import RunLogger
from sft_dist.model.export import UNFINISHED, export, publish
from sft_dist.model.renderer import renderer_of
from sft_dist.model.untrained import untrained_tokens
from sft_dist.model.weights import check_weights
from sft_dist.plan.accelerate import check_accelerate
from sft_dist.plan.choose import choose
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import read_accelerate_environment
from sft_dist.runtime.memory import least_memory_bytes, most_allocated_bytes
from sft_dist.runtime.process_group import device_of, join, process_group, run_on_main_first
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World
from sft_dist.sharding import registry
from sft_dist.sharding.optim import unsupported_on
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.audit import audit_prepared
from sft_dist.train.books import Books
from sft_dist.train.data import showing, told_of_rows
from sft_dist.train.from_mirror import bring, check_mirror, needs_storage, replace_damaged
from sft_dist.train.loop import Training
from sft_dist.train.outlook import Outlook, look_ahead
from sft_dist.train.position import position_after
from sft_dist.train.preflight import NEVER, take_run_directory
from sft_dist.train.receipt import made_with
from sft_dist.train.rehearsal import Stage, rehearse
from sft_dist.train.rehearsed import remove_leftovers, was_rehearsed
from sft_dist.train.resume import changed_settings, check_position, checkpoints_folder, find_checkpoints
from sft_dist.train.resume_receipt import differences, resume_receipt
from sft_dist.train.run_files import keep_file, writing_into
from sft_dist.train.starting_point import newest_valid
from sft_dist.train.summary import long_rows_notice, summary, untrained_notice

# In the run directory: what was found in the data.
AUDIT = "audit.json"


# Whether a run is rehearsed: not, before it, or without it.
Rehearsing = Literal["no", "first", "only"]


def run_training(
    config: Config, *, resume: str = NEVER, allowed: Collection[str] = (), rehearsing: Rehearsing = "no"
) -> None:
    """Trains as ``config`` says, in this process and its peers; returns when ``final/`` is written and proven.

    Args:
        resume: ``never``, ``auto`` or the path of a checkpoint.
        allowed: names of the identity (``checkpoint/identity.py``) in which the checkpoint may differ.

    Raises:
        SftError: one of its kinds for every mistake in configuration, data or model, when training diverges, and when
            what was saved is not what was trained.
        Preempted: a signal ended training. This process is then to end: it no longer heeds such signals.
    """
    with Signals(is_main=World.from_environment().is_main) as signals:
        _run_training(config, signals, resume=resume, allowed=allowed, rehearsing=rehearsing)


def _run_training(
    config: Config, signals: Signals, *, resume: str, allowed: Collection[str], rehearsing: Rehearsing
) -> None:
    ready = make_ready(config, resume=resume)
    run, process, inputs = ready.run, ready.process, ready.inputs
    # Before there is a process group: a plan of ranks that share sequences makes one of its own.
    outlook = None
    if process.world.is_main:
        outlook = look_ahead(ready.config, run, process.device, inputs.train_data, inputs.eval_data)
    with process_group(process.world, process.device, ready.store):
        start = newest_valid(
            ready.checkpoints,
            own=checkpoints_folder(run.output_dir),
            replace=_by_its_copy(ready.config, process),
        )
        try:
            train(
                run, ready.config, process, inputs, outlook, signals,
                start=start, allowed=allowed, rehearsing=rehearsing,
            )  # fmt: skip
        except Preempted:
            # A launcher may end the others as soon as one has ended, and rank 0 has more to do.
            dist.barrier()
            raise
        dist.barrier()


@dataclass(frozen=True)
class Process:
    """This process: its place among its peers, its accelerator, and the store that all of them share.

    Args:
        started: on ``time.perf_counter``; its machine is paid for from then on.
    """

    world: World
    device: torch.device
    store: dist.Store
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Inputs:
    """What is ready before the model is built.

    Args:
        eval_data: held-out rows, or None.
        sample: a row through the chat template, on rank 0. Kept, because after days of training its file may be gone.
    """

    train_data: PreparedData
    eval_data: PreparedData | None
    renderer: ChatRenderer
    sample: TemplateSample | None


@dataclass(frozen=True)
class Found:
    """What rank 0 tells the others when everything is ready; paths.

    Args:
        checkpoints: to go on from, the newest first.
        train_data, eval_data: what it prepared.
    """

    checkpoints: tuple[str, ...]
    train_data: str
    eval_data: str | None


@dataclass(frozen=True)
class Ready:
    """What stands before there is a process group.

    Args:
        config, run: with every ``auto`` made concrete.
        store: that the processes of the launch share.
        checkpoints: to go on from, the newest first.
    """

    config: Config
    run: Run
    process: Process
    store: dist.Store
    inputs: Inputs
    checkpoints: list[Path]


def make_ready(config: Config, *, resume: str) -> Ready:
    """Meets the other processes, decides, and prepares the data on rank 0 or finds them prepared.

    Args:
        resume: ``never``, ``auto`` or the path of a checkpoint.
    """
    world = World.from_environment()
    store = join(world)
    process = Process(world, device_of(world), dist.PrefixStore("sft_dist", store))
    config, run = decide(config, process)
    load = renderer_of(config.model, config.data)
    renderer = load()
    # Before there is a process group: nothing of it can time out while rank 0 tokenises for hours.
    told = run_on_main_first(world, process.store, "prepare", lambda: prepare_run(run, config, renderer, load, resume))
    found = Found(**json.loads(told or ""))
    inputs = open_inputs(run, renderer, found, is_main=world.is_main)
    return Ready(config, run, process, store, inputs, [Path(path) for path in found.checkpoints])


def decide(config: Config, process: Process) -> tuple[Config, Run]:
    """Makes every ``auto`` concrete, the same on all ranks, and compares the result with what accelerate said."""
    world, device = process.world, process.device
    accelerate = read_accelerate_environment()
    memory_bytes = least_memory_bytes(world, device, process.store)
    choice = choose(config, world.shape, memory_bytes=memory_bytes, accelerate=accelerate)
    run = resolve(choice.config, world.shape)
    reason = unsupported_on(run, device.type)
    if reason is not None:
        raise ConfigError(reason, fix="set optim.paged to false")
    if accelerate is not None:
        check_accelerate(accelerate, run)
    if world.is_main:
        for line in choice.reasons:
            Console(highlight=False).print(line, soft_wrap=True, markup=False)
    return choice.config, run


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
) -> None:
    """Build -> shard -> verify -> resume -> rehearsal -> loop -> export -> proof.

    Args:
        config: that ``run`` was resolved from.
        outlook: on rank 0; None elsewhere.
        start: the checkpoint to go on from.
        allowed: in what it may differ from this run.
    """
    world, final = process.world, Path(run.output_dir) / "final"
    order = TrainingOrder(inputs.train_data, run.batch, run.seed)
    num_steps = run.num_steps(inputs.train_data.num_sequences)
    identity = identity_of(run, inputs.train_data)
    completed = 0 if start is None else check_position(start, identity, order, num_steps=num_steps, allowed=allowed)
    if completed == num_steps and final.exists():
        if world.is_main:
            print(f"{run.output_dir} is finished: all {num_steps:,} steps are trained, final/ is there")
        return
    books = None if outlook is None else _books(run, process, inputs, outlook, identity, num_steps, completed)
    with _loading(world) as on_bytes:
        strategy = registry.apply(run, process.device, on_bytes=on_bytes)
    spec = registry.describe(run, world.rank)
    verify_sharding(strategy, spec)
    checkpointer = Checkpointer(
        checkpoints_folder(run.output_dir),
        rules=run.checkpoint,
        identity=identity,
        strategy_name=run.strategy,
        settings=dump_config(config),
    )
    manifest = None if start is None else checkpointer.load(start, strategy)
    if rehearsing != "no" and completed < num_steps and not was_rehearsed():
        stage = Stage(
            run, world, process.device, strategy, spec, order, inputs.eval_data, checkpointer, outlook,
            lambda folder: _write_artefact(folder, run, config, process, inputs, strategy), num_steps, completed,
        )  # fmt: skip
        rehearsed_s = rehearse(stage)
        if books is not None:
            books.account.rehearsed(rehearsed_s)
    if rehearsing == "only":
        checkpointer.close()
        strategy.close()
        return
    with _logger(run, world, config, num_steps, completed) as logger:
        if logger is not None and books is not None:
            logger.say(summary(run, spec, inputs.train_data, inputs.eval_data, num_steps=num_steps))
            if start is not None and manifest is not None:
                now = position_after(run, order, completed, num_steps=num_steps)
                for line in resume_receipt(start, manifest, run, now, num_steps=num_steps):
                    logger.say(escape(line))
                allowed_here = [manifest.identity.told(n, identity) for n in manifest.identity.differences(identity)]
                for line in (*allowed_here, *differences(manifest, now)):
                    logger.say(f"[yellow]changed   {escape(line)}")
                if final.exists():
                    logger.say(f"{final} is of the shorter run, until this one ends")
                for line in changed_settings(start, config):
                    logger.say(f"[yellow]changed   {escape(line)}")
            books.begin(logger)
        training = Training(
            run, world, process.device, strategy, spec, order, inputs.eval_data, logger,
            None if books is None else books.account, checkpointer, signals, num_steps=num_steps, completed=completed,
        )  # fmt: skip
        try:
            with signals.while_training():
                training.train()
        except Preempted:
            if logger is not None and books is not None:
                books.break_off(logger)
            raise
        checkpointer.close()
        peak_bytes = most_allocated_bytes(process.device)
        _write_artefact(final, run, config, process, inputs, strategy)
        if logger is not None and books is not None:
            logger.say(f"saved {final}{_proven(run)}")
            books.close(logger, peak_allocated_bytes=peak_bytes)
        _require_metrics(process, logger)
    strategy.close()


def _books(
    run: Run, process: Process, inputs: Inputs, outlook: Outlook, identity: Identity, num_steps: int, completed: int
) -> Books:
    """The account of this session, opened before ``metrics.jsonl`` is shortened."""
    template = str(inputs.renderer.tokenizer.chat_template)
    return Books.open(
        run,
        inputs.train_data,
        outlook,
        made_with(run, identity, process.device, template),
        num_steps=num_steps,
        completed=completed,
        started=process.started,
    )


def _by_its_copy(config: Config, process: Process) -> Callable[[Path], bool]:
    """Replaces a damaged checkpoint. The others wait on the store, where nothing times out while rank 0 fetches."""

    def replace(checkpoint: Path) -> bool:
        def fetch() -> str | None:
            return "whole" if replace_damaged(config, checkpoint, say=_warn) else None

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
def _loading(world: World) -> Iterator[Callable[[int], None]]:
    """Shows on rank 0 how much of the weights it has read; it reads what it keeps of them."""
    if not world.is_main:
        yield lambda _: None
        return
    console, started, total = Console(highlight=False), time.perf_counter(), 0
    columns = (
        SpinnerColumn(),
        TextColumn("reading weights {task.fields[size]}"),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=None, size=decimal(0))

        def on_bytes(count: int) -> None:
            nonlocal total
            total += count
            progress.update(task, advance=count, size=decimal(total))

        yield on_bytes
    ranks = "" if world.shape.size == 1 else ", as much as rank 0 keeps,"
    console.print(f"read {decimal(total)} of weights{ranks} in {time.perf_counter() - started:.1f} s")


def _proven(run: Run) -> str:
    return ", proven in a fresh process" if run.checkpoint.prove_final else ", not proven (checkpoint.prove_final)"


def _write_artefact(
    final: Path, run: Run, config: Config, process: Process, inputs: Inputs, strategy: Strategy
) -> None:
    """Exports the trained model, which is called ``final`` when a fresh process has found it in the files.

    Raises:
        CheckpointError: it cannot be written, or is not the trained model; it then stays as ``final.unfinished``.
    """
    probes = take_probes(strategy, inputs.train_data, process.device) if run.checkpoint.prove_final else []
    parameters = strategy.full_parameters(trainable_only=run.model.method.type != "full")
    tokenizer, is_main = inputs.renderer.tokenizer, process.world.is_main
    about = training_section(config, final.parent) if is_main else ""
    failure, saved = None, {}
    try:
        saved = export(
            final, run.model, strategy.model, parameters, tokenizer, is_main=is_main, seed=run.seed, about=about
        )
    except CheckpointError as error:
        failure = error  # rank 0's; the others, which have gathered with it, hear of it below
    weights = {name: digest(tensor) for name, tensor in saved.items()}
    saved.clear()  # the fresh process needs the room

    def prove_and_publish() -> None:
        if failure is not None:
            raise failure
        if run.checkpoint.prove_final:
            prove_artefact(final.with_name(final.name + UNFINISHED), run.model, weights, probes, inputs.sample)
        publish(final)

    run_on_main_first(process.world, process.store, f"prove {final}", prove_and_publish)


@contextmanager
def _logger(run: Run, world: World, config: Config, num_steps: int, completed: int) -> Iterator[RunLogger | None]:
    """The run's logger on rank 0, None elsewhere. From here on the run directory is taken."""
    if not world.is_main:
        yield None
        return
    folder = Path(run.output_dir)
    settings = config.model_dump(mode="json")
    with writing_into(folder):
        logger = RunLogger(folder, run.logging.wandb, settings, num_steps=num_steps, completed=completed)
    with logger:
        with writing_into(folder):
            keep_file(folder / "config.yaml", dump_config(config))
        yield logger


def prepare_run(run: Run, config: Config, renderer: ChatRenderer, load: Callable[[], ChatRenderer], resume: str) -> str:
    """Everything that can be found wrong without a GPU, and the data; on rank 0.

    Args:
        load: makes ``renderer`` in another process.

    Returns:
        ``Found``, as JSON.

    Raises:
        ConfigError, CheckpointError, DataError: the run directory, the checkpoint, the weights, the data.
    """
    take_run_directory(Path(run.output_dir), may_hold_a_run=resume != NEVER, say=_warn)
    sweep(checkpoints_folder(run.output_dir))
    remove_leftovers(run.output_dir)
    if needs_storage(config, resume):
        check_mirror(config, resume)
        resume = bring(config, resume, say=_warn)
    checkpoints = find_checkpoints(resume, run.output_dir)
    check_weights(run.model)
    cache = Cache(cache_folder(run.data, run.output_dir), renderer, load, run.data.num_workers)
    with showing() as display:
        sets = prepare_sets(run.data, cache, seed=run.seed, display=display)
    assert sets.train is not None
    untrained = _warn_of_the_data(run, renderer, open_prepared(sets.train))
    found_in_data = audit_prepared(config, cache, sets, untrained=untrained)
    with writing_into(Path(run.output_dir)):
        keep_file(Path(run.output_dir) / AUDIT, found_in_data.to_json())
    for folder, name in ((sets.train, "data.train"), (sets.eval, "data.eval")):
        if folder is not None:
            for line in told_of_rows(folder, run.data):
                Console(highlight=False).print(f"[yellow]{name}: {escape(line)}", soft_wrap=True)
    found = Found(
        checkpoints=tuple(map(str, checkpoints)),
        train_data=str(sets.train),
        eval_data=None if sets.eval is None else str(sets.eval),
    )
    return json.dumps(asdict(found))


def _warn(line: str) -> None:
    Console(highlight=False).print(f"[yellow]{escape(line)}", soft_wrap=True)


def _warn_of_the_data(run: Run, renderer: ChatRenderer, data: PreparedData) -> list[str]:
    """Tells of tokens that the model never learned, which are returned, and of rows longer than it was made for."""
    special = renderer.special_ids
    untrained = untrained_tokens(run.model, data.occurring(special), special)
    lines = [renderer.notice, long_rows_notice(data.lengths, run.model)]
    names = [str(name) for name in renderer.tokenizer.convert_ids_to_tokens(untrained)]
    if names:
        lines.append(untrained_notice(names, run.model))
    for line in lines:
        if line is not None:
            Console(highlight=False).print(f"[yellow]model: {escape(line)}", soft_wrap=True)
    return names


def open_inputs(run: Run, renderer: ChatRenderer, found: Found, *, is_main: bool) -> Inputs:
    """Maps what rank 0 prepared.

    Raises:
        ConfigError: this node does not see the files.
    """
    try:
        return Inputs(
            train_data=open_prepared(Path(found.train_data)),
            eval_data=None if found.eval_data is None else open_prepared(Path(found.eval_data)),
            renderer=renderer,
            sample=_sample(run, renderer) if is_main else None,
        )
    except FileNotFoundError as e:
        raise ConfigError(
            f"this node does not see the data that rank 0 prepared ({e.filename})",
            fix="set data.cache_dir to a folder that all nodes share",
        ) from e


def _sample(run: Run, renderer: ChatRenderer) -> TemplateSample | None:
    """The first conversation that can be rendered; None if no source has conversations.

    All rows of a source are of one kind. Rows that cannot be read or rendered were told when the data was prepared.
    """
    for source in run.data.train:
        try:
            row = _first_conversation(source, renderer)
        except DataError as error:
            if not (is_url(source.path) and is_offline()):
                raise
            line = f"{error.what}: the template in final/ will not be compared with its rows"
            Console(highlight=False).print(f"[yellow]{escape(line)}", soft_wrap=True)
            continue
        if row is not None:
            return renderer.sample(row)
    return None


def _first_conversation(source: SourceConfig, renderer: ChatRenderer) -> Conversation | None:
    for row in read_source(source, on_rejected=lambda _: None):
        if not isinstance(row, Conversation):
            return None
        with suppress(RowError):
            renderer.render(row)
            return row
    return None
