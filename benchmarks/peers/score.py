"""Published rows against predictions: errors by family, fits told from out of memory, throughput of several GPUs."""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.peers.predict import Prediction, predict
from benchmarks.peers.reading import setup_of
from benchmarks.peers.setup import Setup
from benchmarks.peers.speed import Timed, throughput
from benchmarks.peers.unmapped import Unmapped
from benchmarks.peers.words import Counter, Row, counter
from sft_dist.errors import PlanError
from sft_dist.hardware.gpus import Gpu, find_gpu
from sft_dist.plan.memory import (
    ALLOCATED_ERROR,
    CONTEXT_BYTES,
    NCCL_BYTES,
    allocated_range,
    reserved_range,
    verdict,
)
from sft_dist.plan.result import Range

GIB = 2**30

# Of the memory that a GPU is sold with, where the table of GPUs does not have it.
USABLE_SHARE = 0.98


@dataclass(frozen=True)
class Compared:
    """A measured figure beside the predicted one, in GiB.

    Args:
        low, high: of the band that reserved and NVML figures are compared with.
    """

    row: Row
    counter: Counter
    measured_gib: float
    predicted_gib: float
    low_gib: float
    high_gib: float
    phase: str

    @property
    def error(self) -> float:
        """Of the measured figure; positive where too much is predicted."""
        return self.predicted_gib / self.measured_gib - 1


@dataclass
class Scores:
    """Everything that was compared.

    Args:
        rows: by family, how many figures there are.
        compared: by family.
        fits: (published, called) -> rows; published ``fits`` or ``oom``.
        unmapped: reason -> rows.
        speeds: every mapped row with a throughput.
    """

    rows: Tally[tuple[str, Counter]] = field(default_factory=Tally)
    compared: dict[tuple[str, Counter], list[Compared]] = field(default_factory=lambda: defaultdict(list))
    fits: Tally[tuple[str, str]] = field(default_factory=Tally)
    miscalled: list[str] = field(default_factory=list)
    unmapped: Tally[str] = field(default_factory=Tally)
    speeds: list[Timed] = field(default_factory=list)
    total: int = 0
    mapped: int = 0


def family(row: Row) -> str:
    """The published table that a row is from: repository and file, or site and page."""
    source = str(row.get("source") or "no source").strip() or "no source"
    github = re.match(r"github:([^@:]+)(?:@[^:]*)?(?::(.*))?", source)
    if github:
        file = (github[2] or "").rpartition("/")[2]
        return f"{github[1]} {file}".strip()
    plain = re.sub(r"^https?://(www\.)?", "", source.split()[0])
    return plain.rstrip("/")[:80]


def score(rows: Sequence[Row]) -> Scores:
    """Predicts every row that can be, and counts the others by reason."""
    scores = Scores()
    for row in rows:
        scores.total += 1
        figures = _figures(row)
        for kind, _ in figures:
            scores.rows[family(row), kind] += 1
        try:
            setup = setup_of(row)
            prediction = predict(setup)
        except Unmapped as reason:
            scores.unmapped[str(reason)] += 1
            continue
        scores.mapped += 1
        for kind, measured in figures:
            scores.compared[family(row), kind].append(_compare(row, setup, prediction, kind, measured))
        _call(scores, row, setup, prediction)
        speed, gpu = row.get("tokens_per_s_per_gpu"), _gpu(row)
        if isinstance(speed, int | float) and gpu is not None and not setup.at_most:
            measured = sum(setup.seq_lens) / setup.tensor_parallel / setup.context_parallel / speed
            scores.speeds.append(Timed(row, setup, prediction, gpu, measured))
    return scores


def _figures(row: Row) -> list[tuple[Counter, float]]:
    """Peaks that a row gives; of its second one, what it says of it."""
    found: list[tuple[Counter, float]] = []
    if isinstance(row.get("peak_mem_gib"), int | float) and not row.get("oom"):
        found.append((counter(row), float(row["peak_mem_gib"])))
        if isinstance(row.get("mem2_gib"), int | float):
            found.append((counter({"peak_mem_kind": row.get("mem2_kind", "")}), float(row["mem2_gib"])))
    return found


def _compare(row: Row, setup: Setup, prediction: Prediction, kind: Counter, measured: float) -> Compared:
    allocated = allocated_range(prediction.phases)
    if kind == "allocated":
        band = allocated
    else:
        band = reserved_range(allocated, _context(setup) if kind != "reserved" else 0, _usable(row) or 2**60)
    value, low, high = (x / GIB for x in (band.value, band.low, band.high))
    return Compared(row, kind, measured, value, low, high, f"{prediction.peak.name}: {prediction.peak.moment}")


