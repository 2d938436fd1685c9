"""Tokens that a base model knows and never learned: many reserve rows for the special tokens of later chat models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from sft_dist.model.build import build_model
from sft_dist.model.spec import ModelSpec
from sft_dist.model.weights import Weights

# The largest element of a row that counts as zero.
ZERO = 1e-16


def untrained_tokens(spec: ModelSpec, ids: Sequence[int], special_ids: Sequence[int]) -> list[int]:
    """Those of ``ids`` whose row of the embedding or of the output layer is not trained, and stays so in this run.

    A row is not trained that is all zeros, or equal to that of another special token, or of a token that this run adds.
    Reads the rows of ``special_ids`` and nothing else.

    Args:
        ids: of special tokens, those that matter.
        special_ids: of all special tokens of the tokenizer.

    Raises:
        CheckpointError: the weights are not those of the model.
    """
    model = build_model(spec)
    matrices = {id(m.weight) for m in (model.causal_lm.get_input_embeddings(), model.head)}
    frozen = [name for name, p in model.named_parameters() if id(p) in matrices and not p.requires_grad]
    left = sorted(set(ids) - set(spec.tokens.trained_ids))
    if not frozen or not left:
        return []
    weights = Weights(model, spec, seed=0)
    everywhere = sorted({*special_ids, *left})
    found: set[int] = set()
    for name in frozen:
        rows = weights.rows(name, everywhere)
        found |= {id for id, is_untrained in zip(everywhere, _untrained(rows), strict=True) if is_untrained}
    return [id for id in left if id in found or id in spec.tokens.added_ids]


def _untrained(rows: Tensor) -> list[bool]:
    """Of each row [n, h] whether it is zero or not the only one of its values."""
    values = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows]
    times = Counter(values)
    zero: list[bool] = (rows.abs().amax(dim=1) <= ZERO).tolist()
    return [is_zero or times[value] > 1 for is_zero, value in zip(zero, values, strict=True)]
