"""What a language has to bring to the demo's data: the phrases that the generator combines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Family = Literal["reply", "extraction", "rewriting"]
Language = Literal["ja", "en"]

FAMILIES: tuple[Family, ...] = ("reply", "extraction", "rewriting")
LANGUAGES: tuple[Language, ...] = ("ja", "en")


@dataclass(frozen=True)
class Topic:
    """What customers write about one matter, and the answer the house gives to it.

    Every string may use ``{item}``; ``answer`` also uses ``{name}``.
    """

    subject: str
    answer: str
    team: str
    enquiries: Sequence[str]


@dataclass(frozen=True)
class Phrasebook:
    """The phrases of one language.

    Args:
        instructions: the ways in which a user asks for each family; a prompt is an instruction, a line break, a text.
        labels: the three labels of the house format, in their order.
        greetings: frames of an enquiry, with ``{name}`` and ``{enquiry}``.
        topics: matters of enquiries.
        goods: what customers of the shop buy.
        callers: names that customers give in an enquiry.
        records: sentences with ``{name}``, ``{date}``, ``{amount}`` and ``{item}``.
        people: pairs of name parts, joined by ``name_joint`` into the names of records.
        expenses: what is paid for in a record.
        rewritings: pairs of a sentence and its rewriting, with the slots of ``slots``.
        slots: the fillers of each slot of ``rewritings``.
    """

    instructions: Mapping[Family, Sequence[str]]
    labels: tuple[str, str, str]
    greetings: Sequence[str]
    topics: Sequence[Topic]
    goods: Sequence[str]
    callers: Sequence[str]
    records: Sequence[str]
    people: tuple[Sequence[str], Sequence[str]]
    name_joint: str
    expenses: Sequence[str]
    rewritings: Sequence[tuple[str, str]]
    slots: Mapping[str, Sequence[str]]
