"""A base model without a chat template is trained, told about, and leaves with the template that it was trained with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from sft_dist.data.named_templates import built_in_source


@pytest.mark.ci
def test_a_base_model_without_a_template(tmp_path: Path, tiny_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("chat_template.jinja"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "天気は？", "completion": "晴れです。"}))
    config = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_seq_len": 128},
        "precision": {"compute": "fp32"},
        "train": {"global_batch_size": 1, "max_steps": 1},
        "checkpoint": {"prove_final": False},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "train", str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"model: {base} has no chat template: the rows are written, and the model is saved, with the" in done.stdout
    assert "built-in chatml (it knows <|im_start|> and <|im_end|>, which" in done.stdout
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "final").chat_template == built_in_source("chatml")
