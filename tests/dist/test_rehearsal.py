"""A rehearsed run is the run: the same bits; and what goes wrong in a rehearsal is told by its item, and leaves nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.config.schema import Config
from sft_dist.data.chat_template import load_renderer
from sft_dist.errors import SftError
from sft_dist.resolve import resolve
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World, WorldShape
from sft_dist.train import ready, rehearsal_items, rehearsed_answers
from sft_dist.train import run as train_run
from sft_dist.train.asked import Asked, Rehearsing
from sft_dist.train.outlook import look_ahead
from sft_dist.train.rehearsed import FOLDER, remove_leftovers
from sft_dist.train.resume import MARKS_OF_A_RUN
from tests.helpers import cells
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]

STEPS = 4


def config(base: Path, folder: Path, method: str, strategy: str, **sections: Any) -> str:
    folder.mkdir(exist_ok=True)
    base_sections: dict[str, Any] = {
        "train": {"global_batch_size": 8, "micro_batch_size": 1, "max_steps": STEPS},
        "checkpoint": {"every_steps": 2, "keep_last": 1},
        "eval": {"every_steps": 2},
    }
    cfg = cells.config(str(base), method, strategy, **(base_sections | sections))
    if method != "full":
        cfg = cfg.model_copy(update={"method": cfg.method.model_copy(update={"dropout": 0.2})})
    return cells.dump(cells.whole_run(cfg, folder))


def run(
    cfg_yaml: str,
    rehearsing: Rehearsing,
    start: str | None = None,
    fault: str | None = None,
    tries: str | None = None,
) -> str:
    """One run of ``train``, and what its error says if it has one.

    Args:
        fault: a name in ``FAULTS``.
        tries: folder of a launch that starts its processes again.
    """
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    rank = dist.get_rank()
    world = World(rank, rank, WorldShape(1, dist.get_world_size()))
    resolved = resolve(cfg, world.shape)
    data = cells.synthetic_data(rows=60, packing=resolved.data.packing != "none")
    held_out = cells.synthetic_data(rows=9, seed=99, packing=False)
    inputs = ready.Inputs(data, held_out, load_renderer(resolved.model.path, None, None), None)
    process = ready.Process(world, cells.CPU, cells.store())
    outlook = look_ahead(cfg, resolved, cells.CPU, data, held_out) if world.is_main else None
    place = None if start is None else Path(start)
    if tries is not None:
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"{tries}/attempt_0/{rank}/error.json"
    torch.manual_seed(rank)
    drawn = torch.get_rng_state()
    with ExitStack() as stack:
        if fault is not None:
            stack.enter_context(FAULTS[fault]())
        try:
            signals = stack.enter_context(Signals(is_main=world.is_main))
            asked = Asked(rehearsing=rehearsing)
            train_run.train(resolved, cfg, process, inputs, outlook, signals, asked, start=place)
        except SftError as error:
            return f"{error.exit_code}: {error}"
        finally:
            os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
    if rehearsing == "only" and cfg.method.type == "full":  # adapters draw when they are built
        assert torch.equal(torch.get_rng_state(), drawn), "random numbers are those of before"
    return ""


@dataclass(frozen=True)
class Result:
    """What a run left; of ``metrics.jsonl`` what is no time."""

    lines: list[dict[str, float]]
    final: dict[str, bytes]
    checkpoints: dict[str, bytes]


def result(folder: Path) -> Result:
    kept = ("step", "loss", "grad_norm", "lr", "eval_loss")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Result(
        [{key: line[key] for key in kept if key in line} for line in lines],
        {path.name: path.read_bytes() for path in (folder / "final").glob("*.safetensors")},
        {f"{p.parent.name}/{p.name}": p.read_bytes() for p in (folder / "checkpoints").rglob("*.safetensors")},
    )


MORE = pytest.mark.ci


@pytest.mark.parametrize(
    ("strategy", "method", "ranks"),
    [
        ("ddp", "full", 3), ("zero3", "full", 2), ("fsdp2", "lora", 2),
        *(
            pytest.param(strategy, method, ranks, marks=MORE)
            for strategy, method, ranks in (("zero2", "full", 2), ("zero1", "lora", 2), ("zero3", "qlora", 2))
        ),
        *(
            pytest.param(strategy, method, ranks, marks=pytest.mark.full)
            for strategy, method, ranks in (
                ("fsdp2", "full", 2), ("zero1", "full", 2), ("ddp", "lora", 2), ("ddp", "qlora", 2), ("fsdp2", "qlora", 2),
                ("zero1", "qlora", 2), ("zero2", "lora", 2), ("zero2", "qlora", 2), ("zero3", "lora", 2),
                ("fsdp2", "full", 3), ("zero1", "full", 3), ("zero2", "full", 3), ("zero3", "full", 3),
            )
        ),
    ],
)  # fmt: skip
def test_a_rehearsed_run_is_the_run(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, method: str, ranks: int
) -> None:
    """Bit for bit: losses, norms, evaluations, checkpoints and final/; with dropout where there are adapters."""
    plain, rehearsed = tmp_path / "plain", tmp_path / "rehearsed"
    assert world(ranks).run(run, config(tiny_base, plain, method, strategy), "no") == [""] * ranks
    assert world(ranks).run(run, config(tiny_base, rehearsed, method, strategy), "first") == [""] * ranks
    assert result(rehearsed) == result(plain)
    assert [line["step"] for line in result(plain).lines if "loss" in line] == list(range(1, STEPS + 1))
    assert len(result(plain).checkpoints) >= 1 <= len(result(plain).final)
    assert not (rehearsed / FOLDER).exists()
    waste = json.loads((rehearsed / "receipt.json").read_text())["waste"]
    assert waste["rehearsing_s"] > 0.2
    assert json.loads((plain / "receipt.json").read_text())["waste"]["rehearsing_s"] == 0


def test_questions_are_answered_in_a_rehearsal(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """Once, with the longest; the run afterwards is the run."""
    asked = {
        "every_steps": 2, "scores": {"metrics": ["chrf"]}, "answers": {"max_new_tokens": 9, "rows_at_once": 2}
    }  # fmt: skip
    plain, rehearsed = tmp_path / "plain", tmp_path / "rehearsed"
    assert world(2).run(run, config(tiny_base, plain, "lora", "fsdp2", eval=asked), "no") == [""] * 2
    # Nine rows: five groups of two, three of them on one of two ranks; the longest are asked.
    prompts, groups, seconds, said = world(2).run(
        hardest, config(tiny_base, tmp_path / "alone", "lora", "fsdp2", eval=asked)
    )[0]
    assert groups == 3
    assert seconds > 0
    assert said.startswith(f"2 questions of up to {prompts[0]} tokens, answers of 9")
    assert world(2).run(run, config(tiny_base, rehearsed, "lora", "fsdp2", eval=asked), "first") == [""] * 2
    assert result(rehearsed) == result(plain)


def hardest(cfg_yaml: str) -> tuple[list[int], int, float, str]:
    """Lengths of the questions that a rehearsal asks, the groups of all, seconds, and what is said."""
    resolved, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        data = cells.synthetic_data(rows=9, seed=99, packing=False)
        questions = rehearsed_answers.hardest_questions(resolved, data, size)
        assert questions is not None
        place = World(rank, rank, WorldShape(1, size))
        seconds, said = rehearsed_answers.answer_hardest(resolved, strategy, questions, world=place, device=cells.CPU)
        lens = sorted((int(np.flatnonzero(data.row(row)[1])[0]) for row in range(9)), reverse=True)
        assert [len(prompt) for prompt in questions.prompts] == lens[:2]
        return lens, questions.groups, seconds, said
    finally:
        strategy.close()


@pytest.mark.parametrize(
    "optim",
    [
        {"optim": {"type": "sgd", "lr": 0.01, "momentum": 0.9}},
        pytest.param({"optim": {"type": "adafactor", "lr": 0.01}}, marks=MORE),
        pytest.param({"optim": {"type": "adamw", "lr": 0.01}, "precision": {"optimizer_state": "8bit"}}, marks=MORE),
        pytest.param(
            {"optim": {"type": "adamw", "lr": 0.01}, "precision": {"compute": "bf16", "master": "bf16"}}, marks=MORE
        ),
    ],
)
def test_with_every_optimizer(world: Worlds, tiny_base: Path, tmp_path: Path, optim: dict[str, Any]) -> None:
    for name in ("plain", "rehearsed"):
        cfg = config(tiny_base, tmp_path / name, "full", "fsdp2", **optim)
        assert world(2).run(run, cfg, "first" if name == "rehearsed" else "no") == ["", ""]
    assert result(tmp_path / "rehearsed") == result(tmp_path / "plain")


def test_a_resumed_run_rehearses_from_where_it_is(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    keeping = {"every_steps": 2, "keep_last": 9}
    whole = tmp_path / "whole"
    assert world(2).run(run, config(tiny_base, whole, "lora", "fsdp2", checkpoint=keeping), "no") == ["", ""]
    resumed = config(tiny_base, tmp_path / "resumed", "lora", "fsdp2", checkpoint=keeping)
    start = str(whole / "checkpoints" / "step-00000002")
    assert world(2).run(run, resumed, "first", start) == ["", ""]
    after = [line for line in result(whole).lines if line["step"] > 2]
    assert result(tmp_path / "resumed").lines == after != []
    assert result(tmp_path / "resumed").final == result(whole).final


def test_alone_it_leaves_the_folder_as_it_was(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """What a killed rehearsal left is not in the way of the next one."""
    cfg = config(tiny_base, tmp_path / "out", "full", "ddp")
    assert world(2).run(run, cfg, "only") == ["", ""]
    assert list((tmp_path / "out").iterdir()) == []
    leftover = tmp_path / "out" / FOLDER / "step-00000000"
    leftover.mkdir(parents=True)
    remove_leftovers(str(tmp_path / "out"))
    assert not any((tmp_path / "out" / mark).exists() for mark in (*MARKS_OF_A_RUN, FOLDER))


def test_a_launcher_that_starts_again(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """One that failed is rehearsed again; one that passed is not."""
    tries = str(tmp_path / "tries")
    (tmp_path / "tries").mkdir()
    cfg = config(tiny_base, tmp_path / "out", "lora", "ddp")
    told: list[str] = world(2).run(run, cfg, "only", None, "out of memory", tries)
    assert [line[0] for line in told] == ["3", "3"]
    told = world(2).run(run, cfg, "only", None, "out of memory", tries)
    assert [line[0] for line in told] == ["3", "3"]
    assert world(2).run(run, cfg, "only", None, None, tries) == ["", ""]
    assert world(2).run(run, cfg, "only", None, "out of memory", tries) == ["", ""], "it was rehearsed"


def out_of_memory() -> Any:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    return patch.object(rehearsal_items, "train_step", side_effect=error)


def full_disk() -> Any:
    return patch.object(rehearsal_items.shutil, "disk_usage", return_value=type("Usage", (), {"free": 10_000})())


def wrong_state() -> Any:
    load = Checkpointer.load

    def one_bit_off(self: Checkpointer, checkpoint: Path, strategy: Any) -> Any:
        manifest = load(self, checkpoint, strategy)
        if dist.get_rank() == 1:
            values = next(iter(strategy.state().values())).values
            values.view(torch.int32)[0] ^= 1
        return manifest

    return patch.object(Checkpointer, "load", one_bit_off)


def other_random_numbers() -> Any:
    seed_step, calls = rehearsal_items.seed_step, []

    def third_is_another(seed: int, step: int, rank: int) -> None:
        calls.append(step)
        seed_step(seed + (len(calls) == 3), step, rank)

    return patch.object(rehearsal_items, "seed_step", third_is_another)


FAULTS: dict[str, Callable[[], Any]] = {
    "out of memory": out_of_memory,
    "full disk": full_disk,
    "wrong state": wrong_state,
    "other random numbers": other_random_numbers,
}


@pytest.mark.parametrize(
    ("fault", "said", "fix"),
    [
        (
            "out of memory",
            "3: rehearsal, longest batch: rank 0 ran out of device memory; ",
            "set activation_checkpointing.mode to full (now none), or lower data.max_seq_len (now 48)",
        ),
        ("full disk", "5: rehearsal, room on the disk: the disk of ", "make room, or set another output_dir"),
        ("wrong state", "5: rehearsal, reload: the state is not what was saved: ", "of rank 1, "),
        ("other random numbers", "5: rehearsal, resume: the step after a resumption has loss ", "please report this"),
    ],
)
def test_what_goes_wrong_is_told_by_its_item(
    world: Worlds, tiny_base: Path, tmp_path: Path, fault: str, said: str, fix: str
) -> None:
    # Two steps come before the replay: one batch has the longest row, too.
    cfg = config(tiny_base, tmp_path / "out", "lora", "fsdp2", activation_checkpointing={"mode": "none"})
    told: list[str] = world(2).run(run, cfg, "first", None, fault)
    assert told[0].startswith(said), told[0]
    assert fix in told[0]
    assert told[1]
    assert list((tmp_path / "out").iterdir()) == [], "nothing of it stays, and the run has not begun"


def test_a_run_that_would_diverge(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    cfg = config(tiny_base, tmp_path / "out", "full", "ddp", optim={"lr": 1e30, "max_grad_norm": None})
    told: list[str] = world(2).run(run, cfg, "first")
    assert all(line.startswith("6: rehearsal, save beside a step: loss ") for line in told), told
    assert list((tmp_path / "out").iterdir()) == []
