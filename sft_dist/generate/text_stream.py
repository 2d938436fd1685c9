"""From tokens that come one by one to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoders write for bytes that are no character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most four bytes; some decoders write U+FFFD for each of those that are there.
MAX_CUT_BYTES = 3


class CharacterStream:
    """Turns tokens into text as soon as the characters that they belong to are complete.

    A byte-level token may be a third of a character. Text that ends in U+FFFD is therefore held back until what
    follows shows whether it was half a character or is none. Only the last few tokens are decoded again at each step,
    beside those before them, because decoders treat the first token of a text in their own way.

    Args:
        decode: of token ids, without cleaning up spaces.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Text of _ids[:_shown] has been given out; decoding begins at _start, before it.
        self._start = self._shown = 0

    def push(self, token: int) -> str:
        """The characters that ``token`` completes; "" where it completes none."""
        self._ids.append(token)
        return self._advance(is_last=False)

    def finish(self) -> str:
        """What was held back. A character that the limit cut in half is left out."""
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT):
            if not is_last:
                return ""
            text = text[:-MAX_CUT_BYTES] + text[-MAX_CUT_BYTES:].rstrip(REPLACEMENT)
        new = text[len(before) :]
        if new:
            self._start, self._shown = self._shown, len(self._ids)
        return new


class StopStrings:
    """Holds back what may be the beginning of a stop string, and ends the text before one.

    Attributes:
        found: whether one has come; nothing is given out behind it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far is certainly shown."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
