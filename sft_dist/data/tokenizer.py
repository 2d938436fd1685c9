"""A model's tokenizer, with the special tokens that a run adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str, revision: str | None = None, *, added: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        path: folder in Hugging Face layout, or hub id.
        revision: branch, tag or commit of a hub id.
        added: special tokens that it gets behind its own, in this order.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: it has one of ``added`` already.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded: {reason}",
            fix="set model.path to a folder with a tokenizer, or to a hub id that is in the local hub cache",
        ) from error
    vocabulary = tokenizer.get_vocab() if added else {}
    known = [token for token in added if token in vocabulary]
    if known:
        raise ConfigError(
            f"model.add_tokens: the tokenizer of {path} has {', '.join(known)} already",
            fix="remove it from model.add_tokens; method.train_tokens trains tokens that are there",
        )
    if added:
        tokenizer.add_special_tokens({"extra_special_tokens": list(added)}, replace_extra_special_tokens=False)
    return tokenizer
