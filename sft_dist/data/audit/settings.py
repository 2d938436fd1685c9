"""What an audit has to know besides the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.audit_schema import AuditConfig
from sft_dist.errors import DataError


@dataclass(frozen=True)
class PackUse:
    """The sequences of a set.

    Args:
        num_tokens: [sequences] of each.
        capacity: tokens that one can hold.
    """

    num_tokens: NDArray[np.int64]
    capacity: int


@dataclass(frozen=True)
class AuditSettings:
    """Limits, lengths, and the tokenizer's special tokens.

    Args:
        special_tokens: ids of the tokens that the tokenizer finds in any text and reads as special, by name.
        bos_token: name of the one that opens a text, or None.
        end_tokens: names of those that end a turn: EOS and the template's end-of-turn token.
        untrained_tokens: names of those whose embedding is frozen and was never trained.

    Raises:
        DataError: one of the names is not in ``special_tokens``.
    """

    config: AuditConfig = field(default_factory=AuditConfig)
    max_seq_len: int = 2048
    over_length: Literal["error", "drop", "truncate", "split"] = "error"
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    bos_token: str | None = None
    end_tokens: Sequence[str] = ()
    untrained_tokens: Sequence[str] = ()

    def __post_init__(self) -> None:
        named = [*self.end_tokens, *self.untrained_tokens, *([self.bos_token] if self.bos_token else [])]
        unknown = sorted(set(named) - set(self.special_tokens))
        if unknown:
            raise DataError(
                f"{', '.join(unknown)}: no special token of the tokenizer",
                fix="name tokens that the tokenizer marks as special, or add them by model.add_tokens",
            )

    @cached_property
    def bos_id(self) -> int | None:
        return None if self.bos_token is None else self.special_tokens[self.bos_token]

    @cached_property
    def end_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens[name] for name in self.end_tokens)

    @cached_property
    def untrained(self) -> dict[int, str]:
        """Names by id."""
        return {self.special_tokens[name]: name for name in self.untrained_tokens}
