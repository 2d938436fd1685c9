"""How an answer that shows nothing is named, on pages and in the terminal."""

from __future__ import annotations

NO_VISIBLE_TEXT = "(no visible text)"


def visible(answer: str) -> str:
    """The answer, or what stands for one of blanks, line breaks and control characters alone."""
    return answer if any(letter.isprintable() and not letter.isspace() for letter in answer) else NO_VISIBLE_TEXT
