"""What ``config.json`` says of quantised files: which are refused and why, and what the others are described as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist import cli
from sft_dist.errors import ConfigError
from sft_dist.model.prequantized import split_key
from sft_dist.plan.activations import trace
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = NF4 | {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
DENSE = "give the 16-bit model that it was made from"


def base(folder: Path, quantization: dict[str, Any] | None, **settings: Any) -> Path:
    """A model of which there is nothing but ``config.json``."""
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, **settings,
    }  # fmt: skip
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run_of(path: Path, method: str = "qlora", **quantization: Any) -> Run:
    settings = {"quantization": quantization} if quantization else {}
    return resolve(cells.config(str(path), {**cells.METHODS[method], **settings}), WorldShape())


@pytest.mark.parametrize(
    ("quantization", "what"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq"),
        ({"quant_method": "awq", "bits": 4}, "quantised with awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantised with fp8"),
        ({"quant_method": "mxfp4"}, "quantised with mxfp4"),
        ({"quant_method": "compressed-tensors"}, "quantised with compressed-tensors"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "quantised to fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised to fp4"),
        (INT8 | {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
)
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, quantization: dict[str, Any], what: str, method: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(base(tmp_path, quantization), method)
    assert what in caught.value.what
    assert str(tmp_path) in caught.value.what
    assert DENSE in caught.value.fix


@pytest.mark.parametrize(
    ("quantization", "method", "keys", "what", "fix"),
    [
        (DOUBLE, "full", {}, "method.type is full, but", "set method.type to qlora"),
        (DOUBLE, "lora", {}, "is quantised to nf4: it has no 16-bit weights", "set method.type to qlora"),
        (INT8, "lora", {}, "is quantised to int8: it has no 16-bit weights", "set method.type to qlora"),
        (INT8, "qlora", {}, "method.quantization.type is nf4, but", "set method.quantization.type to int8"),
        (DOUBLE, "qlora", {"type": "int8"}, "is quantised to nf4 already", "set method.quantization.type to nf4"),
        (DOUBLE, "qlora", {"skip": ["q_proj"]}, "is quantised already", "remove method.quantization.skip"),
        (DOUBLE, "qlora", {"skip": "auto"}, "is quantised already", "remove method.quantization.skip"),
        (DOUBLE | {"llm_int8_skip_modules": ["o_proj"]}, "qlora", {}, "the output layer, is quantised", "skip_modules: null"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_quantised_base(
    tmp_path: Path, quantization: dict[str, Any], method: str, keys: dict[str, Any], what: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(base(tmp_path, quantization), method, **keys)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_an_error_of_quantisation_that_nobody_knows(tmp_path: Path) -> None:
    """LoftQ starts from it, and the files have the quantised weights alone."""
    with pytest.raises(
        ConfigError, match="init loftq starts from the error of quantisation, which nothing tells"
    ) as caught:
        resolve(cells.config(str(base(tmp_path, DOUBLE)), {"type": "qlora", "init": "loftq"}), WorldShape())
    assert "set method.init to default" in caught.value.fix


def test_weights_that_do_not_fill_the_storage(tmp_path: Path) -> None:
    shape = {"hidden_size": 18, "intermediate_size": 32, "head_dim": 8}
    with pytest.raises(ConfigError, match="q_proj has 18 inputs, not a multiple of 4") as caught:
        run_of(base(tmp_path, None, **shape), type="int8")
    assert caught.value.fix == "name it in method.quantization.skip or set that to auto, or use method.type lora"
    with pytest.raises(ConfigError, match="not a multiple of 64") as caught:
        run_of(base(tmp_path, DOUBLE, **shape))
    assert DENSE in caught.value.fix


def test_the_description_is_that_of_the_files(tmp_path: Path) -> None:
    """From ``config.json`` alone: there are no files yet."""
    now, kinds = run_of(base(tmp_path, None)), {}
    for name, quantization in {"double": DOUBLE, "single": NF4}.items():
        kinds[name] = run_of(base(tmp_path, quantization))
    assert kinds["double"].model == now.model
    assert kinds["single"].model.parameters == now.model.parameters
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 128) // 64
    nested = sum(-(-numel // 64 // 256) for numel in [*[64 * 64] * 4, *[64 * 128] * 3] * 2)
    double = blocks + 4 * (nested + 14 * (256 + 1))
    assert kinds["single"].model.buffer_bytes - now.model.buffer_bytes == 4 * blocks - double
    skipped = run_of(base(tmp_path, DOUBLE | {"llm_int8_skip_modules": ["lm_head", "model.layers.0", "up_proj"]}))
    packed = [p.name for p in skipped.model.parameters if p.shape[-1] == 1]
    layers = {*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.down_proj"}
    assert {name.split(".layers.1.")[1] for name in packed} == {f"{layer}.base_layer.weight" for layer in layers}
    assert all("lora_" in p.name for p in skipped.model.trainable)
    int8 = run_of(base(tmp_path, INT8), type="int8")
    shapes = {p.name.rsplit(".", 3)[1]: p.shape for p in int8.model.parameters if "base_layer" in p.name}
    assert shapes["down_proj"] == (64, 128 // 4)
    # Activations do not know how the base is stored.
    assert len({trace(run).kept_bytes for run in (now, skipped, int8, *kinds.values())}) == 1


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("model.layers.0.q.weight", ("model.layers.0.q.weight", "")),
        ("model.layers.0.q.weight.absmax", ("model.layers.0.q.weight", "absmax")),
        ("q.weight.quant_state.bitsandbytes__nf4", ("q.weight", "quant_state.bitsandbytes__nf4")),
        ("q.SCB", ("q.weight", "SCB")),
        ("q.weight_format", ("q.weight", "weight_format")),
        ("q.bias", ("q.bias", "")),
    ],
)
def test_names_of_parts(key: str, parts: tuple[str, str]) -> None:
    assert split_key(key) == parts


@pytest.mark.parametrize(
    ("quantization", "overrides"),
    [
        ({"quant_method": "gptq", "bits": 4}, ()),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, ()),
        (DOUBLE, ("method.type=lora",)),
        (INT8, ("method.type=qlora",)),
    ],
)
def test_a_refusal_ends_with_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], quantization: dict[str, Any], overrides: tuple[str, ...]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    settings = {
        "model": {"path": str(base(tmp_path, quantization))},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
        "train": {"global_batch_size": 1, "max_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "config.yaml"), *overrides])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert "\n  fix: " in said
    assert "Traceback" not in said
