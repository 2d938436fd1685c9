"""The form in which short answers are compared."""

from __future__ import annotations

import unicodedata


def plain_form(text: str) -> str:
    """``text`` without what makes no other answer: width of characters, case, blanks around it, a full stop at the end.

    NFKC makes full-width letters, digits and punctuation ASCII and half-width katakana full-width.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).strip()
    return folded[:-1].rstrip() if folded.endswith((".", "。")) else folded


def form_of(text: str, *, normalise: bool) -> str:
    """``text`` as it is compared, under ``eval.scores.normalise``."""
    return plain_form(text) if normalise else text
