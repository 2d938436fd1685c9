"""From a text and the spans that are trained in it to token ids, fast.

Most words of a data set have been met before. Where a tokenizer always splits between a character and a space behind
it, as those of GPT-2, Llama 3, Qwen and most after them do, what it makes of the text up to there depends on nothing
behind it: the text is cut there, and around the marks that a chat template writes, and each piece is looked up among
those that were tokenised before. The ids are the tokenizer's own, one piece at a time, and English text comes
out about twice as fast. Whether a tokenizer is of that kind is tried out when it is loaded; one that is not gets whole
texts.
"""

from __future__ import annotations

import re
import string
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from sft_dist.data.byte_fallback import byte_ids, places_of_bytes
from sft_dist.data.jinja_template import Span
from sft_dist.data.masking import supervised_tokens

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

# What may stand before a cut at a space: any ASCII character that can be seen.
VISIBLE = "".join(chr(code) for code in range(ord("!"), ord("~") + 1))
AT_SPACES = re.compile(r"(?<=[!-~])(?= )")
# A space where a text cannot be cut.
NO_CUT = re.compile(r"[^!-~] ")
# What may stand behind the space, for trying out a tokenizer.
BEHIND = [*VISIBLE, "", " ", "  ", "\n", "\t", "\r\n", "あ", "漢", "、", "é", "\u0301", "\u3000", "🦊"]

# A word comes out alike whatever punctuation follows it.
PUNCTUATION = ".,;:!?"
AFTER = ("", " ", "\n", "b", ".")
PROBE = "Probe of the a1 X.\nThe... a.b, X?! end: (12 of 3.5); it's  two"
AT_PUNCTUATION = re.compile(rf"(?<=[A-Za-z])(?=[{PUNCTUATION}])")

