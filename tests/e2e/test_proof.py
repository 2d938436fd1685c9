"""The proof of an artefact finds each kind of defect, and lets a good one pass, in fp32 and in bf16."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft_dist.checkpoint import fresh_process
from sft_dist.checkpoint.artefact import Probe, _environment, prove_artefact, take_probes, write_expected
from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.schema import QloraMethod, QuantizationConfig
from sft_dist.data.batch import MicroBatch
from sft_dist.data.chat_template import TemplateSample, load_renderer
from sft_dist.data.messages import Conversation
from sft_dist.data.sources import read_source
from sft_dist.errors import CheckpointError
from sft_dist.model.build import SftModel
from sft_dist.model.export import export, publish
from sft_dist.model.spec import ModelSpec
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells
from tests.helpers.loaded import load_model
from tests.helpers.quantized_model import write_quantized
from tests.helpers.tiny_model import build_base


class OneProcess:
    """What the proof asks of a strategy, without one."""

    def __init__(self, model: SftModel) -> None:
        self.model = model

    @torch.no_grad()
    def infer(self, batch: MicroBatch, *, logits: bool) -> Tensor:
        result: Tensor = self.model.eval()(batch, logits=logits)
        return result


@dataclass(frozen=True)
class Artefact:
    folder: Path
    spec: ModelSpec
    weights: dict[str, str]
    probes: list[Probe]
    sample: TemplateSample

    def findings(self, tmp_path: Path) -> list[str]:
        """What a fresh process would find, found in this one."""
        expected = tmp_path / "expected"
        expected.mkdir()
        write_expected(expected, self.spec, self.weights, self.probes, self.sample)
        fresh_process.main(self.folder, expected)
        found: list[str] = json.loads((expected / fresh_process.FINDINGS).read_text())
        return found


def trained(
    base: Path,
    tmp_path: Path,
    method: str | dict[str, Any],
    compute: str = "fp32",
    added: tuple[str, ...] = (),
    *,
    quantization: dict[str, Any] | None = None,
) -> Artefact:
    """An artefact of a model whose trained weights have moved."""
    precision = {"compute": compute}
    cfg = cells.config(str(base), method, precision=precision, model={"add_tokens": added})
    if quantization is not None:
        config = QuantizationConfig.model_validate(quantization)
        cfg = cfg.model_copy(update={"method": cfg.method.model_copy(update={"quantization": config})})
    run = resolve(cfg, WorldShape())
    model = load_model(run.model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data = parameter.data.float() + noise  # as stored between steps: fp32 masters

    def masters() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()

    folder = tmp_path / "final"
    renderer = load_renderer(str(base), None, None, added_tokens=added)
    weights: dict[str, str] = {}
    export(
        folder, run.model, model, masters(), renderer.tokenizer, is_main=True, seed=0,
        on_saved=lambda name, tensor: weights.update({name: fresh_process.digest(tensor)}),
    )  # fmt: skip
    publish(folder)
    model.to(torch.bfloat16 if compute == "bf16" else torch.float32)
    probes = take_probes(OneProcess(model), cells.synthetic_data(), cells.CPU)  # type: ignore[arg-type]
    return Artefact(folder, run.model, weights, probes, renderer.sample(row(tmp_path)))


def row(tmp_path: Path) -> Conversation:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "東京は？", "completion": "日本の首都です。"}\n', encoding="utf-8")
    return next(read_source(SourceConfig(path=str(file))))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def first(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def adapter(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder / "adapter_model.safetensors", change)


def model(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder / "model.safetensors", change)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def targets(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", target_modules=names)


def template(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "chat_template.jinja"
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    return apply


@pytest.mark.parametrize(
    ("method", "compute"),
    [("full", "fp32"), ("lora", "fp32"), ("qlora", "fp32"), ("tied", "fp32"), ("full", "bf16"), ("lora", "bf16"), ("qlora", "bf16"),
     ("prompt", "bf16"), ("p_tuning", "fp32"), ("p_tuning lstm", "bf16"), ("prefix", "fp32"), ("prefix projection", "bf16")],
)  # fmt: skip
def test_a_good_artefact_passes(tiny_base: Path, tied_base: Path, tmp_path: Path, method: str, compute: str) -> None:
    base, method = (tied_base, "full") if method == "tied" else (tiny_base, method)
    assert trained(base, tmp_path, method, compute).findings(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "quantization", "compute"),
    [("double-bf16", "nf4", "fp32"), ("single", "nf4", "bf16"), ("int8", "int8", "fp32"), (None, "int8", "fp32")],
)  # fmt: skip
def test_a_good_adapter_on_a_quantised_base_passes(
    tiny_base: Path, tmp_path: Path, kind: str | None, quantization: str, compute: str
) -> None:
    """Quantised in its files, in another dtype than the run's and not as a run would; and to 8 bits by the run."""
    base = tiny_base if kind is None else write_quantized(tiny_base, tmp_path / "base", kind)
    artefact = trained(base, tmp_path, "qlora", compute, quantization={"type": quantization})
    assert artefact.findings(tmp_path) == []
    files = sorted(path.name for path in artefact.folder.iterdir())
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


