"""What each token of a row reads as, from the ids alone.

A token of a byte-level tokenizer holds bytes, and so do the tokens for unknown characters of others: several form one
character, and one may hold the end of a character and the beginning of the next. Decoding tokens one by one gives
U+FFFD for them. Here the bytes of all tokens go through one UTF-8 decoder, and each token reads as the characters that
it completes.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

# Invisible, but part of how the characters around them are drawn: joiners, and the letters of flags.
_JOINING = {"\u200c", "\u200d", *map(chr, range(0xE0020, 0xE0080))}


class TokenText:
    """Reads rows of one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        steps = _steps(tokenizer.backend_tokenizer.decoder)
        self._is_byte_level = "ByteLevel" in steps
        self._has_byte_tokens = "ByteFallback" in steps
        self._known: dict[int, bytes] = {}
        # Some decoders take away the space before the first token of a text: others are read behind this letter.
        self._letter: list[int] = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """[t] what each token reads as; "" where the character goes on in the next one.

        Bytes that form no character, at the end of a row that was cut or before a special token, read ``\\xe3``.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        texts: list[str] = []
        for place, id in enumerate(ids):
            if id in self._added:
                if texts:
                    texts[-1] += decoder.decode(b"", final=True)
                texts.append(self._added[id])
            else:
                texts.append(decoder.decode(self._bytes(id, is_first=place == 0)))
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return texts

    def is_special(self, id: int) -> bool:
        """Whether a token stands for itself and not for a piece of text: an added token that can be seen."""
        return bool(self._added.get(id, "").strip())

    def _bytes(self, id: int, *, is_first: bool) -> bytes:
        if is_first and not self._is_byte_level:
            return self._read(id, after=[])
        if id not in self._known:
            self._known[id] = self._read(id, after=self._letter)
        return self._known[id]

    def _read(self, id: int, *, after: list[int]) -> bytes:
        if self._is_byte_level:
            return _bytes_of(self._tokenizer.convert_ids_to_tokens(id))
        if self._has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(id))):
            return bytes.fromhex(byte[1])
        decode = self._tokenizer.backend_tokenizer.decode
        before = len(decode(after, skip_special_tokens=False)) if after else 0
        return str(decode([*after, id], skip_special_tokens=False)[before:]).encode()


def visible(text: str) -> str:
    """``text`` with its invisible characters shown: ``↵`` before line breaks, ``⇥`` for tabs, code points in brackets.

    Spaces and what joins characters stay as they are. Nothing is left that moves the cursor of a terminal.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _shown(character) for character in text)


def alone(text: str) -> str:
    """A token's text on one line: as ``visible``, with ``␣`` for spaces and code points where nothing can be seen."""
    if text and all(character in _JOINING or "\ufe00" <= character <= "\ufe0f" for character in text):
        return "".join(map(_code_point, text))
    return visible(text).replace("↵\n", "↵").replace(" ", "␣")


def _shown(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    if character in _JOINING or unicodedata.category(character) in ("Zs", "Co", "Cn"):
        return character
    return _code_point(character)


def _code_point(character: str) -> str:
    return f"[U+{ord(character):04X}]"


def _steps(decoder: Any) -> set[str]:
    """The kinds of steps that a tokenizer's decoder has."""
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in (state, *state.get("decoders", []))}


def _alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {chr(value if value in printable else next(others)): value for value in range(256)}


_BYTE_OF = _alphabet()


def _bytes_of(token: str) -> bytes:
    """Of a byte-level token. One with other characters was never split into bytes and stands for itself."""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()
