"""Plans every candidate that could do the same training, and keeps what is cheapest and fastest.

A candidate's numbers are those of a plan of its own. What several share is worked out once: a model's description, the
tape of a micro-batch, the epochs of the data, the memory and the work of a run on GPUs of every kind.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sft_dist.config.schema import Config
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError, PlanError
from sft_dist.hardware.gpus import Gpu
from sft_dist.model.known import known_models_allowed
from sft_dist.plan.cache import cached_describe
from sft_dist.plan.calibration import Calibration, calibration_key, lookup
from sft_dist.plan.candidates import Space, Variant, gpus_to_search, machines_for, variants
from sft_dist.plan.cost import rents_nodes
from sft_dist.plan.epoch import dealt
from sft_dist.plan.fit import eval_tapes
from sft_dist.plan.front import front_of
from sft_dist.plan.host import host_parts
from sft_dist.plan.machines import Machines
from sft_dist.plan.measured_rates import rated_gpu
from sft_dist.plan.memory import MOST_SHARE, context_bytes, memory_phases, resident_parts, verdict
from sft_dist.plan.overrides import key_override
from sft_dist.plan.priced import cost_of
from sft_dist.plan.result import DataPlan, ParetoPoint, Refused, Search
from sft_dist.plan.room import micro_batch_sizes, with_micro_batch_size
from sft_dist.plan.tapes import Tapes
from sft_dist.plan.time import run_time
from sft_dist.plan.units import HOUR_S
from sft_dist.plan.workload import workload
from sft_dist.resolve import described_once, resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape

# Says how many of all variants are done.
Progress = Callable[[int, int], None]

SMALLER_FAILS = "does not fit: a smaller micro-batch does not either"
NOT_RENTED = "no machine with so many of the GPU has a price"
NO_DTYPE = "the GPU has no matrix products in precision.compute"
HOST_TOO_SMALL = "needs more host memory than hardware.host_memory_gib"


@dataclass(frozen=True)
class _Found:
    """A point and what it is a kind of."""

    point: ParetoPoint
    kind: tuple[str, int, int, str]


def search(config: Config, data: DataPlan, space: Space, *, progress: Progress = lambda done, of: None) -> Search:
    """Looks at every candidate of a space.

    Args:
        config: may hold ``auto``; the overrides of what is found are of it.
        data: of a plan of it, on whichever machines.

    Raises:
        UnknownHardware: its GPU, network or provider is not known.
        ConfigError: the model or the file of prices cannot be read.
        PlanError: no GPU that is searched has a price.
    """
    began = time.perf_counter()
    with known_models_allowed():
        searching = _Searching(config, data, space)
        found = list(searching.found(progress))
    front = front_of(each.point for each in found)
    if not searching.priced:
        names = ", ".join(gpu.name for gpu in searching.gpus)
        raise PlanError(f"no price of {names} is known", fix="set hardware.price_per_hour, in USD per GPU-hour")
    return Search(
        looked_at=searching.looked_at,
        fitting=len(found),
        seconds=time.perf_counter() - began,
        front=tuple(front),
        picks=(),
        points=_thinned(found, front),
        refused=tuple(Refused(reason, number) for reason, number in searching.refused.most_common()),
    )


class _Searching:
    """The state of one search."""

    def __init__(self, config: Config, data: DataPlan, space: Space) -> None:
        self.config, self.data, self.space = config, data, space
        self.gpus = gpus_to_search(config)
        self.describe = described_once(cached_describe)
        self.tapes = Tapes()
        self.looked_at = 0
        self.priced = False
        self.refused: Counter[str] = Counter()
        self.rated: dict[tuple[str, int, bool], Gpu] = {}
        self.calibrations: dict[tuple[str, str], Calibration | None] = {}

    def found(self, progress: Progress) -> Iterator[_Found]:
        """Every candidate that fits, planned."""
        of_layout = [
            (layout, list(variants(self.config, nodes=layout[0], gpus_per_node=layout[1], methods=self.space.methods)))
            for layout in self.space.layouts()
        ]
        whole, done = sum(len(each) for _, each in of_layout), 0
        for (nodes, gpus_per_node), each in of_layout:
            machines = [machines_for(self.config, gpu, nodes, gpus_per_node) for gpu in self.gpus]
            rented = [rents_nodes(gpu, self.config.hardware, gpus_per_node) for gpu in self.gpus]
            self.priced = self.priced or any(rented)
            there = [each for each, is_rented in zip(machines, rented, strict=True) if is_rented]
            for variant in each:
                yield from self._of_variant(variant, WorldShape(nodes, gpus_per_node), there)
                done += 1
                progress(done, whole)

    def _of_variant(
        self, variant: Variant, shape: WorldShape, machines: list[tuple[Machines, tuple[str, ...]]]
    ) -> Iterator[_Found]:
        """Micro-batches of every size."""
        sizes = micro_batch_sizes(variant.config, shape)
        left = self._with_dtype(machines, len(sizes))
        absent = len(self.gpus) - len(machines)
        self._refuse(NOT_RENTED, absent * len(sizes))
        for of_kind in _by_accumulation(sizes, config=variant.config, shape=shape):
            yield from self._of_sizes(of_kind, variant, shape, left)

    def _of_sizes(
        self, sizes: list[int], variant: Variant, shape: WorldShape, left: list[tuple[Machines, tuple[str, ...]]]
    ) -> Iterator[_Found]:
        """Of these sizes the larger ones take more: what does not hold one need not be asked about the next."""
        for number, size in enumerate(sizes):
            config = with_micro_batch_size(variant.config, size)
            try:
                validate(config)
                run = resolve(config, shape, describe=self.describe)
            except ConfigError as refusal:
                self._refuse(refusal.what, len(left))
                continue
            fitting = self._fitting(run, left)
            yield from self._planned(config, run, variant, fitting)
            self._refuse(SMALLER_FAILS, (len(left) - len(fitting)) * (len(sizes) - number - 1))
            left = [each for each, _ in fitting]
            if not left:
                return

    def _with_dtype(
        self, machines: list[tuple[Machines, tuple[str, ...]]], sizes: int
    ) -> list[tuple[Machines, tuple[str, ...]]]:
        found = [each for each in machines if self.config.precision.compute in each[0].gpu.flops]
        self._refuse(NO_DTYPE, (len(machines) - len(found)) * sizes)
        return found

    def _fitting(
        self, run: Run, machines: list[tuple[Machines, tuple[str, ...]]]
    ) -> list[tuple[tuple[Machines, tuple[str, ...]], int]]:
        """Machines that hold a run, with what it takes of a GPU."""
        needed = self._needed(run, max((each.gpu.usable_bytes for each, _ in machines), default=0))
        found = []
        for each in machines:
            usable = each[0].gpu.usable_bytes
            if verdict(needed, usable) == "does not fit":
                self._refuse(_too_much(needed / (MOST_SHARE * usable)), 1)
            else:
                found.append((each, needed))
        return found

    def _needed(self, run: Run, most_usable: int) -> int:
        """Bytes of a GPU; where not even what is held between steps fits, no more is looked at than that."""
        held = sum(resident_parts(run).values()) + context_bytes(run)
        if verdict(held, most_usable) == "does not fit":
            return held
        phases = memory_phases(run, self.tapes.of(run), *eval_tapes(run, self.tapes.of))
        return max(phase.total_bytes for phase in phases)

    def _planned(
        self,
        config: Config,
        run: Run,
        variant: Variant,
        fitting: list[tuple[tuple[Machines, tuple[str, ...]], int]],
    ) -> Iterator[_Found]:
        """Time and money of a run on each of the machines that hold it."""
        if not fitting:
            return
        host, there = sum(host_parts(run).values()), config.hardware.host_memory_gib
        if there is not None and host > there * 2**30:
            self._refuse(HOST_TOO_SMALL, len(fitting))
            return
        data = dealt(self.data, run)
        eval_tape, answer_tape = eval_tapes(run, self.tapes.of)
        work = workload(run, self.tapes.of(run), data=data, eval_tape=eval_tape, answer_tape=answer_tape)
        size = run.batch.micro_batch_size
        for (machines, said), needed in fitting:
            known = self._calibration(machines.gpu, run)
            gpu = self._rated(machines, known)
            timed = run_time(work, gpu=gpu, network=machines.network, calibration=known)
            cost = cost_of(config, machines, data, timed.total)
            assert cost.chosen is not None, "machines without a price are left out"
            self.looked_at += 1
            judged = verdict(needed, machines.gpu.usable_bytes)
            point = ParetoPoint(
                label=f"{_machines(machines)}, {variant.label}, micro-batch {size}",
                gpu=machines.gpu.name,
                num_gpus=machines.num_gpus,
                usd=cost.chosen.usd.value,
                hours=timed.total.value / HOUR_S,
                fits=True,
                on_front=False,
                overrides=(
                    *said,
                    *variant.overrides,
                    *key_override("train.micro_batch_size", self.config.train.micro_batch_size, size),
                ),
                verdict=judged,
                peak_bytes=needed,
                usable_bytes=machines.gpu.usable_bytes,
                host_bytes=host,
                jpy=cost.chosen.jpy.value,
            )
            yield _Found(point, (machines.gpu.name, machines.nodes, machines.gpus_per_node, run.strategy))

    def _calibration(self, gpu: Gpu, run: Run) -> Calibration | None:
        key = gpu.name, calibration_key(run)
        if key not in self.calibrations:
            self.calibrations[key] = lookup(*key)
        return self.calibrations[key]

    def _rated(self, machines: Machines, calibration: Calibration | None) -> Gpu:
        key = machines.gpu.name, machines.gpus_per_node, calibration is None
        if key not in self.rated:
            count = machines.gpus_per_node
            self.rated[key] = rated_gpu(machines.gpu, gpus_per_node=count, calibration=calibration)
        return self.rated[key]

    def _refuse(self, reason: str, number: int) -> None:
        if number:
            self.looked_at += number
            self.refused[reason] += number


def _by_accumulation(sizes: Sequence[int], *, config: Config, shape: WorldShape) -> list[list[int]]:
    """Sizes whose steps are alike: of one micro-batch, of two, or of more.

    A step of one micro-batch accumulates nothing and may take less than one of several smaller ones.
    """
    ranks = max(1, shape.size // config.sharding.sequence_parallel)
    own = -(-config.train.global_batch_size // ranks)
    return [list(alike) for _, alike in groupby(sizes, key=lambda size: min(3, -(-own // size)))]


def _machines(machines: Machines) -> str:
    """``2 x 8 H100-SXM``."""
    nodes = f"{machines.nodes} x " if machines.nodes > 1 else ""
    return f"{nodes}{machines.gpus_per_node} {machines.gpu.name}"


def _too_much(ratio: float) -> str:
    """By how much a run exceeds what it may take."""
    if ratio <= 1.1:
        return "does not fit by less than 10%"
    return "does not fit by 10% to 100%" if ratio <= 2 else "does not fit: needs more than twice the memory"


def _thinned(found: Sequence[_Found], front: Sequence[ParetoPoint]) -> tuple[ParetoPoint, ...]:
    """The front, and of each kind the fastest: as many as a picture has room for."""
    fastest: dict[tuple[str, int, int, str], ParetoPoint] = {}
    for each in found:
        known = fastest.get(each.kind)
        if known is None or (each.point.hours, each.point.usd) < (known.hours, known.usd):
            fastest[each.kind] = each.point
    taken = {point.overrides for point in front}
    return (*front, *(point for point in fastest.values() if point.overrides not in taken))
