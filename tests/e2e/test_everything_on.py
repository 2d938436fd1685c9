"""The benchmark of what a run pays in its steps for being watched: it measures both sides of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import everything_on

PAIRS, BLOCK = 2, 4


@pytest.mark.ci
def test_both_sides_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    small = ["--hidden", "64", "--layers", "2", "--tokens", "64", "--evaluate-every", "2", "--json", str(figures)]
    everything_on.main(["--pairs", str(PAIRS), "--block", str(BLOCK), *small])
    shown, found = capsys.readouterr().out, json.loads(figures.read_text())
    assert found["pairs"] == PAIRS
    for name in ("medians", "means", "cpu"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert f"{found[name]['value']:.4f}  [" in shown
    assert 0 < found["off_step_s"] < 60
    assert found["off_cpu_s"] > 0
    assert found["evaluation_s"] > 0
    assert len(found["more_cpu_s_by_rank"]) == everything_on.WORLD


def test_a_ratio_has_its_interval() -> None:
    off = [[1.0, 1.1, 0.9]] * 10
    on = [[1.02 * step_s for step_s in block] for block in off]
    same = everything_on.ratio(on, off, everything_on.median_of)
    assert (same.value, same.low, same.high) == pytest.approx((1.02, 1.02, 1.02))
    uneven = [[factor * step_s for step_s in block] for factor, block in zip([1.0, 1.04] * 5, off, strict=True)]
    found = everything_on.ratio(uneven, off, everything_on.mean_of)
    assert found.value == pytest.approx(1.02)
    assert 1.0 <= found.low < 1.02 < found.high <= 1.04
