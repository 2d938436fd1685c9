"""Two sets of answers to the same prompts: is one better than the other, or is it chance which prompts were asked?

Paired bootstrap (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation"): examples are drawn
with replacement, the same ones for both sets, and every score is computed anew from what was counted in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sft_dist.errors import ConfigError, DataError
from sft_dist.scores.answered import Answered
from sft_dist.scores.judge import Judged, ScoreSettings, judge
from sft_dist.scores.labels import MacroF1, interval_notes
from sft_dist.scores.tally import Array

# Of the 95 % interval.
LOW, HIGH = 0.025, 0.975

# A smaller difference, of scores of 0 to 1 or 0 to 100, is rounding.
_ROUNDING = 1e-9

# Counts that are in memory at a time: 32 MiB.
_COUNTS_AT_A_TIME = 1 << 22

# As many as Koehn 2004 draws.
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Compared:
    """One score of two sets of answers.

    Args:
        difference: tuned - base.
        base_interval: 95 % confidence interval (low, high) of ``base``; the others alike.
        difference_interval: of the paired difference; if 0 is outside, the difference is hardly chance.
        tuned_better: share of the resamples in which tuned has the higher score; equal scores are not better.
    """

    base: float
    tuned: float
    difference: float
    base_interval: tuple[float, float]
    tuned_interval: tuple[float, float]
    difference_interval: tuple[float, float]
    tuned_better: float


def compare(
    base: Sequence[Answered],
    tuned: Sequence[Answered],
    settings: ScoreSettings,
    *,
    samples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Compared]:
    """Each score of both sets, by name. See ``judge`` and ``compare_judged`` for the errors."""
    check_paired(base, tuned)
    return compare_judged(judge(base, settings), judge(tuned, settings), samples=samples, seed=seed)


def compare_judged(base: Judged, tuned: Judged, *, samples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Compared]:
    """The same of sets that have been judged, by the same settings.

    Args:
        samples: number of resamples.
        seed: of numpy's default generator, which draws resample after resample.

    Raises:
        ConfigError: no resample is asked for.
        DataError: the sets do not answer the same prompts.
    """
    if samples < 1:
        raise ConfigError(f"{samples} resamples give no interval", fix="take 1,000")
    check_paired(base.examples, tuned.examples)
    assert list(base.tallies) == list(tuned.tallies)
    blocks: dict[str, list[Array]] = {name: [] for name in base.tallies}
    for counts in _resamples(len(base.examples), samples=samples, seed=seed):
        for name, found in blocks.items():
            found.append(np.stack([base.tallies[name].value(counts), tuned.tallies[name].value(counts)]))
    of_base, of_tuned = base.values(), tuned.values()
    return {
        name: _compared(of_base[name], of_tuned[name], *np.concatenate(found, axis=1)) for name, found in blocks.items()
    }


def notes_on_intervals(judged: Judged) -> list[str]:
    """What a reader of the intervals must know, whichever set was judged: they have the same references."""
    tally = judged.tallies.get("macro_f1")
    return interval_notes(tally.labelled) if isinstance(tally, MacroF1) else []


def check_paired(base: Sequence[Answered], tuned: Sequence[Answered]) -> None:
    """
    Raises:
        DataError: the two sets do not have the same prompts, references and sources in the same order.
    """
    fix = "let both answer the same prompts, in the same order"
    if len(base) != len(tuned):
        raise DataError(f"{len(base):,} answers cannot be compared with {len(tuned):,}", fix=fix)
    for number, (one, other) in enumerate(zip(base, tuned, strict=True), start=1):
        if (one.prompt, one.reference, one.source) != (other.prompt, other.reference, other.source):
            raise DataError(
                f"example {number:,} of the two sets is not the same: {one.prompt[:40]!r} and {other.prompt[:40]!r}",
                fix=fix,
            )


def _resamples(examples: int, *, samples: int, seed: int) -> Iterator[Array]:
    """How often each example is drawn: blocks of [resamples, examples], ``samples`` rows in all."""
    generator = np.random.default_rng(seed)
    step = max(1, _COUNTS_AT_A_TIME // examples)
    for start in range(0, samples, step):
        rows = [
            np.bincount(generator.integers(examples, size=examples), minlength=examples)
            for _ in range(min(step, samples - start))
        ]
        yield np.array(rows, dtype=np.float64)


def _compared(base: float, tuned: float, base_again: Array, tuned_again: Array) -> Compared:
    difference_again = _difference(base_again, tuned_again)
    return Compared(
        base=base,
        tuned=tuned,
        difference=float(_difference(np.array(base), np.array(tuned))),
        base_interval=_interval(base_again),
        tuned_interval=_interval(tuned_again),
        difference_interval=_interval(difference_again),
        tuned_better=float((difference_again > 0).mean()),
    )


def _difference(base: Array, tuned: Array) -> Array:
    difference: Array = tuned - base
    return np.where(np.abs(difference) < _ROUNDING, 0.0, difference)


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [LOW, HIGH])
    return float(low), float(high)
