"""JSON read strictly: no key twice in an object, and every fault as one line what and one line how to fix.

Python's reader keeps the last of two equal keys in silence, and fails on deep nesting and on very long numbers with
exceptions of their own. ``NaN`` and ``Infinity``, which JSON lacks and Python writes, are read: they often stand in a
score that nobody trains on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

_BLANK = re.compile(r"[ \t\n\r]*")
TOO_DEEP = "write the row with less nesting; no layout has more than a few levels"


class JsonFault(Exception):
    """What is wrong with a JSON text.

    Args:
        what: one line.
        fix: one line, or None: the text is no JSON, and who reads it knows best what it should be.
    """

    def __init__(self, what: str, *, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


class _TwiceThere(ValueError):
    """The key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceThere(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)
# Finds the end of a value that the strict reader refuses.
_LAX = json.JSONDecoder(parse_int=str)


def parse(text: str, *, line: int = 1) -> Any:
    """The value of a JSON text.

    Args:
        line: number of the text's first line, for messages.

    Raises:
        JsonFault: it is not JSON, an object has a key twice, or it is nested too deep.
    """
    try:
        return _STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        raise _fault(error, line) from error


def parse_array(text: str) -> Iterator[Any | JsonFault]:
    """The elements of an array, one after the other; a fault in place of one that has a key twice or a huge number.

    Raises:
        JsonFault: the text is no array, or damaged so that the next element cannot be found.
    """
    try:
        at = _skip_blank(text, _expect(text, _skip_blank(text, 0), "["))
        if text[at : at + 1] != "]":
            value, at = _element(text, at)
            yield value
            while text[at : at + 1] != "]":
                value, at = _element(text, _skip_blank(text, _expect(text, at, ",")))
                yield value
        end = _skip_blank(text, at + 1)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        raise _fault(error, 1) from error


def _element(text: str, at: int) -> tuple[Any | JsonFault, int]:
    """An element, and where the next sign after it stands."""
    try:
        value, end = _STRICT.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        value, (_, end) = _fault(error, 1), _LAX.raw_decode(text, at)
    return value, _skip_blank(text, end)


def _expect(text: str, at: int, sign: str) -> int:
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"Expecting {sign!r}", text, at)
    return at + 1


def _skip_blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _fault(error: Exception, line: int) -> JsonFault:
    if isinstance(error, json.JSONDecodeError):
        return JsonFault(f"malformed JSON at line {line - 1 + error.lineno} column {error.colno}: {error.msg}")
    if isinstance(error, RecursionError):
        return JsonFault("JSON nested too deep to be read", fix=TOO_DEEP)
    if isinstance(error, _TwiceThere):
        return JsonFault(
            f"an object has the key {error.args[0][:60]!r} twice", fix="keep one of the two, or give them two names"
        )
    return JsonFault("a number of thousands of digits", fix="write it as a string, or remove it")
