"""Bases that are quantised in their files: trained on exactly those bytes, on any number of ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from sft_dist.config.schema import Config
from sft_dist.data.loader import collate
from sft_dist.errors import CheckpointError
from sft_dist.model.weights import check_weights
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.dist.test_streaming import ROWS, largest_tensor_bytes, load, loss_of, whole_weights
from tests.helpers import cells, figures
from tests.helpers.big_model import LLAMA_200M, write_checkpoint
from tests.helpers.loaded import load_model
from tests.helpers.pool import WorldPool
from tests.helpers.quantized_model import KINDS, load_plain, write_quantized

World = Callable[[int], WorldPool]

pytestmark = pytest.mark.ci

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    return {kind: write_quantized(tiny_base, folder / kind, kind) for kind in KINDS}


def config(base: Path, strategy: str, *, int8: bool = False, **sections: Any) -> Config:
    settings = cells.config(str(base), "qlora", strategy, **sections).model_dump()
    settings["method"]["quantization"] = {"type": "int8" if int8 else "nf4"}
    return Config.model_validate(settings)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """What bitsandbytes holds of a layer, by our names."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        return {"weight": module.weight.data, "row_absmax": module.weight.SCB}
    assert isinstance(module, bnb.nn.Linear4bit)
    state = module.weight.quant_state
    tensors = {"weight": module.weight.data, "absmax": state.absmax}
    if state.nested:
        tensors |= {"nested_absmax": state.state2.absmax, "scale_code": state.state2.code}
        tensors |= {"offset": state.offset.reshape(1)}
    return tensors


def assert_held(ours: list[dict[str, np.ndarray[Any, Any]]], plain: Any) -> int:
    """Every rank holds what transformers and bitsandbytes hold, bit for bit; returns the number of quantised layers."""
    quantized = {n: m for n, m in plain.named_modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)}
    theirs: dict[str, Tensor] = {}
    for name, module in quantized.items():
        theirs |= {f"{name}.{part}": tensor for part, tensor in state_of(module).items()}
    dense = dict(plain.named_parameters()) | dict(plain.named_buffers())
    theirs |= {n: t for n, t in dense.items() if n.rpartition(".")[0] not in quantized}
    for rank in ours:
        held = {n.removeprefix("hf.base_model.model.").replace(".base_layer.", "."): v for n, v in rank.items()}
        assert {n for n in held if ".lora_" not in n} == set(theirs)
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(held[name], tensor.detach().view(-1).view(torch.uint8).numpy(), err_msg=name)
    return len(quantized)


@pytest.mark.parametrize(
    ("kind", "ranks", "strategy", "compute"),
    [
        ("double", 3, "fsdp2", "bf16"),
        ("double", 3, "zero3", "fp32"),
        ("double-bf16", 2, "zero3", "fp32"),
        ("double-bf16", 3, "fsdp2", "bf16"),
        ("single", 3, "fsdp2", "fp32"),
        ("single", 2, "zero3", "bf16"),
        ("skip", 2, "fsdp2", "fp32"),
        ("skip", 2, "ddp", "bf16"),
        ("int8", 3, "fsdp2", "bf16"),
        ("int8-skip", 3, "zero3", "fp32"),
    ],
)
def test_ranks_hold_the_files_bytes(
    world: World, bases: dict[str, Path], kind: str, ranks: int, strategy: str, compute: str
) -> None:
    cfg = config(bases[kind], strategy, int8="int8" in kind, precision={"compute": compute})
    ours = world(ranks).run(whole_weights, cells.dump(cfg))
    skipped = {"skip": 2 + 3, "int8-skip": 2}
    assert assert_held(ours, load_plain(bases[kind], DTYPES[compute])) == 14 - skipped.get(kind, 0)


@pytest.mark.parametrize(
    ("kind", "strategy"), [("double-bf16", "zero3"), ("single", "fsdp2"), ("skip", "zero3"), ("int8", "fsdp2")]
)
def test_the_loss_is_that_of_transformers(world: World, bases: dict[str, Path], kind: str, strategy: str) -> None:
    cfg = config(bases[kind], strategy, int8=kind == "int8")
    plain = loss_of(load_plain(bases[kind], torch.float32))
    for one in world(2).run(load, cells.dump(cfg)):
        assert one.loss == pytest.approx(plain, rel=1e-5)


