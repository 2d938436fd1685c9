"""Writes an answer to a terminal while it comes: lines break between words, or between Japanese characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from rich.cells import cell_len

# What may not begin a line, and what may not end one (JIS X 4051, the common part).
_NOT_FIRST = frozenset(
    "、。，．・：；？！」』）］｝】〉》〕”’ーぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ々…‥,.:;?!)]}%"
)
_NOT_LAST = frozenset("「『（［｛【〈《〔“‘([{")

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


def visible(text: str) -> str:
    """``text`` with control characters made visible: what a model writes must not steer the terminal."""
    return _CONTROL.sub(lambda match: _picture(match[0]), text.replace("\r\n", "\n"))


def _picture(control: str) -> str:
    code = ord(control)
    return (
        chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"
    )


class WrappedText:
    """Breaks lines as the text comes. Holds back the word, or the character, that it is at.

    Args:
        write: gets what is to be shown.
        width: cells of a line, asked for at each line; None: lines are not broken.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int] | None) -> None:
        self._write, self._width = write, width
        self._column = 0
        self._unit = ""

    def push(self, text: str) -> None:
        if self._width is None:
            self._write(text)
            return
        for character in visible(text):
            self._push(character)

    def finish(self) -> None:
        """Writes what was held back."""
        self._put_unit()

    def _push(self, character: str) -> None:
        if character == "\n":
            self._put_unit()
            self._write("\n")
            self._column = 0
        elif character in " \t":
            self._put_unit()
            # Where the line is full, its end stands for the space.
            if self._column < self._limit():
                self._put(" " if character == " " else "    ")
        else:
            if self._unit and (_may_break(self._unit[-1], character) or self._fills_a_line(character)):
                self._put_unit()
            self._unit += character

    def _put_unit(self) -> None:
        unit, self._unit = self._unit, ""
        if not unit:
            return
        if self._column and self._column + cell_len(unit) > self._limit():
            self._write("\n")
            self._column = 0
        self._put(unit)

    def _fills_a_line(self, character: str) -> bool:
        """Whether a word is as long as a line: what has no place to break is cut there, and not held back for ever."""
        return cell_len(self._unit + character) > self._limit()

    def _put(self, text: str) -> None:
        if text:
            self._write(text)
            self._column += cell_len(text)

    def _limit(self) -> int:
        assert self._width is not None
        return max(self._width(), 2)


def _may_break(before: str, after: str) -> bool:
    if after in _NOT_FIRST or before in _NOT_LAST or cell_len(after) == 0 or unicodedata.combining(after):
        return False
    return cell_len(before) == 2 or cell_len(after) == 2
