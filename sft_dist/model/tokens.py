"""Tokens that a run adds or trains by themselves: which ids they have, and how many rows they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft_dist.config.schema import LoraMethod, MethodConfig
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import ConfigError
from sft_dist.model.hub import model_folder
from sft_dist.model.spec import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_tokens(
    path: str, revision: str | None, method: MethodConfig, add_tokens: Sequence[str], vocab_size: int
) -> Tokens:
    """What ``model.add_tokens`` and ``method.train_tokens`` ask for; reads the tokenizer only where they do.

    Args:
        vocab_size: rows of the embedding in the files. Many models have more of them than tokens.

    Raises:
        ConfigError: a token to be added is there, or one to be trained is not.
        CheckpointError: the tokenizer cannot be loaded.
    """
    named = _trained(method, add_tokens)
    if not named and not add_tokens:
        return Tokens()
    tokenizer = load_tokenizer(str(model_folder(path, revision, "tokenizer")), added=add_tokens)
    ids = tokenizer.get_vocab()
    unknown = [token for token in named if token not in ids]
    if unknown:
        raise ConfigError(
            f"method.train_tokens: the tokenizer of {path} has no token {', '.join(unknown)}",
            fix=f"name whole tokens{_special(tokenizer)}, or add new ones by model.add_tokens",
        )
    added_ids = tuple(ids[token] for token in add_tokens)
    return Tokens(
        added=tuple(add_tokens),
        added_ids=added_ids,
        trained_ids=tuple(sorted(ids[token] for token in named)),
        new_rows=max(0, max(added_ids, default=-1) + 1 - vocab_size),
    )


def _trained(method: MethodConfig, add_tokens: Sequence[str]) -> Sequence[str]:
    """Tokens whose rows an adapter trains: those that are named, else those that are new."""
    if not isinstance(method, LoraMethod):
        return ()
    return add_tokens if method.train_tokens is None else method.train_tokens


def _special(tokenizer: PreTrainedTokenizerBase) -> str:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return f", e.g. {', '.join(special[:5])}" if special else ""
