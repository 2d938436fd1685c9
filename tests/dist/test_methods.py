"""Variants of a method: the same numbers on any strategy and number of processes, and what they start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from sft_dist.config.schema import Config
from sft_dist.data.loader import collate
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model.weights import check_weights
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.loaded import load_model
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"type": "lora", "dora": True},
    "qdora": {"type": "qlora", "dora": True, "target_modules": "mlp"},
    "pissa": {"type": "lora", "init": "pissa", "rslora": True},
    "loftq": {"type": "qlora", "init": "loftq"},
    "skip": {"type": "qlora", "init": "loftq", "quantization": {"skip": ["layers.0", "re:.*down_proj"]}},
    "whole": {"type": "qlora", "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "frozen": {"type": "full", "freeze": ["embed_tokens", "re:model.layers.0.*"]},
}
TRAIN = {"global_batch_size": 7, "micro_batch_size": 2, "max_steps": 4, "seed": 3}


@pytest.mark.parametrize(
    ("variant", "strategy", "ranks"),
    [
        ("dora", "fsdp2", 3), ("dora", "zero3", 2), ("dora", "ddp", 2), ("qdora", "zero3", 3), ("qdora", "fsdp2", 2),
        ("pissa", "fsdp2", 2), ("pissa", "zero3", 3), ("loftq", "fsdp2", 3), ("loftq", "zero2", 2),
        ("skip", "fsdp2", 3), ("skip", "zero3", 2), ("skip", "zero1", 2),
        ("whole", "fsdp2", 2), ("whole", "zero3", 2), ("whole", "zero1", 2), ("frozen", "fsdp2", 3),
        ("frozen", "zero3", 2), ("frozen", "zero1", 2),
    ],
)  # fmt: skip
def test_variants_equal_one_process(world: World, tiny_base: Path, variant: str, strategy: str, ranks: int) -> None:
    method = VARIANTS[variant]
    alone: Trained = world(1).run(cells.train, cells.dump(cells.config(str(tiny_base), method, "ddp", train=TRAIN)))[0]
    cfg = cells.config(str(tiny_base), method, strategy, train=TRAIN)
    trained: list[Trained] = world(ranks).run(cells.train, cells.dump(cfg))
    assert alone.losses[-1] < alone.losses[0]
    for rank in trained:
        np.testing.assert_allclose(rank.losses, alone.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, alone.grad_norms, rtol=1e-5)
    assert trained[0].weights.keys() == alone.weights.keys()


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero3"])
def test_lora_plus(world: World, tiny_base: Path, strategy: str) -> None:
    """One step of plain SGD: B moves as many times as far, A (whose gradient is 0 beside a B of 0) not at all."""
    moved = {}
    for ratio in (1.0, 16.0):
        optim = {"type": "sgd", "lr": 0.01, "lora_plus_ratio": ratio, "warmup_ratio": 0}
        cfg = cells.config(str(tiny_base), "lora", strategy, optim=optim, train={**TRAIN, "max_steps": 1})
        moved[ratio] = world(2).run(cells.train, cells.dump(cfg))[0].weights
    for name, weight in moved[16.0].items():
        expected = moved[1.0][name] * (16 if ".lora_B." in name else 1)
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-9)
        assert weight.any()


def test_what_is_trained(tiny_base: Path) -> None:
    def trainable(method: dict[str, Any]) -> set[str]:
        run = resolve(cells.config(str(tiny_base), method), WorldShape())
        return {p.name.removeprefix("hf.").removeprefix("base_model.model.") for p in run.model.trainable}

    attention = {f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 1) for m in "qkvo"}
    lora = {"type": "lora", "target_modules": "attention"}
    assert trainable(lora) == {f"{m}.lora_{k}.default.weight" for m in attention for k in "AB"}
    lora["target_modules"] = ["layers.1", "re:.*0.mlp.(up|down)_proj"]
    names = [f"model.layers.1.self_attn.{m}_proj" for m in "qkvo"] + [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    names += [f"model.layers.1.mlp.{m}_proj" for m in ("up", "down", "gate")]
    assert trainable(lora) == {f"{m}.lora_{k}.default.weight" for m in names for k in "AB"}
    whole = trainable({"type": "lora", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    assert {name for name in whole if ".lora_" not in name} == {"lm_head.weight"}
    frozen = trainable({"type": "full", "freeze": ["layers.0", "lm_head"]})
    assert not any("layers.0." in name or "lm_head" in name for name in frozen)
    assert len(frozen) == 21 - 9 - 1


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ({"type": "lora", "target_modules": ["qkv"]}, "method.target_modules: the model has no linear layer named qkv"),
        ({"type": "lora", "modules_to_save": ["wte"]}, "method.modules_to_save: the model has no part with parameters named wte"),
        ({"type": "lora", "modules_to_save": ["q_proj"]}, "method.modules_to_save covers model.layers.0.self_attn.q_proj, which gets an adapter"),
        ({"type": "full", "freeze": ["h.0"]}, "method.freeze: the model has no parameter named h.0"),
        ({"type": "full", "freeze": ["model", "lm_head"]}, "method.freeze covers the whole model: nothing is left to train"),
    ],
)  # fmt: skip
def test_names_of_nothing(tiny_base: Path, method: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(cells.config(str(tiny_base), method), WorldShape())
    assert caught.value.what == what


def test_tied_embeddings_are_not_parted(tied_base: Path) -> None:
    with pytest.raises(ConfigError, match="ties to its output layer"):
        resolve(cells.config(str(tied_base), {"type": "lora", "modules_to_save": ["embed_tokens"]}), WorldShape())


def first_loss(cfg_yaml: str) -> float:
    """Before any step."""
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    try:
        return float(strategy.evaluate(collate(cells.synthetic_data(), [0, 1, 2])))
    finally:
        strategy.close()


def test_where_an_adapter_starts(world: World, tiny_base: Path) -> None:
    """From the base model as it is stored, but for LoftQ."""
    losses = {}
    for name, method in {
        "full": {"type": "full"},
        "qlora": {"type": "qlora"},
        "lora": {"type": "lora"},
        **VARIANTS,
    }.items():
        losses[name] = world(2).run(first_loss, cells.dump(cells.config(str(tiny_base), method, "fsdp2")))[0]
    for name in ("lora", "dora", "pissa", "frozen"):
        assert losses[name] == pytest.approx(losses["full"], rel=1e-5), name
    # DoRA's lengths of rows among them: those of the quantised weight, which are others than the file's.
    for name in ("whole", "qdora"):
        assert losses[name] == pytest.approx(losses["qlora"], rel=1e-5), name
    assert losses["loftq"] != pytest.approx(losses["qlora"], rel=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        {"type": "lora", "dora": True, "target_modules": ["q_proj", "layers.1"]},
        {"type": "qlora", "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_goes_on_from_another(world: World, tiny_base: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    cfg = cells.config(str(tiny_base), method, "fsdp2")
    trained = world(2).run(cells.train_and_export, cells.dump(cfg), str(tmp_path / "final"))[0]
    for strategy, ranks in (("fsdp2", 3), ("zero3", 2), ("ddp", 1)):
        goes_on = cells.config(str(tiny_base), method | {"init_from": str(tmp_path / "final")}, strategy)
        check_weights(resolve(goes_on, WorldShape()).model)
        again = world(ranks).run(first_logits, cells.dump(goes_on))[0]
        for mine, theirs in zip(again, trained, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in saved.values())


def first_logits(cfg_yaml: str) -> list[np.ndarray[Any, Any]]:
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    data = cells.synthetic_data()
    try:
        logits = cells.all_logits(strategy, collate(data, list(cells.PROBE_ROWS)))
        return [part.numpy() for part in logits.split([len(data.row(row)[0]) for row in cells.PROBE_ROWS])]
    finally:
        strategy.close()


@pytest.fixture
def adapter(world: World, tiny_base: Path, tmp_path: Path) -> Path:
    world(1).run(cells.train_and_export, cells.dump(cells.config(str(tiny_base), "lora")), str(tmp_path / "final"))
    return tmp_path / "final"


def test_another_adapter_is_refused(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    def problem(**method: Any) -> Exception:
        cfg = cells.config(str(tiny_base), {"type": "lora", "init_from": str(adapter), **method})
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            check_weights(resolve(cfg, WorldShape()).model)
        return caught.value

    assert str(problem(r=8)).startswith(f"method.r is 8, and the adapter in method.init_from ({adapter}) has 4")
    assert str(problem(rslora=True)).startswith("method.rslora is true, and")
    assert str(problem(alpha=8)).startswith(
        f"method.alpha is 8.0, and the adapter in method.init_from ({adapter}) has 16"
    )
    assert str(problem(dora=True)).startswith("method.dora is true, and")
    fewer = str(problem(target_modules=["q_proj"]))
    assert "differs in 24 tensors" in fewer
    assert "absent here" in fewer
    nowhere = str(problem(init_from=str(tmp_path)))
    assert nowhere.startswith(f"method.init_from: {tmp_path} holds no adapter in PEFT's format")


def weights_before_training(cfg_yaml: str) -> dict[str, np.ndarray[Any, Any]]:
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    try:
        return {n: t.numpy().copy() for n, t in strategy.full_parameters(trainable_only=False)}
    finally:
        strategy.close()


def test_pissa_takes_the_largest_directions(world: World, tiny_base: Path) -> None:
    cfg = cells.config(str(tiny_base), VARIANTS["pissa"], "fsdp2")
    weights = world(2).run(weights_before_training, cells.dump(cfg))[0]
    base = load_file(tiny_base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].double().numpy()
    layer = "hf.base_model.model.model.layers.0.mlp.up_proj"
    rest = weights[f"{layer}.base_layer.weight"]
    a, b = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
    np.testing.assert_allclose(rest + 16 / 2 * (b @ a), base, atol=1e-6)  # alpha / sqrt(r)
    largest = np.linalg.svd(rest, compute_uv=False)[0]
    assert largest == pytest.approx(np.linalg.svd(base, compute_uv=False)[4], rel=1e-2)


def test_loftq_takes_the_most_of_the_error(world: World, tiny_base: Path) -> None:
    cfg = cells.config(str(tiny_base), VARIANTS["loftq"], "fsdp2")
    weights = world(2).run(weights_before_training, cells.dump(cfg))[0]
    base = load_file(tiny_base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    quantized, state = bnb.functional.quantize_4bit(base, compress_statistics=True, quant_type="nf4")
    error = (base - bnb.functional.dequantize_4bit(quantized, state)).numpy()
    layer = "hf.base_model.model.model.layers.0.mlp.up_proj"
    a, b = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
    least = np.linalg.norm(
        np.linalg.svd(error, compute_uv=False)[4:]
    )  # what no matrix of rank 4 can take (Eckart-Young)
    assert np.linalg.norm(error - 16 / 4 * (b @ a)) == pytest.approx(least, rel=2e-3)


def test_ranks_draw_the_same_adapter(world: World, tiny_base: Path) -> None:
    text = cells.dump(cells.config(str(tiny_base), VARIANTS["loftq"], "fsdp2"))
    two, three = (world(n).run(weights_before_training, text)[0] for n in (2, 3))
    for name, tensor in two.items():
        np.testing.assert_array_equal(tensor, three[name], err_msg=name)


def test_pissa_in_bf16_starts_as_near_to_the_base_as_bf16_is(tiny_base: Path) -> None:
    """What is frozen is the rest of the factors as they are stored: the errors of two roundings must not add up."""
    method = {"type": "lora", "init": "pissa", "r": 24, "alpha": 24}
    run = resolve(cells.config(str(tiny_base), method, precision={"compute": "bf16"}), WorldShape())
    model = load_model(run.model, seed=0)
    layer = model.causal_lm.get_submodule("model.layers.0.mlp.up_proj")
    base = load_file(tiny_base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    parts = (layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.base_layer.weight)
    b, a, rest = (part.detach().double() for part in parts)
    target = base.to(torch.bfloat16).double()
    # A rounding of the rest alone: at most half a unit in the last of 8 bits.
    assert (rest + b @ a - target).norm() <= rest.norm() * 2**-9
