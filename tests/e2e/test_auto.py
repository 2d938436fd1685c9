"""A configuration that leaves strategy and checkpointing open, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist import cli
from sft_dist.config.load import load_config
from sft_dist.config.schema import Fsdp2Sharding

Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def train(tmp_path: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> Train:
    """Runs ``train`` in this process; (exit code, stdout, stderr)."""

    def run(**sections: Any) -> tuple[int, str, str]:
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(json.dumps({"instruction": f"say {i}", "output": str(i)}) for i in range(6)))
        config = {
            "model": {"path": str(tiny_base)},
            "data": {"train": [{"path": str(data)}], "max_seq_len": 128},
            "precision": {"compute": "fp32"},
            "train": {"global_batch_size": 2, "max_steps": 1},
            "checkpoint": {"prove_final": False},
            "logging": {"wandb": {"mode": "disabled"}},
            "output_dir": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | sections))
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["train", str(tmp_path / "config.yaml")])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert isinstance(exit_info.value.code, int)
        return exit_info.value.code, out, err

    return run


def test_the_choice_is_told_and_kept(train: Train, tmp_path: Path) -> None:
    code, out, err = train(train={"global_batch_size": 6, "max_steps": 1, "micro_batch_size": "auto"})
    assert code == 0, err
    first, second, third = (line for line in out.splitlines() if " auto -> " in line)
    assert first.startswith("sharding.strategy auto -> ddp: one process; parameters, gradients and optimizer take ")
    assert second.startswith("activation_checkpointing.mode auto -> none: ")
    assert third.startswith("train.micro_batch_size auto -> 4: ")
    assert "CUDA" not in out, "which a CPU has not"
    assert third.endswith("; a rank has 6 of a step's 6 sequences")
    assert out.index(third) < out.index("sharding  ddp on 1 rank, verified")
    assert "micro-batch of up to 4" in out
    kept = load_config(tmp_path / "run/config.yaml")
    assert (kept.sharding.strategy, kept.activation_checkpointing.mode) == ("ddp", "none")
    assert kept.train.micro_batch_size == 4


def test_an_explicit_configuration_tells_nothing_new(train: Train) -> None:
    code, out, err = train(sharding={"strategy": "fsdp2"}, activation_checkpointing={"mode": "full"})
    assert code == 0, err
    assert "->" not in out


def test_what_does_not_fit_has_its_own_exit_code(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sft_dist.train.ready.least_memory_bytes", lambda *_: 3 * 2**19)
    code, _, err = train()
    assert code == 3
    assert "even when fsdp2 shards them over 1, and a process has 1.5 MiB" in err
    assert "\n  fix: use 2 processes" in err
    assert not (tmp_path / "run/config.yaml").exists()


def test_accelerate_is_honoured_under_auto(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    code, out, err = train()
    assert code == 0, err
    assert "auto -> fsdp2: accelerate launch chose FSDP with fsdp_reshard_after_forward false" in out
    kept = load_config(tmp_path / "run/config.yaml")
    assert kept.sharding == Fsdp2Sharding(reshard_after_forward=False)


def test_accelerate_is_contradicted_before_anything_is_written(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    code, _, err = train(sharding={"strategy": "ddp"})
    assert code == 2
    assert "accelerate's --mixed_precision fp16 is not supported" in err
    assert "accelerate's --use_fsdp contradicts sharding.strategy ddp" in err
    assert not (tmp_path / "run/config.yaml").exists()
