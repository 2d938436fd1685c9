"""What is in a model's files, against what the model needs; and the ways in which the same weights may be stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from sft_dist.errors import CheckpointError
from sft_dist.model import weights
from sft_dist.model.build import build_model
from sft_dist.model.nf4 import NF4Linear
from sft_dist.model.spec import ModelSpec
from sft_dist.model.weights import Part, Weights, check_weights
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers.cells import config
from tests.helpers.loaded import load_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORM = "model.norm.weight"


def spec_of(folder: Path, compute: str = "fp32", method: str = "full") -> ModelSpec:
    return resolve(config(str(folder), method, precision={"compute": compute}), WorldShape()).model


def changed(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def values(folder: Path, compute: str = "fp32") -> dict[str, Tensor]:
    model = load_model(spec_of(folder, compute), seed=0)
    return {name.removeprefix("hf."): p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(NORM), f"1 missing keys, such as {NORM}"),
        (lambda t: t.update(extra=torch.zeros(3)), "1 unexpected keys, such as extra"),
        (lambda t: t.update({NORM: torch.ones(63)}), f"1 mismatched keys, such as {NORM} [63] instead of [64]"),
        (lambda t: t.update({HEAD: t[HEAD].T.contiguous()}), f"such as {HEAD} [64, 259] instead of [259, 64]"),
        (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}), f"1 mismatched keys, such as {NORM} in I8"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(
    tiny_base: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], what: str
) -> None:
    folder = changed(tiny_base, tmp_path / "model", change)
    with pytest.raises(CheckpointError) as caught:
        check_weights(spec_of(folder))
    assert what in caught.value.what
    assert str(folder) in caught.value.what


def test_tied_weights_that_differ_are_refused(tied_base: Path, tmp_path: Path) -> None:
    def untie(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][258, 63] += 1

    folder = changed(tied_base, tmp_path / "model", untie)
    with pytest.raises(CheckpointError, match=f"ties {HEAD} to {EMBEDDING}, and the weights differ"):
        check_weights(spec_of(folder))


@pytest.mark.parametrize("kept", ["both", HEAD])
def test_a_tied_weight_may_have_either_name_or_both(tied_base: Path, tmp_path: Path, kept: str) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if kept == HEAD:
            del tensors[EMBEDDING]

    folder = changed(tied_base, tmp_path / "model", rename)
    check_weights(spec_of(folder))
    assert torch.equal(values(folder)[EMBEDDING], load_file(tied_base / "model.safetensors")[EMBEDDING])


def test_weights_of_the_decoder_without_its_prefix(tied_base: Path, tmp_path: Path) -> None:
    """As ``LlamaModel``, and not ``LlamaForCausalLM``, saves them; and a buffer of old times beside them."""

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    expected = values(tied_base)
    folder = changed(tied_base, tmp_path / "model", strip)
    check_weights(spec_of(folder))
    actual = values(folder)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_transformers_knows_to_leave_out_may_be_there(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models' files hold a head for predicting further tokens, which the model class does not have."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"(^|\.)mtp\..*"])
    known = changed(tiny_base, tmp_path / "known", lambda t: t.update({"mtp.norm.weight": torch.ones(64)}))
    check_weights(spec_of(known))
    with pytest.raises(CheckpointError, match="1 unexpected keys, such as extra"):
        check_weights(spec_of(changed(known, tmp_path / "strange", lambda t: t.update(extra=torch.ones(1)))))


def test_buffers_that_are_weights_are_read_too(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the scale of a layer in Gemma 4. What the model class makes of one before it is filled is no trained value."""
    original = LlamaMLP.__init__

    def with_scale(self: LlamaMLP, config: LlamaConfig) -> None:
        original(self, config)
        self.register_buffer("layer_scale", torch.ones(2))

    monkeypatch.setattr(LlamaMLP, "__init__", with_scale)
    scales = {f"model.layers.{n}.mlp.layer_scale": torch.tensor([0.25, 3.0 + n]) for n in (0, 1)}
    folder = changed(tiny_base, tmp_path / "model", lambda t: t.update(scales))
    for method in ("full", "lora"):
        layers = load_model(spec_of(folder, method=method), seed=0).causal_lm.model.layers
        for layer, scale in zip(layers, scales.values(), strict=True):
            assert torch.equal(layer.mlp.layer_scale, scale), method
    with pytest.raises(CheckpointError, match=r"2 missing keys, such as model\.layers\.0\.mlp\.layer_scale"):
        check_weights(spec_of(tiny_base))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_another_dtype(tiny_base: Path, tmp_path: Path, stored: torch.dtype) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    folder = changed(tiny_base, tmp_path / "model", cast)
    original = load_file(tiny_base / "model.safetensors")
    for compute, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for name, value in values(folder, compute).items():
            assert value.dtype == dtype
            assert torch.equal(value, original[name].to(stored).to(dtype)), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_masters_start_from_the_values_that_are_computed_with(tiny_base: Path, method: str) -> None:
    """In fp32 they could hold more of the files' digits than under DeepSpeed, which casts them: strategies would part."""
    spec = spec_of(tiny_base, "bf16", method)
    model = build_model(spec)
    weights, original = Weights(model, spec, seed=0), load_file(tiny_base / "model.safetensors")
    for name, meta in model.named_parameters():
        local = torch.empty(meta.numel(), dtype=torch.float32)
        weights.read_into(name, Part(meta, local, 0))
        assert torch.equal(local, local.bfloat16().float()), name
        stored = original.get(name.removeprefix("hf."))
        assert stored is None or torch.equal(local, stored.flatten().bfloat16().float()), name


def sharded(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_weights_in_many_files(tiny_base: Path, tmp_path: Path) -> None:
    folder = sharded(tiny_base, tmp_path / "model")
    expected, actual = values(tiny_base), values(folder)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003.safetensors, which"):
        check_weights(spec_of(folder))


def test_a_damaged_index_or_file(tiny_base: Path, tmp_path: Path) -> None:
    folder = sharded(tiny_base, tmp_path / "model")
    file = folder / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"no readable weights in .*model-00001-of-00003.safetensors"):
        check_weights(spec_of(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')
    with pytest.raises(CheckpointError):
        check_weights(spec_of(folder))


# What loading takes in host memory beside what it leaves there; tests/dist/test_streaming.py measures the whole


def test_little_is_quantised_at_a_time(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it quantises, bitsandbytes on a CPU takes 64 bytes a weight."""
    assert 64 * weights.QUANTIZED_AT_ONCE <= 1 << 26
    monkeypatch.setattr(weights, "QUANTIZED_AT_ONCE", 3000)
    sizes, quantize = [], NF4Linear.quantize_units

    def measured(layer: NF4Linear, values: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(values.numel())
        return quantize(layer, values)

    monkeypatch.setattr(NF4Linear, "quantize_units", measured)
    load_model(spec_of(tiny_base, method="qlora"), seed=0)
    assert max(sizes) <= 3000
    assert sum(sizes) == sum(t.numel() for n, t in load_file(tiny_base / "model.safetensors").items() if "proj" in n)


def test_freed_memory_is_handed_back_on_the_way(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(weights, "release_freed_memory", lambda: released.append(1))
    load_model(spec_of(tiny_base), seed=0)
    assert released == [1]
    released.clear()
    monkeypatch.setattr(weights, "RELEASE_EVERY_BYTES", 1 << 15)
    model = load_model(spec_of(tiny_base), seed=0)
    large = [p for p in model.parameters() if p.nbytes > 1 << 15]
    assert len(large) < len(released) <= sum(p.nbytes for p in model.parameters()) / (1 << 15) + 1
