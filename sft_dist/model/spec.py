"""What a model is, without the model: every parameter's name, shape and fate. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sft_dist.config.schema import MethodConfig

Dtype = Literal["fp32", "bf16"]
DTYPE_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter as the model stores it.

    Args:
        name: as in ``named_parameters()`` of the unsharded model; a tied parameter appears once.
        shape: stored shape; an NF4 weight is [packed elements, 1].
        trainable: whether the optimizer updates it.
        block: the decoder block that owns it (the unit that is gathered together), or None for embedding, last norm
            and output layer.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool
    block: str | None

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Tokens:
    """Tokens that a run adds to the tokenizer or trains by themselves.

    Args:
        added: that the tokenizer gets.
        added_ids: theirs.
        trained_ids: whose rows an adapter trains, ascending.
        new_rows: by which embedding and output layer grow, because they have no spare ones.
    """

    added: tuple[str, ...] = ()
    added_ids: tuple[int, ...] = ()
    trained_ids: tuple[int, ...] = ()
    new_rows: int = 0


NO_TOKENS = Tokens()


@dataclass(frozen=True)
class DynamicRope:
    """Rotary frequencies that are others in a forward pass with a long row.

    Args:
        from_tokens: longest row that changes nothing.
        has_memory: they depend on the rows of earlier forward passes too.
    """

    from_tokens: int
    has_memory: bool


@dataclass(frozen=True)
class ModelSpec:
    """A model with its adapters and quantisation, described.

    Args:
        path, revision: where the base comes from.
        method: how it is fine-tuned.
        compute: dtype of products, activations and frozen weights.
        parameters: in the model's own order.
        vocab_size, hidden_size, num_layers: of the decoder; the vocabulary with the rows that are new.
        num_heads, num_kv_heads, head_dim: of its attention.
        dynamic_rope: where rotary frequencies depend on the longest row of a forward pass, when they do; None where
            they never do.
        num_parameters: elements of all of them; of those that are stored packed, before packing.
        max_positions: longest row that the model was made for, where it says so.
        buffer_bytes: bytes of all buffers, which no strategy shards (quantisation state, rotary frequencies).
        quantization_bytes: of them, the state of quantised weights.
        tokens: that are added or trained by themselves.
    """

    path: str
    revision: str | None
    method: MethodConfig
    compute: Dtype
    parameters: tuple[ParameterSpec, ...]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dynamic_rope: DynamicRope | None
    num_parameters: int
    max_positions: int | None
    buffer_bytes: int
    quantization_bytes: int = 0
    tokens: Tokens = NO_TOKENS

    @cached_property
    def trainable(self) -> tuple[ParameterSpec, ...]:
        return tuple(p for p in self.parameters if p.trainable)

    @cached_property
    def num_trainable(self) -> int:
        """Elements that the optimizer updates."""
        return sum(p.numel for p in self.trainable)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the decoder blocks, first to last."""
        return tuple(dict.fromkeys(p.block for p in self.parameters if p.block is not None))

    @cached_property
    def members(self) -> dict[str | None, list[ParameterSpec]]:
        """Parameters of each decoder block by its name; None: of what is before and behind the blocks."""
        found: dict[str | None, list[ParameterSpec]] = {None: [], **{block: [] for block in self.blocks}}
        for parameter in self.parameters:
            found[parameter.block].append(parameter)
        return found
