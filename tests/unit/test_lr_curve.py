"""The rates that a range test suggests, on curves whose shape is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sft_dist.train.lr_curve import LrCurve, rates
from sft_dist.train.lr_picture import draw, in_terminal

RATES = rates(1e-7, 1.0, 100)


def curve(*, falls_at: float = 1e-4, rises_at: float = 1e-2, noise: float = 0.0) -> LrCurve:
    """A loss of 5 that falls by 3 around one rate, and rises steeply from another."""
    at = np.log10(RATES)
    losses = 5 - 3 / (1 + np.exp(-3 * (at - math.log10(falls_at)))) + 20 * np.clip(at - math.log10(rises_at), 0, None)
    losses += noise * np.random.default_rng(0).standard_normal(len(losses))
    kept = LrCurve((), ())
    for rate, loss in zip(RATES, losses, strict=True):
        kept = LrCurve((*kept.rates, rate), (*kept.losses, float(loss)))
        if kept.has_diverged:
            break
    return kept


def test_rates_have_equal_factors() -> None:
    assert (RATES[0], RATES[-1], len(RATES)) == (1e-7, pytest.approx(1.0), 100)
    assert np.allclose(np.diff(np.log(RATES)), np.log(RATES[1] / RATES[0]))


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_both_rules_find_the_shape_of_the_curve(noise: float) -> None:
    found = curve(noise=noise)
    assert found.has_diverged
    assert found.rates[-1] < 1.0, "the test ends where the loss diverges"
    assert found.steepest == pytest.approx(1e-4, rel=1.0 if noise else 0.3)
    assert found.turning == pytest.approx(1e-2, rel=0.7)
    assert found.tenth == pytest.approx(found.turning / 10)
    assert found.suggested == min(found.steepest, found.tenth)


def test_a_loss_that_never_rises_has_no_turning() -> None:
    found = curve(rises_at=10.0)
    assert (found.turning, found.tenth) == (None, None)
    assert found.suggested == found.steepest
    assert "raise --max-lr" in found.told()[1]


def test_it_has_diverged_at_twice_the_lowest_loss_and_not_the_first() -> None:
    for last, has_diverged in ((3.9, False), (4.1, True)):
        losses = (5.0, 5.0, 5.0, 2.0, 2.0, 2.0, last, last, last)
        assert LrCurve(tuple(RATES[:9]), losses).has_diverged == has_diverged


def test_a_rise_that_is_small_beside_the_fall_is_no_turning() -> None:
    assert LrCurve(tuple(RATES[:40]), (*(5 - 0.1 * n for n in range(30)), *[2.2] * 10)).turning is None
    early = LrCurve(tuple(RATES[:20]), (5.0, 4.0, 3.0, 2.0, *(3.0 + n for n in range(16))))
    assert early.steepest in RATES[:4]


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    found = LrCurve(tuple(RATES[:20]), tuple(1.0 + 0.01 * n for n in range(20)))
    assert found.suggested is None
    assert found.told() == ["the loss never fell: lower --min-lr, which is 1.00e-07, or look at the data"]


def test_a_loss_that_is_no_number_ends_the_test_and_is_null(tmp_path: Path) -> None:
    whole = curve(rises_at=10.0)
    found = LrCurve(whole.rates[:70], (*whole.losses[:69], math.nan))
    assert found.has_diverged
    assert not LrCurve(whole.rates[:69], whole.losses[:69]).has_diverged
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(text)["loss"][-1] is None
    assert found.turning is not None
    draw(found, tmp_path / "x.svg")
    assert "steepest descent" in (tmp_path / "x.svg").read_text() or (tmp_path / "x.svg").stat().st_size > 10_000


def test_the_terminal_shows_the_curve_and_the_rate() -> None:
    lines = in_terminal(curve()).splitlines()
    assert lines[0].strip().startswith("5.") or lines[0].strip()[0].isdigit()
    assert all(len(line) <= 80 for line in lines)
    (arrow,) = (line for line in lines if "↑" in line)
    found = curve()
    share = math.log(found.suggested / found.rates[0]) / math.log(found.rates[-1] / found.rates[0])  # type: ignore[operator]
    assert arrow.index("↑") - 10 == round(share * 63)
