"""Runs that overfit by design: they stop early, ``final/`` is the best state, and a resumed one is uninterrupted."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.config.schema import Config
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import ConfigError
from sft_dist.resolve import resolve
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World, WorldShape
from sft_dist.train import ready
from sft_dist.train import run as train_run
from sft_dist.train.outlook import look_ahead
from tests.helpers import cells
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]

STEPS = 40

PATIENT: Mapping[str, Any] = {"patience": 3}

# Rates at which the held-out loss falls first and rises then.
RATES = {"full": 3e-3, "lora": 2e-2}


def held_out() -> PreparedData:
    return cells.synthetic_data(rows=9, seed=99, packing=False)


def train(cfg_yaml: str, start: str | None = None) -> None:
    """A run on few rows, which it learns by heart."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    rank = dist.get_rank()
    world = World(rank, rank, WorldShape(1, dist.get_world_size()))
    run = resolve(cfg, world.shape)
    inputs = ready.Inputs(
        cells.synthetic_data(rows=10, seed=5, packing=False),
        held_out(),
        load_renderer(run.model.path, None, None),
        None,
    )
    seen = look_ahead(cfg, run, cells.CPU, inputs.train_data, inputs.eval_data) if world.is_main else None
    with Signals(is_main=world.is_main) as signals:
        process = ready.Process(world, cells.CPU, cells.store())
        train_run.train(run, cfg, process, inputs, seen, signals, start=None if start is None else Path(start))


