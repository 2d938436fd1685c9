"""A merged model is the adapter on its base: PEFT's logits, for every kind of adapter and base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.checkpoint import fresh_process
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.export.command import run_export
from sft_dist.export.wish import Wish, parse_size
from sft_dist.model import merge
from tests.helpers.moved import finished_run
from tests.helpers.quantized_model import write_quantized
from tests.helpers.tiny_model import build_base

UNCHECKED = Wish(merge=True, check=False)

IDS = [[5, 77, 130, 0, 2, 200], [9, 8, 7, 1]]

GROWN = ("<tool>", "<|call|>")


def logits(model: nn.Module, more: tuple[int, ...] = ()) -> list[Tensor]:
    return [fresh_process.probe_logits(model, {"input_ids": [*ids, *more], "positions": slice(None)}) for ids in IDS]


def plain(folder: Path, more: tuple[int, ...] = ()) -> list[Tensor]:
    """Logits by transformers from the folder alone, in fp32."""
    model, findings = fresh_process.load(folder, torch.float32)
    assert findings == []
    return logits(model, more)


def peft(
    folder: Path,
    quantization: dict[str, Any] | None = None,
    vocabulary: int | None = None,
    more: tuple[int, ...] = (),
    stored: torch.dtype | None = None,
) -> list[Tensor]:
    """Logits of an adapter on its base by peft."""
    return logits(fresh_process.load_adapter(folder, quantization, torch.float32, vocabulary, stored), more)


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(fresh_process.relative_difference(a, b) for a, b in zip(some, others, strict=True))


LORA = {
    "plain": {},
    "rslora": {"rslora": True, "target_modules": "attention"},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa rslora": {"init": "pissa", "rslora": True},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    "tokens": {"train_tokens": ["a", "e", "<|im_end|>"]},
}


@pytest.mark.parametrize("kind", LORA)
def test_merged_is_the_adapter_on_its_base(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    finished_run(tiny_base, tmp_path, {"type": "lora"} | LORA[kind])
    folder = run_export(tmp_path, UNCHECKED)
    assert folder == tmp_path / "merged"
    expected = peft(tmp_path / "final")
    assert difference(plain(folder), expected) < 1e-6
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32))
    assert difference(expected, base) > 1e-2, "an adapter that does nothing is merged by anything"


@pytest.mark.parametrize("kind", ["plain", "tokens"])
def test_tied_embeddings_stay_tied(tied_base: Path, tmp_path: Path, kind: str) -> None:
    finished_run(tied_base, tmp_path, {"type": "lora"} | LORA[kind])
    folder = run_export(tmp_path, UNCHECKED)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert difference(plain(folder), peft(tmp_path / "final")) < 1e-6


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("method", [{"type": "lora"}, {"type": "qlora", "modules_to_save": ["lm_head"]}])
def test_a_vocabulary_that_grew(
    tiny_base: Path, tied_base: Path, tmp_path: Path, base: str, method: dict[str, Any]
) -> None:
    if base == "tied":
        method = {"type": method["type"]}
    finished_run(tied_base if base == "tied" else tiny_base, tmp_path, method, add_tokens=GROWN)
    folder = run_export(tmp_path, UNCHECKED)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 261
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(list(GROWN)) == [259, 260]
    quantization = {"type": "nf4", "skip": []} if method["type"] == "qlora" else None
    expected = peft(tmp_path / "final", quantization, 261, more=(259, 260))
    found = plain(folder, more=(259, 260))
    assert found[0].shape[1] == 261
    assert difference(found, expected) < 1e-6


@pytest.mark.parametrize("base", [None, "dequantized", "original"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "nf4 dora", "nf4 loftq", "nf4 skip"])
def test_a_quantised_base_is_merged_as_it_was_trained_or_as_it_was(
    tiny_base: Path, tmp_path: Path, kind: str, base: Any
) -> None:
    stored, _, options = kind.partition(" ")
    quantization = {"type": stored, "skip": ["q_proj", "layers.1.mlp"] if options == "skip" else []}
    more: dict[str, Any] = {"": {}, "skip": {}, "dora": {"dora": True}, "loftq": {"init": "loftq"}}[options]
    finished_run(tiny_base, tmp_path, {"type": "qlora", "quantization": quantization} | more)
    folder = run_export(tmp_path, replace(UNCHECKED, base=base))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found = plain(folder)
    skip = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    skip += [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    as_trained = peft(tmp_path / "final", {"type": stored, "skip": skip if options == "skip" else []})
    as_it_was = peft(tmp_path / "final")
    mine, other = (as_it_was, as_trained) if base == "original" else (as_trained, as_it_was)
    assert difference(found, mine) < 1e-6
    assert difference(found, other) > 1e-3


@pytest.mark.parametrize("kind", ["double", "single", "int8"])
def test_a_base_that_is_quantised_in_its_files(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    base = write_quantized(tiny_base, tmp_path / "base", kind)
    stored = "int8" if kind == "int8" else "nf4"
    finished_run(base, tmp_path / "run", {"type": "qlora", "quantization": {"type": stored}})
    folder = run_export(tmp_path / "run", UNCHECKED)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert difference(plain(folder), peft(tmp_path / "run/final", {"type": stored, "skip": []})) < 1e-6
    with pytest.raises(ConfigError, match="quantised in its files"):
        run_export(tmp_path / "run", replace(UNCHECKED, base="original", out=tmp_path / "other"))


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 1e-2), ("fp16", 2e-3), (None, 1e-6)])
def test_the_dtype_is_what_is_asked_for(tiny_base: Path, tmp_path: Path, dtype: Any, most: float) -> None:
    finished_run(tiny_base, tmp_path, "lora")
    folder = run_export(tmp_path, replace(UNCHECKED, dtype=dtype))
    exact = load_file(run_export(tmp_path, replace(UNCHECKED, dtype="fp32", out=tmp_path / "exact")) / WEIGHTS)
    found = load_file(folder / WEIGHTS)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[dtype]
    assert {tensor.dtype for tensor in found.values()} == {wanted}
    config = json.loads((folder / "config.json").read_text())
    assert str(wanted).removeprefix("torch.") in (config.get("dtype"), config.get("torch_dtype"))
    assert all(torch.equal(found[name], value.to(wanted)) for name, value in exact.items()), "rounded once"
    assert difference(plain(folder), peft(tmp_path / "final")) < most


WEIGHTS = "model.safetensors"


def test_a_run_in_bf16_is_merged_in_bf16(tiny_base: Path, tmp_path: Path) -> None:
    finished_run(tiny_base, tmp_path, "qlora", compute="bf16")
    folder = run_export(tmp_path, UNCHECKED)
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.bfloat16}
    expected = peft(tmp_path / "final", {"type": "nf4", "skip": []}, stored=torch.bfloat16)
    assert difference(plain(folder), expected) < 1e-2


def test_what_fp16_cannot_hold_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    finished_run(tiny_base, tmp_path, "lora")
    weights = load_file(tmp_path / "final/adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: weights[name] + 1e6}, tmp_path / "final/adapter_model.safetensors")
    with pytest.raises(ConfigError, match="float16 cannot hold"):
        run_export(tmp_path, replace(UNCHECKED, dtype="fp16"))
    assert not (tmp_path / "merged").exists()
    run_export(tmp_path, replace(UNCHECKED, dtype="bf16"))
    save_file({**weights, name: weights[name] * float("nan")}, tmp_path / "final/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        run_export(tmp_path, replace(UNCHECKED, out=tmp_path / "other"))


def test_rows_are_merged_a_stretch_at_a_time(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stretches end changes nothing but the last bits; DoRA, trained and new rows, several files."""
    finished_run(tiny_base, tmp_path, {"type": "lora", "dora": True}, add_tokens=GROWN)
    whole = run_export(tmp_path, UNCHECKED)
    monkeypatch.setattr(merge, "ELEMENTS_AT_ONCE", 5 * 64)
    folder = run_export(tmp_path, replace(UNCHECKED, out=tmp_path / "small", max_file_bytes=100_000))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert difference(plain(folder, more=(259, 260)), plain(whole, more=(259, 260))) < 1e-6
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 100_000 or len(sizes) == 1


