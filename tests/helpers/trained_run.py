"""A run directory: this process alone trains a tiny model, with checkpoints and ``final/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.train.run import run_training
from tests.helpers.taught import PAIRS, conversation, write_rows


def train_run(base: Path, folder: Path, *, steps: int = 60, lr: float = 1.0e-2, **sections: Any) -> Path:
    """Trains ``base`` on ``PAIRS``; returns the run directory, with checkpoints of the middle and of the end.

    Args:
        sections: of the configuration, in place of those here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "train.jsonl", [conversation(*pair) for pair in PAIRS])
    settings = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": str(rows)}], "max_seq_len": 128, "packing": "none"},
        "precision": {"compute": "fp32"},
        "sharding": {"strategy": "ddp"},
        "activation_checkpointing": {"mode": "none"},
        "optim": {"lr": lr},
        "train": {"global_batch_size": 3, "micro_batch_size": 3, "max_steps": steps},
        "eval": {"before_training": False},
        "checkpoint": {"prove_final": False, "keep_last": 2},
        "logging": {"wandb": {"mode": "disabled"}},
        "output_dir": str(folder / "run"),
        **sections,
    }
    run_training(Config.model_validate(settings))
    return folder / "run"
