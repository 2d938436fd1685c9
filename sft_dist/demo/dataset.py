"""The demo's instruction set: three small tasks in Japanese and English, made from hand-written phrases.

``python -m sft_dist.demo.dataset sft_dist/demo/data`` rewrites the two committed files; a test proves that they are
what this module generates. The held-out rows are of the same tasks, and no held-out text occurs in training: a model
that answers them has learned the task and copies names, dates and amounts that it never saw together.
"""

from __future__ import annotations

import datetime
import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from sft_dist.demo.house_format import KEYS, PHRASEBOOKS
from sft_dist.demo.phrasebook import FAMILIES, LANGUAGES, Family, Language, Phrasebook

SEED = 20260403
TRAIN_ROWS_PER_TASK = 200
EVAL_ROWS_PER_TASK = 10

_FIRST_DAY = datetime.date(2024, 1, 1)
_NUM_DAYS = 3 * 365 + 1  # three years from 2024, a leap year
_YEN_BELOW_THOUSAND = (0, 200, 300, 400, 500, 600, 800, 980)
_CENTRAL_BELOW_THOUSAND = (120, 250, 300, 480, 500, 640, 750, 900)
_CURRENCY_SIGNS = {"USD": "$", "EUR": "€", "GBP": "£"}

ExampleMaker = Callable[[random.Random, Language], tuple[str, str]]
MessageRow = dict[str, list[dict[str, str]]]


def data_file(name: str) -> Path:
    """Path of a data file of the installed package, ``train.jsonl`` or ``eval.jsonl``."""
    return Path(__file__).parent / "data" / name


def generate(seed: int = SEED) -> tuple[list[MessageRow], list[MessageRow]]:
    """Training and held-out rows, in the order of the files: every task and language equally often, shuffled."""
    generator = random.Random(seed)
    train: list[MessageRow] = []
    held_out: list[MessageRow] = []
    for family in FAMILIES:
        for language in LANGUAGES:
            rows = _distinct_rows(generator, family, language, count=TRAIN_ROWS_PER_TASK + EVAL_ROWS_PER_TASK)
            held_out += rows[:EVAL_ROWS_PER_TASK]
            train += rows[EVAL_ROWS_PER_TASK:]
    generator.shuffle(train)
    generator.shuffle(held_out)
    return train, held_out


def write(folder: Path, seed: int = SEED) -> None:
    """Write ``train.jsonl`` and ``eval.jsonl`` into ``folder``, one row a line in UTF-8."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train.jsonl", "eval.jsonl"), generate(seed), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _distinct_rows(generator: random.Random, family: Family, language: Language, *, count: int) -> list[MessageRow]:
    """Rows whose texts all differ, so that any split of them leaks no text; the instruction may repeat."""
    make = _MAKERS[family]
    answers: dict[str, str] = {}
    while len(answers) < count:
        text, answer = make(generator, language)
        answers.setdefault(text, answer)
    instructions = PHRASEBOOKS[language].instructions[family]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{generator.choice(instructions)}\n{text}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for text, answer in answers.items()
    ]


def _make_reply(generator: random.Random, language: Language) -> tuple[str, str]:
    book = PHRASEBOOKS[language]
    topic = generator.choice(book.topics)
    facts = {"name": generator.choice(book.callers), "item": generator.choice(book.goods)}
    enquiry = generator.choice(topic.enquiries).format(**facts)
    text = generator.choice(book.greetings).format(enquiry=enquiry, **facts)
    bodies = (topic.subject.format(**facts), topic.answer.format(**facts), topic.team)
    joint = "" if language == "ja" else " "
    return text, "\n".join(label + joint + body for label, body in zip(book.labels, bodies, strict=True))


def _make_record(generator: random.Random, language: Language) -> tuple[str, str]:
    book = PHRASEBOOKS[language]
    name = book.name_joint.join(generator.choice(part) for part in book.people)
    date = _FIRST_DAY + datetime.timedelta(days=generator.randrange(_NUM_DAYS))
    if language == "ja":
        amount, currency = 1000 * generator.randint(1, 29) + generator.choice(_YEN_BELOW_THOUSAND), "JPY"
        shown_date, shown_amount = f"{date.year}年{date.month}月{date.day}日", f"{amount:,}円"
    else:
        amount = 1000 * generator.randint(0, 9) + generator.choice(_CENTRAL_BELOW_THOUSAND)
        currency = generator.choice(tuple(_CURRENCY_SIGNS))
        shown_date = f"{date.day} {_MONTHS[date.month - 1]} {date.year}"
        shown_amount = f"{_CURRENCY_SIGNS[currency]}{amount:,}"
    item = generator.choice(book.expenses)
    text = generator.choice(book.records).format(name=name, date=shown_date, amount=shown_amount, item=item)
    values = (name, date.isoformat(), amount, currency, item)
    return text, json.dumps(dict(zip(KEYS, values, strict=True)), ensure_ascii=False)


def _make_rewriting(generator: random.Random, language: Language) -> tuple[str, str]:
    book: Phrasebook = PHRASEBOOKS[language]
    wordy, short = generator.choice(book.rewritings)
    fillers = {slot: generator.choice(choices) for slot, choices in book.slots.items()}
    return wordy.format(**fillers), short.format(**fillers)


# Spelled out: strftime's month names depend on the locale of whoever runs it.
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_MAKERS: Mapping[Family, ExampleMaker] = {
    "reply": _make_reply,
    "extraction": _make_record,
    "rewriting": _make_rewriting,
}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m sft_dist.demo.dataset OUT_DIR")
    write(Path(sys.argv[1]))