def test_an_adapter_of_another_program(tied_base: Path, tiny_base: Path, tmp_path: Path) -> None:
    """PEFT's own, with settings of its own, far from any run directory."""
    for base, options in (
        (tiny_base, {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_rslora": True}),
        (tiny_base, {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "use_dora": True}),
        (tied_base, {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 77]}}),
    ):
        shutil.rmtree(tmp_path, ignore_errors=True)
        config = LoraConfig(r=3, lora_alpha=7, **options)  # type: ignore[arg-type]
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(str(tmp_path / "adapter"))
        folder = run_export(tmp_path / "adapter", replace(UNCHECKED, out=tmp_path / "whole"))
        assert difference(plain(folder), logits(model.eval())) < 1e-6
        assert (folder / "tokenizer.json").is_file(), "the base's"


@pytest.mark.parametrize(
    ("setting", "value"), [("alpha_pattern", {"q_proj": 3}), ("lora_bias", True), ("peft_type", "IA3")]
)
def test_what_would_be_merged_wrongly_is_refused(tiny_base: Path, tmp_path: Path, setting: str, value: Any) -> None:
    finished_run(tiny_base, tmp_path, "lora")
    path = tmp_path / "final/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(ConfigError) as caught:
        run_export(tmp_path, UNCHECKED)
    assert "not merged here" in caught.value.what
    assert "merge_and_unload" in caught.value.fix


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    finished_run(tiny_base, tmp_path, "lora")
    for wrong, what in (({"num_layers": 1}, "changes 7 parameters"), ({"hidden_size": 32}, "is wanted")):
        base = build_base(tmp_path / f"base{next(iter(wrong))}", **wrong)
        path = tmp_path / "final/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
        shutil.copytree(tmp_path / "final", tmp_path / "alone", dirs_exist_ok=True)
        (tmp_path / "alone/README.md").unlink()
        with pytest.raises((ConfigError, CheckpointError), match=what):
            run_export(tmp_path / "alone", replace(UNCHECKED, out=tmp_path / "never"))


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix"])
def test_virtual_tokens_cannot_be_merged(tiny_base: Path, tmp_path: Path, method: str) -> None:
    finished_run(tiny_base, tmp_path, method)
    shutil.copytree(tmp_path / "final", tmp_path / "alone")
    for path in (tmp_path, tmp_path / "final", tmp_path / "alone"):
        with pytest.raises(ConfigError, match=f"method.type {method} trains virtual tokens"):
            run_export(path, replace(UNCHECKED, out=tmp_path / "never"))
    folder = run_export(tmp_path, Wish(check=False))
    assert difference(peft(folder), peft(tmp_path / "final")) == 0


