"""Evaluations of a run: answers that are generated where the model is sharded, their scores, and samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from sft_dist.config.schema import Config
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.messages import Conversation, Message, Origin
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import ConfigError
from sft_dist.resolve import resolve
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World, WorldShape
from sft_dist.train import outlook, ready
from sft_dist.train import run as train_run
from tests.helpers import cells
from tests.helpers.pool import WorldPool
from tests.helpers.taught import PAIRS, conversation, write_rows

Worlds = Callable[[int], WorldPool]

EVAL = {
    "every_steps": 30,
    "scores": {"metrics": ["exact_match", "chrf", "rougeL"]},
    "samples": {"prompts": ["東京は？"], "from_eval": 1},
    "answers": {"max_new_tokens": 40, "rows_at_once": 2},
}


def rows_of(base: str) -> PreparedData:
    renderer = load_renderer(base, None, None)
    rendered = [
        renderer.render(Conversation((Message("user", asked), Message("assistant", answer)), (), Origin("pairs", n)))
        for n, (asked, answer) in enumerate(PAIRS)
    ]
    return PreparedData.of([(row.input_ids, row.supervised) for row in rendered])


def train(cfg_yaml: str) -> None:
    """``PAIRS`` are learned by heart, and held out as well."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    rank = dist.get_rank()
    world = World(rank, rank, WorldShape(1, dist.get_world_size()))
    run = resolve(cfg, world.shape)
    data = rows_of(cfg.model.path)
    inputs = ready.Inputs(data, data, load_renderer(run.model.path, None, None), None)
    seen = outlook.look_ahead(cfg, run, cells.CPU, data, data) if world.is_main else None
    with Signals(is_main=world.is_main) as signals:
        train_run.train(run, cfg, ready.Process(world, cells.CPU, cells.store()), inputs, seen, signals)


def config(base: Path, folder: Path, strategy: str, *, steps: int, **sections: Any) -> Config:
    (folder / "run").mkdir(parents=True)
    rows = write_rows(folder / "rows.jsonl", [conversation(*pair) for pair in PAIRS])
    files = {"train": [{"path": str(rows)}], "eval": [{"path": str(rows)}], "packing": "none", "max_seq_len": 128}
    cfg = cells.config(
        str(base), "full", strategy, data=files, optim={"lr": 1.0e-2, "weight_decay": 0.0},
        train={"global_batch_size": 3, "micro_batch_size": 1, "max_steps": steps}, **{"eval": EVAL, **sections},
    )  # fmt: skip
    return cells.whole_run(cfg, folder / "run")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.parametrize(
    ("strategy", "size"), [("fsdp2", 2), pytest.param("zero3", 3, marks=pytest.mark.ci), ("ddp", 1)]
)
def test_what_was_learned_by_heart_is_answered_and_scored(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, size: int
) -> None:
    cfg = config(tiny_base, tmp_path / "learned", strategy, steps=60)
    world(size).run(train, cells.dump(cfg))
    run = tmp_path / "learned/run"
    before, _, after = evaluations(run)
    assert (before["step"], after["step"]) == (0, 60)
    assert before["eval_scores/exact_match"] == 0
    assert (after["eval_scores/exact_match"], after["eval_scores/chrf"], after["eval_scores/rougeL"]) == (
        1.0,
        pytest.approx(100.0),
        1.0,
    )
    samples = lines(run / "samples.jsonl")
    assert [(line["step"], line["sample"]) for line in samples] == [(s, n) for s in (0, 30, 60) for n in (0, 1)]
    assert samples[-2] == {
        "step": 60, "sample": 0, "prompt": "東京は？", "answer": "日本の首都です。", "reference": None,
        "source": "prompts", "finish_reason": "stop", "question": "東京は？",
    }  # fmt: skip
    assert samples[-1]["answer"] == samples[-1]["reference"] in dict(PAIRS).values()
    assert samples[0]["answer"] != "日本の首都です。"
    answers = lines(run / "answers/step-00000060.jsonl")
    assert [(line["question"], line["reference"]) for line in answers] == list(PAIRS)
    assert all(line["question"] in line["prompt"] != line["question"] for line in answers), "the template is in prompt"
    assert [line["scores"]["exact_match"] for line in answers] == [1.0] * 3


