"""What stands before there is a process group: decisions, the run directory, checkpoints to go on from, data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from sft_dist.checkpoint.store import sweep
from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.schema import Config
from sft_dist.config.watchdog_schema import WatchdogConfig
from sft_dist.data.chat_template import ChatRenderer, TemplateSample
from sft_dist.data.files import is_url
from sft_dist.data.fingerprint import is_offline
from sft_dist.data.messages import Conversation
from sft_dist.data.prepared import PreparedData, open_prepared
from sft_dist.data.sources import read_source
from sft_dist.errors import ConfigError, DataError, RowError
from sft_dist.metrics.heartbeat import Heartbeat
from sft_dist.model.renderer import renderer_of
from sft_dist.plan.accelerate import check_accelerate
from sft_dist.plan.choose import choose
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import read_accelerate_environment
from sft_dist.runtime.memory import least_memory_bytes
from sft_dist.runtime.process_group import device_of, join, run_on_main_first
from sft_dist.runtime.rank_log import settle
from sft_dist.runtime.world import World
from sft_dist.scores.judge import check_settings
from sft_dist.sharding.optim import unsupported_on
from sft_dist.train.asked import NEVER
from sft_dist.train.from_mirror import bring, check_mirror, needs_storage
from sft_dist.train.inputs import prepare_inputs
from sft_dist.train.preflight import take_run_directory
from sft_dist.train.rehearsed import remove_leftovers
from sft_dist.train.resume import checkpoints_folder, find_checkpoints
from sft_dist.train.run_files import AUDIT, keep_file, writing_into
from sft_dist.watchdog.limits import Limits
from sft_dist.watchdog.watch import Watchdog


@dataclass(frozen=True)
class Process:
    """This process: its place among its peers, its accelerator, and the store that all of them share.

    Args:
        started: on ``time.perf_counter``; its machine is paid for from then on.
        heartbeat: gets what it is doing.
        limits: are told how fast its disk is.
    """

    world: World
    device: torch.device
    store: dist.Store
    started: float = field(default_factory=time.perf_counter)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    limits: Limits = field(default_factory=lambda: Limits(WatchdogConfig()))


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


@dataclass(frozen=True)
class Met:
    """This process among its peers, and what they do, before any data is looked at.

    Args:
        config, run, store: as in ``Ready``.
        load: makes the renderer of the model, in this process or in another one.
    """

    config: Config
    run: Run
    process: Process
    store: dist.Store
    load: Callable[[], ChatRenderer]


def meet(config: Config, *, heartbeat: Heartbeat | None = None, watchdog: Watchdog | None = None) -> Met:
    """Meets the other processes and decides; arguments as for ``make_ready``."""
    world = World.from_environment()
    store = join(world)
    settle(store, world)
    if watchdog is not None:
        watchdog.meet(store)
    process = Process(
        world, device_of(world), dist.PrefixStore("sft_dist", store), heartbeat=heartbeat or Heartbeat(),
        limits=Limits(config.watchdog) if watchdog is None else watchdog.limits,
    )  # fmt: skip
    config, run = decide(config, process)
    return Met(config, run, process, store, renderer_of(config.model, config.data))


def make_ready(
    config: Config,
    *,
    resume: str,
    before: Callable[[], None] = lambda: None,
    heartbeat: Heartbeat | None = None,
    watchdog: Watchdog | None = None,
) -> Ready:
    """Meets the other processes, decides, and prepares the data on rank 0 or finds them prepared.

    Args:
        resume: ``never``, ``auto`` or the path of a checkpoint.
        before: called on rank 0 before anything is prepared (``Asked.before``).
        heartbeat: begins when the run directory is taken; None: nothing is to be left there.
        watchdog: sees the other ranks from here on.
    """
    met = meet(config, heartbeat=heartbeat, watchdog=watchdog)
    config, run, process, load = met.config, met.run, met.process, met.load
    world, renderer = process.world, load()

    def taken() -> None:
        if heartbeat is not None:
            heartbeat.begin(Path(run.output_dir), strategy=run.strategy, world_size=world.size, say=warn)
        if watchdog is not None:
            watchdog.forget_earlier()

    def prepare() -> str:
        with process.heartbeat.phase("preparing"):
            before()
            return prepare_run(run, config, renderer, load, resume, taken=taken)

    # Before there is a process group: nothing of it can time out while rank 0 tokenises for hours.
    told = run_on_main_first(world, process.store, "prepare", prepare)
    found = Found(**json.loads(told or ""))
    inputs = open_inputs(run, renderer, found, is_main=world.is_main)
    return Ready(config, run, process, met.store, inputs, [Path(path) for path in found.checkpoints])


def decide(config: Config, process: Process) -> tuple[Config, Run]:
    """Makes every ``auto`` concrete, the same on all ranks, and compares the result with what accelerate said."""
    world, device = process.world, process.device
    accelerate = read_accelerate_environment()
    memory_bytes = least_memory_bytes(world, device, process.store)
    on_cpu = device.type == "cpu"
    choice = choose(config, world.shape, memory_bytes=memory_bytes, accelerate=accelerate, on_cpu=on_cpu)
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


def prepare_run(
    run: Run,
    config: Config,
    renderer: ChatRenderer,
    load: Callable[[], ChatRenderer],
    resume: str,
    *,
    taken: Callable[[], None],
) -> str:
    """Everything that can be found wrong without a GPU, and the data; on rank 0.

    Args:
        load: makes ``renderer`` in another process.
        taken: called when the run directory is this run's own.

    Returns:
        ``Found``, as JSON.

    Raises:
        ConfigError, CheckpointError, DataError: what answers are judged by, the run directory, the checkpoint, the
            weights, the data.
    """
    if config.eval.scores is not None:
        check_settings(config.eval.scores)
    take_run_directory(Path(run.output_dir), may_hold_a_run=resume != NEVER, say=warn)
    taken()
    sweep(checkpoints_folder(run.output_dir))
    remove_leftovers(run.output_dir)
    if needs_storage(config, resume):
        check_mirror(config, resume)
        resume = bring(config, resume, say=warn)
    checkpoints = find_checkpoints(resume, run.output_dir)
    sets, found_in_data = prepare_inputs(config, run.model, renderer, load)
    with writing_into(Path(run.output_dir)):
        keep_file(Path(run.output_dir) / AUDIT, found_in_data.to_json())
    found = Found(
        checkpoints=tuple(map(str, checkpoints)),
        train_data=str(sets.train),
        eval_data=None if sets.eval is None else str(sets.eval),
    )
    return json.dumps(asdict(found))


def warn(line: str) -> None:
    Console(highlight=False).print(f"[yellow]{escape(line)}", soft_wrap=True)


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
