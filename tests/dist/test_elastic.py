"""A checkpoint of any number of processes under any strategy goes on on any other: the same losses, the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.torch import load_file

from sft_dist.checkpoint import reader
from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.shard_file import file_name
from sft_dist.data.loader import TrainingOrder
from tests.dist.test_checkpoint import save, started
from tests.dist.test_resume import STEPS, STOP, checkpoint, run_part
from tests.helpers import cells, figures
from tests.helpers.host_memory import peak_anonymous_memory
from tests.helpers.pool import WorldPool
from tests.helpers.tiny_model import build_base

Worlds = Callable[[int], WorldPool]

# What hashing, reading back and looking for what is not finite take, a few megabytes each.
BUFFERS_BYTES = 16 << 20

WORLDS = (1, 2, 3, 4)
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, bf16 states": {"precision": {"compute": "fp32", "optimizer_state": "bf16"}},
    "sgd with momentum": {"optim": {"type": "sgd", "lr": 0.3, "momentum": 0.9}},
    "adafactor": {"optim": {"type": "adafactor", "lr": 3e-3}},
    "LoRA+": {"optim": {"lora_plus_ratio": 16}},
}


@dataclass(frozen=True)
class Setup:
    """What a run is started as; `method` and `optimizer` it shares with those that it is compared with.

    Args:
        sharding: beside the strategy.
    """

    strategy: str
    size: int
    method: str = "full"
    optimizer: str = "adamw"
    micro_batch_size: int = 1
    every_steps: int = STOP
    sharding: tuple[tuple[str, int], ...] = ()

    def config(self, base: Path, folder: Path) -> str:
        folder.mkdir()
        sections = {
            "sharding": {"strategy": self.strategy, **dict(self.sharding)},
            "train": {"global_batch_size": 8, "micro_batch_size": self.micro_batch_size, "max_steps": STEPS},
            "checkpoint": {"every_steps": self.every_steps, "keep_last": 9},
        }
        cfg = cells.config(str(base), self.method, self.strategy, **sections, **OPTIMIZERS[self.optimizer])
        return cells.dump(cells.whole_run(cfg, folder))

    def __str__(self) -> str:
        extra = [f"{key} {value}" for key, value in self.sharding]
        extra += [f"micro-batches of {self.micro_batch_size}"] if self.micro_batch_size > 1 else []
        return f"{self.strategy}x{self.size}" + (f" ({', '.join(extra)})" if extra else "")


@dataclass(frozen=True)
class Ran:
    """A run of one start, to its end.

    Args:
        metrics: (step, loss, gradient norm) of each step that was trained.
        weights: of ``final/``.
    """

    folder: Path
    metrics: list[tuple[int, float, float]]
    weights: dict[str, np.ndarray[Any, Any]]


Runs = Callable[..., Ran]


@pytest.fixture(scope="module")
def runs(world: Worlds, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """``runs(setup, start)``: that run, made once."""
    made: dict[tuple[Setup, str | None], Ran] = {}

    def run(setup: Setup, start: str | None = None) -> Ran:
        if (setup, start) not in made:
            folder = tmp_path_factory.mktemp("elastic") / "run"
            part = world(setup.size).run(run_part, setup.config(tiny_base, folder), start)[0]
            weights = {
                name: tensor.float().numpy()
                for path in (folder / "final").glob("*.safetensors") for name, tensor in load_file(path).items()
            }  # fmt: skip
            assert weights
            made[setup, start] = Ran(folder, part.metrics, weights)
        return made[setup, start]

    return run


def compare(ran: Ran, whole: Ran, *, completed: int, rtol: float = 1e-5) -> float:
    """The largest relative difference of a loss, a norm or a tensor from the uninterrupted run's; within ``rtol``.

    A tensor's is the norm of the difference over the norm: where a gradient is next to nothing, AdamW takes whole steps
    by the sign of a rounding.
    """
    rest = whole.metrics[completed:]
    assert [step for step, _, _ in ran.metrics] == list(range(completed + 1, STEPS + 1))
    np.testing.assert_allclose(ran.metrics, rest, rtol=rtol)
    a, b = np.asarray(ran.metrics), np.asarray(rest)
    largest = float(np.max(np.abs(a - b) / np.abs(b)))
    assert ran.weights.keys() == whole.weights.keys()
    for name, expected in whole.weights.items():
        difference = float(np.linalg.norm(ran.weights[name] - expected) / np.linalg.norm(expected))
        assert difference <= rtol, f"{name}: {difference}"
        largest = max(largest, difference)
    return largest


def goes_on(runs: Runs, before: Setup, after: Setup) -> float:
    """Saved as ``before`` and resumed as ``after``, against one process that was never stopped."""
    whole = runs(Setup("ddp", 1, before.method, before.optimizer))
    ran = runs(after, checkpoint(runs(before).folder))
    figures.difference(f"elastic: {before.method}, {before.optimizer}", ran.metrics, whole.metrics[STOP:])
    return compare(ran, whole, completed=STOP)


@pytest.mark.parametrize(
    "chain",
    [
        "full: fsdp2x4 -> zero3x1 -> zero1x3 -> fsdp2x2",
        pytest.param("full: fsdp2x4 -> fsdp2x1 -> fsdp2x3 -> fsdp2x2", marks=pytest.mark.full),
        pytest.param("full: zero3x4 -> zero3x1 -> zero3x3 -> zero3x2", marks=pytest.mark.full),
        pytest.param("lora: ddpx4 -> zero2x1 -> ddpx3 -> zero1x2", marks=pytest.mark.full),
        pytest.param("qlora: zero3x4 -> ddpx1 -> fsdp2x3 -> zero3x2", marks=pytest.mark.full),
    ],
)
def test_four_one_three_two(runs: Runs, chain: str) -> None:
    """A step on each, the rest on the last: the final loss and the final weights of one process."""
    method, parts = chain.split(": ")
    start, whole, largest = None, runs(Setup("ddp", 1, method)), 0.0
    for completed, place in enumerate(parts.split(" -> ")):
        strategy, size = place.split("x")
        ran = runs(Setup(strategy, int(size), method, every_steps=1), start)
        largest = max(largest, compare(ran, whole, completed=completed))
        start = checkpoint(ran.folder, completed + 1)
    figures.lines.append(f"{chain}: losses, norms and final weights within {largest:.1e} of one process'")


@pytest.mark.full
@pytest.mark.parametrize(("strategy", "method"), [("fsdp2", "full"), ("zero3", "full"), ("ddp", "lora")])
def test_from_any_number_to_any_number(runs: Runs, strategy: str, method: str) -> None:
    for saved in WORLDS:
        row = [goes_on(runs, Setup(strategy, saved, method), Setup(strategy, size, method)) for size in WORLDS]
        numbers = "  ".join(f"{size}: {value:.1e}" for size, value in zip(WORLDS, row, strict=True))
        figures.lines.append(f"{strategy} {method}, saved on {saved}, resumed on {numbers}")


@pytest.mark.ci
@pytest.mark.parametrize("before", STRATEGIES)
@pytest.mark.parametrize("after", STRATEGIES)
def test_from_any_strategy_to_any_strategy(runs: Runs, before: str, after: str) -> None:
    """On another number of processes, too."""
    if before != after:
        sizes = {"ddp": 2, "fsdp2": 3, "zero1": 3, "zero2": 2, "zero3": 3}
        goes_on(runs, Setup(before, sizes[before]), Setup(after, 5 - sizes[before]))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Setup("fsdp2", 2), Setup("zero2", 2, micro_batch_size=4)),
        (Setup("zero3", 3, micro_batch_size=2), Setup("fsdp2", 2)),
        (Setup("fsdp2", 2, sharding=(("sequence_parallel", 2),)), Setup("fsdp2", 2)),
        (Setup("zero1", 3), Setup("zero3", 2, sharding=(("sequence_parallel", 2),))),
        (Setup("fsdp2", 4, sharding=(("dp_replicate", 2),)), Setup("fsdp2", 3)),
        (Setup("zero2", 2), Setup("fsdp2", 4, sharding=(("dp_replicate", 2),))),
        (
            Setup("fsdp2", 4, sharding=(("dp_replicate", 2), ("sequence_parallel", 2))),
            Setup("fsdp2", 4, sharding=(("dp_replicate", 4),)),
        ),
    ],
    ids=lambda setup: str(setup),
)
@pytest.mark.ci
def test_what_else_a_step_is_spread_by(runs: Runs, before: Setup, after: Setup) -> None:
    goes_on(runs, before, after)


@pytest.mark.parametrize(
    ("method", "optimizer", "before", "after"),
    [
        ("full", "adamw, bf16 states", "fsdp2x2", "ddpx3"),
        ("full", "adamw, bf16 states", "ddpx3", "fsdp2x1"),
        ("full", "sgd with momentum", "fsdp2x3", "zero3x2"),
        ("full", "sgd with momentum", "zero2x2", "ddpx3"),
        ("full", "adafactor", "fsdp2x3", "fsdp2x2"),
        ("full", "adafactor", "ddpx2", "fsdp2x3"),
        ("lora", "LoRA+", "fsdp2x2", "zero3x3"),
        ("lora", "LoRA+", "zero3x3", "zero1x2"),
        ("lora", "LoRA+", "zero1x2", "fsdp2x3"),
    ],
)
@pytest.mark.ci
def test_states_of_every_optimizer(runs: Runs, method: str, optimizer: str, before: str, after: str) -> None:
    setups = [Setup(place.split("x")[0], int(place.split("x")[1]), method, optimizer) for place in (before, after)]
    goes_on(runs, *setups)


@dataclass(frozen=True)
class Moved:
    """Bytes of one rank.

    Args:
        held: its part of the state.
        taken: of host memory while it saved, beyond what it had.
        files, read, taken_to_read: that it opened to go on with it, the bytes it asked them for, and of host memory.
    """

    held: int
    taken: int
    files: list[str]
    read: int
    taken_to_read: int


def save_and_load(cfg_yaml: str, folder: str, start: str | None) -> Moved:
    """Trains a step and saves, unless there is a checkpoint to go on from; then loads that."""
    strategy, checkpointer, order = started(cfg_yaml, folder, 0 if start else 1, asynchronous=True)
    assert isinstance(order, TrainingOrder)
    try:
        # What the optimizer makes at its first step is no part of saving.
        held = sum(shard.values.nbytes for shard in strategy.state().values())
        taken = 0
        if start is None:
            with peak_anonymous_memory() as memory:
                save(checkpointer, strategy, 1)
            taken, start = memory[0], str(Path(folder) / "step-00000001")
        read, files = [0], set[str]()
        file_of, overlapping = reader.CheckpointReader._file, reader.CheckpointReader._overlapping

        def opened(self: Any, name: str) -> Any:
            files.add(name)
            return file_of(self, name)

        def asked(self: Any, name: str, first: int, stop: int) -> Iterator[Any]:
            for begin, end, part in overlapping(self, name, first, stop):
                read[0] += 4 * (end - begin)
                yield begin, end, part

        watched = patch.multiple(reader.CheckpointReader, _file=opened, _overlapping=asked)
        with watched, peak_anonymous_memory() as to_read:
            checkpointer.load(Path(start), strategy)
        return Moved(held, taken, sorted(files), read[0], to_read[0])
    finally:
        checkpointer.close()
        strategy.close()


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_no_rank_gathers(world: Worlds, tmp_path: Path, strategy: str) -> None:
    """Each of four writes a quarter of the state, takes no more memory for it, and reads what is its own."""
    base = build_base(tmp_path / "base", vocab_size=48_000)
    text = cells.dump(cells.config(str(base), "full", strategy))
    ranks: list[Moved] = world(4).run(save_and_load, text, str(tmp_path / "a"), None)
    start = tmp_path / "a/step-00000001"
    manifest = Manifest.read(start)
    whole = sum(4 * int(np.prod(record.shape)) for record in manifest.tensors.values())
    assert whole > 70 << 20
    sizes = [manifest.files[file_name(rank, 4)].num_bytes for rank in range(4)]
    assert max(sizes) < 0.26 * whole
    for rank, moved in enumerate(ranks):
        assert sizes[rank] == pytest.approx(moved.held, rel=0.01)
        assert moved.held < moved.taken < moved.held + BUFFERS_BYTES, "a copy of its own part"
        assert (moved.files, moved.read) == ([file_name(rank, 4)], moved.held)
        assert moved.taken_to_read < BUFFERS_BYTES
    halves: list[Moved] = world(2).run(save_and_load, text, str(tmp_path / "b"), str(start))
    for rank, moved in enumerate(halves):
        assert moved.files == [file_name(2 * rank, 4), file_name(2 * rank + 1, 4)]
        assert moved.read == moved.held == sum(r.held for r in ranks[2 * rank : 2 * rank + 2])
    figures.lines.append(
        f"{strategy} on 4 processes: of {whole / 2**20:.1f} MiB of state a rank writes {max(sizes) / 2**20:.1f}, takes "
        f"{max(r.taken for r in ranks) / 2**20:.1f} to save and {max(r.taken_to_read for r in ranks) / 2**20:.1f} to resume"
    )