# What is remembered, and the most characters of it: 60 MB.
MAX_PIECES = 1 << 18
MAX_BORDERS = 1 << 14
MAX_PIECE_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text.

    Args:
        input_ids: [t].
        supervised: [t], whether every character of the token lies in one of the spans.
        reached: for each span the character where its last supervised token ends; None: none of its tokens is whole.
        last: index of the last supervised token, or None.
    """

    input_ids: list[int]
    supervised: list[bool]
    reached: list[int | None]
    last: int | None


class RowTokenizer:
    """Tokenises as ``tokenizer`` does, without special tokens of its own.

    Args:
        tokenizer: a fast tokenizer.
        marks: added tokens that stand in most texts, e.g. those of a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Collection[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        # transformers sets these for each call of a tokenizer; a tokenizer.json may ask for either.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._byte_ids = byte_ids(self._backend)
        added = list(tokenizer.added_tokens_decoder.values())
        self._pieces = self._borders = None
        if _cuts(self._backend, added, AT_SPACES, [(before, f" {after}") for before in VISIBLE for after in BEHIND]):
            ends = (
                (letter, mark + after) for letter in string.ascii_letters for mark in PUNCTUATION for after in AFTER
            )
            self._pieces = _Pieces(self._backend, cuts_words=_cuts(self._backend, added, AT_PUNCTUATION, ends))
            self._borders = _Borders(self._whole)
            alone = [mark for mark in sorted(marks) if _stands_alone(self._backend, mark, added)]
            self._marks = re.compile(f"({'|'.join(map(re.escape, alone))})") if alone else None

    @property
    def looks_up(self) -> bool:
        """Whether texts are cut into pieces that are looked up."""
        return self._pieces is not None

    def __call__(self, text: str, spans: Sequence[Span]) -> Tokens:
        """Tokenises ``text``; ``spans`` in order and without overlap."""
        if self._borders is None:
            return self._whole(text, spans)
        parts = [text] if self._marks is None else self._marks.split(text)
        pieces = list(chain.from_iterable(map(_cut, parts)))
        ends = list(accumulate(map(len, pieces)))
        ids: list[int] = []
        supervised: list[bool] = []
        reached: list[int | None] = [None] * len(spans)
        last: int | None = None
        done, open_span = 0, -1  # pieces so far, and the span that the last of them left open
        for border, touching in _border_pieces(ends, spans):
            start = ends[border - 1] if border else 0
            is_inside = touching[0] == open_span
            self._take(pieces[done:border], ids, supervised, is_supervised=is_inside)
            if is_inside and done < border:
                reached[open_span], last = start, len(ids) - 1
            piece = pieces[border]
            local = tuple((max(spans[n][0] - start, 0), min(spans[n][1] - start, len(piece))) for n in touching)
            part = self._borders[piece, local]
            for number, place in zip(touching, part.reached, strict=True):
                reached[number] = reached[number] if place is None else start + place
            last = last if part.last is None else len(ids) + part.last
            ids += part.input_ids
            supervised += part.supervised
            done, open_span = border + 1, touching[-1]
        self._take(pieces[done:], ids, supervised, is_supervised=False)
        return Tokens(ids, supervised, reached, last)

    def _take(self, pieces: list[str], ids: list[int], supervised: list[bool], *, is_supervised: bool) -> None:
        """Appends pieces that lie inside a span, or outside of all."""
        assert self._pieces is not None
        ids.extend(chain.from_iterable(map(self._pieces.__getitem__, pieces)))
        supervised.extend([is_supervised] * (len(ids) - len(supervised)))

    def _whole(self, text: str, spans: Sequence[Span]) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not spans:
            return Tokens(ids, [False] * len(ids), [], None)
        offsets = encoding.offsets
        if self._byte_ids:
            offsets = places_of_bytes(text, ids, offsets, self._byte_ids)
        supervised = supervised_tokens(text, offsets, [id in self._added_ids for id in ids], spans)
        reached: list[int | None] = [None] * len(spans)
        last, span = None, 0
        for index, is_supervised in enumerate(supervised):
            if is_supervised:
                last, end = index, offsets[index][1]
                # An added token may swallow white space behind the span, which does not count.
                while span < len(spans) - 1 and spans[span + 1][0] < end and spans[span][1] < end:
                    span += 1
                if end > spans[span][0]:
                    reached[span] = end
        return Tokens(ids, supervised, reached, last)


def _border_pieces(ends: list[int], spans: Sequence[Span]) -> list[tuple[int, list[int]]]:
    """The pieces that hold the first or the last character of a span, each with the spans that it does so for.

    Args:
        ends: of the pieces, in characters.
    """
    borders: list[tuple[int, list[int]]] = []
    for number, (start, end) in enumerate(spans):
        for piece in (bisect_right(ends, start), bisect_left(ends, end)):
            if not borders or borders[-1][0] != piece:
                borders.append((piece, [number]))
            elif borders[-1][1][-1] != number:
                borders[-1][1].append(number)
    return borders


def _cut(text: str) -> list[str]:
    """``text`` in pieces, cut ``AT_SPACES``."""
    if "\0" in text or NO_CUT.search(text):
        return AT_SPACES.split(text)
    # The same, several times faster.
    return text.replace(" ", "\0 ").split("\0")


class _Pieces(dict[str, tuple[int, ...]]):
    """The ids of pieces of text; one that is not there yet is tokenised.

    Args:
        cuts_words: pieces may be cut ``AT_PUNCTUATION``.
    """

    def __init__(self, backend: Any, *, cuts_words: bool) -> None:
        self._backend, self._cuts_words = backend, cuts_words

    def __missing__(self, piece: str) -> tuple[int, ...]:
        words = AT_PUNCTUATION.split(piece) if self._cuts_words else [piece]
        if len(words) > 1:
            ids = tuple(chain.from_iterable(self[word] for word in words))
        else:
            ids = tuple(self._backend.encode(piece, add_special_tokens=False).ids)
        if len(piece) <= MAX_PIECE_CHARACTERS and len(self) < MAX_PIECES:
            self[piece] = ids
        return ids


class _Borders(dict[tuple[str, tuple[Span, ...]], Tokens]):
    """Pieces with a border of a span, tokenised."""

    def __init__(self, tokenise: Callable[[str, Sequence[Span]], Tokens]) -> None:
        self._tokenise = tokenise

    def __missing__(self, key: tuple[str, tuple[Span, ...]]) -> Tokens:
        tokens = self._tokenise(*key)
        if len(key[0]) <= MAX_PIECE_CHARACTERS and len(self) < MAX_BORDERS:
            self[key] = tokens
        return tokens


def _cuts(
    backend: Any, added: Sequence[AddedToken], pattern: re.Pattern[str], places: Iterable[tuple[str, str]]
) -> bool:
    """Whether a text can be cut at ``pattern`` and tokenised piece by piece.

    It can where the tokenizer splits there before it looks at words (tried at all ``places``, each what stands before
    and behind), nothing before that changes the text but Unicode's composition, which ends at a space and at ASCII, and
    no added token has a cut inside or takes the space behind it.
    """
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    if splitter is None or (normalizer is not None and type(normalizer).__name__ not in ("NFC", "NFKC")):
        return False
    if any(token.rstrip or pattern.search(token.content) for token in added):
        return False
    for before, after in places:
        if all(start != 2 for _, (start, _) in splitter.pre_tokenize_str(f"a{before}{after}")):
            return False
    return _joins(backend, pattern.split(PROBE))


def _stands_alone(backend: Any, mark: str, added: Sequence[AddedToken]) -> bool:
    """Whether a text can be cut before and after every ``mark``: an added token that takes nothing of its neighbours,
    and that no other one overlaps."""
    own = [token for token in added if token.content == mark]
    if not own or own[0].lstrip or own[0].rstrip or own[0].single_word or own[0].normalized:
        return False
    others = [token.content for token in added if token.content != mark]
    overlaps = (
        other in mark or mark in other or any(_meet(other, mark, n) for n in range(1, min(len(other), len(mark))))
        for other in others
    )
    return not any(overlaps) and _joins(backend, ["Probe", mark, "of it", mark, "\n", mark, " of"])


def _meet(one: str, other: str, length: int) -> bool:
    """Whether the end of one is the beginning of the other."""
    return one[-length:] == other[:length] or other[-length:] == one[:length]


def _joins(backend: Any, pieces: Sequence[str]) -> bool:
    ids = [backend.encode(piece, add_special_tokens=False).ids for piece in pieces]
    return bool(backend.encode("".join(pieces), add_special_tokens=False).ids == list(chain.from_iterable(ids)))
