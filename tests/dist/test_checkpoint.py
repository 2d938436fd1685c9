"""A checkpoint that is not what was in memory is never given its name, and a damaged one is never resumed from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft_dist.checkpoint import checkpointer as saving
from sft_dist.checkpoint import shard_file, store
from sft_dist.checkpoint.checkpointer import Checkpointer, Outcome
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Position, TensorRecord
from sft_dist.checkpoint.proof import Chunk, FileProof, problems_of
from sft_dist.config.schema import CheckpointConfig, Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.errors import CheckpointError, ConfigError, SftError
from sft_dist.sharding.state import StateShard
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.resume import check_position
from sft_dist.train.starting_point import newest_valid
from sft_dist.train.step import train_step
from tests.helpers import cells
from tests.helpers.disks import locked
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]
LORA_B = "model.hf.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"


def shard(folder: Path, rank: int) -> Path:
    return folder / shard_file.file_name(rank, 2)


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a file and keeps its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def holder(folder: Path, name: str) -> Path:
    """A file that holds (a part of) a tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return path
    raise AssertionError(name)


# Each is applied to rank 1's file as soon as it is written, before it is read back.
DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a zeroed LoRA-B": (lambda path: edit(path, lambda t: t[LORA_B].zero_()), "is not what was in memory"),
    "a missing key": (lambda path: edit(path, lambda t: t.pop(LORA_B)), "is not what was in memory"),
    "a shard of another step": (
        lambda path: shutil.copy(shard(path.parent.with_name("step-00000001"), 1), path),
        "is not what was in memory",
    ),
    "another dtype": (
        lambda path: edit(path, lambda t: t.update({LORA_B: t[LORA_B].half()})),
        "is not what was in memory",
    ),
    "a cut file": (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is not what was in memory"),
}


def started(
    cfg_yaml: str, folder: str, steps: int, *, asynchronous: bool = False
) -> tuple[Any, Checkpointer, TrainingOrder]:
    """A strategy after some steps, and the checkpointer of its run."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    run, strategy = cells.start(cfg)
    data = cells.synthetic_data()
    order = TrainingOrder(data, run.batch, run.seed)
    for number in range(steps):
        train_step(strategy, data, run.batch, order.step(number), rank=dist.get_rank(), device=cells.CPU, lr=3e-3)
    checkpointer = Checkpointer(
        Path(folder),
        rules=CheckpointConfig(keep_last=2, asynchronous=asynchronous),
        identity=identity_of(run, data),
        strategy_name=run.strategy,
        settings=cfg_yaml,
    )
    return strategy, checkpointer, order


def save(checkpointer: Checkpointer, strategy: Strategy, completed: int, following: tuple[int, ...] = ()) -> Outcome:
    checkpointer.save(strategy, Position(completed_steps=completed, next_sequences=following))
    checkpointer.wait()
    (outcome,) = checkpointer.news()
    return outcome


def move(strategy: Strategy) -> None:
    """What a step would do: every trained weight becomes another one."""
    for _, parameter, trained in strategy.local_parameters():
        if trained:
            parameter.detach().mul_(1.5)


def save_with_defect(cfg_yaml: str, folder: str, defect: str) -> str:
    """What saving says when step 2 is damaged on its way to the disk; step 1 is saved well before."""
    strategy, checkpointer, _ = started(cfg_yaml, folder, 1)
    write = saving.write_shard

    def damaged(path: Path, pieces: Any) -> FileRecord:
        record = write(path, pieces)
        if dist.get_rank() == 1:
            DEFECTS[defect][0](path)
        return record

    try:
        save(checkpointer, strategy, 1)
        move(strategy)
        with patch.object(saving, "write_shard", damaged), pytest.raises(CheckpointError) as caught:
            save(checkpointer, strategy, 2)
        return caught.value.what
    finally:
        strategy.close()


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_not_in_memory_is_rejected_and_kept(
    world: Worlds, tiny_base: Path, tmp_path: Path, defect: str
) -> None:
    text = cells.dump(cells.config(str(tiny_base), "lora", "fsdp2"))
    said = world(2).run(save_with_defect, text, str(tmp_path), defect)
    assert len(set(said)) == 1, "every rank says so"
    assert said[0].startswith("the checkpoint of step 2 failed its proof: ")
    assert DEFECTS[defect][1] in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002.rejected"}


def save_zeros(cfg_yaml: str, folder: str, completed: int) -> str:
    """What saving says of a model one of whose adapters is where it started."""
    strategy, checkpointer, _ = started(cfg_yaml, folder, 1)
    try:
        for name, parameter, _ in strategy.local_parameters():
            if f"model.{name}" == LORA_B:
                parameter.detach().zero_()
        save(checkpointer, strategy, completed)
    except CheckpointError as error:
        return error.what
    finally:
        strategy.close()
    return ""


def test_an_adapter_that_learned_nothing_is_a_defect_after_the_first_step(
    world: Worlds, tiny_base: Path, tmp_path: Path
) -> None:
    text = cells.dump(cells.config(str(tiny_base), "lora", "ddp"))
    assert f"{LORA_B} is all zeros after 1 steps" in world(1).run(save_zeros, text, str(tmp_path / "a"), 1)[0]
    assert world(1).run(save_zeros, text, str(tmp_path / "b"), 0)[0] == ""


@pytest.mark.parametrize(
    ("name", "second_is_zero", "expected"),
    [(LORA_B, True, 1), (LORA_B, False, 0), (LORA_B.replace("model.", "optim.exp_avg.", 1), True, 0)],
)
def test_an_adapter_is_judged_as_a_whole(name: str, second_is_zero: bool, expected: int) -> None:
    """One rank's part may be zero, and so may a moment of AdamW."""
    chunks = (Chunk(name, 0, 6, "float32", True), Chunk(name, 6, 9, "float32", second_is_zero))
    proofs = [FileProof("file", FileRecord(num_bytes=0, digest=""), (chunk,), ()) for chunk in chunks]
    record = TensorRecord(shape=(3, 3), dtype="float32")
    assert len(problems_of(proofs, {name: record}, completed_steps=1)) == expected


