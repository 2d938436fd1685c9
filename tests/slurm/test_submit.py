"""``sft-dist submit`` and the ready scripts on a real cluster: SLURM takes the scripts, and they train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY, STEPS, SmallRun

pytestmark = pytest.mark.slurm

CPUS: dict[str, Any] = {"request_gpus": "none", "memory_gib": 4, "time_limit": "30", "cpus_per_gpu": 1}


def sft_dist(cluster: Cluster, run: SmallRun, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as on a login node."""
    return subprocess.run(
        [sys.executable, "-m", "sft_dist", *arguments], env=cluster.environment, cwd=run.folder, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


def steps_of(output: Path) -> list[int]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line or "train_loss" in line or "train/loss" in line]


def test_what_slurm_refuses_is_told_in_its_words(cluster: Cluster, small_run: SmallRun) -> None:
    file, output = small_run.write("refused", cluster=CPUS | {"partition": "nowhere"})
    done = sft_dist(cluster, small_run, "submit", str(file))
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert not list(output.glob("slurm/*"))
    assert cluster.command("squeue", "--noheader").strip() == ""


def test_every_launcher_and_way_to_ask_for_gpus_is_taken(cluster: Cluster, small_run: SmallRun) -> None:
    """``sbatch --test-only`` of what is rendered; names with spaces too."""
    from sft_dist.cluster.script import Place, render_train
    from tests.unit.test_cluster_script import config, resources

    place = Place(sys.executable, str(REPOSITORY), str(small_run.folder), "/tmp/my 日本 $x #1", "/tmp/my 日本 $x #1/s")
    options = {"exclude": ["n3"], "options": ["--nice=100", "--comment='a b'"], "partition": "main"}
    for number, launcher in enumerate(("torchrun", "accelerate", "deepspeed", "srun")):
        asked = config(launcher=launcher, request_gpus=("gpus-per-node", "gres")[number % 2], **options)
        script = render_train(asked, resources(2, launcher=launcher), place, name="my 日本 $x #1")
        file = small_run.folder / f"{launcher}.sbatch"
        file.write_text(script)
        done = subprocess.run(
            ["sbatch", "--test-only", str(file)], env=os.environ, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        assert "nodes n[1-2]" in done.stderr


def test_a_ready_script_trains_what_it_is_given(cluster: Cluster, small_run: SmallRun) -> None:
    """``sbatch slurm/x.sbatch CONFIG`` in the checkout, with another CONFIG than its recipe."""
    file, output = small_run.write("ready")
    job = subprocess.run(
        ["sbatch", "--parsable", "--gpus-per-node=1", f"--output={small_run.folder}/%x-%j.out",
         "slurm/train_7b_lora_1xa100_80.sbatch", str(file), "train.seed=3"],
        env=os.environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True,
    ).stdout.strip()  # fmt: skip
    cluster.wait(job, "COMPLETED", 90)
    assert (output / "final").is_dir()
    assert steps_of(output) == list(range(1, STEPS + 1))
    assert "seed: 3" in (output / "config.yaml").read_text()
    link = output / f"slurm/train-{job}.out"
    assert link.resolve() == small_run.folder / f"train_7b_lora_1xa100_80-{job}.out"
    assert cluster.left_running() == []
