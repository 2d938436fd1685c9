"""Training a few tokens' rows of the embedding and of the output layer, and nothing else of the two.

The rows that are trained lie in a parameter of their own, [k, h], beside the frozen matrix [V, h], as in PEFT's
``trainable_token_indices``; its names and saved files are PEFT's. PEFT makes a copy of the whole matrix with these rows
in it at each forward, and a gradient of the whole matrix at each backward. Here the frozen matrix is read as it is:
the embedding's output is replaced where a token is one of the k, and so are the k columns of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from sft_dist.errors import ConfigError
from sft_dist.model.loss import LossHead, linear_cross_entropy_sum
from sft_dist.model.spec import Tokens

# Where PEFT keeps the rows, under the module that owns the matrix; "default" is the adapter's name.
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta.default"


class TokenRows(nn.Module):
    """The rows of tokens ``ids`` (ascending). They are read by the modules that hold this one; it is not called."""

    ids: Tensor

    def __init__(self, ids: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.default = nn.Parameter(torch.empty(len(ids), width, dtype=dtype))
        # The tokenizer knows them: like rotary frequencies they are real on a meta model, and in no file.
        self.register_buffer("ids", torch.tensor(ids, device="cpu"), persistent=False)


class ReadsTokenRows(nn.Module):
    """A module whose forward reads the parameter of a :class:`TokenRows` inside it."""

    @property
    def token_rows(self) -> TokenRows:
        rows = self.token_adapter["trainable_tokens_delta"]  # type: ignore[index, operator]
        assert isinstance(rows, TokenRows)
        return rows


class EmbedsTokenRows(ReadsTokenRows):
    """Goes in front of the class of an embedding, whatever else that class does."""

    def forward(self, input_ids: Tensor) -> Tensor:
        frozen = super().forward(input_ids)  # type: ignore[misc]
        rows = self.token_rows
        values: Tensor = rows.default
        scale = getattr(self, "embed_scale", None)  # Gemma's embedding multiplies what it looks up
        if scale is not None:
            values = values * torch.as_tensor(scale).to(values)
        result: Tensor = ReplaceRows.apply(frozen, values, input_ids, rows.ids)
        return result


class TokenLossHead(ReadsTokenRows, LossHead):
    """The output layer with the logits of some tokens from rows of their own."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        rows = self.token_rows
        if labels is None:
            logits = F.linear(hidden, self.weight)
            return logits.index_copy(-1, rows.ids, F.linear(hidden, rows.default))
        return linear_cross_entropy_sum(
            hidden, self.weight, labels, rows=rows.default, row_ids=rows.ids, row_multiple=self.row_multiple,
            smoothing=self.smoothing,
        )  # fmt: skip


class ReplaceRows(torch.autograd.Function):
    """frozen [..., h] with values[i] [k, h] wherever ``input_ids`` [...] is ``ids[i]``."""

    @staticmethod
    def forward(ctx: Any, frozen: Tensor, values: Tensor, input_ids: Tensor, ids: Tensor) -> Tensor:
        is_id = input_ids[..., None] == ids
        ctx.save_for_backward(is_id)
        # argmax of bytes: where no token is among them it is 0, and not taken.
        return torch.where(is_id.any(-1, keepdim=True), values[is_id.byte().argmax(-1)], frozen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """A product with zeros and ones: what a scatter would add in any order, one product adds up in fp32."""
        (is_id,) = ctx.saved_tensors
        needs_frozen, needs_values = ctx.needs_input_grad[:2]
        grad_frozen = grad.masked_fill(is_id.any(-1, keepdim=True), 0) if needs_frozen else None
        grad_values = None
        if needs_values:
            grad_values = is_id.flatten(0, -2).to(grad.dtype).T @ grad.flatten(0, -2)
        return grad_frozen, grad_values, None, None


def train_token_rows(model: PreTrainedModel, tokens: Tokens, whole: list[str], *, named: bool) -> None:
    """Lets an adapter train the rows of ``tokens.trained_ids``, of the output layer too where it is not tied.

    Args:
        model: with its adapters, everything else frozen.
        whole: parameters that ``modules_to_save`` trains whole, their rows among them.
        named: whether ``method.train_tokens`` names tokens; else they are the added ones.

    Raises:
        ConfigError: rows that are new would not be in the adapter; both matrices are trained whole.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, LossHead)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    modules: list[nn.Embedding | LossHead] = [m for m in (embedding, head) if name_of[id(m.weight)] not in whole]
    first_new = embedding.num_embeddings - tokens.new_rows
    if modules and not set(range(first_new, embedding.num_embeddings)) <= set(tokens.trained_ids):
        raise ConfigError(
            "model.add_tokens: the vocabulary grows, and an adapter that does not train the new rows would have none "
            "of them in its files",
            fix="leave method.train_tokens out, or name all of model.add_tokens in it",
        )
    if named and not modules:
        raise ConfigError(
            "method.train_tokens has no effect: method.modules_to_save trains the whole embedding and output layer",
            fix="remove method.train_tokens, or take the two out of method.modules_to_save",
        )
    if not tokens.trained_ids:
        return
    is_tied = embedding.weight is head.weight
    shared: nn.ModuleDict | None = None
    for module in modules:
        if shared is None or not is_tied:
            rows = TokenRows(tokens.trained_ids, module.weight.shape[1], module.weight.dtype)
            shared = nn.ModuleDict({"trainable_tokens_delta": rows})
        module.token_adapter = shared
        # The object keeps its identity and hooks and changes its class, as ``fully_shard`` does it.
        kind = type(module)
        module.__class__ = TokenLossHead if kind is LossHead else type(kind.__name__, (EmbedsTokenRows, kind), {})