def test_a_rank_reads_its_own_bytes(world: World, bases: dict[str, Path]) -> None:
    """Packed weights in parts, scales whole on every rank."""
    tensors = {n: t for file in bases["double"].glob("*.safetensors") for n, t in load_file(file).items()}
    used = {n: t.nbytes for n, t in tensors.items() if not n.endswith((".quant_map", "__nf4"))}
    scales = sum(size for n, size in used.items() if "absmax" in n or "nested" in n) + 14 * 4
    weights = sum(size for n, size in used.items() if "absmax" not in n and "nested" not in n)
    loaded = world(3).run(load, cells.dump(config(bases["double"], "fsdp2")))
    assert sum(one.read_bytes for one in loaded) == weights + 3 * scales


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", ["double-bf16", "int8"])
def test_a_rank_takes_its_shard(world: World, tmp_path: Path, kind: str, strategy: str) -> None:
    """Of 200M parameters: no second copy of its packed weights in host memory."""
    base, quantized = tmp_path / "base", tmp_path / "quantized"
    base.mkdir()
    write_checkpoint(base, LLAMA_200M, num_files=4)
    dtype, settings = KINDS[kind]
    load_plain(base, dtype, BitsAndBytesConfig(**settings)).save_pretrained(quantized)
    cfg = config(quantized, strategy, int8=kind == "int8", precision={"compute": "bf16"})
    loaded = world(2).run(load, cells.dump(cfg))
    allowed = loaded[0].shard_bytes + loaded[0].state_bytes + largest_tensor_bytes(LLAMA_200M) + 1e8
    worst = max(one.peak_bytes for one in loaded)
    figures.lines.append(
        f"load {kind} {strategy} on 2: shard {loaded[0].shard_bytes / 1e9:.2f} GB, host memory grew by "
        f"{worst / 1e9:.2f} GB at the peak, {allowed / 1e9:.2f} allowed"
    )
    assert worst <= allowed


@pytest.mark.parametrize(("kind", "strategy"), [("double", "fsdp2"), ("int8", "zero3")])
def test_quantised_before_or_now_is_the_same_training(
    world: World, tiny_base: Path, bases: dict[str, Path], kind: str, strategy: str
) -> None:
    int8 = kind == "int8"
    base = tiny_base
    if int8:  # its other weights are in fp16
        base = bases[kind].parent / "fp16"
        if not base.exists():
            load_plain(tiny_base, torch.float16).save_pretrained(base)
    before, now = (
        world(2).run(cells.train, cells.dump(config(folder, strategy, int8=int8)))[0] for folder in (bases[kind], base)
    )
    assert before.losses == now.losses
    assert before.losses[-1] < before.losses[0]
    assert before.local == now.local
    for name, weight in now.weights.items():
        np.testing.assert_array_equal(before.weights[name], weight)


@pytest.mark.parametrize(
    ("ranks", "strategy", "compute"), [(3, "fsdp2", "bf16"), (3, "zero3", "fp32"), (2, "zero3", "bf16")]
)
def test_int8_bytes_are_those_of_bitsandbytes(
    world: World, tiny_base: Path, ranks: int, strategy: str, compute: str
) -> None:
    """Three flat parts cut through rows, whose scale needs all of a row."""
    cfg = config(tiny_base, strategy, int8=True, precision={"compute": compute})
    ours = world(ranks).run(whole_weights, cells.dump(cfg))
    plain = load_plain(tiny_base, DTYPES[compute], BitsAndBytesConfig(load_in_8bit=True))
    assert assert_held(ours, plain) == 14


