"""What is in ``final/`` beside equal logits: dtypes, settings for generation, and all of it or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_dist.errors import CheckpointError
from sft_dist.model.build import SftModel
from sft_dist.model.export import export, publish
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers.cells import config
from tests.helpers.loaded import load_model

BF16 = {"precision": {"compute": "bf16", "master": "fp32"}}


def masters(model: SftModel, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters as fp32 masters with bits that bf16 does not have, in one buffer that is used again."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            buffer = parameter.detach().float() + 1e-5
            yield name, buffer
            buffer.zero_()


def exported(base: Path, folder: Path, method: str, **sections: Any) -> tuple[Path, SftModel]:
    run = resolve(config(str(base), method, **sections), WorldShape())
    model = load_model(run.model, seed=0)
    parameters = masters(model, trainable_only=method != "full")
    export(folder, run.model, model, parameters, AutoTokenizer.from_pretrained(base), is_main=True, seed=0)
    publish(folder)
    return folder, model


def test_an_adapter_keeps_the_bits_of_its_masters(tiny_base: Path, tmp_path: Path) -> None:
    folder, model = exported(tiny_base, tmp_path / "final", "lora", **BF16)
    saved = load_file(folder / "adapter_model.safetensors")
    expected = dict(masters(model, trainable_only=True))
    assert len(saved) == len(expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = saved[name.removeprefix("hf.").replace(".default", "")]
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, parameter.detach().float() + 1e-5), name


def test_a_model_is_saved_in_the_dtype_it_computed_in(tiny_base: Path, tmp_path: Path) -> None:
    folder, model = exported(tiny_base, tmp_path / "final", "full", **BF16)
    saved = load_file(folder / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(saved[name.removeprefix("hf.")], (parameter.detach().float() + 1e-5).bfloat16()), name
    written = json.loads((folder / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["use_cache"] is True, "it was off for training alone"


@pytest.mark.parametrize("known", [0, [0, 1], 2, [1, 2], None])
def test_generation_stops_at_the_end_of_a_turn_too(tiny_base: Path, tmp_path: Path, known: Any) -> None:
    """The base stops at the end of a document (0) only; the tokenizer's turns end with 2."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**settings, "eos_token_id": known}))
    folder, _ = exported(base, tmp_path / "final", "full")
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    before = [] if known is None else [known] if isinstance(known, int) else known
    assert set([eos] if isinstance(eos, int) else eos) == {*before, 2}


def test_it_is_complete_or_not_there(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the tokenizer, which comes last, is written; a second attempt does not mind the rest."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        with pytest.raises(CheckpointError) as caught:
            exported(tiny_base, tmp_path / "final", "lora")
    assert "No space left on device" in caught.value.what
    assert caught.value.fix
    assert not (tmp_path / "final").exists()
    exported(tiny_base, tmp_path / "final", "lora")
    assert {p.name for p in tmp_path.iterdir()} == {"final"}


def test_a_longer_run_replaces_the_artefact(tiny_base: Path, tmp_path: Path) -> None:
    exported(tiny_base, tmp_path / "final", "full")
    exported(tiny_base, tmp_path / "final", "lora")
    assert {p.name for p in tmp_path.iterdir()} == {"final"}
    assert not (tmp_path / "final/model.safetensors").exists()


def test_an_adapter_names_the_revision_of_its_base(tiny_base: Path, tmp_path: Path) -> None:
    run = resolve(config(str(tiny_base), "lora"), WorldShape())
    model, spec = load_model(run.model, seed=0), replace(run.model, revision="v2")
    parameters = masters(model, trainable_only=True)
    export(tmp_path / "final", spec, model, parameters, AutoTokenizer.from_pretrained(tiny_base), is_main=True, seed=0)
    written = json.loads((tmp_path / "final.unfinished/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (str(tiny_base), "v2")


def test_the_way_to_load_an_adapter_names_the_revision_too(tiny_base: Path, tmp_path: Path) -> None:
    """Another revision of the base has other weights, and the code that users copy would take its newest."""
    run = resolve(config(str(tiny_base), "lora", model={"add_tokens": ["<tool>"]}), WorldShape())
    model = load_model(run.model, seed=0)
    for revision, options in ((None, ""), ("v2", ', revision="v2"')):
        spec, parameters = replace(run.model, revision=revision), masters(model, trainable_only=True)
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        export(tmp_path / "final", spec, model, parameters, tokenizer, is_main=True, seed=0)
        told = (tmp_path / "final.unfinished/README.md").read_text()
        assert f'AutoModelForCausalLM.from_pretrained("{tiny_base}"{options})\n' in told


def test_other_ranks_write_nothing(tiny_base: Path, tmp_path: Path) -> None:
    run = resolve(config(str(tiny_base)), WorldShape())
    model = load_model(run.model, seed=0)
    asked = 0

    def count() -> Iterator[tuple[str, Tensor]]:
        nonlocal asked
        for pair in masters(model, trainable_only=False):
            asked += 1
            yield pair

    export(
        tmp_path / "final", run.model, model, count(), AutoTokenizer.from_pretrained(tiny_base), is_main=False, seed=0
    )
    assert asked == len(list(model.parameters())), "they take part in gathering every parameter"
    assert not list(tmp_path.iterdir())