def printed(cfg_yaml: str, start: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train(cfg_yaml, start)
    return out.getvalue()


def refusal(cfg_yaml: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(cfg_yaml)
    return caught.value.what


def config(
    base: Path,
    folder: Path,
    method: str,
    strategy: str,
    *,
    early_stopping: Mapping[str, Any] | None = PATIENT,
    **sections: Any,
) -> str:
    folder.mkdir(exist_ok=True)
    settings: dict[str, dict[str, Any]] = {
        "optim": {"lr": RATES[method], "warmup_ratio": 0.0, "weight_decay": 0.0},
        "train": {"global_batch_size": 5, "micro_batch_size": 2, "max_steps": STEPS},
        "eval": {"every_steps": 2},
        "checkpoint": {"keep_last": 1},
        "data": {"packing": "none"},
    }
    if early_stopping is not None:
        settings["early_stopping"] = dict(early_stopping)
    return cells.dump(cells.whole_run(cells.config(str(base), method, strategy, **settings | sections), folder))


def lines(folder: Path, key: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if key in line]


def loss_of_final(folder: Path) -> float:
    """The held-out loss of ``final/`` by plain transformers and peft."""
    adapter = folder / "final/adapter_config.json"
    path = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(folder / "final")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter.exists():
        model = PeftModel.from_pretrained(model, str(folder / "final"))
    model.eval()
    data, total, count = held_out(), 0.0, 0
    with torch.no_grad():
        for number in range(data.num_rows):
            ids, mask = (torch.from_numpy(part.copy()).long() for part in data.row(number))
            losses = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total += float(losses[mask[1:].bool()].sum())
            count += int(mask[1:].sum())
    return total / count


CELLS = [
    pytest.param(strategy, method, marks=() if (strategy, method) == ("fsdp2", "full") else pytest.mark.ci)
    for strategy in ("ddp", "fsdp2", "zero3")
    for method in RATES
]


@pytest.mark.parametrize(("strategy", "method"), CELLS)
def test_an_overfitting_run_stops_and_ends_as_its_best_state(
    world: Worlds, tiny_base: Path, tmp_path: Path, strategy: str, method: str
) -> None:
    run = tmp_path / "run"
    world(2).run(train, config(tiny_base, run, method, strategy))
    losses = {line["step"]: line["eval_loss"] for line in lines(run, "eval_loss")}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert 2 <= best < last < STEPS, f"the run must overfit: {losses}"
    assert last == best + 2 * 3
    (fired,) = lines(run, "early_stopping/fired")
    assert fired == {
        "step": last, "event": "early_stopping", "early_stopping/fired": 1, "early_stopping/evaluations": 3,
        "early_stopping/best": losses[best], "early_stopping/best_step": best,
    }  # fmt: skip
    assert loss_of_final(run) == pytest.approx(losses[best], rel=1e-5)
    assert abs(losses[last] - losses[best]) > 1e-3 * losses[best]
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["finished"]
    assert receipt["final"] == {
        "step": best, "trained_steps": last, "num_steps": STEPS, "metric": "eval_loss", "value": losses[best],
        "stopped_early": True,
    }  # fmt: skip
    card = (run / "final/README.md").read_text(encoding="utf-8")
    assert f"of step {best:,}, the best evaluation: eval_loss {losses[best]:.4f}" in card
    assert f"stopped early after step {last} of {STEPS}" in card
    rates = [line["lr"] for line in lines(run, "lr")]
    assert rates[-1] > 0.3 * rates[0], "the schedule is that of all planned steps"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in (best, last)}


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    """From a checkpoint inside the patience: two evaluations without an improvement are behind it. With noise, too."""
    sections: dict[str, Any] = {
        "checkpoint": {"keep_last": 99, "every_steps": 1},
        "train": {"global_batch_size": 5, "micro_batch_size": 2, "max_steps": STEPS, "neftune_alpha": 5.0},
    }
    world(1).run(train, config(tiny_base, tmp_path / "a", "full", "ddp", **sections))
    (fired,) = lines(tmp_path / "a", "early_stopping/fired")
    inside = fired["step"] - 1
    start = tmp_path / f"a/checkpoints/step-{inside:08d}"
    waiting = Manifest.read(start).position.waiting
    assert waiting is not None
    assert (waiting.evaluations, waiting.best_step) == (2, fired["early_stopping/best_step"])
    world(1).run(train, config(tiny_base, tmp_path / "b", "full", "ddp", **sections), str(start))
    assert lines(tmp_path / "b", "early_stopping/fired") == [fired]
    assert [line["loss"] for line in lines(tmp_path / "b", "loss")] == [lines(tmp_path / "a", "loss")[-1]["loss"]]
    # Its best state is of the run before: what it has itself is what it exports.
    assert loss_of_final(tmp_path / "b") == pytest.approx(lines(tmp_path / "b", "eval_loss")[-1]["eval_loss"], rel=1e-5)


def test_a_run_that_stopped_stays_so_until_it_may_wait_longer(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    world(1).run(train, config(tiny_base, run, "full", "ddp", early_stopping={"patience": 1}))
    (fired,) = lines(run, "early_stopping/fired")
    at, before = fired["step"], (run / "metrics.jsonl").read_bytes()
    start = str(run / f"checkpoints/step-{at:08d}")
    (said,) = world(1).run(printed, config(tiny_base, run, "full", "ddp", early_stopping={"patience": 1}), start)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert f"it stopped early at step {at} of {STEPS}, final/ is there" in said
    world(1).run(train, config(tiny_base, run, "full", "ddp", early_stopping={"patience": 2}), start)
    assert lines(run, "early_stopping/fired")[-1]["step"] > at
    assert len(lines(run, "loss")) > at


def test_the_last_state_where_that_is_asked_for(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = config(tiny_base, run, "full", "ddp", checkpoint={"final": "last"}, early_stopping={"patience": 1})
    world(1).run(train, text)
    last = lines(run, "eval_loss")[-1]
    assert loss_of_final(run) == pytest.approx(last["eval_loss"], rel=1e-5)
    state = json.loads((run / "receipt.json").read_text())["final"]
    assert (state["step"], state["value"], state["stopped_early"]) == (last["step"], None, True)


def test_a_metric_that_is_not_measured_is_refused_before_the_model_is_built(
    world: Worlds, tiny_base: Path, tmp_path: Path
) -> None:
    text = config(tiny_base, tmp_path / "run", "full", "ddp", early_stopping={"metric": "eval_loss/nowhere"})
    said = world(1).run(refusal, text)
    assert said == ["early_stopping.metric is eval_loss/nowhere, which an evaluation of this run does not measure"]
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_overfitting_is_told_once(world: Worlds, tiny_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = config(
        tiny_base, run, "full", "ddp",
        early_stopping=None, checkpoint={"keep_best": True}, eval={"every_steps": 2, "warn_after_rises": 2},
    )  # fmt: skip
    world(1).run(train, text)
    losses = {line["step"]: line["eval_loss"] for line in lines(run, "eval_loss")}
    (told,) = lines(run, "overfitting")
    best = min((step for step in losses if step <= told["step"]), key=lambda step: losses[step])
    assert told == {"step": told["step"], "event": "overfitting", "overfitting": 1, "best_eval_step": best}
    assert losses[told["step"]] > losses[told["step"] - 2] > losses[told["step"] - 4]
