"""Which linear layers of a qlora base stay unquantised: those named, or those that quantising would change most."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sft_dist import cli
from sft_dist.config.schema import QloraMethod
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model import skip
from sft_dist.model.build import QUANTIZED
from sft_dist.model.safetensors_folder import SafetensorsFolder
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells
from tests.helpers.loaded import load_model
from tests.helpers.tiny_model import build_base

LAYERS = {f"model.layers.{n}.{m}_proj" for n in (0, 1) for m in (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
WORST, SECOND = "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers have outliers, as trained models do; the second has fewer of them."""
    folder = tmp_path_factory.mktemp("outliers") / "base"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, count in {WORST: 4, SECOND: 16}.items():
        weight = tensors[f"{name}.weight"]
        weight.view(-1)[:: 64 * count] = 30 * weight.std()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run_of(path: Path, compute: str = "fp32", **quantization: Any) -> Run:
    method = {**cells.METHODS["qlora"], "quantization": quantization}
    return resolve(cells.config(str(path), method, precision={"compute": compute}), WorldShape())


def skipped(run: Run) -> list[str]:
    assert isinstance(run.model.method, QloraMethod)
    assert run.model.method.quantization.skip != "auto"
    return list(run.model.method.quantization.skip)


def packed(run: Run) -> set[str]:
    """Layers whose stored weight has not the layer's own shape."""
    files = load_file(Path(run.model.path) / "model.safetensors")
    layers = [p for p in run.model.parameters if p.name.endswith(".base_layer.weight")]
    names = {p.name.removeprefix("hf.base_model.model.").removesuffix(".base_layer.weight"): p.shape for p in layers}
    assert names.keys() == LAYERS
    return {name for name, shape in names.items() if shape != files[f"{name}.weight"].shape}


def frozen_bytes(run: Run) -> int:
    width = {"fp32": 4, "bf16": 2}[run.model.compute]
    return (
        sum(p.numel * width for p in run.model.parameters if p.name.endswith("base_layer.weight"))
        + run.model.buffer_bytes
    )


def test_named_layers_stay_as_they_are(base: Path) -> None:
    run = run_of(base, skip=["layers.0.mlp", "re:.*v_proj"])
    wanted = {f"model.layers.0.mlp.{m}_proj" for m in ("gate", "up", "down")} | {
        f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)
    }
    assert set(skipped(run)) == wanted
    assert packed(run) == LAYERS - wanted
    model = load_model(run.model, seed=0)
    files = load_file(base / "model.safetensors")
    for name in LAYERS:
        layer = model.causal_lm.get_submodule(name).base_layer
        assert isinstance(layer, QUANTIZED["nf4"]) == (name not in wanted)
        if name in wanted:
            assert torch.equal(layer.weight, files[f"{name}.weight"])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_auto_takes_the_worst_within_its_budget(base: Path, kind: str, compute: str) -> None:
    none = frozen_bytes(run_of(base, compute, type=kind))
    cost = {name: frozen_bytes(run_of(base, compute, type=kind, skip=[name])) - none for name in (WORST, SECOND)}
    linears = sum(p.num_bytes for p in measured(base, kind, compute))
    both, one = (sum(cost.values()) + 1) / linears, (cost[WORST] + 1) / linears
    assert set(skipped(run_of(base, compute, type=kind, skip="auto", skip_budget=both))) == {WORST, SECOND}
    assert skipped(run_of(base, compute, type=kind, skip="auto", skip_budget=one)) == [WORST]
    for budget in (0.01, 0.3, 0.6, 0.9):
        run = run_of(base, compute, type=kind, skip="auto", skip_budget=budget)
        assert frozen_bytes(run) - none <= budget * linears
        assert packed(run) == LAYERS - set(skipped(run))
    assert skipped(run_of(base, compute, type=kind, skip="auto", skip_budget=0.001)) == []


def test_without_a_budget_it_is_a_tenth(base: Path) -> None:
    """As the schema says: with other layers left in 16 bits the same file would make another model."""
    assert skipped(run_of(base, skip="auto")) == skipped(run_of(base, skip="auto", skip_budget=0.1)) != []
    linears = sum(p.num_bytes for p in measured(base, "nf4", "fp32"))
    cost = frozen_bytes(run_of(base, skip="auto")) - frozen_bytes(run_of(base))
    assert 0 < cost <= 0.1 * linears


def test_measured_or_named_they_are_the_same_model(base: Path) -> None:
    """So that a run goes on where its layers are written out instead: the rest of its description is no other."""
    measured_run = run_of(base, skip="auto", skip_budget=0.3)
    assert run_of(base, skip=skipped(measured_run)).model == measured_run.model


def measured(base: Path, kind: str, compute: str) -> tuple[skip.Layer, ...]:
    return skip.measure(str(base), None, kind, compute)  # type: ignore[arg-type]


def test_the_errors_are_those_of_the_weights(base: Path) -> None:
    files = load_file(base / "model.safetensors")
    for kind in ("nf4", "int8"):
        for layer in measured(base, kind, "fp32"):
            weight = files[f"{layer.name}.weight"].double()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            quantized = QUANTIZED[kind].quantize(linear, torch.float32)
            other = quantized.dequantize(quantized.stored(), tuple(weight.shape), torch.float32)  # type: ignore[arg-type]
            assert layer.error == pytest.approx(
                float((weight - other).square().sum() / weight.square().sum()), rel=1e-4
            )


