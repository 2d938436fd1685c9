"""Llamas of hundreds of millions of parameters with random weights, written file by file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA_200M = LlamaConfig(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=8,
    vocab_size=16_000, tie_word_embeddings=False, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
LLAMA_2B = LlamaConfig(
    hidden_size=2560, intermediate_size=6912, num_hidden_layers=24, num_attention_heads=20, num_key_value_heads=20,
    vocab_size=32_000, tie_word_embeddings=False, bos_token_id=0, eos_token_id=2,
)  # fmt: skip


def write_checkpoint(folder: Path, config: LlamaConfig, *, num_files: int) -> int:
    """Writes config.json and bf16 weights in ``num_files`` files or one more; returns the number of parameters."""
    with init_empty_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    shapes = model.state_dict()
    numel = sum(t.numel() for t in shapes.values())
    files = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=2 * numel // num_files
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name].shape, dtype=torch.bfloat16)
            tensors[name] = tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    return numel
