"""What a report says, as data: terminal, page and JSON are views of it. Nothing is read here, nothing is worded twice.

None is what is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_dist.cluster.status import Status
from sft_dist.report.metrics import Metrics
from sft_dist.train.sessions import Session
from sft_dist.train.waste import Waste

# How a figure of a plan and of a run is written.
Unit = Literal["seconds", "duration", "bytes", "count", "rate", "usd", "jpy"]


@dataclass(frozen=True)
class Compared:
    """A figure, planned and measured.

    Args:
        is_forecast: ``actual`` is what the run will have taken, by its speed so far.
    """

    name: str
    unit: Unit
    planned: float | None
    actual: float | None
    is_forecast: bool = False

    @property
    def ratio(self) -> float | None:
        return self.actual / self.planned if self.actual is not None and self.planned else None


@dataclass(frozen=True)
class DataSource:
    """Rows and tokens are None where nobody has counted them yet."""

    set: str
    name: str
    rows: int | None
    tokens: int | None
    supervised_tokens: int | None


@dataclass(frozen=True)
class Found:
    """A finding of the audit of the data."""

    severity: str
    place: str
    check: str
    what: str
    count: int
    share: float


@dataclass(frozen=True)
class Answer:
    """
    Args:
        is_cut: it was longer than allowed.
    """

    step: int
    text: str
    is_cut: bool


@dataclass(frozen=True)
class Sample:
    """A prompt, or the question in it, and its answers in the order of their steps."""

    number: int
    prompt: str
    reference: str | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Bill:
    """
    Args:
        sessions: each start of the run.
        elapsed_s, usd: up to the last sign of life.
        waste: of the last session of a finished run.
    """

    sessions: tuple[Session, ...]
    elapsed_s: float | None
    usd: float | None
    usd_per_hour: float | None
    jpy_per_usd: float | None
    price_name: str | None
    waste: Waste | None

    def jpy(self, usd: float | None) -> float | None:
        return None if usd is None or self.jpy_per_usd is None else usd * self.jpy_per_usd


@dataclass(frozen=True)
class ReportData:
    """
    Args:
        tokens_per_s: of all ranks, mean of the steady steps.
        checkpoints: steps of the complete ones that are there.
        versions, topology, identity: of the receipt.
        settings: the resolved configuration, without secrets; None: there is none that can be read.
        directory: where the run was started: relative paths of its settings count from there.
        notes: what is not known and why, a line each.
    """

    folder: Path
    status: Status
    metrics: Metrics
    tokens_per_s: float | None
    checkpoints: tuple[int, ...]
    compared: tuple[Compared, ...]
    sources: tuple[DataSource, ...]
    findings: tuple[Found, ...] | None
    samples: tuple[Sample, ...]
    bill: Bill
    versions: dict[str, str]
    topology: dict[str, Any]
    identity: dict[str, Any]
    settings: dict[str, Any] | None
    directory: str | None
    notes: tuple[str, ...]

    @property
    def restarts(self) -> list[int]:
        """Steps before which another session begins, without the first."""
        return [session.first_step - 1 for session in self.bill.sessions[1:]]

    @property
    def trained_tokens(self) -> int:
        return int(sum(self.metrics.finite("num_tokens")))