def test_a_weight_of_zeros_has_no_error(base: Path, tmp_path: Path) -> None:
    """Nothing is lost where all is zero. An error that is no number would compare with none of the others, and what
    is left unquantised would hang on where the layer stands."""
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    first = "model.layers.0.self_attn.q_proj"
    tensors[f"{first}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert {layer.name: layer.error for layer in measured(folder, "nf4", "fp32")}[first] == 0.0
    one = next(layer.more_bytes for layer in measured(folder, "nf4", "fp32") if layer.name == WORST)
    linears = sum(layer.num_bytes for layer in measured(folder, "nf4", "fp32"))
    assert skipped(run_of(folder, skip="auto", skip_budget=(one + 1) / linears)) == [WORST]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_layers_that_cannot_be_packed(tmp_path: Path, compute: str) -> None:
    """Named, they stay as they are: that is what the message of the refusal says. ``auto`` leaves them out, and they take
    nothing from the budget of the others."""
    (tmp_path / "base").mkdir()
    base = build_base(tmp_path / "base", hidden_size=40, intermediate_size=96)
    with pytest.raises(ConfigError, match="a multiple of 64") as caught:
        run_of(base, compute)
    assert caught.value.fix.startswith("name it in method.quantization.skip")
    cheap = run_of(base, compute, skip="auto", skip_budget=1e-9)
    divisible = {layer.name for layer in measured(base, "nf4", compute) if layer.error < 1}
    assert packed(cheap) == divisible
    assert divisible == {name for name in LAYERS if not name.endswith(("k_proj", "v_proj"))}
    run = run_of(base, compute, skip=["k_proj", "v_proj"])
    assert packed(run) == LAYERS - set(skipped(run)) == divisible
    model = load_model(run.model, seed=0)
    files = load_file(base / "model.safetensors")
    for name in skipped(run):
        layer = model.causal_lm.get_submodule(name).base_layer
        assert torch.equal(layer.weight, files[f"{name}.weight"].to(layer.weight.dtype))


class Drawn(SafetensorsFolder):
    """One weight whose every element is its own index."""

    def __init__(self) -> None: ...

    def read(self, key: str, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop)


@pytest.mark.parametrize(
    ("kind", "shape"), [("nf4", (4096, 4096)), ("nf4", (704, 1000)), ("nf4", (64, 2**20)), ("int8", (4096, 1000))]
)
def test_a_sample_is_spread_over_the_weight(kind: str, shape: tuple[int, int]) -> None:
    """Whole units, from the first to the last, none twice."""
    layer = QUANTIZED[kind].in_place_of(nn.Linear(shape[1], shape[0], bias=False, device="meta"), torch.float32)
    sample = skip._sample(Drawn(), "", layer)
    unit = 64 if kind == "nf4" else shape[1]
    assert sample.shape[1] == unit
    assert 0.4 * skip.SAMPLED < sample.numel() <= skip.SAMPLED
    firsts = sample[:, 0]
    assert (firsts % unit == 0).all()
    assert torch.equal(sample, firsts[:, None] + torch.arange(unit))
    assert (firsts.diff() > 0).all()
    assert int(sample[-1, -1]) == shape[0] * shape[1] - 1


def test_small_weights_are_looked_at_whole() -> None:
    layer = QUANTIZED["nf4"].in_place_of(nn.Linear(512, 512, bias=False, device="meta"), torch.float32)
    assert torch.equal(skip._sample(Drawn(), "", layer).flatten(), torch.arange(512 * 512))


def test_loftq_where_nothing_was_quantised(base: Path) -> None:
    """An adapter of two zeros would never move: there it starts as by default."""
    method = {**cells.METHODS["qlora"], "init": "loftq", "quantization": {"skip": ["q_proj"]}}
    model = load_model(resolve(cells.config(str(base), method), WorldShape()).model, seed=3)
    default = load_model(resolve(cells.config(str(base), "lora"), WorldShape()).model, seed=3)
    ours, theirs = dict(model.named_parameters()), dict(default.named_parameters())
    for name in (name for name in ours if ".lora_" in name):
        assert torch.equal(ours[name], theirs[name]) == ("q_proj" in name), name


@pytest.mark.parametrize(
    ("quantization", "what", "fix"),
    [
        ({"skip": ["qkv"]}, "method.quantization.skip: the model has no linear layer named qkv", "choose from down_proj,"),
        ({"skip": ["lm_head"]}, "method.quantization.skip: the model has no linear layer named lm_head", "or say auto"),
        ({"skip": ["model"]}, "method.quantization.skip covers every linear layer", "use method.type lora"),
    ],
)  # fmt: skip
def test_names_of_nothing_or_all(base: Path, quantization: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(base, **quantization)
    assert caught.value.what.startswith(what)
    assert fix in caught.value.fix


def test_auto_needs_the_weights(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        run_of(tmp_path, skip="auto")
    assert skipped(run_of(tmp_path, skip=["q_proj"]))


def test_config_check_without_the_weights(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    method = {**cells.METHODS["qlora"], "quantization": {"skip": "auto"}}
    config = tmp_path / "config.yaml"
    config.write_text(cells.dump(cells.config("sft-dist/never-fetched", method)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["config", "check", str(config)])
    assert ended.value.code == 0
    assert "sft-dist model fetch CONFIG\n" in capfd.readouterr().out.replace("  ", " ")
