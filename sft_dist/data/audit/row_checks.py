"""The checks that need one row only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from sft_dist.data.audit import text_checks
from sft_dist.data.audit.language import MIN_LETTERS, differ, names_a_language
from sft_dist.data.audit.rows import RowText, normalised, shown
from sft_dist.data.audit.settings import AuditSettings

if TYPE_CHECKING:
    from sft_dist.data.chat_template import TokenizedRow

# By as many characters two texts may differ that are the same after normalising, for the comparison to be tried.
_MOST_WHITE_SPACE = 64

Defect = tuple[str, str]
"""(name of the check, a short text that shows the defect)."""


class TextChecks:
    """The checks of texts, with the patterns of one tokenizer."""

    def __init__(self, settings: AuditSettings) -> None:
        own = set(settings.special_tokens)
        foreign = text_checks.pattern_of(set(text_checks.KNOWN_TOKENS) - own)
        assert foreign is not None, "no tokenizer has all of the known tokens"
        self._foreign: Callable[[str], int | None] = partial(text_checks.foreign_token, known=foreign)
        self._own: re.Pattern[str] | None = text_checks.pattern_of(own)

    def __call__(self, text: RowText) -> Iterator[Defect]:
        """Every defect of the row, each check once."""
        everything = (*text.others, *text.answers)
        yield from _first("mojibake", everything, text_checks.mojibake)
        yield from _first("foreign_token", everything, self._foreign)
        if self._own is not None:
            yield from _first("special_token_in_text", everything, self._find_own)
        yield from _first("role_marker", text.answers if text.roles else (), text_checks.role_marker)
        yield from _first("placeholder", everything, text_checks.placeholder)
        if any("&" in part or "<" in part for part in everything):
            row = "\n".join(everything)
            yield from _first("markup_remains", everything, partial(text_checks.markup_remains, row=row))
        if text.roles:
            yield from _first("boilerplate", text.answers, text_checks.boilerplate)
            yield from _of_answers(text)
            yield from _of_roles(text)

    def _find_own(self, text: str) -> int | None:
        match = self._own.search(text) if self._own else None
        return None if match is None else match.start()


def _first(check: str, texts: tuple[str, ...], find: Callable[[str], int | None]) -> Iterator[Defect]:
    for text in texts:
        place = find(text)
        if place is not None:
            yield check, shown(text, around=place)
            return


def _of_answers(text: RowText) -> Iterator[Defect]:
    if any(not answer.strip() for answer in text.answers):
        yield "empty_answer", shown(text.last_question)
    question = text.last_question.strip()
    if not question or abs(len(text.answer) - len(text.last_question)) > _MOST_WHITE_SPACE:
        return
    if normalised(question) == text.plain_answer:
        yield "answer_is_question", shown(text.answer)


def _of_roles(text: RowText) -> Iterator[Defect]:
    roles = text.roles
    if roles[-1] == "user":
        yield "role_order", shown(f"{', '.join(roles)}: {text.others[-1]}")
    elif any(role == after and role != "tool" for role, after in pairwise(roles)):
        yield "role_order", shown(f"{', '.join(roles)}: {text.last_question or text.answer}")


def token_defects(row: TokenizedRow, settings: AuditSettings, *, is_chat: bool) -> Iterator[Defect]:
    """The checks of tokens and labels. The text of a defect says what was found there.

    Args:
        is_chat: raw text may end anywhere, and has no turn to end; a row with a part that is not trained has.
    """
    ids, supervised = row.input_ids, row.supervised
    if len(ids) > 1 and ids[0] == ids[1] == settings.bos_id:
        yield "double_bos", f"{settings.bos_token}{settings.bos_token}"
    excess = len(ids) - settings.max_seq_len
    if excess > 0:
        yield "over_length", f"{len(ids):,} tokens"
    if True not in supervised[1:]:
        yield "no_supervised_token", f"{len(ids):,} tokens"
        return
    last = len(supervised) - 1 - supervised[::-1].index(True)
    if excess > 0 and last >= settings.max_seq_len and settings.over_length == "truncate":
        is_lost = True not in supervised[1 : settings.max_seq_len]
        yield "answer_cut", "no answer is left" if is_lost else f"{last + 1 - settings.max_seq_len:,} tokens cut off"
    if settings.end_ids and ids[last] not in settings.end_ids and (is_chat or False in supervised[1:]):
        yield "unsupervised_end", f"token {last + 1:,} of {len(ids):,} is the last one that is trained"
    if settings.untrained and not settings.untrained.keys().isdisjoint(ids):
        for id, is_supervised in zip(ids, supervised, strict=True):
            if is_supervised and id in settings.untrained:
                yield "untrained_token", settings.untrained[id]
                return


def features(text: RowText) -> Iterator[tuple[str, str]]:
    """What is a defect only where the rest of the source is otherwise: (feature, text of an example).

    ``form/X`` of an answer; ``one_word``; ``language/X/Y`` asked in X and answered in Y.
    """
    if not text.roles or not text.answer.strip():
        return
    yield f"form/{text_checks.form(text.answer)}", shown(text.answer)
    if text_checks.is_one_word(text.answer):
        yield "one_word", shown(f"{text.last_question} → {text.answer}")
    (asked, asked_letters), (answered, answered_letters) = text.languages
    if min(asked_letters, answered_letters) >= MIN_LETTERS:
        is_other = differ(asked, answered) and not names_a_language(text.context)
        yield (
            f"language/{asked}/{answered if is_other else asked}",
            shown(f"{text.last_question[:50]} → {text.answer}") if is_other else "",
        )
