"""Rows and packs of prepared data as they are trained, in pieces that can be read.

What is trained is read from the arrays that training reads; texts are only what their tokens read as.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.batch import IGNORE_INDEX
from sft_dist.data.mixing import Side
from sft_dist.data.prepared import PreparedData
from sft_dist.data.show_choice import Choice, choose_packs, choose_rows
from sft_dist.data.token_store import TokenStore
from sft_dist.data.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that form whole characters: one, or the several of one character.

    Args:
        is_supervised: whether the token that completes the text is trained.
        is_special: it is one token that stands for itself (``<|im_end|>``).
    """

    text: str
    ids: tuple[int, ...]
    is_supervised: bool
    is_special: bool


@dataclass(frozen=True)
class Place:
    """Where a row comes from.

    Args:
        origin: file and line.
        num_tokens: that the row has in its source, before anything was cut off.
        part: from 1, of ``parts`` that are trained of a row that was split.
    """

    origin: str
    num_tokens: int
    part: int = 1
    parts: int = 1


@dataclass(frozen=True)
class ShownRow:
    """A row as it is trained.

    Args:
        number: in its set.
        input_ids: [t].
        labels: [t], the token where it is trained, else ``IGNORE_INDEX``; the model shifts them.
    """

    number: int
    source: str
    place: Place
    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pieces: tuple[Piece, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))

    @property
    def runs(self) -> list[tuple[bool, int]]:
        """(whether they are trained, how many) of tokens in a row that are alike."""
        return [(trained, sum(1 for _ in run)) for trained, run in groupby((self.labels != IGNORE_INDEX).tolist())]

    @property
    def notes(self) -> list[str]:
        """What was done to the row, a line each."""
        notes = []
        if self.place.num_tokens > self.num_tokens:
            notes.append(f"cut: the first {self.num_tokens:,} of its {self.place.num_tokens:,} tokens are left")
        if self.place.parts > 1:
            notes.append(f"split: part {self.place.part} of {self.place.parts} of a row that is too long")
        return notes


@dataclass(frozen=True)
class ShownPack:
    """Rows that one sequence is made of.

    Args:
        capacity: tokens that it could have.
    """

    number: int
    capacity: int
    rows: tuple[ShownRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_supervised(self) -> int:
        return sum(row.num_supervised for row in self.rows)

    @property
    def starts(self) -> list[int]:
        """Where each row begins."""
        ends = list(accumulate(row.num_tokens for row in self.rows))
        return [0, *ends[:-1]]

    @property
    def position_ids(self) -> list[int]:
        """[t], from 0 in every row."""
        return [position for row in self.rows for position in range(row.num_tokens)]


@dataclass(frozen=True)
class Totals:
    """Figures of a whole set.

    Args:
        capacity: tokens that a sequence may have.
        is_packed: sequences are packs; else they are rows.
    """

    rows: int
    tokens: int
    supervised: int
    sequences: int
    capacity: int
    is_packed: bool


@dataclass(frozen=True)
class Shown:
    """What was chosen of a set: rows, or packs with their rows."""

    side: Side
    totals: Totals
    rows: tuple[ShownRow, ...]
    packs: tuple[ShownPack, ...]

    @property
    def key(self) -> str:
        return f"data.{self.side}"


def look(
    data: PreparedData,
    stores: Sequence[TokenStore],
    tokenizer: PreTrainedTokenizerBase,
    choice: Choice,
    *,
    capacity: int,
    is_packed: bool,
) -> Shown:
    """What ``choice`` asks for.

    Args:
        stores: of ``data``, in the same order.
        tokenizer: that the data was made with.
        capacity: tokens that a sequence may have.

    Raises:
        ConfigError: there is no such row or source.
    """
    reader = _Reader(data, stores, TokenText(tokenizer))
    totals = Totals(
        rows=data.num_rows,
        tokens=int(data.lengths.sum()),
        supervised=int(data.num_supervised.sum()),
        sequences=data.num_sequences,
        capacity=capacity,
        is_packed=is_packed,
    )
    if choice.packs is None:
        return Shown(choice.side, totals, tuple(map(reader.row, choose_rows(data, choice))), ())
    packs = (
        ShownPack(number, capacity, tuple(reader.row(int(row)) for row in data.packs[number]))
        for number in choose_packs(data, choice)
    )
    return Shown(choice.side, totals, (), tuple(packs))


class _Reader:
    def __init__(self, data: PreparedData, stores: Sequence[TokenStore], text: TokenText) -> None:
        self._data, self._text = data, text
        self._shelves = [_Shelf(store) for store in stores]

    def row(self, number: int) -> ShownRow:
        store, start, _, _ = self._data.rows[number].item()
        ids, supervised = self._data.row(number)
        is_trained = supervised.astype(bool)
        is_trained[:1] = False  # nothing predicts the first token
        input_ids = ids.astype(np.int64)
        return ShownRow(
            number=number,
            source=self._data.sources[store],
            place=self._shelves[store].place(start),
            input_ids=input_ids,
            labels=np.where(is_trained, input_ids, IGNORE_INDEX),
            pieces=pieces(input_ids.tolist(), is_trained.tolist(), self._text),
        )


def pieces(ids: Sequence[int], is_trained: Sequence[bool], text: TokenText) -> tuple[Piece, ...]:
    """A row [t] in pieces that can be read. Tokens at the end that complete nothing are one too, without text."""
    found: list[Piece] = []
    begun: list[int] = []
    for id, trained, token in zip(ids, is_trained, text(ids), strict=True):
        begun.append(id)
        if token:
            found.append(Piece(token, tuple(begun), trained, text.is_special(id)))
            begun = []
    if begun:
        found.append(Piece("", tuple(begun), is_trained[-1], False))
    return tuple(found)


class _Shelf:
    """Finds the rows of a store by where their tokens begin."""

    def __init__(self, store: TokenStore) -> None:
        self._store, self._starts = store, store.starts

    def place(self, start: int) -> Place:
        row = int(np.searchsorted(self._starts, start, side="right")) - 1
        first = last = row
        while first > 0 and self._are_one(first - 1, row):
            first -= 1
        while last < len(self._starts) - 1 and self._are_one(last + 1, row):
            last += 1
        return Place(
            origin=self._store.origin(row),
            num_tokens=int(self._store.rows["length"][row]),
            part=row - first + 1,
            parts=last - first + 1,
        )

    def _are_one(self, row: int, other: int) -> bool:
        """Whether two rows of the store are parts of one row of the file."""
        return all(self._store.rows[name][row] == self._store.rows[name][other] for name in ("file", "number"))


def to_json(shown: Shown) -> dict[str, Any]:
    """For other programs; ``docs/data.md`` describes the keys."""
    rows = shown.rows or tuple(row for pack in shown.packs for row in pack.rows)
    return {
        "version": 1,
        "set": shown.side,
        "rows": [_row_to_json(row) for row in rows],
        "packs": [
            {
                "pack": pack.number,
                "capacity": pack.capacity,
                "rows": [row.number for row in pack.rows],
                "seq_lens": [row.num_tokens for row in pack.rows],
                "position_ids": pack.position_ids,
            }
            for pack in shown.packs
        ],
    }


def _row_to_json(row: ShownRow) -> dict[str, Any]:
    return {
        "row": row.number,
        "source": row.source,
        "origin": row.place.origin,
        "tokens": row.num_tokens,
        "supervised_tokens": row.num_supervised,
        "tokens_before_cut": row.place.num_tokens,
        "part": row.place.part,
        "parts": row.place.parts,
        "input_ids": row.input_ids.tolist(),
        "labels": row.labels.tolist(),
    }
