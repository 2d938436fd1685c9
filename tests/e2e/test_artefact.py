"""``final/`` in the hands of someone who has only transformers and peft: same logits as the trained model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import cells, load_final
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]
Logits = list[np.ndarray[Any, Any]]

# What comes after the method's type, by name.
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": "attention", "rslora": True},
    "layers": {"target_modules": ["layers.0", "re:.*down_proj"], "init": "default"},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa rslora": {"init": "pissa", "rslora": True, "target_modules": ["q_proj"]},
    "loftq": {"init": "loftq", "dora": True},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    "frozen": {"freeze": ["embed_tokens", "layers.0"]},
    "tokens": {"train_tokens": ["a", "e", "<|im_end|>"]},
    "grown tokens": {"train_tokens": ["a", "e", "<tool>", "<|call|>"], "target_modules": "attention"},
    "grown whole": {"modules_to_save": ["lm_head"]},
}
CELLS = [
    "full-fsdp2", "lora-fsdp2", "qlora-fsdp2", "full-zero3", "qlora-zero3", "lora-ddp", "full-zero1", "lora-zero2",
    "full-fsdp2-tied", "full-zero3-frozen", "lora-zero3-attention", "lora-fsdp2-layers", "lora-fsdp2-dora",
    "qlora-zero3-dora", "lora-ddp-pissa", "lora-zero3-pissa rslora", "qlora-fsdp2-loftq", "lora-fsdp2-whole",
    "qlora-zero3-whole", "lora-fsdp2-tokens", "qlora-zero3-tokens", "lora-zero3-tied tokens", "full-fsdp2-grown",
    "full-zero3-tied grown", "lora-zero3-grown tokens", "qlora-fsdp2-grown tokens", "lora-ddp-tied grown tokens",
    "lora-fsdp2-grown whole",
    "prompt text-ddp", "p_tuning-fsdp2", "p_tuning lstm-zero3", "prefix-fsdp2-tied", "prefix projection-zero2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artefacts")


@pytest.fixture(scope="module")
def in_memory(world: World, tiny_base: Path, tied_base: Path, folder: Path) -> dict[str, list[Logits]]:
    """Trains and exports every cell on two processes; their logits, by cell and rank."""
    results = {}
    for cell in CELLS:
        method, strategy, *rest = cell.split("-")
        options = "".join(rest)
        base = tied_base if options.startswith("tied") else tiny_base
        options = options.removeprefix("tied").strip()
        model = {"add_tokens": ["<tool>", "<|call|>"]} if options.startswith("grown") else {}
        section = {"type": method} | OPTIONS[options] if options in OPTIONS else method
        cfg = cells.config(str(base), section, strategy, model=model)
        results[cell] = world(2).run(cells.train_and_export, cells.dump(cfg), str(folder / cell / "final"))
    return results


@pytest.fixture(scope="module")
def elsewhere(in_memory: dict[str, list[Logits]], folder: Path) -> dict[str, Logits]:
    """The logits that one fresh process computes from the files alone."""
    (folder / "ids.json").write_text(json.dumps(cells.probe_ids()))
    command = [sys.executable, load_final.__file__, str(folder / "ids.json"), *(str(folder / cell) for cell in CELLS)]
    subprocess.run(command, check=True, timeout=180)
    logits = {}
    for cell in CELLS:
        with np.load(folder / cell / "logits.npz") as file:
            logits[cell] = list(file.values())
    return logits


@pytest.mark.parametrize("cell", CELLS)
def test_final_loads_elsewhere_with_equal_logits(
    in_memory: dict[str, list[Logits]], elsewhere: dict[str, Logits], cell: str
) -> None:
    for rank in in_memory[cell]:
        for mine, theirs in zip(rank, elsewhere[cell], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_the_cells_differ(elsewhere: dict[str, Logits]) -> None:
    """A loader that ignored the adapter, or a training that moved nothing, would make some of these equal."""
    first = {cell: logits[0] for cell, logits in elsewhere.items() if "tied" not in cell}
    assert np.abs(first["full-fsdp2"] - first["lora-fsdp2"]).max() > 1e-2
    assert np.abs(first["lora-fsdp2"] - first["qlora-fsdp2"]).max() > 1e-3


@pytest.mark.parametrize("cell", CELLS)
def test_final_is_complete(elsewhere: dict[str, Logits], folder: Path, cell: str) -> None:
    names = {p.name for p in (folder / cell / "final").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    is_full = cell.startswith("full")
    assert ("model.safetensors" in names) == is_full
    assert ("adapter_model.safetensors" in names) != is_full
    assert not (folder / cell / "final.unfinished").exists()
