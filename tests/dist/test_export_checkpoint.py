"""What is exported of a checkpoint is what the run would have called ``final/`` at that step, under every strategy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_dist.checkpoint import fresh_process
from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import Position
from sft_dist.checkpoint.source import find_source
from sft_dist.config.load import dump_config
from sft_dist.config.schema import CheckpointConfig, Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.export.checkpoint_artefact import artefact_of_checkpoint
from sft_dist.export.command import run_export
from sft_dist.export.wish import Wish
from sft_dist.model.export import export, publish
from sft_dist.train.step import train_step
from tests.helpers import cells
from tests.helpers.pool import WorldPool
from tests.helpers.tiny_model import build_base

Worlds = Callable[[int], WorldPool]

STEPS = 2


def trained(cfg_yaml: str) -> None:
    """Leaves a run directory with config.yaml, a checkpoint and ``final/`` of the same step."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    run, strategy = cells.start(cfg)
    folder, rank = Path(cfg.output_dir), dist.get_rank()
    data = cells.synthetic_data(packing=run.data.packing != "none")
    order = TrainingOrder(data, run.batch, run.seed)
    checkpointer = Checkpointer(
        folder / "checkpoints", rules=CheckpointConfig(asynchronous=False), identity=identity_of(run, data),
        strategy_name=run.strategy, settings=dump_config(cfg),
    )  # fmt: skip
    try:
        for number in range(STEPS):
            train_step(strategy, data, run.batch, order.step(number), rank=rank, device=cells.CPU, lr=3e-3)
        checkpointer.save(strategy, Position(completed_steps=STEPS, next_sequences=()))
        checkpointer.wait()
        parameters = strategy.full_parameters(trainable_only=run.model.method.type != "full")
        tokenizer = load_tokenizer(run.model.path, added=run.model.tokens.added)
        export(folder / "final", run.model, strategy.model, parameters, tokenizer, is_main=rank == 0, seed=run.seed)
        if rank == 0:
            publish(folder / "final")
            (folder / "config.yaml").write_text(dump_config(cfg))
    finally:
        checkpointer.close()
        strategy.close()