def test_parts_that_do_not_make_up_the_whole() -> None:
    def problems(*ranges: tuple[int, int]) -> list[str]:
        parts = tuple(Chunk("t", first, stop, "float32", False) for first, stop in ranges)
        proof = FileProof("file", FileRecord(num_bytes=0, digest=""), parts, ())
        return problems_of([proof], {"t": TensorRecord(shape=(4, 2), dtype="float32")}, completed_steps=1)

    assert problems((0, 7), (7, 8)) == problems((7, 8), (0, 7)) == problems((0, 8)) == []
    for wrong in [], [(0, 7)], [(1, 8)], [(0, 3), (4, 8)], [(0, 5), (4, 8)], [(0, 8), (0, 8)], [(0, 4), (4, 9)]:
        assert problems(*wrong) == ["t is not a whole tensor of shape (4, 2) and dtype float32"], wrong


def save_half(cfg_yaml: str, folder: str) -> str:
    """What saving says when a rank leaves out what is its own to write."""
    strategy, checkpointer, _ = started(cfg_yaml, folder, 1)
    share = StateShard.share

    def less(shard: StateShard) -> StateShard:
        return share(shard if dist.get_rank() == 0 else replace(shard, values=shard.values[:-1]))

    try:
        with patch.object(StateShard, "share", less), pytest.raises(CheckpointError) as caught:
            save(checkpointer, strategy, 1)
        return caught.value.what
    finally:
        strategy.close()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_what_no_rank_writes_is_missed(world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    text = cells.dump(cells.config(str(tiny_base), "full", strategy))
    for what in world(2).run(save_half, text, str(tmp_path)):
        assert "is not a whole tensor of shape" in what
    assert store.complete_checkpoints(tmp_path) == []


def save_on_a_full_disk(
    cfg_yaml: str, folder: str, moment: str, asynchronous: bool, earlier: int
) -> tuple[bool, str, str, bool]:
    """How a save ends when rank 0 finds no room at one moment, after some that went well.

    Returns:
        whether training may go on, what is said, how to mend it, and whether the next save goes well.
    """
    strategy, checkpointer, _ = started(cfg_yaml, folder, 1, asynchronous=asynchronous)
    owner = saving if moment == "write_shard" else store

    def refuse(*args: Any, **kwargs: Any) -> Any:
        # Of the small files the last one: what stands before it must not have the checkpoint's name yet.
        if dist.get_rank() == 0 and (moment != "write_synced" or args[0].name == MANIFEST):
            raise OSError(28, "No space left on device")
        return work(*args, **kwargs)

    try:
        for completed in range(1, earlier + 1):
            save(checkpointer, strategy, completed)
        work = getattr(owner, moment)
        with patch.object(owner, moment, refuse):
            try:
                failed = save(checkpointer, strategy, earlier + 1)
            except CheckpointError as error:
                assert checkpointer.has_failed
                return False, error.what, error.fix, False
        assert not checkpointer.has_failed
        assert not list(Path(folder).glob(f"*{store.UNFINISHED}")), "it may be what fills the disk"
        dist.barrier()  # rank 0 begins the next one when the others have looked
        after = save(checkpointer, strategy, earlier + 2)
        return True, failed.error or "", failed.fix, after.error is None
    finally:
        strategy.close()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("moment", ["begin", "write_shard", "write_synced", "commit"])
def test_a_full_disk_is_told_on_every_rank_and_costs_no_checkpoint(
    world: Worlds, tiny_base: Path, tmp_path: Path, moment: str, asynchronous: bool
) -> None:
    text = cells.dump(cells.config(str(tiny_base), "lora", "fsdp2"))
    for goes_on, what, fix, next_one in world(2).run(save_on_a_full_disk, text, str(tmp_path), moment, asynchronous, 2):
        assert (goes_on, next_one) == (True, True)
        assert what == f"cannot write {tmp_path / 'step-00000003'}: No space left on device"
        assert fix == "make room on the disk, or see who may write there; then go on with --resume auto"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def save_beside_one_that_stays(cfg_yaml: str, folder: str) -> tuple[Outcome, Outcome]:
    """How a save ends while the oldest checkpoint cannot be deleted, and the next one."""
    strategy, checkpointer, _ = started(cfg_yaml, folder, 1)
    try:
        for completed in (1, 2):
            save(checkpointer, strategy, completed)
        if dist.get_rank() == 0:
            with locked(Path(folder) / "step-00000001"):
                first = save(checkpointer, strategy, 3)
        else:
            first = save(checkpointer, strategy, 3)
        assert not checkpointer.has_failed
        return first, save(checkpointer, strategy, 4)
    finally:
        strategy.close()


def test_one_that_cannot_be_deleted_is_no_failure_of_the_next(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), "lora", "fsdp2"))
    for first, second in world(2).run(save_beside_one_that_stays, text, str(tmp_path)):
        assert first.error is not None
        assert first.error.startswith(
            f"{tmp_path / 'step-00000003'} is saved, but an older checkpoint cannot be deleted: "
        )
        assert (first.is_fatal, second.error) == (False, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_nothing_saved_at_all_ends_the_run(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """Days of training without a checkpoint to go back to are what must not happen."""
    text = cells.dump(cells.config(str(tiny_base), "lora", "fsdp2"))
    for goes_on, what, fix, _ in world(2).run(save_on_a_full_disk, text, str(tmp_path), "write_shard", True, 0):
        assert not goes_on
        assert "cannot write" in what
        assert "--resume" not in fix


def save_nan(cfg_yaml: str, folder: str) -> str:
    strategy, checkpointer, _ = started(cfg_yaml, folder, 0)
    try:
        next(iter(strategy.local_parameters()))[1].detach().view(-1)[0] = torch.nan
        with pytest.raises(CheckpointError) as caught:
            save(checkpointer, strategy, 1)
        return caught.value.what
    finally:
        strategy.close()


def test_a_value_that_is_not_finite_is_a_defect(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), "full", "fsdp2"))
    assert "embed_tokens.weight has values that are not finite" in world(2).run(save_nan, text, str(tmp_path))[0]


