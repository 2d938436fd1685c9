"""The data benchmark: its packing part runs with the packing that runs use, and it can prepare rows as a run does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data
from benchmarks.data_parts import packing, rows
from sft_dist.data.packing import pack_best_fit


def test_the_packing_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.main(["--only", "packing", "--no-peer", "--lengths", "3000", "--json", str(tmp_path / "figures.json")])
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())["packing"]
    assert len(figures) == 2 * len(packing.DISTRIBUTIONS)
    for name in packing.DISTRIBUTIONS:
        assert name in shown
        whole = next(each for each in figures if (each["distribution"], each["way"]) == (name, "sft_dist"))
        lengths = packing.draw(name, 3000)
        assert whole["packs"] == len(pack_best_fit(lengths, packing.CAPACITY))
        assert whole["bound"] >= np.ceil(lengths.sum() / packing.CAPACITY)
        assert f"{whole['packs'] / whole['bound']:.6f}" in shown


def test_rows_are_prepared(tmp_path: Path, tiny_base: Path) -> None:
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    figures = rows.sft_dist(tiny_base)(tmp_path / "rows.jsonl")
    assert figures["packs"] == 1
    assert figures["tokens"] > figures["supervised"] > 3
