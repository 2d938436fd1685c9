"""The scores of a set of answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sft_dist.config.scores_schema import ScoreName, ScoresConfig
from sft_dist.config.validate_scores import scores_findings
from sft_dist.errors import ConfigError, DataError
from sft_dist.scores.answered import Answered
from sft_dist.scores.bleu import Bleu, bleu_notes, check_tokeniser, count_bleu
from sft_dist.scores.chrf import Chrf, chrf_signature, count_chrf
from sft_dist.scores.custom import CustomScore
from sft_dist.scores.json_answers import SchemaCheck, is_json
from sft_dist.scores.labels import Labelled, MacroF1, label_notes, read_labels
from sft_dist.scores.plain_form import form_of
from sft_dist.scores.rouge import SIGNATURE as ROUGE_SIGNATURE
from sft_dist.scores.rouge import rouge_l, rouge_n, tokens
from sft_dist.scores.tally import Mean, Tally, mean_of

# The section itself: nothing has to be derived from it.
ScoreSettings = ScoresConfig


@dataclass(frozen=True)
class Scores:
    """How good the answers are.

    Args:
        values: by name of the score; bleu and chrf 0 to 100, custom what its function returns, the others 0 to 1.
        by_source: the same of the examples of each source.
        per_example: of a score that is a mean of its examples, the value of each.
        statistics: of bleu and chrf, what was counted in each example (see ``Bleu`` and ``Chrf``); of macro_f1, the
            position of the reference's and of the answer's label, -1: none.
        signature: by name of the score, what it takes to compute it again.
        notes: what a reader of the figures must know, a line each.
    """

    values: dict[str, float]
    by_source: dict[str, dict[str, float]]
    per_example: dict[str, list[float]]
    statistics: dict[str, list[list[int]]]
    signature: dict[str, str]
    notes: list[str]


@dataclass(frozen=True)
class Judged:
    """Answers that were read and counted, from which scores of any choice of them follow."""

    examples: tuple[Answered, ...]
    tallies: dict[str, Tally]
    signature: dict[str, str]
    notes: list[str]

    def values(self) -> dict[str, float]:
        """Each score of all examples."""
        return {name: _whole(tally, len(self.examples)) for name, tally in self.tallies.items()}

    def scores(self) -> Scores:
        """The scores of all examples and of each source."""
        rows: dict[str, list[int]] = {}
        for row, example in enumerate(self.examples):
            rows.setdefault(example.source, []).append(row)
        signature, notes = dict(self.signature), list(self.notes)
        by_source = {}
        for source, own in rows.items():
            parts = {name: tally.part(own) for name, tally in self.tallies.items()}
            by_source[source] = {name: _whole(tally, len(own)) for name, tally in parts.items()}
            bleu, own_bleu = self.tallies.get("bleu"), parts.get("bleu")
            if isinstance(bleu, Bleu) and isinstance(own_bleu, Bleu) and bleu.tokeniser != own_bleu.tokeniser:
                signature[f"bleu of {source}"] = own_bleu.signature
                notes.append(
                    f"bleu: {source} alone is counted with tokeniser {own_bleu.tokeniser}, all sources together with "
                    f"{bleu.tokeniser}"
                )
        return Scores(
            values=self.values(),
            by_source=by_source,
            per_example={
                name: tally.values.tolist() for name, tally in self.tallies.items() if isinstance(tally, Mean)
            },
            statistics={name: _statistics(t) for name, t in self.tallies.items() if not isinstance(t, Mean)},
            signature=signature,
            notes=notes,
        )


@dataclass
class _Reading:
    """What several scores of the same examples need, computed once."""

    examples: tuple[Answered, ...]
    settings: ScoresConfig
    signature: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _tokens: list[tuple[list[str], list[str]]] | None = None
    _labelled: Labelled | None = None

    def tally(self, name: ScoreName) -> Tally:
        match name:
            case "bleu":
                bleu = count_bleu(self.examples, wanted=self.settings.tokeniser)
                self.signature[name] = bleu.signature
                self.notes += bleu_notes(bleu)
                return bleu
            case "chrf":
                self.signature[name] = chrf_signature()
                return count_chrf(self.examples)
            case "rouge1" | "rouge2":
                self.signature[name] = f"{ROUGE_SIGNATURE}|unicode:{unicodedata.unidata_version}"
                order = int(name[-1])
                return mean_of([rouge_n(answer, reference, n=order) for answer, reference in self._all_tokens()])
            case "rougeL":
                self.signature[name] = f"{ROUGE_SIGNATURE}|unicode:{unicodedata.unidata_version}"
                return mean_of([rouge_l(answer, reference) for answer, reference in self._all_tokens()])
            case "exact_match":
                self.signature[name] = self._form()
                return mean_of([self._same(example) for example in self.examples])
            case "accuracy" | "macro_f1":
                labelled = self._all_labels()
                labels = "of the references" if labelled.of_references else "listed"
                self.signature[name] = f"labels:{len(labelled.labels)} {labels}|{self._form()}"
                return MacroF1(labelled) if name == "macro_f1" else mean_of(labelled.truth == labelled.found)
            case "json_valid":
                self.signature[name] = "strict, one fence around it removed"
                return mean_of([is_json(example.answer) for example in self.examples])
            case "json_schema":
                assert self.settings.json_schema is not None
                check = SchemaCheck(self.settings.json_schema)
                self.signature[name] = check.signature
                return mean_of([check.accepts(example.answer) for example in self.examples])
            case "custom":
                assert self.settings.custom is not None
                custom = CustomScore(self.settings.custom)
                self.signature[name] = custom.signature
                return mean_of([custom.of(example, number=i) for i, example in enumerate(self.examples, start=1)])

    def _all_tokens(self) -> list[tuple[list[str], list[str]]]:
        if self._tokens is None:
            self._tokens = [(tokens(example.answer), tokens(example.reference)) for example in self.examples]
            empty = sum(not reference for _, reference in self._tokens)
            if empty:
                self.notes.append(f"rouge: {empty:,} references have no letter or digit and count 0")
        return self._tokens

    def _all_labels(self) -> Labelled:
        if self._labelled is None:
            self._labelled = read_labels(self.examples, labels=self.settings.labels, normalise=self.settings.normalise)
            self.notes += label_notes(self._labelled, has_macro_f1="macro_f1" in self.settings.metrics)
        return self._labelled

    def _same(self, example: Answered) -> bool:
        answer, reference = (
            form_of(text, normalise=self.settings.normalise) for text in (example.answer, example.reference)
        )
        return answer == reference

    def _form(self) -> str:
        if not self.settings.normalise:
            return "compared as written"
        return f"NFKC, case folded, trimmed, without full stop|unicode:{unicodedata.unidata_version}"


def check_settings(settings: ScoreSettings) -> None:
    """Looks whether what the settings name can be used, without an answer to judge; a function of the user's own is
    loaded, which runs its file.

    Raises:
        ConfigError: it cannot.
    """
    if "bleu" in settings.metrics:
        check_tokeniser(settings.tokeniser)
    if "json_schema" in settings.metrics and settings.json_schema is not None:
        SchemaCheck(settings.json_schema)
    if "custom" in settings.metrics and settings.custom is not None:
        CustomScore(settings.custom)


def score(examples: Sequence[Answered], settings: ScoreSettings) -> Scores:
    """The scores that ``settings.metrics`` names, in their order. See ``judge`` for the errors."""
    return judge(examples, settings).scores()


def judge(examples: Sequence[Answered], settings: ScoreSettings) -> Judged:
    """Reads and counts the examples.

    Raises:
        ConfigError: a setting contradicts another one, or what it names cannot be used.
        DataError: there is no example, or a reference is none of the labels.
    """
    for what, fix in scores_findings(settings):
        raise ConfigError(what, fix=fix)
    if not examples:
        raise DataError("there is no answer to be judged", fix="give held-out data with at least one row")
    reading = _Reading(tuple(examples), settings)
    for kind, texts in {
        "answers": [example.answer for example in examples],
        "references": [example.reference for example in examples],
    }.items():
        empty = sum(not text.strip() for text in texts)
        if empty:
            reading.notes.append(f"{empty:,} of {len(texts):,} {kind} are empty")
    tallies: dict[str, Tally] = {name: reading.tally(name) for name in settings.metrics}
    return Judged(reading.examples, tallies, reading.signature, reading.notes)


def _whole(tally: Tally, examples: int) -> float:
    return float(tally.value(np.ones((1, examples)))[0])


def _statistics(tally: Tally) -> list[list[int]]:
    if isinstance(tally, Bleu | Chrf):
        return [[int(count) for count in row] for row in tally.statistics]
    assert isinstance(tally, MacroF1)
    return [[int(truth), int(found)] for truth, found in zip(tally.labelled.truth, tally.labelled.found, strict=True)]
