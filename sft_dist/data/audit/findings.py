"""What an audit says: findings, figures, and both as JSON.

``Audit.to_json`` is the content of ``audit.json``; docs/data.md describes its keys. Keys are added in later versions,
never renamed or given another meaning without a new ``version``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from sft_dist.errors import DataError

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

VERSION = 1


@dataclass(frozen=True)
class Example:
    """A row that shows a finding: where it stands (``file:line``), and a short piece of its text."""

    origin: str
    text: str


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a source.

    Args:
        check: name of the check, the key of its limit in ``data.audit.max_share``.
        severity: ``error``: over its limit, ``enforce`` refuses the data; ``warning``: look at it; ``info``: to know.
        set: ``train`` or ``eval``.
        source: of the set; None where a finding concerns all of them together.
        count: how many ``unit`` are concerned.
        total: of how many.
        share: ``count / total``.
        limit: largest share allowed, or None: reported only.
        unit: what is counted, e.g. ``rows``.
    """

    check: str
    severity: Severity
    set: str
    source: str | None
    count: int
    total: int
    share: float
    limit: float | None
    unit: str
    examples: tuple[Example, ...]
    what: str
    fix: str

    @property
    def place(self) -> str:
        return self.set if self.source is None else f"{self.set} {self.source}"


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values lie in ``[edges[i], edges[i + 1])``; the last bin has its upper edge too."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SourceFigures:
    """Of one source of a set.

    Args:
        tokens: of all rows, before anything is cut; 0 where rows were not tokenised.
        supervised_tokens: those that the model is trained to produce.
        lengths: of its rows, in tokens.
        longest: tokens of the longest row.
    """

    source: str
    rows: int
    tokens: int
    supervised_tokens: int
    lengths: Histogram
    longest: int


@dataclass(frozen=True)
class PackFigures:
    """How full the sequences are.

    Args:
        capacity: tokens that a sequence can hold.
        fill: share of the capacity that is used, over all sequences.
        fill_histogram: sequences by fill in percent.
        padding_if_unpacked: share of tokens that would be padding if each row were padded to ``capacity``.
    """

    sequences: int
    capacity: int
    fill: float
    fill_histogram: Histogram
    padding_if_unpacked: float


@dataclass(frozen=True)
class Prefix:
    """A frequent beginning; ``share`` of all rows of the set."""

    text: str
    share: float


@dataclass(frozen=True)
class Cluster:
    """Rows that are near-duplicates of each other, directly or through others."""

    size: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class SetFigures:
    """Of the training or the held-out set.

    Args:
        distinct_prompts: prompts that differ in more than case, width and white space.
        prompt_prefixes, answer_prefixes: the most frequent beginnings.
        distinct_n: for n = 1, 2, 3 the number of different n-grams over that of all of them, in a sample of answers
            (Li et al. 2016, arXiv 1510.03055). In tokens, or in characters where rows were not tokenised.
        question_languages, answer_languages: rows by script.
        clusters: the largest groups of near-duplicates; num_clusters counts all.
    """

    set: str
    rows: int
    tokens: int
    supervised_tokens: int
    sources: tuple[SourceFigures, ...]
    distinct_prompts: int
    prompt_prefixes: tuple[Prefix, ...]
    answer_prefixes: tuple[Prefix, ...]
    distinct_n: dict[str, float]
    question_languages: dict[str, int]
    answer_languages: dict[str, int]
    packs: PackFigures | None
    num_clusters: int | None
    clusters: tuple[Cluster, ...]


@dataclass(frozen=True)
class RenderDiff:
    """The prompt of one answer in training and at inference, around the first token that differs.

    Args:
        answer: number of the answer in its conversation, from 1.
        trained_text: what stands before the answer in the trained row.
        inference_text: what ``apply_chat_template`` gives with the generation prompt.
        differs_at: number of tokens that are the same, or None: all of them.
    """

    origin: str
    answer: int
    trained_text: str
    inference_text: str
    differs_at: int | None


@dataclass(frozen=True)
class Audit:
    """Everything that is known about a data set after its rows went by once.

    Args:
        max_seq_len: tokens, the limit that lengths were held against.
        is_cheap: near-duplicates were not looked for.
        seconds: that the audit took, tokenising included.
    """

    findings: tuple[Finding, ...]
    figures: tuple[SetFigures, ...]
    render_diffs: tuple[RenderDiff, ...]
    max_seq_len: int
    is_cheap: bool
    seconds: float
    version: int = field(default=VERSION)

    @property
    def rows(self) -> int:
        return sum(figures.rows for figures in self.figures)

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> str:
        """Indented JSON, Japanese as it is."""
        return _ADAPTER.dump_json(self, indent=2).decode() + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Audit:
        """The audit that ``to_json`` wrote.

        Raises:
            DataError: the text is something else, or of another version.
        """
        try:
            audit = _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(
                f"not the JSON of an audit: {place}: {first['msg']}", fix="run `sft-dist data audit` again"
            ) from error
        if audit.version != VERSION:
            raise DataError(
                f"an audit of version {audit.version}; this program reads {VERSION}",
                fix="run `sft-dist data audit` again",
            )
        return audit

    @staticmethod
    def read(path: Path) -> Audit:
        """From a file. Raises ``DataError`` as ``from_json``, or when it cannot be read."""
        try:
            return Audit.from_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}", fix="run `sft-dist data audit` again") from error


_ADAPTER = TypeAdapter(Audit)
