"""A run directory made in this process: one process trains a tiny model, with checkpoints and final/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PAIRS = [("東京は？", "日本の首都です。"), ("大阪は？", "西の都です。"), ("空は？", "青い😀です。")]


def train_run(base: Path, folder: Path, *, steps: int = 60, lr: float = 1.0e-2, **sections: Any) -> Path:
    """Trains ``base`` on ``PAIRS`` until it knows them, from the shell; returns the run directory.

    Args:
        sections: of the configuration, in place of or beside those here.
    """
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
        for asked, answered in PAIRS
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    config = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "max_seq_len": 128, "packing": "none"},
        "precision": {"compute": "fp32"},
        "sharding": {"strategy": "ddp"},
        "activation_checkpointing": {"mode": "none"},
        "optim": {"lr": lr},
        "train": {"global_batch_size": 3, "micro_batch_size": 3, "max_steps": steps},
        "eval": {"before_training": False},
        "checkpoint": {"prove_final": False, "every_steps": steps // 2, "keep_last": 2},
        "logging": {"wandb": {"mode": "disabled"}},
        "output_dir": str(folder / "run"),
        **sections,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "train", str(folder / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"