@pytest.mark.parametrize(("kind", "compute"), [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "fp32")])
def test_an_adapter_on_a_base_quantised_in_part_passes(
    tiny_base: Path, tmp_path: Path, kind: str, compute: str
) -> None:
    """By the proof, and by a user who does what README.md beside the adapter says."""
    skip = ["layers.0.mlp", "v_proj"]
    added = ("<tool>",) if compute == "bf16" else ()
    artefact = trained(tiny_base, tmp_path, "qlora", compute, added, quantization={"type": kind, "skip": skip})
    assert artefact.findings(tmp_path) == []
    readme = (artefact.folder / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(artefact.folder)), names)
    layers = {name: type(module).__name__ for name, module in names["model"].get_base_model().named_modules()}
    quantized = {
        name.removesuffix(".base_layer") for name, layer in layers.items() if layer in ("Linear4bit", "Linear8bitLt")
    }
    assert len(quantized) == 14 - 3 - 2
    assert not any(".v_proj" in name or ".0.mlp." in name or "lm_head" in name for name in quantized)
    assert names["model"].get_input_embeddings().weight.shape[0] == artefact.spec.vocab_size
    # Other scales or another dtype would make another base, which this adapter was not trained on.
    settings = names["quantization"].to_dict()
    assert (settings["load_in_4bit"], settings["load_in_8bit"]) == (kind == "nf4", kind == "int8")
    if kind == "nf4":
        told = [settings[f"bnb_4bit_{key}"] for key in ("quant_type", "use_double_quant", "compute_dtype")]
        assert told == ["nf4", True, {"fp32": "float32", "bf16": "bfloat16"}[compute]]


@pytest.mark.parametrize(("kind", "compute"), [(None, "fp32"), (None, "bf16"), ("double-bf16", "fp32")])
def test_a_base_whose_rows_end_within_a_block_passes(tmp_path: Path, kind: str | None, compute: str) -> None:
    """On a CPU bitsandbytes dequantises down_proj wrong there, and the proof must not believe it. Files that are
    quantised note the dtype that they were made in, which is not the one of the run."""
    (tmp_path / "base").mkdir()
    base = build_base(tmp_path / "base", intermediate_size=160)
    if kind is not None:
        base = write_quantized(base, tmp_path / "quantized", kind)
    assert trained(base, tmp_path, "qlora", compute).findings(tmp_path) == []


def test_logits_that_are_no_numbers_are_found(tiny_base: Path, tmp_path: Path) -> None:
    """All weights may be finite and still overflow on the way; a difference that is NaN is no small one."""

    class Overflowing(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 7), torch.nan))

    probe = {"input_ids": [1, 2, 3], "positions": [0, 2]}
    expected = {"probes": [probe], "tolerance": 1e-4}
    found = list(fresh_process.logit_findings(Overflowing(), expected, {"0": torch.randn(2, 7)}))
    assert len(found) == 1
    assert "the logits of probe 0 differ by nan" in found[0]


