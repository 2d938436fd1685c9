"""Where the bytes of unknown characters stand.

A unigram model with byte fallback writes a character that it does not know as the tokens of its bytes, ``<0xF0>`` and
so on. It puts unknown characters that follow each other into one piece first, and gives every byte token the place of
the whole piece: a line break at the end of a prompt and an emoji at the beginning of the answer cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, groupby
from typing import Any

from sft_dist.data.jinja_template import Span

_BYTE_TOKENS = tuple(f"<0x{value:02X}>" for value in range(256))


def byte_ids(backend: Any) -> frozenset[int]:
    """The ids of a tokenizer's byte tokens, if it is a unigram model, which needs ``places_of_bytes``."""
    if type(backend.model).__name__ != "Unigram":
        return frozenset()
    ids = (backend.token_to_id(token) for token in _BYTE_TOKENS)
    return frozenset(id for id in ids if id is not None)


def places_of_bytes(text: str, ids: Sequence[int], offsets: Sequence[Span], bytes_of: Collection[int]) -> list[Span]:
    """``offsets`` with each byte token at its own character.

    A piece whose bytes are not those of its text (a normaliser changed them) keeps its offsets.

    Args:
        text: that was tokenised.
        ids: [t].
        offsets: [t] characters.
        bytes_of: ids of the byte tokens.
    """
    places: list[Span] = []
    tokens = zip(ids, offsets, strict=True)
    for ((start, end), is_byte), group in groupby(tokens, key=lambda token: (token[1], token[0] in bytes_of)):
        count = sum(1 for _ in group)
        own = [(start, end)] * count
        if is_byte and end - start > 1:
            widths = [len(character.encode(errors="surrogatepass")) for character in text[start:end]]
            if sum(widths) == count:
                own = list(chain.from_iterable([(at, at + 1)] * width for at, width in enumerate(widths, start)))
        places += own
    return places
