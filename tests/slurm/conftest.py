"""The cluster that the tests of this folder share, and a small run for its jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sft_dist
from tests.helpers import cells
from tests.slurm.cluster import Cluster, missing

REPOSITORY = Path(sft_dist.__file__).parents[1]
STEPS = 6

# As nothing in a job may come from whoever started the tests.
LAUNCHERS = ("PET_", "ACCELERATE_", "FSDP_", "DS_", "DEEPSPEED_", "SFT_DIST_", "TORCHELASTIC_", "SLURM_", "WANDB_")


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, for all tests; use ``cluster``."""
    why = missing()
    if why is not None:
        pytest.skip(f"no SLURM cluster: {why}")
    shared = tmp_path_factory.mktemp("shared")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(shared / "hf"), "SFT_DIST_CACHE": str(shared / "cache"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            patch.delenv(name)
        with Cluster(3, job_environment=environment) as cluster:
            yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, all nodes idle; SLURM's commands that a test starts find it. Afterwards nothing is left of the test.

    A test that ends its jobs itself asserts ``left_running() == []``; here jobs are cancelled first.
    """
    for name, value in running_cluster.environment.items():
        monkeypatch.setenv(name, value)
    running_cluster.repair()
    yield running_cluster
    running_cluster.cancel_all()
    running_cluster.repair()
    running_cluster.wait_for(
        lambda: not running_cluster.left_running(), 20, what=f"nothing is left: {running_cluster.left_running()}"
    )


@dataclass(frozen=True)
class SmallRun:
    """A small model and its prepared data, in a folder that all nodes see.

    Args:
        folder: where configurations and run directories go.
        settings: of a run of ``STEPS`` steps; fp32, LoRA, DDP, no W&B, no proof at the end.
    """

    folder: Path
    settings: dict[str, Any]

    def write(self, name: str, **sections: dict[str, Any]) -> tuple[Path, Path]:
        """Writes a configuration; ``sections`` are merged over ``settings``.

        Returns:
            Its file, and the run directory that it names.
        """
        output = self.folder / name
        settings = self.settings | {"output_dir": str(output)}
        for section, values in sections.items():
            settings[section] = values if "type" in values else {**settings.get(section, {}), **values}
        file = self.folder / f"{name}.yaml"
        file.write_text(json.dumps(settings))  # which is YAML
        return file, output


@pytest.fixture(scope="session")
def small_run(tiny_base: Path, running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """See ``SmallRun``; a run's rows are short, so a step takes some 20 ms."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = cells.config(
        str(tiny_base), "lora", "ddp",
        data={"train": [{"path": str(folder / "rows.jsonl")}], "cache_dir": str(folder / "data_cache")},
        train={"global_batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS},
    )  # fmt: skip
    run = SmallRun(folder, cells.whole_run(config, folder / "unused").model_dump(mode="json"))
    file, _ = run.write("prepare")
    subprocess.run(
        [sys.executable, "-m", "sft_dist", "data", "prepare", str(file)], env=running_cluster.environment,
        cwd=folder, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return run