def test_a_whole_model_is_written_in_another_dtype_and_other_files(tied_base: Path, tmp_path: Path) -> None:
    finished_run(tied_base, tmp_path, "full")
    with pytest.raises(ConfigError, match="nothing to merge"):
        run_export(tmp_path, UNCHECKED)
    folder = run_export(tmp_path, Wish(check=False, dtype="bf16", max_file_bytes=parse_size("200 kB")))
    assert folder == tmp_path / "model"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in trained.items())


def test_an_adapter_alone_keeps_its_bits_or_gets_another_dtype(tiny_base: Path, tmp_path: Path) -> None:
    finished_run(tiny_base, tmp_path, "qlora")
    folder = run_export(tmp_path, Wish(check=False))
    assert folder == tmp_path / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "final").iterdir()}
    assert all((folder / name).read_bytes() == (tmp_path / "final" / name).read_bytes() for name in names)
    smaller = run_export(tmp_path, Wish(check=False, dtype="bf16", out=tmp_path / "small"))
    exact = load_file(tmp_path / "final/adapter_model.safetensors")
    found = load_file(smaller / "adapter_model.safetensors")
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in exact.items())


def test_an_adapter_far_from_its_run_knows_how_its_base_was_stored(tiny_base: Path, tmp_path: Path) -> None:
    """By its card: without it, it is merged into the files' weights, and that is said."""
    finished_run(tiny_base, tmp_path / "run", {"type": "qlora", "r": 4})
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "run/final", alone)
    as_trained = peft(alone, {"type": "nf4", "skip": []})
    assert difference(plain(run_export(alone, replace(UNCHECKED, out=tmp_path / "a"))), as_trained) < 1e-6
    (alone / "README.md").unlink()
    assert difference(plain(run_export(alone, replace(UNCHECKED, out=tmp_path / "b"))), peft(alone)) < 1e-6
    with pytest.raises(ConfigError, match="as far as is known"):
        run_export(alone, replace(UNCHECKED, out=tmp_path / "c", base="dequantized"))


def test_generation_stops_at_the_end_of_a_turn(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        # What many published models have, and save_pretrained refuses.
        more = {"temperature": 0.6, "do_sample": False} if name.startswith("gen") else {}
        (base / name).write_text(json.dumps({**settings, "eos_token_id": 0} | more))
    finished_run(base, tmp_path / "run", "lora")
    folder = run_export(tmp_path / "run", UNCHECKED)
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 2]
    assert written["temperature"] == 0.6
    assert (folder / "chat_template.jinja").read_text() == (tiny_base / "chat_template.jinja").read_text()


def test_a_folder_that_is_taken_is_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    finished_run(tiny_base, tmp_path, "lora")
    (tmp_path / "merged").mkdir()
    run_export(tmp_path, UNCHECKED)  # empty
    with pytest.raises(ConfigError, match="is not empty"):
        run_export(tmp_path, UNCHECKED)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        run_export(tmp_path, replace(UNCHECKED, out=tmp_path / "file"))


def test_base_has_a_meaning_for_quantised_bases_alone(tiny_base: Path, tmp_path: Path) -> None:
    finished_run(tiny_base, tmp_path, "lora")
    with pytest.raises(ConfigError, match="was not quantised"):
        run_export(tmp_path, replace(UNCHECKED, base="dequantized"))
    with pytest.raises(ConfigError, match="without --merge"):
        run_export(tmp_path, Wish(base="original"))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200 kB", 200_000), ("1.5GiB", 3 << 29), ("77", 77), ("2gb", 2 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "5 apples", "-1GB", "0.1B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)
