"""What a world of test processes runs: generation with a strategy whose trained weights have moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.evaluation.decode import Generated, gather, generate
from sft_dist.model.export import export, publish
from sft_dist.run import Run
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.step import train_step
from tests.helpers import cells
from tests.helpers.tiny_model import build_tokenizer

Prompts = list[list[int]]


@torch.no_grad()
def move(strategy: Strategy, scale: float) -> None:
    """Adds to every trained parameter a wave of its own, the same under every strategy and on any number of ranks."""
    numbers = {f"model.{name}": n for n, (name, _) in enumerate(strategy.model.named_parameters())}
    for name, shard in strategy.state().items():
        if name in numbers:
            flat = shard.values.view(-1)
            at = torch.arange(shard.first, shard.first + flat.numel(), dtype=torch.float64)
            flat += (scale * torch.sin(at * (0.7 + 0.1 * numbers[name]) + numbers[name])).to(flat.dtype)
    strategy.restored(completed_steps=0)


def prompts(count: int = 11, *, vocab: int = 259, seed: int = 1) -> Prompts:
    """Of 1 to 23 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, rng.integers(1, 24)).tolist() for _ in range(count)]


@dataclass(frozen=True)
class Answered:
    """
    Args:
        answers: what rank 0 gathers; None elsewhere.
        told: the rank, of its progress.
    """

    answers: list[Generated] | None
    told: list[int]
    notes: list[str]


def answer(
    cfg_yaml: str, asked: Prompts, how: dict[str, Any], scale: float = 0.0, folder: str | None = None
) -> Answered:
    """Generates, with weights moved by ``scale``.

    Args:
        how: arguments of ``generate``.
        folder: that the model is exported to.
    """
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        if scale:
            move(strategy, scale)
        told: list[int] = []
        notes: list[str] = []
        own = generate(
            strategy, asked, rank=rank, world_size=size, device=cells.CPU, on_progress=told.append,
            on_note=notes.append, **how,
        )  # fmt: skip
        if folder is not None:
            export_to(Path(folder), run, strategy)
        return Answered(gather(own, rank=rank, world_size=size), told, notes)
    finally:
        strategy.close()


def export_to(folder: Path, run: Run, strategy: Strategy) -> None:
    everything, rank = run.model.method.type == "full", dist.get_rank()
    export(
        folder, run.model, strategy.model, strategy.full_parameters(trainable_only=not everything),
        load_tokenizer(run.model.path, added=run.model.tokens.added), is_main=rank == 0, seed=run.seed,
    )  # fmt: skip
    if rank == 0:
        publish(folder)


def losses_around(cfg_yaml: str, asked: Prompts, how: dict[str, Any] | None) -> list[float]:
    """Losses and norms of three steps, with ``generate`` between them, or without."""
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    rank = dist.get_rank()
    data = cells.synthetic_data(packing=run.data.packing != "none")
    order = TrainingOrder(data, run.batch, run.seed)
    seen = []
    try:
        for number in range(3):
            done = train_step(strategy, data, run.batch, order.step(number), rank=rank, device=cells.CPU, lr=3e-3)
            seen += [float(done.loss), float(done.grad_norm)]
            if how is not None:
                before = torch.get_rng_state()
                generate(strategy, asked, rank=rank, world_size=dist.get_world_size(), device=cells.CPU, **how)
                assert torch.equal(torch.get_rng_state(), before)
                assert strategy.model.training
        return seen
    finally:
        strategy.close()


def build_base(folder: Path, kind: str) -> Path:
    """A tiny model of another kind than ``tiny_base``, with its tokenizer."""
    build_tokenizer(folder)
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.08, "bos_token_id": 0,
        "eos_token_id": 2,
    }  # fmt: skip
    config: PretrainedConfig
    match kind:
        case "mistral":
            config = MistralConfig(**shape, sliding_window=7)
        case "qwen2":
            config = Qwen2Config(**shape, use_sliding_window=True, sliding_window=9, max_window_layers=1)
        case "qwen3":
            config = Qwen3Config(**shape, head_dim=32, tie_word_embeddings=True)
        case "gemma3":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            config = Gemma3TextConfig(
                **shape, head_dim=16, sliding_window=6, layer_types=kinds, query_pre_attn_scalar=16, pad_token_id=0
            )
        case "phi3":  # one projection for query, key and value; other rotary frequencies from 32 tokens on
            factors = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
            config = Phi3Config(**shape, original_max_position_embeddings=32, rope_scaling=factors, pad_token_id=0)
        case "gpt2":  # learned positions
            config = GPT2Config(
                vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2, bos_token_id=0,
                eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
            )  # fmt: skip
        case _:
            raise ValueError(kind)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
