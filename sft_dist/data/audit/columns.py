"""What is kept of every row of a set: numbers in arrays, some 160 bytes a row, and no text but its first bytes.

With a signature of 64 places (256 bytes) a million rows take some 400 MB.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft_dist.data.audit.findings import Example
from sft_dist.data.audit.rows import RowText, shown
from sft_dist.data.audit.text_checks import verdict
from sft_dist.data.messages import Origin

if TYPE_CHECKING:
    from sft_dist.data.chat_template import TokenizedRow

# UTF-8 bytes of the question and of the answer: 48 Latin letters, or 16 Japanese characters.
PART_BYTES = 48
PREVIEW_BYTES = 2 * PART_BYTES

# Fewer characters than these are a greeting or a yes: that the same ones are in both sets is no leak.
MIN_KEY_CHARACTERS = 10


@dataclass(frozen=True)
class Hashes:
    """XXH3 hashes of parts of a row.

    Args:
        whole: roles, texts and tools, as they are; the token ids where there is no text.
        key: the prompt, normalised (see ``RowText.key``); 0 where it is too short to prove a leak.
        prompt: the question, normalised; 0 where there is none.
        context: everything before the last answer, as it is; 0 for a row without turns.
        answer: the last answer, normalised.
    """

    whole: int
    key: int
    prompt: int
    context: int
    answer: int

    @staticmethod
    def of(text: RowText, tokens: TokenizedRow | None) -> Hashes:
        if not text.has_text and tokens is not None:
            whole = xxhash.xxh3_64_intdigest(np.asarray(tokens.input_ids, np.int32).tobytes())
            return Hashes(whole=whole, key=whole, prompt=0, context=0, answer=whole)
        key = text.key
        return Hashes(
            whole=_hash(text.whole),
            key=_hash(key) if len(key) >= MIN_KEY_CHARACTERS else 0,
            prompt=_hash(text.plain_question) if text.question else 0,
            context=_hash(text.context) if text.question else 0,
            answer=_hash(text.plain_answer),
        )


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


class Columns:
    """The rows of one set so far, column by column."""

    def __init__(self) -> None:
        self.sources: dict[str, int] = {}
        self._paths: dict[tuple[str, bool], int] = {}
        self._hashes = array("Q")
        self._source = array("i")
        self._path = array("i")
        self._row = array("q")
        self._tokens = array("i")
        self._supervised = array("i")
        self._verdict = array("b")
        self._has_text = array("b")
        self._previews = bytearray()

    def __len__(self) -> int:
        return len(self._source)

    def append(self, source: str, origin: Origin, text: RowText, tokens: TokenizedRow | None, hashes: Hashes) -> None:
        self._source.append(self.sources.setdefault(source, len(self.sources)))
        self._path.append(self._paths.setdefault((origin.path, origin.is_line), len(self._paths)))
        self._row.append(origin.row)
        self._hashes.extend((hashes.whole, hashes.key, hashes.prompt, hashes.context, hashes.answer))
        self._tokens.append(len(tokens.input_ids) if tokens else 0)
        # The first token of a row is never predicted.
        self._supervised.append(sum(tokens.supervised[1:]) if tokens else 0)
        self._verdict.append(verdict(text.answer))
        self._has_text.append(text.has_text)
        for part in (text.last_question, text.answer):
            piece = shown(part, characters=PART_BYTES).encode("utf-8", "replace")
            self._previews += piece[:PART_BYTES].ljust(PART_BYTES, b"\x00")

    # Views of what is complete: an array that is looked at cannot grow any more.

    @cached_property
    def source(self) -> NDArray[np.int32]:
        return np.frombuffer(self._source, np.int32)

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        return np.frombuffer(self._tokens, np.int32).astype(np.int64)

    @cached_property
    def supervised(self) -> NDArray[np.int64]:
        return np.frombuffer(self._supervised, np.int32).astype(np.int64)

    @cached_property
    def verdict(self) -> NDArray[np.int8]:
        return np.frombuffer(self._verdict, np.int8)

    @cached_property
    def has_text(self) -> NDArray[np.bool_]:
        return np.frombuffer(self._has_text, np.int8).astype(bool)

    def hashes(self, part: str) -> NDArray[np.uint64]:
        """[rows] of the part of ``Hashes`` with this name."""
        place = ("whole", "key", "prompt", "context", "answer").index(part)
        return np.frombuffer(self._hashes, np.uint64).reshape(-1, 5)[:, place]

    @cached_property
    def rows_by_source(self) -> NDArray[np.int64]:
        return np.bincount(self.source, minlength=len(self.sources))

    def origin(self, row: int) -> str:
        path, is_line = list(self._paths)[self._path[row]]
        return str(Origin(path, self._row[row], is_line))

    def preview(self, row: int) -> str:
        """The beginnings of the last question and of the last answer."""
        start = row * PREVIEW_BYTES
        parts = [_cut(self._previews[at : at + PART_BYTES]) for at in (start, start + PART_BYTES)]
        return " → ".join(part for part in parts if part)

    def example(self, row: int, *, like: str = "") -> Example:
        """A row by its number; ``like`` says which other row it is compared with."""
        return Example(self.origin(row), self.preview(row) + (f"  (like {like})" if like else ""))


def _cut(stored: bytearray) -> str:
    raw = bytes(stored).rstrip(b"\x00")
    text = raw.decode("utf-8", "ignore")
    return text + "…" if len(raw) > PART_BYTES - 3 and not text.endswith("…") else text
