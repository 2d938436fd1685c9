"""Answers that are one of a few labels: which one an answer is, accuracy and macro-F1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_dist.errors import ConfigError, DataError
from sft_dist.scores.answered import Answered
from sft_dist.scores.plain_form import form_of
from sft_dist.scores.rouge import CJK
from sft_dist.scores.tally import Array

NO_LABEL = -1

# Below so many references of a label a resample often has none, and its F1 is then 0.
_FEW_REFERENCES = 5
_MANY_LABELS = 50

_ENDS_IN_A_WORD = re.compile(rf"[^\W{CJK}]\Z")
_GOES_ON = re.compile(rf"[^\W{CJK}]|[.,]\d")


class LabelReader:
    """Tells which label an answer is.

    Args:
        labels: in the form in which they are compared, each once.
    """

    def __init__(self, labels: Sequence[str], *, normalise: bool) -> None:
        self.labels = tuple(labels)
        self._normalise = normalise
        self._codes = {label: code for code, label in enumerate(labels)}
        self._lengths = sorted({len(label) for label in labels if label}, reverse=True)

    def read(self, answer: str) -> int:
        """The label's position in ``labels``, or ``NO_LABEL``.

        It is the whole answer, or else what the first line starts with: the longest label, if several do. A label that
        ends in a letter or digit of a script with spaces must end there: "no" is not read from "nothing", "3" not from
        "3.5".
        """
        text = form_of(answer, normalise=self._normalise)
        whole = self._codes.get(text)
        if whole is not None:
            return whole
        line = next(iter(text.splitlines()), "")
        for length in self._lengths:
            start = line[:length]
            if start in self._codes and not (_ENDS_IN_A_WORD.search(start) and _GOES_ON.match(line, length)):
                return self._codes[start]
        return NO_LABEL


@dataclass(frozen=True)
class Labelled:
    """The labels of n examples.

    Args:
        labels: in the form in which they are compared.
        of_references: nobody listed the labels; they are those that the references have.
        truth: [n], position in ``labels`` of each reference.
        found: [n], of each answer; ``NO_LABEL``: it is none.
    """

    labels: tuple[str, ...]
    of_references: bool
    truth: NDArray[np.int64]
    found: NDArray[np.int64]


@dataclass(frozen=True)
class MacroF1:
    """The mean of the labels' F1; a label that is neither asked for nor answered has 0, as in scikit-learn."""

    labelled: Labelled

    def value(self, counts: Array) -> Array:
        truth, found = self.labelled.truth, self.labelled.found
        wanted = self._by_label(counts, truth)
        answered = self._by_label(counts, found)
        right = self._by_label(counts, np.where(truth == found, truth, NO_LABEL))
        mean: Array = (2 * right / np.maximum(wanted + answered, 1)).mean(axis=1)
        return mean

    def part(self, rows: Sequence[int]) -> MacroF1:
        """The tally of these examples alone; of the labels that their own references have, if nobody listed them."""
        whole = self.labelled
        truth, found = whole.truth[list(rows)], whole.found[list(rows)]
        if not whole.of_references:
            return MacroF1(Labelled(whole.labels, False, truth, found))
        kept = np.unique(truth)
        # One place more, for NO_LABEL, which is the last from behind.
        code = np.full(len(whole.labels) + 1, NO_LABEL, dtype=np.int64)
        code[kept] = np.arange(len(kept))
        return MacroF1(Labelled(tuple(whole.labels[label] for label in kept), True, code[truth], code[found]))

    def _by_label(self, counts: Array, codes: NDArray[np.int64]) -> Array:
        """[k, labels]: how often each label is in each choice of examples."""
        choices, width = len(counts), len(self.labelled.labels) + 1
        # NO_LABEL goes to the last column, which is dropped.
        cells = np.arange(choices)[:, None] * width + np.where(codes == NO_LABEL, width - 1, codes)
        sums = np.bincount(cells.ravel(), weights=counts.ravel(), minlength=choices * width)
        return sums.astype(np.float64, copy=False).reshape(choices, width)[:, :-1]


def read_labels(examples: Sequence[Answered], *, labels: Sequence[str] | None, normalise: bool) -> Labelled:
    """The labels of all references and answers.

    Raises:
        ConfigError: two of the listed labels are the same when they are compared, or one is empty.
        DataError: a reference is none of the listed labels.
    """
    references = [form_of(example.reference, normalise=normalise) for example in examples]
    reader = LabelReader(
        sorted(set(references)) if labels is None else _listed(labels, normalise=normalise), normalise=normalise
    )
    truth = [reader.read(example.reference) for example in examples]
    strangers = [example.reference for example, code in zip(examples, truth, strict=True) if code == NO_LABEL]
    if strangers:
        raise DataError(
            f"{len(strangers):,} of {len(examples):,} references are none of eval.scores.labels, e.g. "
            f"{strangers[0][:60]!r}",
            fix="add what is missing to eval.scores.labels, or leave accuracy and macro_f1 out",
        )
    found = [reader.read(example.answer) for example in examples]
    return Labelled(reader.labels, labels is None, np.array(truth, dtype=np.int64), np.array(found, dtype=np.int64))


def label_notes(labelled: Labelled, *, has_macro_f1: bool) -> list[str]:
    """What a reader of accuracy, and of macro_f1 where it is asked for, must know."""
    notes = []
    examples = len(labelled.truth)
    without = int((labelled.found == NO_LABEL).sum())
    if without:
        notes.append(f"labels: {without:,} of {examples:,} answers are no label and count as wrong")
    if _are_texts(labelled):
        notes.append(
            f"labels: the {examples:,} references have {len(labelled.labels):,} different forms; are they labels? "
            "(eval.scores.labels lists them)"
        )
        return notes
    absent = _labels_with(labelled, 0, 0)
    if absent and has_macro_f1:
        notes.append(f"labels: no reference is {_list(absent)}; macro_f1 counts an F1 of 0 for it")
    return notes


def interval_notes(labelled: Labelled) -> list[str]:
    """What a reader of macro_f1's interval must know."""
    rare = _labels_with(labelled, 1, _FEW_REFERENCES - 1)
    if not rare or _are_texts(labelled):
        return []
    return [f"labels: fewer than {_FEW_REFERENCES} references are {_list(rare)}; macro_f1's interval is too low"]


def _are_texts(labelled: Labelled) -> bool:
    """Whether nobody listed the labels, and the references look like none."""
    return labelled.of_references and len(labelled.labels) > max(_MANY_LABELS, len(labelled.truth) / 2)


def _labels_with(labelled: Labelled, least: int, most: int) -> list[str]:
    """Those with so many references."""
    number = np.bincount(labelled.truth, minlength=len(labelled.labels))
    return [label for label, count in zip(labelled.labels, number, strict=True) if least <= count <= most]


def _list(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label[:40]) for label in labels[:5])
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5:,} more"


def _listed(labels: Sequence[str], *, normalise: bool) -> list[str]:
    forms: dict[str, str] = {}
    for label in labels:
        form = form_of(label, normalise=normalise)
        if not form:
            raise ConfigError(f"eval.scores.labels has {label!r}, which is empty when compared", fix="remove it")
        if form in forms:
            raise ConfigError(
                f"eval.scores.labels has {forms[form]!r} and {label!r}, which are the same when compared",
                fix="remove one of them, or set eval.scores.normalise to false",
            )
        forms[form] = label
    return list(forms)
