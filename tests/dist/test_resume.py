"""Stopped and resumed is uninterrupted: through the run's own loop and its own checkpoints, on real processes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from sft_dist.checkpoint import checkpointer, store
from sft_dist.config.schema import Config
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.loader import micro_batches
from sft_dist.errors import SftError
from sft_dist.resolve import resolve
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World, WorldShape
from sft_dist.train import loop, ready
from sft_dist.train import run as train_run
from sft_dist.train import step as train_step
from sft_dist.train.asked import Asked
from sft_dist.train.outlook import look_ahead
from tests.dist.test_offload import OFFLOADS
from tests.helpers import cells, figures
from tests.helpers.checkpoints import edit_manifest
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]

STOP, STEPS = 2, 5  # an epoch has 3 steps of 4 micro-batches on a rank: the stop is inside it, with accumulation


@dataclass(frozen=True)
class Part:
    """What one rank did in a part of a run.

    Args:
        ids: of every micro-batch it ran in training, in order.
        metrics: (step, loss, gradient norm) of each step that was written.
    """

    ids: list[bytes]
    metrics: list[tuple[int, float, float]]


def run_part(cfg_yaml: str, start: str | None, allowed: tuple[str, ...] = ()) -> Part:
    """One run of ``train``, from a checkpoint if one is given, to its end."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    rank = dist.get_rank()
    world = World(rank, rank, WorldShape(1, dist.get_world_size()))
    held_out = cells.synthetic_data(rows=5, seed=99) if cfg.eval.every_steps is not None else None
    run = resolve(cfg, world.shape)
    seen: list[bytes] = []

    def watched(*args: Any) -> Iterator[Any]:
        for batch, is_last in micro_batches(*args):
            seen.append(batch.input_ids.numpy().tobytes())
            yield batch, is_last

    with patch.object(train_step, "micro_batches", watched):
        inputs = ready.Inputs(
            cells.synthetic_data(rows=60, packing=run.data.packing != "none"),
            held_out,
            load_renderer(run.model.path, None, None),
            None,
        )
        process = ready.Process(world, cells.CPU, cells.store())
        outlook = look_ahead(cfg, run, cells.CPU, inputs.train_data, held_out) if world.is_main else None
        with Signals(is_main=world.is_main) as signals:
            place = None if start is None else Path(start)
            train_run.train(run, cfg, process, inputs, outlook, signals, Asked(allowed=allowed), start=place)
    steps = [line for line in metrics(Path(run.output_dir)) if "loss" in line]
    return Part(seen, [(line["step"], line["loss"], line["grad_norm"]) for line in steps])


def config(
    base: Path,
    folder: Path,
    method: str,
    strategy: str,
    *,
    dropout: float = 0.0,
    every_steps: int = STOP,
    compiled: bool = False,
    **sections: Any,
) -> str:
    folder.mkdir()
    train = {"global_batch_size": 8, "micro_batch_size": 1, "max_steps": STEPS, "compile": compiled}
    keeping = {"every_steps": every_steps, "keep_last": 9}
    cfg = cells.config(str(base), method, strategy, train=train, checkpoint=keeping, **sections)
    if dropout:
        cfg = cfg.model_copy(update={"method": cfg.method.model_copy(update={"dropout": dropout})})
    return cells.dump(cells.whole_run(cfg, folder))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "final").glob("*.safetensors")}