def save_twice(cfg_yaml: str, folder: str) -> list[int]:
    strategy, checkpointer, order = started(cfg_yaml, folder, 1)
    try:
        for completed in (1, 2, 3):
            following = tuple(order.step(completed).sequences.tolist())
            move(strategy)
            save(checkpointer, strategy, completed, following)
        return list(following)
    finally:
        strategy.close()


def load(cfg_yaml: str, folder: str, name: str) -> tuple[str, str]:
    """(kind, message) of what loading raises; on success the steps behind it."""
    strategy, checkpointer, order = started(cfg_yaml, folder, 0)
    try:
        start = newest_valid([Path(folder) / name], own=Path(folder))
        assert start is not None
        check_position(start, checkpointer.identity, order, num_steps=99)
        manifest = checkpointer.load(start, strategy)
    except SftError as error:
        return type(error).__name__, error.what
    finally:
        strategy.close()
    return "", str(manifest.completed_steps)


@pytest.fixture(scope="module")
def saved(world: Worlds, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A configuration and a folder with its checkpoints of steps 2 and 3, of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    text = cells.dump(cells.config(str(tiny_base), "lora", "fsdp2"))
    following = world(2).run(save_twice, text, str(folder))[0]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"], "the last two"
    manifest = Manifest.read(folder / "step-00000003")
    assert (manifest.completed_steps, manifest.strategy, manifest.world_size) == (3, "fsdp2", 2)
    assert list(manifest.position.next_sequences) == following
    assert {path.name for path in (folder / "step-00000003").iterdir()} == {
        "config.yaml", "manifest.json", shard(folder, 0).name, shard(folder, 1).name
    }  # fmt: skip
    assert (folder / "step-00000003/config.yaml").read_text() == text
    return text, folder


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard of another step": (
        lambda folder: shutil.copy(shard(folder.with_name("step-00000002"), 1), shard(folder, 1)),
        "is not the file that was written at this step",
    ),
    "a flipped bit": (
        lambda folder: flip_last_bit(holder(folder, LORA_B)),
        "is not the file that was written at this step",
    ),
    "a cut file": (
        lambda folder: shard(folder, 0).write_bytes(shard(folder, 0).read_bytes()[:-8]),
        "bytes instead of",
    ),
    "a missing shard": (lambda folder: shard(folder, 1).unlink(), "is missing"),
    "a shard too many": (
        lambda folder: shutil.copy(shard(folder, 1), folder / shard_file.file_name(2, 3)),
        "does not belong to it",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is no checkpoint: it has no manifest.json"),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:400]),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_resumed_from(
    world: Worlds, saved: tuple[str, Path], tmp_path: Path, damage: str
) -> None:
    text, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if damage == "a flipped bit":
        for name in ("step-00000002", "step-00000003"):
            assert world(2).run(load, text, str(tmp_path), name)[0] == ("", str(int(name[-1])))
    change, message = DAMAGES[damage]
    change(tmp_path / "step-00000003")
    for kind, what in world(2).run(load, text, str(tmp_path), "step-00000003"):
        assert kind == "CheckpointError"
        assert message in what


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"seed": 4}}, "train.seed is 4 here and 3 in the checkpoint"),
        ({"train": {"global_batch_size": 6}}, "train.global_batch_size is 6 here and 7 in the checkpoint"),
        ({"method": {"type": "lora", "r": 8, "alpha": 16}}, "method.r is 8 here and 4 in the checkpoint"),
        ({"optim": {"type": "sgd", "lr": 1.0}}, "optim.type is sgd here and adamw in the checkpoint"),
    ],
)
def test_another_run_is_refused_with_both_values(
    world: Worlds, saved: tuple[str, Path], section: dict[str, Any], message: str
) -> None:
    text, folder = saved
    other = yaml.safe_load(text)
    for name, values in section.items():
        other[name] = values if "type" in values else other[name] | values
    answers = world(2).run(load, cells.dump(Config.model_validate(other)), str(folder), "step-00000003")
    for kind, what in answers:
        assert kind == ConfigError.__name__
        assert message in what


def test_tensors_of_another_dtype_are_not_resumed_from(world: Worlds, saved: tuple[str, Path]) -> None:
    text, folder = saved
    other = yaml.safe_load(text) | {"precision": {"compute": "bf16", "master": "bf16"}}
    for kind, what in world(2).run(load, cells.dump(Config.model_validate(other)), str(folder), "step-00000003"):
        assert kind == CheckpointError.__name__
        assert "dtype='float32' there and shape=" in what
        assert "dtype='bfloat16' here" in what


def test_nothing_is_pickled(saved: tuple[str, Path]) -> None:
    _, folder = saved
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".yaml"}
    record = json.loads((folder / "step-00000003/manifest.json").read_text())["tensors"][LORA_B]
    assert record == {"shape": [32, 4], "dtype": "float32"}
