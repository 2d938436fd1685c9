"""A training that is started as users start it leaves its page, and the page has the figures of its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.config.text import write_yaml
from sft_dist.report.page import render
from sft_dist.report.read import read_report
from tests.helpers.taught import PAIRS, conversation, write_rows
from tests.unit.test_report import text_of, values_of


@pytest.mark.ci
@pytest.mark.parametrize("fails", [False, True], ids=["finished", "diverged"])
def test_a_training_leaves_its_page(tmp_path: Path, tiny_base: Path, fails: bool) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", [conversation(*pair) for pair in PAIRS]))
    settings = {
        "model": {"path": str(tiny_base)},
        "data": {"train": [{"path": rows}], "eval": [{"path": rows}], "max_seq_len": 128, "packing": "none",
                 "audit": {"max_share": {"leak_exact": 1.0}}},
        "precision": {"compute": "fp32"}, "sharding": {"strategy": "ddp"},
        "optim": {"lr": 1e30 if fails else 1e-2, "max_grad_norm": 1e30},
        "train": {"global_batch_size": 3, "max_steps": 12}, "eval": {"every_steps": 4},
        "checkpoint": {"prove_final": False, "every_steps": 4}, "hardware": {"price_per_hour": 2.5},
        "logging": {"wandb": {"mode": "disabled"}}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(write_yaml(settings), encoding="utf-8")
    command = [sys.executable, "-m", "sft_dist", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == (6 if fails else 0), done.stderr
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert ("Failed with 6 (diverged)" if fails else "Finished after 12 steps") in text_of(html)
    assert "cannot be written" not in done.stderr
    written = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in written if "loss" in line]
    for key in ("loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_gib"):
        wanted = [None if line[key] is None else pytest.approx(line[key], rel=1e-6) for line in trained]
        assert values_of(html, key)["lines"][0]["mean"] == wanted
    [dots] = values_of(html, "loss")["dots"]
    assert dots["y"] == pytest.approx([line["eval_loss"] for line in written if "eval_loss" in line], rel=1e-6)
    # What the command writes later is the same page, but for the moment.
    assert values_of(render(read_report(tmp_path / "run")), "loss") == values_of(html, "loss")
