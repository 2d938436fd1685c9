"""Models whose rotary frequencies depend on the longest row of a forward pass: a row must not change its neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.data.loader import collate
from sft_dist.errors import ConfigError
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells
from tests.helpers.loaded import load_model

ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def base(tiny_base: Path, folder: Path, rope: str) -> Path:
    """A model whose limit is 64 tokens either way."""
    settings = json.loads((tiny_base / "config.json").read_text())
    settings["rope_parameters"] = {"rope_theta": 10000.0, **ROPES[rope]}
    settings["max_position_embeddings"] = 64 if rope == "dynamic" else 512
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").symlink_to(tiny_base / "model.safetensors")
    return folder


def run_of(path: Path, max_seq_len: int, packing: str, micro_batch_size: int = 1, sequence_parallel: int = 1) -> Run:
    data = {"train": [{"path": "unused"}], "max_seq_len": max_seq_len, "packing": packing}
    train = {"global_batch_size": 4, "micro_batch_size": micro_batch_size, "max_steps": 1}
    sharding = {"strategy": "fsdp2", "sequence_parallel": sequence_parallel}
    return resolve(cells.config(str(path), "full", data=data, train=train, sharding=sharding), WorldShape(1, 2))


@pytest.mark.parametrize("rope", ROPES)
def test_rows_beyond_the_limit(tiny_base: Path, tmp_path: Path, rope: str) -> None:
    path = base(tiny_base, tmp_path, rope)
    assert run_of(path, 64, "best_fit", 2, 2).model.dynamic_rope is not None
    with pytest.raises(ConfigError, match=r"data\.max_seq_len 65: in rows of more than 64 tokens"):
        run_of(path, 65, "best_fit")
    for settings in ((2, 1), (1, 2)):
        with pytest.raises(ConfigError, match="rotary frequencies"):
            run_of(path, 65, "none", *settings)
    if rope == "dynamic":
        with pytest.raises(ConfigError, match="depend on the rows before"):
            run_of(path, 65, "none")
    else:
        run_of(path, 65, "none")


def test_frequencies_of_each_kind_of_layer(tmp_path: Path) -> None:
    """Some models have them by the kind of layer; one kind whose frequencies depend on the row is enough."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    settings = {
        "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": plain, "full_attention": plain | ROPES["dynamic"]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert run_of(tmp_path, 64, "best_fit").model.dynamic_rope is not None
    with pytest.raises(ConfigError, match=r"data\.max_seq_len 65: in rows of more than 64 tokens"):
        run_of(tmp_path, 65, "best_fit")


def test_virtual_tokens_count(tiny_base: Path, tmp_path: Path) -> None:
    path = base(tiny_base, tmp_path, "dynamic")
    data = {"train": [{"path": "unused"}], "packing": "none"}
    resolve(cells.config(str(path), "prompt", data={**data, "max_seq_len": 59}), WorldShape())
    with pytest.raises(ConfigError, match="max_seq_len 60 and 5 virtual tokens"):
        resolve(cells.config(str(path), "prompt", data={**data, "max_seq_len": 60}), WorldShape())


@pytest.mark.parametrize("rope", ROPES)
def test_why(tiny_base: Path, tmp_path: Path, rope: str) -> None:
    """Up to the limit a row has the same loss beside others as alone, beyond it not: what is refused is wrong."""
    model = load_model(run_of(base(tiny_base, tmp_path, rope), 64, "best_fit").model, seed=0)
    data = cells.synthetic_data(max_len=100, packing=False)
    lengths = [len(data.row(row)[0]) for row in range(data.num_rows)]
    short = [row for row, length in enumerate(lengths) if 8 < length < 30][:2]

    def loss(rows: list[int]) -> float:
        with torch.no_grad():
            return float(model(collate(data, rows)))

    alone = sum(loss([row]) for row in short)
    assert loss(short) == pytest.approx(alone, rel=1e-6)
    long = max(range(len(lengths)), key=lambda row: lengths[row])
    beside = loss([*short, long]) - loss([long])
    assert lengths[long] > 64
    assert beside != pytest.approx(alone, rel=1e-4)