def _context(setup: Setup) -> int:
    return CONTEXT_BYTES + (NCCL_BYTES if setup.world > 1 else 0)


def _gpu(row: Row) -> Gpu | None:
    """The row's GPU, whatever the order of the words in its name; None where the table does not have it."""
    name = re.sub(r"\(.*", "", str(row.get("gpu", ""))).strip()
    model = re.search(r"[a-z]{1,3}\d{1,4}\w?|\d{4}", name, re.I)
    form = re.search(r"sxm|pcie|nvl", name, re.I)
    size = re.search(r"\d+\s*gi?b", name, re.I)
    words = [part[0] for part in (model, form, size) if part]
    for spoken in (name, "-".join(words), "-".join(w for w in words if not form or w != form[0]), "-".join(words[:2])):
        try:
            return find_gpu(spoken)
        except PlanError:
            continue
    return None


def _usable(row: Row) -> int | None:
    """Bytes of the row's GPU, by the size in its name where that is another; None where neither is known."""
    gpu = _gpu(row)
    size = re.search(r"(\d+)\s*gi?b", str(row.get("gpu", "")), re.I)
    if gpu is not None and (size is None or abs(int(size[1]) / gpu.sold_gb - 1) < 0.05):
        return gpu.usable_bytes
    return int(int(size[1]) * GIB * USABLE_SHARE) if size else None


def _call(scores: Scores, row: Row, setup: Setup, prediction: Prediction) -> None:
    published = "oom" if row.get("oom") else "fits" if row.get("oom") is False or "peak_mem_gib" in row else None
    usable = _usable(row)
    if published is None or usable is None:
        scores.fits["unknown", "GPU not known" if usable is None else "outcome not given"] += 1
        return
    called = "oom" if verdict(prediction.allocated_bytes + _context(setup), usable) == "does not fit" else "fits"
    scores.fits[published, called] += 1
    if called != published:
        scores.miscalled.append(f"{row.get('id', 'row')}: {published}, called {called}")


def errors(compared: Iterable[Compared]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Absolute relative errors."""
    return np.abs([c.error for c in compared])


def family_table(scores: Scores) -> dict[str, dict[str, Any]]:
    """A family and counter to its errors, as shares of what was measured."""
    table = {}
    for (name, kind), total in sorted(scores.rows.items()):
        compared = scores.compared[name, kind]
        off = errors(compared)
        entry: dict[str, Any] = {"counter": kind, "rows": total, "mapped": len(compared)}
        entry |= {"median_abs_error": None, "p90": None, "worst": None}
        if compared:
            worst = compared[int(off.argmax())]
            entry |= {
                "median_abs_error": round(float(np.median(off)), 5),
                "p90": round(float(np.quantile(off, 0.9)), 5),
                "worst": round(float(off.max()), 5),
                "worst_row": str(worst.row.get("id", "")),
                "median_error": round(float(np.median([c.error for c in compared])), 5),
            }
            if kind != "allocated":
                inside = sum(c.low_gib <= c.measured_gib <= c.high_gib for c in compared)
                entry["within_band"] = round(inside / len(compared), 4)
        table[f"{name} ({kind})"] = entry
    return table


def summary(scores: Scores) -> dict[str, Any]:
    """What ``--json`` prints. Errors are shares, not percent."""
    allocated = [c for (_, kind), cs in scores.compared.items() if kind == "allocated" for c in cs]
    off = errors(allocated)
    overall = {"rows": len(allocated)}
    if allocated:
        overall |= {"median_abs_error": round(float(np.median(off)), 5), "p90": round(float(np.quantile(off, 0.9)), 5),
                    "worst": round(float(off.max()), 5),
                    "within_stated_range": round(float(np.mean(off <= ALLOCATED_ERROR)), 4)}  # fmt: skip
    fits = {
        "fits_called_fits": scores.fits["fits", "fits"],
        "fits_called_oom": scores.fits["fits", "oom"],
        "oom_called_oom": scores.fits["oom", "oom"],
        "oom_called_fits": scores.fits["oom", "fits"],
        "not_judged": {why: n for (kind, why), n in scores.fits.items() if kind == "unknown"},
        "miscalled": scores.miscalled,
    }
    return {
        "families": family_table(scores),
        "allocated": overall,
        "fits": fits,
        "throughput": throughput(scores.speeds),
        "unmapped": dict(scores.unmapped.most_common()),
        "rows": scores.total,
        "mapped": scores.mapped,
    }


__all__ = ["Compared", "Range", "Scores", "family", "score", "summary"]
