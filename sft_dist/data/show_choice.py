"""Which rows or packs of a set are looked at, and in which form."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.mixing import Side
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import ConfigError

FIRST_ROWS = 3

_ROWS = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Choice:
    """What is asked for on the command line; at most one way to choose, else the first ``FIRST_ROWS`` rows.

    Args:
        side: the set.
        rows: numbers and ranges (``0-5``, both ends included), in this order.
        random: so many, drawn by ``seed`` (0 by default) and in the set's order.
        longest: so many, the longest first.
        least_supervised: so many, those with the fewest trained tokens first.
        packs: so many of the first packs instead of rows.
        source: only rows of it, and packs with such a row.

    Raises:
        ConfigError: two ways to choose are given, or one is not understood.
    """

    side: Side = "train"
    rows: tuple[str, ...] = ()
    random: int | None = None
    seed: int | None = None
    longest: int | None = None
    least_supervised: int | None = None
    packs: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("row", "random", "longest", "least-supervised", "packs") if self._has(name)]
        if len(given) > 1:
            raise ConfigError(f"--{given[0]} and --{given[1]} both choose what is shown", fix="give one of them")
        if self.seed is not None and self.random is None:
            raise ConfigError("--seed draws nothing without --random", fix="add --random N, or leave out --seed")
        if self.rows and self.source is not None:
            raise ConfigError("--row names rows of the whole set, whatever --source says", fix="leave out one of them")
        for text in self.rows:
            _range(text)

    def _has(self, option: str) -> bool:
        value = self.rows or None if option == "row" else getattr(self, option.replace("-", "_"))
        return value is not None

    @property
    def key(self) -> str:
        """How messages call the set."""
        return f"data.{self.side}"


@dataclass(frozen=True)
class Form:
    """How rows are shown: as text in the terminal, unless a page or JSON is asked for.

    Args:
        tokens: with the borders of the tokens and their ids.
        html: file for a page, in place of the text.
        as_json: JSON in place of the text.

    Raises:
        ConfigError: two forms are asked for, or the page has no folder.
    """

    tokens: bool = False
    html: Path | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.as_json and self.html is not None:
            raise ConfigError("--json and --html are two forms of the same rows", fix="give one of them")
        if self.as_json and self.tokens:
            raise ConfigError("--tokens changes nothing of --json, which has all ids", fix="leave out one of them")
        if self.html is not None and not self.html.absolute().parent.is_dir():
            raise ConfigError(
                f"--html {self.html}: there is no folder {self.html.parent}", fix="make the folder, or name another"
            )


def choose_rows(data: PreparedData, choice: Choice) -> list[int]:
    """Numbers of the rows that are asked for, in the order in which they are shown.

    Raises:
        ConfigError: there is no such row or source.
    """
    if choice.rows:
        return [row for text in choice.rows for row in _existing(_range(text), data, choice)]
    rows = np.arange(data.num_rows) if choice.source is None else np.flatnonzero(_is_of_source(data, choice))
    if not len(rows):
        raise _without_rows(choice)
    if choice.random is not None:
        draw = np.random.Generator(np.random.PCG64(choice.seed or 0))
        drawn = draw.choice(len(rows), size=min(choice.random, len(rows)), replace=False)
        return [int(row) for row in np.sort(rows[drawn])]
    if choice.longest is not None:
        order = np.argsort(-data.lengths[rows], kind="stable")
        return [int(row) for row in rows[order[: choice.longest]]]
    if choice.least_supervised is not None:
        order = np.argsort(data.rows["supervised"][rows], kind="stable")
        return [int(row) for row in rows[order[: choice.least_supervised]]]
    return [int(row) for row in rows[:FIRST_ROWS]]


def choose_packs(data: PreparedData, choice: Choice) -> list[int]:
    """Numbers of the packs that are asked for. Raises ``ConfigError`` as ``choose_rows``."""
    packs: NDArray[Any] = np.arange(data.num_sequences)
    if choice.source is not None:
        packs = np.flatnonzero(data.packs.sums(_is_of_source(data, choice).astype(np.int64)))
    if not len(packs):
        raise _without_rows(choice)
    return [int(pack) for pack in packs[: choice.packs]]


def _range(text: str) -> range:
    found = _ROWS.fullmatch(text.strip())
    if not found or (found[2] is not None and int(found[2]) < int(found[1])):
        raise ConfigError(
            f"--row {text} is no row and no range of rows", fix="say a number or a range, e.g. --row 7 --row 0-5"
        )
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _existing(rows: range, data: PreparedData, choice: Choice) -> range:
    if rows[-1] >= data.num_rows:
        raise ConfigError(
            f"--row {rows[-1]}: {choice.key} has {data.num_rows:,} row{'s' if data.num_rows != 1 else ''}",
            fix=f"say a number from 0 to {data.num_rows - 1}" if data.num_rows > 1 else "say --row 0",
        )
    return rows


def _is_of_source(data: PreparedData, choice: Choice) -> NDArray[np.bool_]:
    """[rows]."""
    assert choice.source is not None
    if choice.source not in data.sources:
        near = difflib.get_close_matches(choice.source, data.sources, n=1)
        names = ", ".join(data.sources)
        raise ConfigError(
            f"--source {choice.source}: {choice.key} has no source of this name",
            fix=f"did you mean {near[0]}?" if near else f"its sources are: {names}",
        )
    return np.asarray(data.rows["store"] == data.sources.index(choice.source))


def _without_rows(choice: Choice) -> ConfigError:
    return ConfigError(
        f"--source {choice.source}: no row of it is in {choice.key}",
        fix="choose another source; `sft-dist data prepare` says how many rows are left of each",
    )