def test_one_process_and_three_say_the_same(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """Before training all have the same weights: what they generate is the same to the last token."""
    runs = []
    (tmp_path / "long.txt").write_text("東京は日本の首都です。" * 20, encoding="utf-8")
    long_texts = {"paths": [str(tmp_path / "*.txt")], "length": 64, "stride": 24}
    asked = {**EVAL, "every_steps": None, "long_texts": long_texts}
    for strategy, size in (("ddp", 1), ("fsdp2", 3), ("zero3", 3)):
        cfg = config(tiny_base, tmp_path / strategy, strategy, steps=1, eval=asked)
        world(size).run(train, cells.dump(cfg))
        runs.append(tmp_path / strategy / "run")
    first, *others = [
        (
            [line for line in lines(run / "samples.jsonl") if line["step"] == 0],
            (run / "answers/step-00000000.jsonl").read_text(),
            {k: v for k, v in evaluations(run)[0].items() if k not in ("eval_loss", "eval_perplexity")},
        )
        for run in runs
    ]
    assert all(other == first for other in others)
    assert first[2]["eval_long_perplexity"] > 100


@pytest.mark.ci
def test_a_run_may_stop_by_a_score(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """What rank 0 has judged, every rank has to know."""
    cfg = config(
        tiny_base, tmp_path / "stops", "fsdp2", steps=120,
        early_stopping={"metric": "eval_scores/exact_match", "patience": 1}, checkpoint={"keep_best": True},
    )  # fmt: skip
    world(2).run(train, cells.dump(cfg))
    run = tmp_path / "stops/run"
    scores = {line["step"]: line["eval_scores/exact_match"] for line in evaluations(run)}
    last = max(scores)
    assert last < 120
    assert scores[last] <= max(score for step, score in scores.items() if step < last)
    assert json.loads((run / "receipt.json").read_text())["final"]["stopped_early"]


@pytest.mark.parametrize("size", [2, pytest.param(1, marks=pytest.mark.ci)])
def test_a_run_that_stops_early_is_asked_what_is_asked_at_its_end(
    world: Worlds, tiny_base: Path, tmp_path: Path, size: int
) -> None:
    """``when: ends`` is known to be the end only when the last evaluation has been looked at."""
    asked = {**EVAL, "every_steps": 2, "answers": {**EVAL["answers"], "when": "ends"}}
    cfg = config(
        tiny_base, tmp_path / "ends", "fsdp2", steps=20, eval=asked,
        early_stopping={"patience": 2, "threshold": 100.0},
    )  # fmt: skip
    world(size).run(train, cells.dump(cfg))
    run = tmp_path / "ends/run"
    assert [(line["step"], "eval_scores/chrf" in line) for line in evaluations(run)] == [
        (0, True),
        (2, False),
        (4, True),
    ]
    assert sorted({line["step"] for line in lines(run / "samples.jsonl")}) == [0, 4]
    assert sorted(file.name for file in (run / "answers").iterdir()) == ["step-00000000.jsonl", "step-00000004.jsonl"]
    assert json.loads((run / "receipt.json").read_text())["final"]["stopped_early"]


def test_questions_alone_change_no_step(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    losses = []
    for name, section in (("asked", EVAL), ("silent", {"every_steps": 30})):
        cfg = config(tiny_base, tmp_path / name, "fsdp2", steps=35, eval=section)
        world(2).run(train, cells.dump(cfg))
        losses.append([line["loss"] for line in lines(tmp_path / name / "run/metrics.jsonl") if "loss" in line])
    assert losses[0] == losses[1]


def message(cfg_yaml: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(cfg_yaml)
    return caught.value.what


def test_scores_that_cannot_be_are_told_before_a_step(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    scores = {"metrics": ["custom"], "custom": f"{tmp_path}/nowhere.py:score"}
    cfg = config(tiny_base, tmp_path / "wrong", "ddp", steps=1, eval={**EVAL, "scores": scores})
    assert "nowhere.py" in world(1).run(message, cells.dump(cfg))[0]
    assert torch.is_grad_enabled()
