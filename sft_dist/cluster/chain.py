"""Jobs of one submission that follow each other: preparation, training, and what comes after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist.cluster import slurm
from sft_dist.errors import SftError


@dataclass(frozen=True)
class Link:
    """One job of a chain.

    Args:
        name: what it does, e.g. ``train``.
        script: its file.
        each_after_its_own: whether it is an array like the one before, of which each job waits for that of its index.
    """

    name: str
    script: Path
    each_after_its_own: bool = False


def submit_chain(links: Sequence[Link]) -> dict[str, str]:
    """Submits jobs, each of which begins when the one before has ended with 0; SLURM's ids by what they do.

    One that can no longer begin, because the one before failed or was cancelled, is removed from the queue. A job that
    is requeued keeps its id and has not ended, so what waits for it goes on waiting.

    Raises:
        ConfigError, MachineError: SLURM does not take one of them; those before it are cancelled.
    """
    ids: dict[str, str] = {}
    for link in links:
        try:
            ids[link.name] = slurm.submit(link.script, *_after(list(ids.values()), link))
        except SftError as error:
            raise _cancelled(ids, link, error) from error
        except BaseException:
            if ids:
                slurm.cancel(*ids.values())
            raise
    return ids


def _after(earlier: Sequence[str], link: Link) -> list[str]:
    if not earlier:
        return []
    kind = "aftercorr" if link.each_after_its_own else "afterok"
    return [f"--dependency={kind}:{earlier[-1]}", "--kill-on-invalid-dep=yes"]


def _cancelled(ids: dict[str, str], refused: Link, error: SftError) -> SftError:
    """The refusal of a job, and what became of those before it."""
    what = f"the job `{refused.name}` was not taken: {error.what}"
    if not ids:
        return type(error)(what, fix=error.fix)
    said = ", ".join(f"{name} {job_id}" for name, job_id in ids.items())
    try:
        slurm.cancel(*ids.values())
    except SftError as second:
        return type(error)(
            f"{what}; the jobs before it are still there ({said}), as they could not be cancelled: {second.what}",
            fix=f"scancel {' '.join(ids.values())}; then: {error.fix}",
        )
    return type(error)(f"{what}; the jobs before it were cancelled ({said})", fix=error.fix)
