"""The sizes the project is for, sharded on this machine: shapes only, one process in the place of eight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.helpers import cells, figures

LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128_256, tie_word_embeddings=False,
)  # fmt: skip
NUM_PARAMETERS = 70_553_706_496
NUM_ADAPTER_PARAMETERS = 207_093_760  # of rank 16 on every linear layer of a block

RANKS = 8
MOST_SECONDS, MOST_BYTES = 30, 2e9


@pytest.mark.parametrize(
    ("method", "rank", "trainable", "shard_bytes"),
    [
        # fp32 masters of everything; the last rank has the same, for eight divides every first dimension.
        ("full", 0, NUM_PARAMETERS, 4 * NUM_PARAMETERS / RANKS),
        ("lora", 7, NUM_ADAPTER_PARAMETERS, (2 * NUM_PARAMETERS + 4 * NUM_ADAPTER_PARAMETERS) / RANKS),
        # Half a byte for the linear layers of the blocks; embedding, output layer and norms stay in bf16.
        ("qlora", 3, NUM_ADAPTER_PARAMETERS, None),
    ],
)
def test_70b_over_eight(tmp_path: Path, method: str, rank: int, trainable: int, shard_bytes: float | None) -> None:
    LLAMA_70B.save_pretrained(tmp_path)
    adapter: dict[str, Any] = {"type": method} if method == "full" else {"type": method, "r": 16}
    cfg = cells.config(str(tmp_path), method, "fsdp2", precision={"compute": "bf16"})
    (tmp_path / "run.yaml").write_text(cells.dump(cfg.model_copy(update={"method": type(cfg.method)(**adapter)})))
    command = [sys.executable, "-m", "tests.helpers.fake_world", str(tmp_path / "run.yaml"), str(rank), str(RANKS)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    figures.lines.append(
        f"70B {method} over {RANKS} ranks: sharded and checked in {result['seconds']:.1f} s with "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB; {result['shard_bytes'] / 1e9:.2f} GB a rank"
    )
    assert result["differences"] == []
    assert result["shard_bytes"] == result["described_bytes"]
    assert result["trainable"] == trainable
    embeddings, norms = 2 * 128_256 * 8192, 161 * 8192
    linears = NUM_PARAMETERS - embeddings - norms
    if method == "qlora":
        shard_bytes = (linears / 2 + 2 * (embeddings + norms) + 4 * trainable) / RANKS
        # A scale of a byte for 64 weights, one of 4 bytes for 256 scales, 4 bytes for each layer's mean.
        rotary = 2 * 4 * 64
        assert result["buffer_bytes"] == linears / 64 + 4 * linears / 64 / 256 + (4 + 4 * 256) * 7 * 80 + rotary
    assert result["shard_bytes"] == shard_bytes
    assert result["seconds"] <= MOST_SECONDS
    assert result["peak_memory_bytes"] <= MOST_BYTES
