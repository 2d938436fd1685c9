"""The language of a text, as far as its script tells: by Unicode ranges alone."""

from __future__ import annotations

import re

# For use inside the brackets of a pattern.
KANA = "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d"
HAN = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"

_KANA = re.compile(f"[{KANA}]")
_HAN = re.compile(f"[{HAN}]")
_HANGUL = re.compile(f"[{HANGUL}]")
_LATIN = re.compile(
    "[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a]"
)
_LETTER = re.compile(r"[^\W\d_]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://[\x21-\x7e]+", re.DOTALL)
_LANGUAGES_NAMED = re.compile(
    r"translat|翻訳|英訳|和訳|邦訳|訳して|訳せ|\bin (?:english|japanese|french|german|spanish|chinese|korean)\b"
    r"|英語|日本語|中国語|韓国語|フランス語|ドイツ語|スペイン語|\b(?:english|japanese|chinese|korean)\b",
    re.IGNORECASE,
)

# A Chinese character or kana says as much as some three Latin letters: 「PyTorchのDataLoaderを使う」 is Japanese.
_LETTERS_A_CHARACTER = 3

# Of a text, enough to tell its language.
_READ_CHARACTERS = 600

# Fewer letters than these prove no language: names and formulas are written alike in all.
MIN_LETTERS = 10

LANGUAGES = {
    "ja": "Japanese",
    "han": "Chinese characters only",
    "latin": "Latin letters (English)",
    "hangul": "Korean",
    "other": "other scripts",
    "none": "no letters",
}


def without_code(text: str) -> str:
    """``text`` without code in backticks and without addresses."""
    return _CODE.sub(" ", text) if "`" in text or "://" in text else text


def language(text: str) -> tuple[str, int]:
    """A key of ``LANGUAGES``, and how many letters it was told from (a Chinese character counts as three)."""
    part = without_code(text[:_READ_CHARACTERS])
    if part.isascii():
        letters = len(_LATIN.findall(part))
        return ("latin" if letters else "none"), letters
    kana, han, latin = len(_KANA.findall(part)), len(_HAN.findall(part)), len(_LATIN.findall(part))
    hangul = len(_HANGUL.findall(part))
    counts = {
        "ja" if kana else "han": _LETTERS_A_CHARACTER * (kana + han),
        "latin": latin,
        "hangul": _LETTERS_A_CHARACTER * hangul,
        "other": len(_LETTER.findall(part)) - kana - han - latin - hangul,
    }
    found = max(counts, key=lambda name: counts[name])
    return (found, counts[found]) if counts[found] > 0 else ("none", 0)


def differ(question: str, answer: str) -> bool:
    """Whether two languages are certainly not the same: a text of Chinese characters alone may be Japanese."""
    return question != answer and {question, answer} != {"ja", "han"}


def names_a_language(text: str) -> bool:
    """Whether a question speaks of languages or of translating: then an answer in another one is what was asked for."""
    return _LANGUAGES_NAMED.search(text) is not None