def test_every_element_of_a_large_weight_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is hashed a part at a time."""
    monkeypatch.setattr(fresh_process, "DIGEST_ELEMENTS", 16)
    weight = torch.randn(7, 9)
    before = fresh_process.digest(weight)
    for place in (0, 17, 62):
        other = weight.clone()
        other.view(-1)[place] += 1
        assert fresh_process.digest(other) != before
    assert fresh_process.digest(weight.clone()) == before


def test_the_bias_of_a_layer_whose_rows_end_within_a_block_stays() -> None:
    quantized = bnb.nn.Linear4bit(96, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    torch.nn.init.normal_(quantized.bias)
    bias = quantized.bias.detach().clone()
    model = torch.nn.Sequential(quantized.to("cpu"))
    fresh_process.by_whole_blocks(model, torch.float32)
    assert type(model[0]) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(model(torch.zeros(1, 96)), bias[None])


def test_other_layers_left_unquantised_are_found(tiny_base: Path, tmp_path: Path) -> None:
    artefact = trained(tiny_base, tmp_path, "qlora", quantization={"skip": ["layers.0.mlp"]})
    method = artefact.spec.method
    assert isinstance(method, QloraMethod)
    other = method.model_copy(update={"quantization": QuantizationConfig()})
    spec = replace(artefact.spec, method=other)
    assert any("logits" in finding for finding in replace(artefact, spec=spec).findings(tmp_path))


def test_an_adapter_on_another_base_is_found(tiny_base: Path, tmp_path: Path) -> None:
    """The proof reads the base's own quantised weights: quantised to 4 bits in another way, the logits differ."""
    artefact = trained(tiny_base, tmp_path, "qlora", quantization={"type": "int8"})
    nf4 = write_quantized(tiny_base, tmp_path / "base", "double")
    edit_json(artefact.folder / "adapter_config.json", base_model_name_or_path=str(nf4))
    assert any("logits" in finding for finding in artefact.findings(tmp_path))


@pytest.mark.parametrize(
    ("method", "compute"), [("lora", "bf16"), ("qlora", "fp32"), ("full", "bf16"), ("tied", "fp32")]
)
def test_an_artefact_of_a_grown_vocabulary_passes(
    tiny_base: Path, tied_base: Path, tmp_path: Path, method: str, compute: str
) -> None:
    base, method = (tied_base, "lora") if method == "tied" else (tiny_base, method)
    artefact = trained(base, tmp_path, method, compute, ("<tool>", "<|call|>"))
    assert artefact.findings(tmp_path) == []
    assert (
        ("resize_token_embeddings(261" in (artefact.folder / "README.md").read_text())
        if method != "full"
        else (json.loads((artefact.folder / "config.json").read_text())["vocab_size"] == 261)
    )