@pytest.fixture(scope="module")
def run_of(
    world: Worlds, tiny_base: Path, tied_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The run directory of a method and a strategy, trained once."""
    runs: dict[str, Path] = {}

    def run(method: dict[str, Any], strategy: str, *, tied: bool = False, **sections: Any) -> Path:
        key = json.dumps([method, strategy, tied, sections])
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("run")
            cfg = cells.config(str(tied_base if tied else tiny_base), method, strategy, **sections)
            cfg = Config.model_validate(cfg.model_dump(mode="json") | {"output_dir": str(runs[key])})
            world(2).run(trained, cells.dump(cfg))
        return runs[key]

    return run


def unchecked(merge: bool, out: Path) -> Wish:
    return Wish(merge=merge, check=False, out=out)


LORA: dict[str, tuple[dict[str, Any], str]] = {
    "ddp pissa": ({"type": "lora", "init": "pissa"}, "ddp"),
    "fsdp2 dora": ({"type": "lora", "dora": True}, "fsdp2"),
    "fsdp2 tokens": ({"type": "lora", "train_tokens": ["a", "<|im_end|>"]}, "fsdp2"),
    "zero1": ({"type": "lora"}, "zero1"),
    "zero2 whole": ({"type": "lora", "modules_to_save": ["lm_head"]}, "zero2"),
    "zero3 qlora": ({"type": "qlora"}, "zero3"),
}


# The others are in `make test-ci`.
QUICK = ("ddp pissa", "zero3 qlora", "fsdp2 tokens")


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=() if cell in QUICK else pytest.mark.ci) for cell in LORA])
def test_an_adapter_is_exported_and_merged(run_of: Callable[..., Path], tmp_path: Path, cell: str) -> None:
    method, strategy = LORA[cell]
    run = run_of(method, strategy)
    alone = run_export(run, unchecked(False, tmp_path / "adapter"), checkpoint="latest")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (run / "final", alone))
    assert found.keys() == expected.keys()
    if "pissa" not in cell:
        # ZeRO exports what it computes with; in fp32 that is the master weight.
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert json.loads((alone / "adapter_config.json").read_text()) == json.loads(
        (run / "final/adapter_config.json").read_text()
    )
    whole = run_export(run / f"checkpoints/step-{STEPS:08d}", unchecked(True, tmp_path / "merged"))
    merged, _ = fresh_process.load(whole, torch.float32)
    quantization = {"type": "nf4", "skip": []} if "qlora" in cell else None
    adapted = fresh_process.load_adapter(run / "final", quantization, torch.float32, None)
    for ids in cells.probe_ids():
        mine, theirs = (
            fresh_process.probe_logits(model, {"input_ids": ids, "positions": slice(None)})
            for model in (merged, adapted)
        )
        assert fresh_process.relative_difference(mine, theirs) < 1e-6
    assert not list((run / "checkpoints").glob("*.adapter*"))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("zero3", {}), ("fsdp2", {"tied": True}), ("ddp", {"model": {"add_tokens": ["<tool>"]}, "freeze": ["layers.0"]})],
)
def test_a_whole_model_is_exported(
    run_of: Callable[..., Path], tmp_path: Path, strategy: str, options: dict[str, Any]
) -> None:
    method = {"type": "full", "freeze": options.get("freeze", [])}
    run = run_of(method, strategy, **{key: value for key, value in options.items() if key != "freeze"})
    folder = run_export(run, unchecked(False, tmp_path / "model"), checkpoint=str(STEPS))
    expected = load_file(run / "final/model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="nothing to merge"):
        run_export(run, unchecked(True, tmp_path / "never"), checkpoint="latest")


@pytest.mark.parametrize("method", [{"type": "prefix", "projection": True}, {"type": "p_tuning"}])
def test_virtual_tokens_are_exported_without_their_encoder(
    run_of: Callable[..., Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    run = run_of(method, "fsdp2")
    folder = run_export(run, unchecked(False, tmp_path / "adapter"), checkpoint="latest")
    expected, found = (load_file(each / "adapter_model.safetensors") for each in (run / "final", folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(ConfigError, match="trains virtual tokens"):
        run_export(run, unchecked(True, tmp_path / "never"), checkpoint="latest")


def test_a_damaged_checkpoint_is_not_exported(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of({"type": "lora", "r": 2}, "fsdp2")
    file = next((run / "checkpoints").glob("step-*/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for merge in (False, True):
        with pytest.raises(CheckpointError, match="is damaged: "):
            run_export(run, unchecked(merge, tmp_path / "never"), checkpoint="latest")
    assert not (tmp_path / "never").exists()


def test_a_checkpoint_without_a_trained_parameter_is_refused(run_of: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(run_of({"type": "lora"}, "zero1"), checkpoint="latest")
    assert source.config is not None
    more = source.config.model_copy(
        update={"method": source.config.method.model_copy(update={"modules_to_save": ["lm_head"]})}
    )
    with pytest.raises(CheckpointError, match=r"does not hold .*lm_head.*, which its config\.yaml trains"):
        artefact_of_checkpoint(replace(source, config=more), tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []


def test_another_base_than_the_trained_one_is_refused(world: Worlds, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    cfg = cells.config(str(base), "lora", "ddp")
    cfg = Config.model_validate(cfg.model_dump(mode="json") | {"output_dir": str(tmp_path / "run")})
    world(2).run(trained, cells.dump(cfg))
    build_base(base, seed=1)
    for merge in (False, True):
        with pytest.raises(ConfigError, match="other weights than those"):
            run_export(tmp_path / "run", unchecked(merge, tmp_path / "never"), checkpoint="latest")


def test_which_checkpoints_there_are_is_told(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of({"type": "lora"}, "zero1")
    for path, checkpoint, what, fix in (
        (run, "7", "no complete checkpoint of step 7", "there are 2, and latest"),
        (run, "best", "is no number of steps", "give a number, or latest"),
        (run / "final", "latest", "chooses one of a run directory", "give the output_dir of the run"),
        (tmp_path, None, "neither a run directory, nor a checkpoint", "give the output_dir of a run"),
        (tmp_path / "nowhere", None, "is no folder here", "give a run directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            run_export(path, unchecked(False, tmp_path / "never"), checkpoint=checkpoint)
        assert what in caught.value.what
        assert fix in caught.value.fix
