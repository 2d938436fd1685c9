"""BLEU (Papineni et al. 2002) as sacrebleu computes it, from counts that can be added up."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from sft_dist.data.audit.language import language
from sft_dist.errors import ConfigError
from sft_dist.scores.answered import Answered
from sft_dist.scores.tally import Array

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

ORDERS = 4

# Chinese texts hold a kana now and then; of Japanese letters, texts with none at all (labels, names) are a minority.
_MIN_JAPANESE_SHARE = 0.1

# Of references in another script; fewer move the score by less than which examples were drawn does.
_MIN_MIXED_SHARE = 0.05


@dataclass(frozen=True)
class Bleu:
    """Counts of n examples.

    Args:
        statistics: [n, 10]: length of the answer and of the reference in tokens, matches of 1 to 4 tokens, and all
            such n-grams of the answer.
        examples: that were counted.
        wanted: the tokeniser of the configuration.
        tokeniser: that it means for these references.
        signature: sacrebleu's.
    """

    statistics: Array
    examples: tuple[Answered, ...]
    wanted: str
    tokeniser: str
    signature: str

    def value(self, counts: Array) -> Array:
        return bleu_of_sums(counts @ self.statistics)

    def part(self, rows: Sequence[int]) -> Bleu:
        """The tally of these examples alone, with the tokeniser that their own references have."""
        examples = tuple(self.examples[row] for row in rows)
        tokeniser = tokeniser_for(self.wanted, [example.reference for example in examples])
        if tokeniser != self.tokeniser:
            return count_bleu(examples, wanted=self.wanted)
        return Bleu(self.statistics[list(rows)], examples, self.wanted, tokeniser, self.signature)


def count_bleu(examples: Sequence[Answered], *, wanted: str) -> Bleu:
    """Counts the examples.

    Raises:
        ConfigError: the tokeniser ``ja-mecab`` is wanted, and MeCab is not installed.
    """
    tokeniser = tokeniser_for(wanted, [example.reference for example in examples])
    check_tokeniser(tokeniser)
    metric = _metric(tokeniser)
    rows = []
    for example in examples:
        found = metric.sentence_score(example.answer, [example.reference])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return Bleu(np.array(rows, dtype=np.float64), tuple(examples), wanted, tokeniser, _signature(tokeniser))


def check_tokeniser(tokeniser: str) -> None:
    """
    Raises:
        ConfigError: it is not installed.
    """
    if tokeniser == "ja-mecab" and not has_mecab():
        raise ConfigError(
            "eval.scores.tokeniser is ja-mecab, and MeCab with its dictionary is not installed",
            fix="pip install 'sacrebleu[ja]', or set eval.scores.tokeniser to char",
        )


def tokeniser_for(wanted: str, references: Sequence[str]) -> str:
    """sacrebleu's name of the tokeniser that ``eval.scores.tokeniser`` means for these references."""
    if wanted != "auto":
        return wanted
    script = script_of(references)
    if script == "ja":
        return "ja-mecab" if has_mecab() else "char"
    return "zh" if script == "zh" else "13a"


def script_of(texts: Sequence[str]) -> str:
    """``ja``, ``zh`` or ``other``, by the letters of all texts together."""
    letters: Counter[str] = Counter()
    for text in texts:
        name, number = language(text)
        letters[name] += number
    han_or_kana = letters["ja"] + letters["han"]
    if han_or_kana == 0 or han_or_kana < max(letters["latin"], letters["hangul"], letters["other"]):
        return "other"
    return "ja" if letters["ja"] >= _MIN_JAPANESE_SHARE * han_or_kana else "zh"


def has_mecab() -> bool:
    """Whether sacrebleu can cut Japanese into words."""
    try:
        importlib.import_module("MeCab")
        importlib.import_module("ipadic")
    except ImportError:
        return False
    return True


def bleu_of_sums(sums: Array) -> Array:
    """BLEU, 0 to 100, with sacrebleu's ``exp`` smoothing (method 3 of Chen and Cherry 2014).

    Args:
        sums: [k, 10], statistics of ``Bleu`` added up.

    Returns:
        [k].
    """
    answer_len, reference_len = sums[:, 0], sums[:, 1]
    correct, total = sums[:, 2 : 2 + ORDERS], sums[:, 2 + ORDERS :]
    is_defined = (correct.sum(axis=1) > 0) & (total > 0).all(axis=1)
    total = np.maximum(total, 1)
    # The first order without a match counts as half a match, the next as a quarter.
    smoothed = 0.5 ** np.cumsum(correct == 0, axis=1)
    log_precision = np.log(100 * np.where(correct == 0, smoothed, correct) / total)
    brevity = np.exp(np.minimum(0, 1 - reference_len / np.maximum(answer_len, 1)))
    return np.where(is_defined, brevity * np.exp(log_precision.mean(axis=1)), 0.0)


def bleu_notes(bleu: Bleu) -> list[str]:
    """What a reader of the score must know."""
    notes = []
    if bleu.wanted == "auto" and bleu.tokeniser == "char":
        notes.append(
            "bleu: the references are Japanese and MeCab is not installed, so single characters were counted "
            "(tokeniser char); not comparable with BLEU of words (pip install 'sacrebleu[ja]')"
        )
    elif bleu.wanted == "auto" and bleu.tokeniser == "ja-mecab":
        notes.append("bleu: the references are Japanese; MeCab's words were counted (tokeniser ja-mecab)")
    elif bleu.wanted == "auto" and bleu.tokeniser == "zh":
        notes.append("bleu: the references are Chinese; their characters were counted (tokeniser zh)")
    if bleu.wanted == "auto":
        notes += _mixture([example.reference for example in bleu.examples], bleu.tokeniser)
    if bleu.statistics[:, -1].sum() == 0:
        notes.append("bleu: 0 by definition, because no answer has four tokens; chrf and exact_match tell more")
    return notes


def _mixture(references: Sequence[str], tokeniser: str) -> list[str]:
    """That references are in languages of which one tokeniser fits only some."""
    scripts = [script_of([text]) for text in references if language(text)[0] != "none"]
    east_asian = len(scripts) - scripts.count("other")
    name = "Japanese" if script_of(references) == "ja" or "ja" in scripts else "Chinese"
    count, what = (east_asian, name) if tokeniser == "13a" else (scripts.count("other"), f"not {name}")
    if count < _MIN_MIXED_SHARE * len(references) or not count:
        return []
    return [
        f"bleu: {count:,} of {len(references):,} references ({count / len(references):.0%}) are {what}, and all were "
        f"counted with tokeniser {tokeniser}; give each language a source of its own, or set eval.scores.tokeniser, "
        "e.g. to char, which fits all of them"
    ]


@cache
def _metric(tokeniser: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    # effective_order allows single sentences and changes only their score, which is not used.
    return BLEU(tokenize=tokeniser, effective_order=True)


def _signature(tokeniser: str) -> str:
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokeniser)
    metric.corpus_score([""], [[""]])  # which tells it the number of references
    return str(metric.get_signature())
