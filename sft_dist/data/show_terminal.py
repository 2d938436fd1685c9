"""Rows and packs in a terminal or a file: 100 columns, and nothing that only a colour says.

Without colours the trained text stands in ``⟦⟧``. On a terminal lines are broken at its width; elsewhere they are left
whole, for ``grep``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sft_dist.data.batch import IGNORE_INDEX
from sft_dist.data.show import Piece, Shown, ShownPack, ShownRow, Totals
from sft_dist.data.token_text import alone, visible

TRAINED, CONTEXT, SPECIAL, TRAINED_SPECIAL, QUIET = "green", "", "magenta", "bold green", "dim"

OPEN, CLOSE = "⟦", "⟧"
GUTTER, BORDER = "│ ", "│"

MAX_COLUMNS = 100

# Where there is no terminal whose width lines could be broken at.
UNBROKEN = 1 << 20

# Do not begin a line.
_CLOSING = frozenset("、。,.!?!?)」』】)]}〉》ー々" + CLOSE + "↵")


@dataclass(frozen=True)
class _Page:
    """What the console can do.

    Args:
        columns: for text.
        picture_columns: for bars and tables.
        marks: trained text is put into brackets.
    """

    console: Console
    columns: int
    picture_columns: int
    marks: bool

    def print(self, *texts: Text | str) -> None:
        line = Text()
        for text in texts:
            line.append(text)
        # Broken where it should be already.
        self.console.print(line, soft_wrap=True, highlight=False)


def print_shown(shown: Shown, console: Console, *, tokens: bool = False) -> None:
    """Prints rows or packs. ``tokens``: with the borders of the tokens, and their ids below."""
    columns = console.width if console.is_terminal else UNBROKEN
    picture_columns = min(console.width, MAX_COLUMNS) if console.is_terminal else MAX_COLUMNS
    page = _Page(console, columns, picture_columns, marks=console.color_system is None or console.no_color)
    page.print(Text(f"{shown.key}: {totals_line(shown.totals)}", style="bold"))
    page.print(_legend(page, tokens=tokens, has_packs=bool(shown.packs)))
    for row in shown.rows:
        _print_row(row, page, tokens=tokens)
    for pack in shown.packs:
        _print_pack(pack, page)
        for row, start in zip(pack.rows, pack.starts, strict=True):
            last = row.num_tokens - 1
            where = f"tokens {start:,} to {start + last:,} of the pack, position ids 0 to {last:,}"
            _print_row(row, page, tokens=tokens, where=where)


def totals_line(totals: Totals) -> str:
    """``298 rows, 41,203 tokens, 38.1% trained; 167 packs of 256, 96.4% full``."""
    line = f"{count(totals.rows, 'row')}, {count(totals.tokens, 'token')}, {percent(totals.supervised, totals.tokens)} "
    line += "trained"
    if totals.is_packed:
        full = percent(totals.tokens, totals.sequences * totals.capacity)
        line += f"; {count(totals.sequences, 'pack')} of {totals.capacity:,}, {full} full"
    return line


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def row_line(row: ShownRow) -> str:
    """Figures of a row."""
    figures = f"{count(row.num_tokens, 'token')}, {row.num_supervised:,} trained ({percent(*_share(row))})"
    return figures if row.place.origin.startswith(row.source) else f"{figures}, source {row.source}"


def pack_line(pack: ShownPack) -> str:
    """Figures of a pack."""
    full = percent(pack.num_tokens, pack.capacity)
    trained = percent(pack.num_supervised, pack.num_tokens)
    return (
        f"{count(len(pack.rows), 'row')}, {pack.num_tokens:,} of {pack.capacity:,} tokens ({full} full, "
        f"{pack.capacity - pack.num_tokens:,} free), {pack.num_supervised:,} trained ({trained})"
    )


def _share(row: ShownRow) -> tuple[int, int]:
    return row.num_supervised, row.num_tokens


def _legend(page: _Page, *, tokens: bool, has_packs: bool) -> Text:
    if page.marks:
        words = [Text(f"{OPEN}trained{CLOSE}"), Text("context"), Text("<special token>"), Text("↵ line break")]
    else:
        words = [
            Text("trained", TRAINED),
            Text("context", CONTEXT),
            Text("<special token>", SPECIAL),
            Text("<trained special token>", TRAINED_SPECIAL),
            Text("↵ line break", QUIET),
        ]
    words += [Text("␣ space")] if tokens else []
    legend = Text("   ").join(words)
    return legend.append("\n█ trained   ░ context   · free", QUIET) if has_packs else legend


def _print_row(row: ShownRow, page: _Page, *, tokens: bool, where: str = "") -> None:
    page.print("")
    page.print(Text(f"row {row.number:,}", "bold"), "  ", visible(row.place.origin))
    page.print(Text(visible(row_line(row)), QUIET))
    if where:
        page.print(Text(where, QUIET))
    for note in row.notes:
        page.print(Text(f"! {note}", "yellow"))
    lines = _token_lines(row, page) if tokens else _text_lines(row, page)
    for line in lines:
        page.print(Text(GUTTER, QUIET), line)


def _text_lines(row: ShownRow, page: _Page) -> Iterator[Text]:
    """The text of a row, broken at the width of the page."""
    text = Text()
    for trained, run in groupby(row.pieces, key=lambda piece: piece.is_supervised):
        text.append(OPEN if trained and page.marks else "")
        for piece in run:
            _append(text, visible(piece.text), _style(piece))
        text.append(CLOSE if trained and page.marks else "")
    lines = text.split("\n")
    for line in lines:
        yield from line.divide(breaks(line.plain, page.columns - cell_len(GUTTER)))


def _append(text: Text, content: str, style: str) -> None:
    """``content`` in its style, and the marks of line breaks in theirs."""
    for index, part in enumerate(content.split("↵\n")):
        if index:
            text.append("↵", style or QUIET)
            text.append("\n")
        text.append(part, style)


def _style(piece: Piece) -> str:
    if piece.is_special:
        return TRAINED_SPECIAL if piece.is_supervised else SPECIAL
    return TRAINED if piece.is_supervised else CONTEXT


def breaks(line: str, columns: int) -> list[int]:
    """Where to break a line that has more than ``columns``: at spaces and beside wide characters, else anywhere."""
    found: list[int] = []
    start = used = allowed = used_there = 0
    before = ""
    for index, character in enumerate(line):
        width = cell_len(character)
        if index > start and _may_break(before, character, width):
            allowed, used_there = index, used
        if used + width > columns and index > start:
            if allowed <= start:
                allowed, used_there = index, used
            found.append(allowed)
            start, used = allowed, used - used_there
        used += width
        before = character
    return found


def _may_break(before: str, character: str, width: int) -> bool:
    if width == 0 or before == "\u200d" or character in _CLOSING:
        return False
    return (before == " " and character != " ") or width == 2 or cell_len(before) == 2


def _token_lines(row: ShownRow, page: _Page) -> Iterator[Text]:
    """Two lines for each line of text: tokens and, below, their ids, several where a character has several tokens."""
    columns = page.columns - cell_len(GUTTER)
    texts, ids, used = Text(), Text(), 0
    trained = [False, *(piece.is_supervised for piece in row.pieces), False]
    for index, piece in enumerate(row.pieces):
        content = alone(piece.text)
        if piece.is_supervised and page.marks:
            content = (OPEN if not trained[index] else "") + content + (CLOSE if not trained[index + 2] else "")
        below = "+".join(map(str, piece.ids))
        width = max(cell_len(content), len(below))
        if used and used + width + 1 > columns:
            yield from (texts, ids)
            texts, ids, used = Text(), Text(), 0
        texts.append(content, _style(piece)).append(" " * (width - cell_len(content)) + BORDER, QUIET)
        ids.append(below.ljust(width) + BORDER, QUIET)
        used += width + 1
        if "\n" in piece.text:
            yield from (texts, ids)
            texts, ids, used = Text(), Text(), 0
    if used:
        yield from (texts, ids)


LABEL = "{:<14}"

# Of the bar of a pack, at least on average and at most.
COLUMNS_PER_ROW, MAX_BAR_LINES = 8, 8
MIN_BAR_COLUMNS = 20


def _print_pack(pack: ShownPack, page: _Page) -> None:
    head = f"━━ pack {pack.number:,} "
    page.print("")
    page.print(Text(head.ljust(page.picture_columns, "━"), "bold"))
    page.print(pack_line(pack))
    width = max(MIN_BAR_COLUMNS, page.picture_columns - cell_len(LABEL.format("")))
    columns = min(bar_lines(len(pack.rows), width) * width, pack.capacity)
    bar, rows, ids = fill_bar(pack, columns), row_brackets(pack, columns), positions(pack, columns)
    for start in range(0, columns, width):
        line = slice(start, start + width)
        page.print(LABEL.format("tokens"), bar[line])
        page.print(LABEL.format("rows"), Text(rows[line], QUIET))
        page.print(LABEL.format("position ids"), Text(ids[line], QUIET))


def bar_lines(rows: int, width: int) -> int:
    """Lines of ``width`` columns that the bar of a pack gets, so that the numbers of its rows find room."""
    return min(max(1, -(-rows * COLUMNS_PER_ROW // width)), MAX_BAR_LINES)


def fill_bar(pack: ShownPack, columns: int) -> Text:
    """The tokens of a pack in so many columns: each has what most of its tokens are."""
    trained = np.concatenate([row.labels != IGNORE_INDEX for row in pack.rows])
    reached = np.concatenate([[0], np.cumsum(trained)]).tolist()
    bar = Text()
    for start, end in pairwise(column * pack.capacity // columns for column in range(columns + 1)):
        first, last = min(start, len(trained)), min(end, len(trained))
        if 2 * (last - first) < end - start:
            bar.append("·", QUIET)
        elif 2 * (reached[last] - reached[first]) >= last - first:
            bar.append("█", TRAINED)
        else:
            bar.append("░", QUIET)
    return bar


def row_brackets(pack: ShownPack, columns: int) -> str:
    """``└12────┘└5──┘``: where each row of a pack lies, with its number where there is room."""
    line = ""
    for row, (start, end) in zip(pack.rows, _columns_of(pack, columns), strict=True):
        width = end - start
        if width == 1:
            line += "│"
        elif width > 1:
            label = str(row.number)
            line += f"└{label if len(label) <= width - 2 else ''}".ljust(width - 1, "─") + "┘"
    return line


def positions(pack: ShownPack, columns: int) -> str:
    """The first and the last position of each row of a pack, where there is room: each begins with 0."""
    line = ""
    for row, (start, end) in zip(pack.rows, _columns_of(pack, columns), strict=True):
        width, last = end - start, str(row.num_tokens - 1)
        if width >= len(last) + 3:
            line += "0" + f"{last} ".rjust(width - 1)
        else:
            line += "0".ljust(width)[:width]
    return line.rstrip()


def _columns_of(pack: ShownPack, columns: int) -> list[tuple[int, int]]:
    """(first column, the one after its last) of each row."""
    ends = np.cumsum([0, *(row.num_tokens for row in pack.rows)]) * columns / pack.capacity
    bounds = [round(float(end)) for end in ends]
    return list(pairwise(bounds))
