"""Data that is not here, as its owner describes it: how many examples of how many tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.packing import Packs, pack_best_fit, pack_in_windows
from sft_dist.errors import ConfigError, PlanError
from sft_dist.plan.epoch import Epoch, data_plan, set_bytes, store_bytes
from sft_dist.plan.result import DataPlan, Range
from sft_dist.run import Run

# Standard deviation of the logarithm of a row's tokens. Answers of six published conversation sets have coefficients of
# variation from 0.77 (ShareGPT) and 0.93 (WildChat) over 1.01 (Alpaca), 1.16 (Open Assistant) and 1.64 (Dolly) to 8.6
# (LMSYS-Chat-1M): Zhao et al. 2024, arXiv 2405.01470, table 1. sqrt(ln(1 + cv^2)) has a median of 0.88.
DEFAULT_SIGMA = 0.88
# The same table: tokens of answers over those of prompts and answers, median of the six 0.76; a chat template adds some
# that are not trained.
DEFAULT_SUPERVISED_SHARE = 0.7

# Rows that are packed; more are counted as so many times these.
MAX_PACKED_ROWS = 200_000

_COUNT = re.compile(r"(\d+(?:[._]\d+)*)([kKmMgGbB]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


@dataclass(frozen=True)
class AssumedData:
    """Rows of one epoch, as stated. Their lengths are taken for log-normal.

    Args:
        rows: before some are held out for evaluation.
        tokens_per_row: mean, with the chat template; before ``data.over_length`` cuts or drops long ones.
        supervised_share: of the tokens that are trained.
        sigma: standard deviation of the logarithm of the length.

    Raises:
        ConfigError: a number is out of range.
    """

    rows: int
    tokens_per_row: float
    supervised_share: float = DEFAULT_SUPERVISED_SHARE
    sigma: float = DEFAULT_SIGMA

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"{self.rows} examples: there is nothing to train", fix="state 1 example or more")
        if not 2 <= self.tokens_per_row < math.inf:
            raise ConfigError(
                f"{self.tokens_per_row:g} tokens an example: a row has a prompt and an answer",
                fix="state 2 tokens or more",
            )
        if not (0 < self.supervised_share <= 1 and 0 <= self.sigma < math.inf):
            raise ConfigError(
                f"a supervised share of {self.supervised_share:g} with sigma {self.sigma:g} is no length distribution",
                fix="state a share above 0 and at most 1, and a sigma of 0 or more",
            )


def parse_count(text: str) -> float:
    """A number as people write it: ``512``, ``10k``, ``1.5M``, ``52_000``, ``2G`` (10^9). Raises ``ConfigError``."""
    found = _COUNT.fullmatch(text.strip().replace(",", "_"))
    if found is None or found[1].count(".") > 1:
        raise ConfigError(f"{text} is no number", fix="write it as 512, 10k, 1.5M or 2G")
    return float(found[1].replace("_", "")) * _UNITS[found[2].lower()]


def assumed_plan(run: Run, assumed: AssumedData) -> DataPlan:
    """
    Raises:
        PlanError: no row would be left, or rows as long as stated are an error.
    """
    held_out = 0.0 if run.data.eval_split is None else run.data.eval_split.share
    number = assumed.rows * (1 - held_out)
    drawn = min(max(1, round(number)), MAX_PACKED_ROWS)
    lengths = _fitted(run, assumed, drawn)
    scale = number / drawn
    if run.data.packing == "none":
        packs = Packs.single(len(lengths))
    elif run.data.packing_window is None:
        packs = pack_best_fit(lengths, run.data.max_seq_len)
    else:
        packs = pack_in_windows(lengths, run.data.max_seq_len, window=run.data.packing_window)
    epoch = Epoch.of(lengths, assumed.supervised_share * float(lengths.sum()), packs, scale=scale)
    eval_tokens = epoch.tokens * held_out / (1 - held_out)
    unknown = "; data.eval is not counted" if run.data.eval else ""
    return data_plan(
        run,
        epoch,
        basis="assumed",
        tokens=Range(epoch.tokens, epoch.tokens, epoch.tokens),
        eval_tokens=eval_tokens,
        cache_bytes=store_bytes(assumed.rows, assumed.rows * assumed.tokens_per_row)
        + set_bytes(epoch.rows, epoch.sequences),
        source=f"stated: {assumed.rows:,} examples of {assumed.tokens_per_row:,g} tokens; lengths log-normal with "
        f"sigma {assumed.sigma:g} (arXiv 2405.01470, table 1), {assumed.supervised_share:.0%} trained{unknown}",
        lost_share=max(0.0, 1 - epoch.tokens / (number * assumed.tokens_per_row)),
    )


def _fitted(run: Run, assumed: AssumedData, number: int) -> NDArray[np.int64]:
    """Lengths of the rows that are left, in no order: the quantiles of the distribution, at most ``max_seq_len``."""
    longest, rule = run.data.max_seq_len, run.data.over_length
    normal = NormalDist()
    grid = np.array([normal.inv_cdf((n + 0.5) / 4096) for n in range(4096)])
    places = (np.arange(number) + 0.5) / number * 4096 - 0.5
    shape = np.exp(assumed.sigma * np.interp(places, np.arange(4096), grid))
    lengths = assumed.tokens_per_row * shape / shape.mean()
    if rule == "error":
        lengths = _within(shape, assumed.tokens_per_row, longest)
    whole = np.maximum(2, np.rint(lengths)).astype(np.int64)
    if rule == "truncate":
        whole = np.minimum(whole, longest)
    elif rule == "drop":
        whole = whole[whole <= longest]
    elif rule == "split":
        rests = whole % longest
        whole = np.concatenate([np.full(int((whole // longest).sum()), longest), rests[rests > 1]])
    if not len(whole):
        raise PlanError(
            f"no example of {assumed.tokens_per_row:,g} tokens is left after data.over_length={rule} at "
            f"data.max_seq_len={longest}",
            fix=f"raise data.max_seq_len above {assumed.tokens_per_row:,.0f}",
        )
    return np.random.Generator(np.random.PCG64(run.seed)).permutation(whole)


def _within(shape: NDArray[np.float64], mean: float, longest: int) -> NDArray[np.float64]:
    """Lengths of this shape and mean of which none exceeds ``longest``: whoever makes long rows an error has none."""
    if mean > longest:
        raise PlanError(
            f"examples of {mean:,g} tokens are longer than data.max_seq_len={longest}, and data.over_length is error",
            fix=f"raise data.max_seq_len above {mean:,.0f}, or set data.over_length to truncate, split or drop",
        )
    low, high = 0.0, longest / float(shape.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * shape, longest).mean() < mean else (low, middle)
    return np.minimum(high * shape, longest)
