"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), the F1 of each example, for every script.

On English equal to Google's rouge-score without stemming, whose tokeniser drops every character beyond ASCII and whose
table for the longest common subsequence takes seconds for a few thousand characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from sft_dist.data.audit.language import HAN, HANGUL, KANA

SIGNATURE = (
    "f1|stemmer:no|tokens:NFKC, lower case, words of letters and digits, single characters of Chinese, Japanese and "
    "Korean|LCS of the whole text"
)

CJK = f"{KANA}{HAN}{HANGUL}"
_TOKEN = re.compile(rf"(?=\w)[{CJK}]|[^\W_{CJK}]+")


def tokens(text: str) -> list[str]:
    """Words of letters and digits, in lower case; a Chinese, Japanese or Korean character is a word."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def rouge_n(answer: Sequence[str], reference: Sequence[str], *, n: int) -> float:
    """F1 of the n-grams that two lists of tokens share; 0 where one of them has none. ``n`` is 1 or 2."""
    found = Counter(answer if n == 1 else pairwise(answer))
    wanted = Counter(reference if n == 1 else pairwise(reference))
    return _f1((found & wanted).total(), found.total(), wanted.total())


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of tokens; 0 where one of them is empty."""
    return _f1(longest_common_subsequence(answer, reference), len(answer), len(reference))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length: a bit for each token of ``a``, all of them moved at once (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"). A column of the table grows where its bit is 0."""
    places: dict[str, int] = {}
    for place, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << place
    whole = (1 << len(a)) - 1
    row = whole
    for token in b:
        match = row & places.get(token, 0)
        row = (row + match | row - match) & whole
    return len(a) - row.bit_count()


def _f1(shared: int, found: int, wanted: int) -> float:
    return 2 * shared / (found + wanted) if shared else 0.0