@pytest.mark.parametrize(
    ("method", "damage", "finding"),
    [
        ("tokens", adapter(lambda t: t[first(t, "lm_head")].add_(1e-6)), "1 weights are not those of the trained model"),
        ("tokens", lambda f: edit_json(f / "adapter_config.json", trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [7, 8]}), "the logits of probe 0 differ"),
        ("lora", adapter(lambda t: t[first(t, "lora_B")].zero_()), "is all zeros: the adapter does nothing there"),
        ("lora", adapter(lambda t: t.pop(first(t, "lora_B"))), "weights are not those of the trained model"),
        ("lora", adapter(lambda t: t[first(t, "lora_A")].add_(1e-6)), "1 weights are not those of the trained model"),
        ("lora", lambda f: edit_json(f / "adapter_config.json", lora_alpha=8), "the logits of probe 0 differ"),
        ("lora", targets("q_proj"), "trained weights are not in the loaded model, such as base_model.model.model.layers.0."),
        ("lora", targets("lm_head", "q_proj"), "weights of the loaded model were not trained, such as base_model.model.lm_"),
        ("qlora", adapter(lambda t: t[first(t, "lora_B")].zero_()), "is all zeros: the adapter does nothing there"),
        ("prompt", adapter(lambda t: t["prompt_embeddings"].add_(1e-6)), "1 weights are not those of the trained model"),
        ("prefix", adapter(lambda t: t.update(prompt_embeddings=t["prompt_embeddings"].roll(64, 1))), "1 weights are not"),
        ("full", model(lambda t: t.pop("model.norm.weight")), "the weights lack model.norm.weight"),
        ("full", model(lambda t: t.update(stranger=torch.ones(1))), "the weights have an unknown stranger"),
        ("full", model(lambda t: t["model.norm.weight"].fill_(torch.nan)), "has values that are not finite"),
        ("full", config(rope_parameters={"rope_theta": 100.0, "rope_type": "default"}), "the logits of probe 0 differ"),
        ("full", config(tie_word_embeddings=True), "config.json says that the embeddings are tied"),
        ("tied", config(tie_word_embeddings=False), "the weights lack lm_head.weight"),
        ("full", template(lambda text: text + " "), "the chat template is not the one that was trained with"),
        ("lora", template(lambda text: text.replace("role", "name")), "the chat template is not the one"),
        ("lora", lambda f: (f / "chat_template.jinja").unlink(), "the tokenizer has no chat template"),
    ],
)  # fmt: skip
def test_each_defect_is_found(
    tiny_base: Path, tied_base: Path, tmp_path: Path, method: str, damage: Callable[[Path], None], finding: str
) -> None:
    base = tied_base if method == "tied" else tiny_base
    settings = {"tied": "full", "tokens": {"type": "lora", "train_tokens": ["a", "e"]}}.get(method, method)
    artefact = trained(base, tmp_path, settings)
    damage(artefact.folder)
    assert any(finding in line for line in artefact.findings(tmp_path)), artefact


def test_a_tokenizer_that_splits_otherwise_is_found(tiny_base: Path, tmp_path: Path) -> None:
    artefact = trained(tiny_base, tmp_path, "lora")
    file = artefact.folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "東"}, "content": "西"}
    file.write_text(json.dumps(settings))
    assert artefact.findings(tmp_path) == ["the tokenizer gives the first row other ids"]


def test_a_template_with_the_date_may_render_otherwise(tiny_base: Path, tmp_path: Path) -> None:
    artefact = trained(tiny_base, tmp_path, "lora")
    for changes_with_time, found in ((True, 0), (False, 1)):
        messages = [{**message, "content": "of another day"} for message in artefact.sample.messages]
        sample = replace(artefact.sample, messages=messages, changes_with_time=changes_with_time)
        folder = tmp_path / str(found)
        folder.mkdir()
        findings = replace(artefact, sample=sample).findings(folder)
        assert len(findings) == found
        assert all(line.startswith("the chat template renders the first row differently: ") for line in findings)


def test_the_fresh_process_is_nobodys_and_has_neither_gpu_nor_network(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"HF_HOME": "/models", "PATH": "/bin"}
    launchers = {
        "RANK": "0",
        "MASTER_PORT": "1",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "TORCHELASTIC_RUN_ID": "x",
    }
    monkeypatch.setattr(os, "environ", mine | launchers | {"CUDA_VISIBLE_DEVICES": "3"})
    assert _environment() == mine | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def test_a_fresh_process_says_so(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run does it, under a launcher: silent about a good artefact, loud about a bad one, which stays."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    artefact = trained(tiny_base, tmp_path, "lora")
    arguments = (artefact.folder, artefact.spec, artefact.weights, artefact.probes, artefact.sample)
    prove_artefact(*arguments)
    adapter(lambda t: t[first(t, "lora_B")].zero_())(artefact.folder)
    with pytest.raises(CheckpointError, match=r"failed its proof: .*the adapter does nothing there") as caught:
        prove_artefact(*arguments)
    assert caught.value.exit_code == 5
    assert artefact.folder.is_dir()


@pytest.mark.ci
def test_an_artefact_that_does_not_load_is_said_so(tiny_base: Path, tmp_path: Path) -> None:
    artefact = trained(tiny_base, tmp_path, "lora")
    (artefact.folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it does not load: "):
        prove_artefact(artefact.folder, artefact.spec, artefact.weights, artefact.probes, artefact.sample)
