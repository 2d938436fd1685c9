"""Does an answer keep the house format? What a prompt asks for decides which format that is.

A low loss does not say whether a fine-tuned model does what it was tuned for; a rule that a person could state does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_dist.demo.phrasebook import FAMILIES, LANGUAGES, Family, Language, Phrasebook
from sft_dist.demo.phrases_english import ENGLISH
from sft_dist.demo.phrases_japanese import JAPANESE
from sft_dist.errors import DataError

PHRASEBOOKS: Mapping[Language, Phrasebook] = {"ja": JAPANESE, "en": ENGLISH}
KEYS = ("name", "date", "amount", "currency", "item")
CURRENCIES = ("JPY", "USD", "EUR", "GBP")

_ISO_DATE = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])")
# A polite sentence ends in one of these; casual Japanese (だよ, して, かな) in none of them.
_POLITE_ENDING = re.compile(r"(ます|です|ました|ません|ください|でしょうか|ますか|ましたか|幸いです)。")

Row = Mapping[str, Sequence[Mapping[str, str]]]


def prompt_of(row: Row) -> str:
    """The user's message of a row."""
    return row["messages"][0]["content"]


def answer_of(row: Row) -> str:
    """The assistant's message of a row, the reference for what a model answers."""
    return row["messages"][-1]["content"]


def kind_of(row: Row) -> tuple[Family, Language]:
    """Which task, in which language, the prompt of ``row`` states.

    Raises:
        DataError: the prompt starts with no instruction of the demo.
    """
    instruction = prompt_of(row).partition("\n")[0]
    for language in LANGUAGES:
        for family in FAMILIES:
            if instruction in PHRASEBOOKS[language].instructions[family]:
                return family, language
    raise DataError(f"no task of the demo starts with {instruction!r}", fix="regenerate the demo's data files")


def house_format_ok(row: Row, answer: str) -> bool:
    """Whether ``answer`` has the form that the prompt of ``row`` asks for; its content is not judged."""
    family, language = kind_of(row)
    if family == "reply":
        return _is_reply(answer, labels=PHRASEBOOKS[language].labels)
    if family == "extraction":
        return _is_record(answer)
    if language == "ja":
        return "\n" not in answer and _POLITE_ENDING.search(answer[-8:]) is not None and answer.endswith("。")
    text = prompt_of(row).partition("\n")[2]
    return re.fullmatch(r"[A-Z][^\n.?]*[.?]", answer) is not None and len(answer) < len(text)


def _is_reply(answer: str, *, labels: Sequence[str]) -> bool:
    lines = answer.split("\n")
    return len(lines) == len(labels) and all(
        line.startswith(label) and bool(line.removeprefix(label).strip())
        for line, label in zip(lines, labels, strict=True)
    )


def _is_record(answer: str) -> bool:
    try:
        record: Any = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(record, dict)
        and tuple(record) == KEYS
        and all(isinstance(record[key], str) and record[key] for key in ("name", "item"))
        and isinstance(record["date"], str)
        and _ISO_DATE.fullmatch(record["date"]) is not None
        and type(record["amount"]) is int
        and record["currency"] in CURRENCIES
    )