def checkpoint(folder: Path, step: int = STOP) -> str:
    return str(folder / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp2", "zero1", "zero2", "zero3", pytest.param("zero2 offload", marks=pytest.mark.ci), "zero3 offload"],
)
def test_resumed_equals_uninterrupted(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, method: str
) -> None:
    """Bit for bit: losses, norms, final weights; and the same samples on the same ranks, as they are fed."""
    # With adapters also dropout: what is drawn at random must be what would have been drawn.
    dropout = 0.0 if method == "full" else 0.2
    strategy, _, offload = strategy.partition(" ")
    sharding = {"strategy": strategy} | ({"deepspeed_config": OFFLOADS[strategy]} if offload else {})
    whole_cfg = config(tiny_base, tmp_path / "a", method, strategy, dropout=dropout, sharding=sharding)
    whole: list[Part] = world(2).run(run_part, whole_cfg, None)
    resumed_cfg = config(tiny_base, tmp_path / "b", method, strategy, dropout=dropout, sharding=sharding)
    resumed: list[Part] = world(2).run(run_part, resumed_cfg, checkpoint(tmp_path / "a"))
    steps = [step for step, _, _ in whole[0].metrics]
    assert steps == list(range(1, STEPS + 1))
    assert resumed[0].metrics == whole[0].metrics[STOP:]
    for before, after in zip(whole, resumed, strict=True):
        assert len(before.ids) == 4 + 4 + 2 + 4 + 4, "the last step of an epoch is smaller"
        assert after.ids == before.ids[4 * STOP :]
    assert final_bytes(tmp_path / "b") == final_bytes(tmp_path / "a") != {}


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.ci) for name in ("fsdp2", "zero1", "zero2", "zero3"))]
)
def test_on_three_ranks_too(world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    """The sum of two does not depend on their order; that of three does."""
    whole = world(3).run(run_part, config(tiny_base, tmp_path / "a", "full", strategy), None)
    resumed_cfg = config(tiny_base, tmp_path / "b", "full", strategy)
    resumed = world(3).run(run_part, resumed_cfg, checkpoint(tmp_path / "a"))
    assert resumed[0].metrics == whole[0].metrics[STOP:]
    assert final_bytes(tmp_path / "b") == final_bytes(tmp_path / "a") != {}


@pytest.fixture(scope="module")
def uninterrupted(world: Worlds, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """By method, the run that never stopped, in one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    methods = ("full", "lora", "qlora", "p_tuning lstm", "prefix")
    return {m: world(1).run(run_part, config(tiny_base, folder / m, m, "ddp"), None)[0] for m in methods}


@pytest.mark.parametrize(
    "chain",
    [
        "full: fsdp2x2 -> fsdp2x1",
        "full: fsdp2x2 -> fsdp2x3",
        pytest.param("full: zero1x2 -> zero1x1", marks=pytest.mark.ci),
        "full: zero1x2 -> zero1x3",
        "full: zero2x3 -> zero2x2",
        pytest.param("full: zero3x2 -> zero3x1", marks=pytest.mark.ci),
        "full: zero3x2 -> zero3x3",
        pytest.param("full: ddpx2 -> ddpx3", marks=pytest.mark.ci),
        "full: fsdp2x2 -> zero3x2 -> ddpx1",
        "qlora: fsdp2x2 -> zero3x2 -> ddpx1",
        "lora: zero1x3 -> fsdp2x2 -> zero2x2",
        "qlora: zero3x2 -> fsdp2x3",
        "prefix: fsdp2x2 -> zero3x3",
        pytest.param("p_tuning lstm: zero3x2 -> fsdp2x3 -> ddpx1", marks=pytest.mark.ci),
    ],
)
def test_another_strategy_or_world_goes_on_with_it(
    world: Worlds, tiny_base: Path, tmp_path: Path, uninterrupted: dict[str, Part], chain: str
) -> None:
    """To 1e-5. Three divides no dimension, so shards are uneven. No dropout: it is drawn per rank."""
    method, parts = chain.split(": ")
    start = None
    for number, place in enumerate(parts.split(" -> ")):
        strategy, size = place.split("x")
        folder = tmp_path / str(number)
        part = world(int(size)).run(run_part, config(tiny_base, folder, method, strategy), start)[0]
        rest = uninterrupted[method].metrics[STOP * number :]
        if number:
            figures.difference("resumed on another strategy or world", part.metrics, rest)
        np.testing.assert_allclose(part.metrics, rest, rtol=1e-5)
        start = checkpoint(folder, STOP * (number + 1))


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_momentum_of_sgd_is_part_of_it(world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    sections = {"optim": {"type": "sgd", "lr": 0.3, "momentum": 0.9}}
    (whole, _) = world(2).run(run_part, config(tiny_base, tmp_path / "a", "full", strategy, **sections), None)
    text = config(tiny_base, tmp_path / "b", "full", strategy, **sections)
    (resumed, _) = world(2).run(run_part, text, checkpoint(tmp_path / "a"))
    assert resumed.metrics == whole.metrics[STOP:]


def test_saving_changes_nothing(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """Checkpoints at every step or only where they must be: the same bits."""
    (often, _) = world(2).run(run_part, config(tiny_base, tmp_path / "a", "full", "zero2", every_steps=1), None)
    (rarely, _) = world(2).run(run_part, config(tiny_base, tmp_path / "b", "full", "zero2", every_steps=99), None)
    assert often == rarely
    assert sorted(path.name[-1] for path in (tmp_path / "a/checkpoints").iterdir()) == ["1", "2", "3", "4", "5"]
    # Step 3 ends an epoch, step 5 the run.
    assert sorted(path.name[-1] for path in (tmp_path / "b/checkpoints").iterdir()) == ["3", "5"]


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    price = {"price_per_hour": 3600.0, "fx": 150.0}
    text = config(tiny_base, tmp_path / "a", "full", "ddp", hardware=price)
    (whole,) = world(1).run(run_part, text, None)
    before = final_bytes(tmp_path / "a")
    (again,) = world(1).run(run_part, text, checkpoint(tmp_path / "a", STEPS))
    assert (again.ids, again.metrics) == ([], whole.metrics)
    shutil.rmtree(tmp_path / "a/final")
    (again,) = world(1).run(run_part, text, checkpoint(tmp_path / "a", STEPS))
    assert (again.ids, final_bytes(tmp_path / "a")) == ([], before), (
        "ended between its last checkpoint and its artefact"
    )
    longer = yaml.safe_load(text)
    longer["train"]["max_steps"] = STEPS + 1
    (more,) = world(1).run(run_part, yaml.safe_dump(longer), checkpoint(tmp_path / "a", STEPS))
    assert [step for step, _, _ in more.metrics] == list(range(1, STEPS + 2))
    assert final_bytes(tmp_path / "a") != before
    receipt = json.loads((tmp_path / "a/receipt.json").read_text())
    # One session found everything done: it began nothing.
    assert [(s["first_step"], s["ended"]) for s in receipt["sessions"]] == [
        (1, True),
        (STEPS + 1, True),
        (STEPS + 1, True),
    ]
    paid = [s["cost_usd"] for s in receipt["sessions"]]
    assert paid == pytest.approx([s["elapsed_s"] for s in receipt["sessions"]]), "a dollar a second"
    actual = receipt["actual"]
    assert (actual["steps"], actual["first_step"]) == (STEPS + 1, 1)
    assert actual["cost_usd"] == pytest.approx(sum(paid))
    assert metrics(tmp_path / "a")[-1]["cost_usd"] > paid[0] + paid[1], "the bill goes on"
    assert receipt["ratio"]["tokens"] == 1


def refusal(cfg_yaml: str, start: str) -> tuple[str, str]:
    """Kind and text of what a run says that does not go on."""
    with pytest.raises(SftError) as caught:
        run_part(cfg_yaml, start)
    return type(caught.value).__name__, caught.value.what


def test_what_a_run_does_not_go_on_from(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    text = config(tiny_base, tmp_path / "a", "full", "ddp")
    world(1).run(run_part, text, None)
    other = yaml.safe_load(text)
    other["train"]["seed"] = 4
    ((kind, what),) = world(1).run(refusal, yaml.safe_dump(other), checkpoint(tmp_path / "a", STEPS))
    assert kind == "ConfigError"
    assert "train.seed is 4 here and 3 in the checkpoint" in what, "although the run is finished"
    start = checkpoint(tmp_path / "a")
    edit_manifest(Path(start), lambda content: content["position"]["next_sequences"].reverse())
    ((kind, what),) = world(1).run(refusal, config(tiny_base, tmp_path / "b", "full", "ddp"), start)
    assert kind == "CheckpointError"
    assert "step 3 would train other sequences" in what


def test_an_evaluation_is_not_repeated(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    sections = {"eval": {"every_steps": STOP}}
    world(1).run(run_part, config(tiny_base, tmp_path / "a", "full", "ddp", **sections), None)
    world(1).run(run_part, config(tiny_base, tmp_path / "b", "full", "ddp", **sections), checkpoint(tmp_path / "a"))
    whole, resumed = ([line for line in metrics(tmp_path / name) if "eval_loss" in line] for name in "ab")
    assert [line["step"] for line in whole] == [0, STOP, 2 * STOP, STEPS]
    assert resumed == whole[2:]


def movement_is_checked(cfg_yaml: str, start: str | None, lr: float) -> bool:
    with patch.object(loop, "learning_rate", lambda *_: lr), patch.object(loop.MovementCheck, "verify") as verify:
        run_part(cfg_yaml, start)
    return verify.called


def test_a_resumed_run_must_move_what_it_can(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """At the end of a schedule an update may be too small to show; at the beginning that is no excuse."""
    peak, start = 3e-3, None
    for folder, lr, expected in (("a", 0.0, True), ("b", 0.009 * peak, False), ("c", 0.011 * peak, True)):
        text = config(tiny_base, tmp_path / folder, "full", "ddp")
        assert world(1).run(movement_is_checked, text, start, lr) == [expected]
        start = checkpoint(tmp_path / "a")


def test_what_must_stay_may_change_when_the_user_says_so(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """With another seed the run goes on at the same step of another order."""
    text = config(tiny_base, tmp_path / "a", "full", "ddp")
    (whole,) = world(1).run(run_part, text, None)
    other = yaml.safe_load(config(tiny_base, tmp_path / "b", "full", "ddp"))
    other["train"] |= {"seed": 4, "global_batch_size": 6}
    ((_, what),) = world(1).run(refusal, yaml.safe_dump(other), checkpoint(tmp_path / "a"))
    assert "train.global_batch_size is 6 here and 8 in the checkpoint\ntrain.seed is 4 here and 3" in what
    allowed = ("train.seed", "train.global_batch_size")
    (part,) = world(1).run(run_part, yaml.safe_dump(other), checkpoint(tmp_path / "a"), allowed)
    assert [step for step, _, _ in part.metrics] == [3, 4, 5]
    assert part.metrics != whole.metrics[STOP:]
    (again,) = world(1).run(run_part, text, checkpoint(tmp_path / "a"), allowed)
    assert again.metrics == whole.metrics, "allowed is not demanded"


def best_and_others(cfg_yaml: str) -> list[tuple[int, float | None]]:
    """(step, evaluation loss) of the checkpoints that a run leaves."""
    run_part(cfg_yaml, None)
    return [
        (manifest.completed_steps, manifest.position.eval_loss)
        for _, manifest in store.readable_checkpoints(
            Path(Config.model_validate(yaml.safe_load(cfg_yaml)).output_dir) / "checkpoints"
        )
    ]


def test_the_best_one_so_far_is_saved_and_stays(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """A rate that destroys what was learned: the first evaluation is the best, at a step that nothing else saves."""
    text = yaml.safe_load(config(tiny_base, tmp_path / "a", "full", "fsdp2", eval={"every_steps": 1}))
    text["checkpoint"] |= {"every_steps": None, "keep_last": 1, "keep_best": True}
    text["optim"] |= {"lr": 0.5, "warmup_ratio": 0.0, "schedule": "constant"}
    kept = world(2).run(best_and_others, yaml.safe_dump(text))[0]
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "a") if "eval_loss" in line}
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    assert best not in (3, STEPS), "no end of an epoch, nor of the run"
    assert kept == [(best, losses[best]), (STEPS, losses[STEPS])]


def slowly_saved(cfg_yaml: str) -> list[tuple[str, int]]:
    """What happens in which order, where the first write takes longer than a step: (event, step) on this rank."""
    goes_on = Config.model_validate(yaml.safe_load(cfg_yaml)).checkpoint.asynchronous
    stepped = threading.Event()
    events: list[tuple[str, int]] = []
    write, train = checkpointer.write_shard, loop.train_step

    def slow(path: Path, pieces: Any) -> Any:
        step = int(path.parent.name.removeprefix("step-").removesuffix(".unfinished"))
        events.append(("write", step))
        if goes_on and step == STOP:
            assert stepped.wait(60)
        record = write(path, pieces)
        events.append(("written", step))
        return record

    def trained(*args: Any, **kwargs: Any) -> Any:
        outcome = train(*args, **kwargs)
        events.append(("step", 0))
        if ("write", STOP) in events:
            stepped.set()
        return outcome

    with patch.object(checkpointer, "write_shard", slow), patch.object(loop, "train_step", trained):
        run_part(cfg_yaml, None)
    return events


def shards(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.rglob("shard-*")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_training_goes_on_while_a_checkpoint_is_written(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str
) -> None:
    """And what is written are the values of its step, although the next steps have changed them."""
    text = config(tiny_base, tmp_path / "a", "full", strategy)
    events = world(2).run(slowly_saved, text)[0]
    kinds = [kind for kind, _ in events]
    assert kinds[kinds.index("write") : kinds.index("written")].count("step") >= 1, events
    in_flight = [sum({"write": 1, "written": -1}.get(kind, 0) for kind in kinds[: n + 1]) for n in range(len(kinds))]
    assert max(in_flight) == 1
    at_once = yaml.safe_load(config(tiny_base, tmp_path / "b", "full", strategy))
    at_once["checkpoint"]["asynchronous"] = False
    events = world(2).run(slowly_saved, yaml.safe_dump(at_once))[0]
    kinds = [kind for kind, _ in events]
    assert all(kinds[n + 1] == "written" for n, kind in enumerate(kinds) if kind == "write"), "not one step meanwhile"
    assert shards(tmp_path / "a") == shards(tmp_path / "b") != {}
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


def test_the_clock_of_rank_0_makes_all_save(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    text = yaml.safe_load(config(tiny_base, tmp_path / "a", "full", "fsdp2", every_steps=99))
    text["checkpoint"]["every_minutes"] = 1e-9
    world(2).run(run_part, yaml.safe_dump(text), None)
    assert sorted(path.name[-1] for path in (tmp_path / "a/checkpoints").iterdir()) == ["1", "2", "3", "4", "5"]


def until_it_fails(cfg_yaml: str) -> tuple[str, list[int]]:
    """What a run says whose first checkpoint finds no room on rank 1, and the steps that were trained until then."""
    write, output = checkpointer.write_shard, Path(yaml.safe_load(cfg_yaml)["output_dir"])

    def refuse(path: Path, pieces: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    with patch.object(checkpointer, "write_shard", refuse), pytest.raises(SftError) as caught:
        run_part(cfg_yaml, None)
    return caught.value.what, [line["step"] for line in metrics(output)]


def test_a_save_that_must_not_fail_ends_the_run_before_the_next_one(
    world: Worlds, tiny_base: Path, tmp_path: Path
) -> None:
    text = yaml.safe_load(config(tiny_base, tmp_path / "a", "full", "fsdp2", every_steps=999))
    epoch = cells.synthetic_data(rows=60, packing=text["data"]["packing"] != "none").num_sequences
    text["train"] |= {"global_batch_size": 1, "max_steps": 2 * epoch}
    for what, steps in world(2).run(until_it_fails, yaml.safe_dump(text)):
        assert f"step-{epoch:08d}: No space left on device" in what
        assert epoch <= steps[-1] < 2 * epoch - 1, "saved at the end of the epoch, and next at the end of the run"
