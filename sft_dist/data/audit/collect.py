"""Goes over the rows of a set once: runs the checks of single rows, keeps of each what the others need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from sft_dist.data.audit.columns import Columns, Hashes
from sft_dist.data.audit.held_out import HeldOut, Passing
from sft_dist.data.audit.minhash import MinHasher
from sft_dist.data.audit.neighbours import Signatures
from sft_dist.data.audit.row_checks import TextChecks, features, token_defects
from sft_dist.data.audit.rows import AuditedRow, RowText, row_text, shown
from sft_dist.data.audit.samples import AnswerSample, FrequentPrefixes, Tally
from sft_dist.data.audit.settings import AuditSettings

# Texts signed together.
BATCH_ROWS = 2048
BATCH_CHARACTERS = 4_000_000


@dataclass
class Collected:
    """A set after its rows went by.

    Args:
        contents: signatures of what is said in each row; None where near-duplicates are not looked for.
        keys: signatures of the prompts, of a held-out set.
        languages: rows by language of (question, answer).
    """

    name: str
    columns: Columns
    defects: Tally
    features: Tally
    prompt_prefixes: FrequentPrefixes
    answer_prefixes: FrequentPrefixes
    sample: AnswerSample
    languages: Tally
    contents: Signatures | None
    keys: Signatures | None


class Collector:
    """Takes the rows of one set.

    Args:
        hasher: None: nothing is signed.
        held_out: what training rows are compared with, or None.
        signs_keys: whether prompts are to be found by others (a held-out set).
    """

    def __init__(
        self,
        name: str,
        settings: AuditSettings,
        hasher: MinHasher | None,
        *,
        held_out: HeldOut | None = None,
        signs_keys: bool = False,
    ) -> None:
        self._settings, self._hasher, self._held_out = settings, hasher, held_out
        self._signs_keys = signs_keys or held_out is not None
        self._check_text = TextChecks(settings)
        self._contents: list[str] = []
        self._keys: list[str] = []
        self._characters = 0
        self._hashes: list[tuple[int, int]] = []
        self.collected = Collected(
            name, Columns(), Tally(), Tally(), FrequentPrefixes(), FrequentPrefixes(), AnswerSample(), Tally(),
            contents=self._signatures(), keys=self._signatures() if signs_keys else None,
        )  # fmt: skip

    def _signatures(self) -> Signatures | None:
        config = self._settings.config
        return Signatures(config.num_permutations, config.near_duplicate_similarity) if self._hasher else None

    def collect(self, rows: Iterable[AuditedRow], on_row: Callable[[], None]) -> Collected:
        """All rows; ``on_row`` is called after each."""
        for row in rows:
            self._add(row)
            on_row()
        self._flush()
        return self.collected

    def _add(self, row: AuditedRow) -> None:
        text, to = row_text(row.row), self.collected
        origin, source, tokens = row.row.origin, row.source, row.tokens
        is_garbled = False
        for check, shows in self._check_text(text):
            to.defects.add(source, check, origin, shows)
            is_garbled |= check == "mojibake"
        if tokens is not None:
            for check, shows in token_defects(tokens, self._settings, is_chat=bool(text.roles)):
                to.defects.add(source, check, origin, f"{shows}: {shown(text.last_question or text.answer)}")
        if not is_garbled:  # in no language, and in no form
            for feature, shows in features(text):
                to.features.add(source, feature, origin, shows)
        hashes = Hashes.of(text, tokens)
        to.columns.append(source, origin, text, tokens, hashes)
        self._describe(text, row)
        if self._held_out is not None:
            self._hashes.append((hashes.key, hashes.whole))
        if self._hasher is not None:
            self._contents.append(text.plain_content)
            if self._signs_keys:
                self._keys.append(text.key)
            self._characters += len(text.plain_content)
        if len(to.columns) % BATCH_ROWS == 0 or self._characters > BATCH_CHARACTERS:
            self._flush()

    def _describe(self, text: RowText, row: AuditedRow) -> None:
        to = self.collected
        to.prompt_prefixes.add(text.plain_question)
        to.answer_prefixes.add(text.plain_answer)
        (asked, _), (answered, _) = text.languages
        if text.question:
            to.languages.add("question", asked, "", "")
        to.languages.add("answer", answered, "", "")
        place = to.sample.place()
        if place is not None:
            if row.tokens is None:
                units = [ord(character) for character in text.answer]
            else:
                pairs = zip(row.tokens.input_ids, row.tokens.supervised, strict=True)
                units = [id for id, is_supervised in pairs if is_supervised]
            to.sample.keep(place, units)

    def _flush(self) -> None:
        keys = contents = None
        if self._hasher is not None:
            contents = self._hasher.sign(self._contents)
            assert self.collected.contents is not None
            self.collected.contents.extend(contents)
            if self._signs_keys:
                keys = self._hasher.sign(self._keys)
                if self.collected.keys is not None:
                    self.collected.keys.extend(keys)
        if self._held_out is not None and self._hashes:
            hashes = np.array(self._hashes, np.uint64)
            has_text = np.array([bool(text) for text in self._contents], bool)
            passing = Passing(hashes[:, 0], hashes[:, 1], has_text, keys, contents)
            self._held_out.compare(passing, len(self.collected.columns) - len(hashes))
        self._contents, self._keys, self._hashes, self._characters = [], [], [], 0