def test_int8_trains_alike_under_any_strategy(world: World, tiny_base: Path, bases: dict[str, Path]) -> None:
    """And one base with layers of both kinds."""
    for base, int8 in ((tiny_base, True), (bases["skip"], False)):
        reference = world(1).run(cells.train, cells.dump(config(base, "ddp", int8=int8)))[0]
        for ranks, strategy in ((3, "fsdp2"), (2, "zero3")):
            for one in world(ranks).run(cells.train, cells.dump(config(base, strategy, int8=int8))):
                np.testing.assert_allclose(one.losses, reference.losses, rtol=1e-5)
                np.testing.assert_allclose(one.grad_norms, reference.grad_norms, rtol=1e-5)


def test_the_files_own_table_of_scales_counts(bases: dict[str, Path], tmp_path: Path) -> None:
    """It is computed where a model is quantised, and may differ in the last bit from what is computed here."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("nested_quant_map"):
                tensor.mul_(1.01)

    folder = edited(bases["double"], tmp_path / "edited", change)
    model = load_model(resolve(config(folder, "ddp"), WorldShape()).model, seed=0)
    with torch.no_grad():
        batch = collate(cells.synthetic_data(), list(ROWS))
        loss = float(model(batch)) / batch.num_supervised
    assert loss == pytest.approx(loss_of(load_plain(folder, torch.float32)), rel=1e-5)
    assert loss != pytest.approx(loss_of(load_plain(bases["double"], torch.float32)), rel=1e-5)


def edited(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], object], **settings: object) -> Path:
    """A copy of a base with other tensors, and other keys in its ``quantization_config``."""
    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))
    return folder


def drop(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(part)]


def note(**changes: object) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "quant_state" in name:
                noted = json.dumps(json.loads(bytes(tensor.tolist())) | changes)
                tensors[name] = torch.tensor(list(noted.encode()), dtype=torch.uint8)

    return change


def cut(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({n: t[1:].clone() for n, t in tensors.items() if n.endswith(part)})


def spoil(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "quant_state" in name:
            tensor[0] = 0


@pytest.mark.parametrize(
    ("kind", "change", "settings", "what"),
    [
        ("double", drop("q_proj.weight.absmax"), {}, r"2 missing keys, such as \S+q_proj.weight.absmax"),
        ("double", drop(".weight.nested_quant_map"), {}, "14 missing keys"),
        ("double", lambda _: None, {"llm_int8_skip_modules": ["lm_head", "o_proj"]}, r"\d+ unexpected keys, such as \S+o_proj"),
        ("skip", lambda _: None, {"llm_int8_skip_modules": None}, "missing keys"),
        ("double", lambda _: None, {"bnb_4bit_use_double_quant": False}, "28 unexpected keys, such as .*nested_absmax"),
        ("single", lambda _: None, {"bnb_4bit_use_double_quant": True}, "28 missing keys"),
        ("double", cut("v_proj.weight"), {}, "2 mismatched keys, such as .*v_proj.weight of 1023 bytes instead of 1024"),
        ("double", cut("v_proj.weight.absmax"), {}, r"mismatched keys, such as .*absmax \[31\] instead of \[32\]"),
        ("single", note(blocksize=128), {}, "was quantised with blocksize 128 instead of 64"),
        ("double", note(nested_blocksize=64), {}, "was quantised with nested_blocksize 64 instead of 256"),
        ("double", note(shape=[1, 2]), {}, r"was quantised as \[1, 2\] instead of \[64, 64\]"),
        ("double", spoil, {}, "damaged quant_state"),
        ("int8", drop(".SCB"), {}, "14 missing keys, such as .*SCB"),
        ("int8", lambda t: t.update({n: torch.tensor(2, dtype=torch.uint8) for n in t if "format" in n}), {}, "is laid out for the GPU"),
    ],
)  # fmt: skip
def test_files_that_are_not_as_config_json_says(
    bases: dict[str, Path],
    tmp_path: Path,
    kind: str,
    change: Callable[[dict[str, Tensor]], object],
    settings: dict[str, object],
    what: str,
) -> None:
    folder = edited(bases[kind], tmp_path / "edited", change, **settings)
    run = resolve(config(folder, "fsdp2", int8="int8" in kind), WorldShape())
    with pytest.raises(CheckpointError) as caught:
        check_weights(run.model)
    assert re.search(what, caught.value.what), caught.value.what
