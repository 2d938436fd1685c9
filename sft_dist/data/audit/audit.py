"""An audit of a data set, from its rows to its findings.

The held-out rows go first, so that training rows are compared with them as they stream by. Of a text nothing is kept
but the examples that are shown, the row's first bytes, and hashes (``columns`` and ``neighbours`` say how many bytes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from sft_dist.config.audit_schema import AuditLimits
from sft_dist.data.audit.catalogue import CHECKS, finding, percent
from sft_dist.data.audit.collect import Collected, Collector
from sft_dist.data.audit.figures import set_figures
from sft_dist.data.audit.findings import SEVERITIES, Audit, Example, Finding, RenderDiff, SetFigures
from sft_dist.data.audit.held_out import HeldOut
from sft_dist.data.audit.minhash import MinHasher
from sft_dist.data.audit.rows import AuditedRow, shown
from sft_dist.data.audit.samples import MAX_EXAMPLES
from sft_dist.data.audit.settings import AuditSettings, PackUse
from sft_dist.data.audit.similarity import contradictions, exact_duplicates, leaks, near_duplicates
from sft_dist.data.audit.source_checks import source_findings
from sft_dist.errors import DataError

TRAIN, EVAL = "train", "eval"


def audit(
    train: Iterable[AuditedRow],
    eval: Iterable[AuditedRow] | None,
    *,
    settings: AuditSettings,
    packs: Mapping[str, PackUse] | None = None,
    render_diffs: Iterable[RenderDiff] = (),
    cheap: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> Audit:
    """Goes over all rows once, the held-out ones first.

    Args:
        packs: sequences of ``train`` and of ``eval``; their figures are left out where they are not given.
        render_diffs: prompts that were compared (``render_diff.compare_prompts``).
        cheap: leave out near-duplicates and near leaks, which take signatures.
        on_row: called after every row, for a progress display.
    """
    started = time.monotonic()
    hasher = None if cheap else MinHasher(settings.config.num_permutations)
    compared = tuple(render_diffs)
    sets: list[Collected] = []
    held_out = None
    if eval is not None:
        sets.append(Collector(EVAL, settings, hasher, signs_keys=True).collect(eval, on_row))
        held_out = HeldOut(sets[0].columns, sets[0].keys, sets[0].contents)
    sets.insert(0, Collector(TRAIN, settings, hasher, held_out=held_out).collect(train, on_row))

    findings = [*_render_findings(compared, settings.config.max_share)]
    figures: list[SetFigures] = []
    for collected in sets:
        near, num_clusters, clusters = near_duplicates(collected, settings)
        findings += [
            *source_findings(collected, settings),
            *exact_duplicates(collected, settings),
            *near,
            *contradictions(collected, settings),
        ]
        figures.append(
            set_figures(
                collected,
                max_seq_len=settings.max_seq_len,
                packs=(packs or {}).get(collected.name),
                num_clusters=num_clusters,
                clusters=clusters,
            )
        )
    if held_out is not None:
        findings += leaks(sets[1], sets[0], held_out, settings)
    return Audit(
        findings=sorted_findings(findings),
        figures=tuple(figures),
        render_diffs=compared,
        max_seq_len=settings.max_seq_len,
        is_cheap=cheap,
        seconds=time.monotonic() - started,
    )


def enforce(audit: Audit, limits: AuditLimits) -> None:
    """Refuses data of which more is wrong than ``limits`` allow.

    Raises:
        DataError: naming every check that is over its limit with its count, share and limit.
    """
    over = [found for found in audit.findings if _is_over(found, getattr(limits, found.check))]
    if not over:
        return
    said = "; ".join(
        f"{found.place}: {found.check}: {found.count:,} of {found.total:,} {found.unit} ({percent(found.share)}), "
        f"limit {percent(getattr(limits, found.check))}"
        for found in over
    )
    keys = ", ".join(dict.fromkeys(f"data.audit.max_share.{found.check}" for found in over))
    first = over[0]
    where = f" (first: {first.examples[0].origin})" if first.examples else ""
    raise DataError(f"the data audit found too much: {said}{where}", fix=f"{first.fix}; or accept it: raise {keys}")


def _is_over(found: Finding, limit: float | None) -> bool:
    return limit is not None and found.share > limit


def sorted_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, then in the order of the checks."""
    return tuple(sorted(findings, key=_rank))


def _rank(found: Finding) -> tuple[int, int, str, float]:
    return SEVERITIES.index(found.severity), list(CHECKS).index(found.check), found.set, -found.share


def _render_findings(compared: tuple[RenderDiff, ...], limits: AuditLimits) -> Iterator[Finding]:
    different = [diff for diff in compared if diff.differs_at is not None]
    if different:
        yield finding(
            "render_diff", set=TRAIN, source=None, count=len(different), total=len(compared), limits=limits,
            examples=[
                Example(diff.origin, shown(f"answer {diff.answer}: {diff.trained_text!r} / {diff.inference_text!r}"))
                for diff in different[:MAX_EXAMPLES]
            ],
        )  # fmt: skip
