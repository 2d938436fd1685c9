"""Whatever starts the processes, the run learns the same: real trainings on this machine, to 1e-5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import cells, figures
from tests.helpers.pool import free_port
from tests.launch.conftest import NAMES, PREFIXES, REPOSITORY

BIN = Path(sys.executable).parent
SCRIPT = str(REPOSITORY / "launch/train.py")
STEPS = 4

Train = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def train(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``train(*commands, expected=...)``: runs commands side by side as one training; [steps, 2] losses and norms.

    Args of the function:
        commands: each a launcher with its options, to which script and configuration are added.
        expected: what the summary must say of the sharding.
    """
    folder = tmp_path_factory.mktemp("launched")
    rows = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}"} for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = cells.config(
        str(tiny_base), "lora", "ddp",
        data={"train": [{"path": str(folder / "rows.jsonl")}]},
        train={"global_batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS},
    )  # fmt: skip
    (folder / "run.yaml").write_text(cells.dump(cells.whole_run(cfg, folder / "unused")))
    clean = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith(PREFIXES)}
    environment = clean | {
        "PATH": f"{BIN}{os.pathsep}{clean['PATH']}", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
        "HF_HOME": str(folder / "hf"),
    }  # fmt: skip

    def run(*commands: list[str], strategy: str, expected: str) -> np.ndarray:
        output = folder / f"out-{len(list(folder.glob('out-*')))}"
        # Through a shell's arguments as a user gives them; the whole section, because strategies have other keys.
        rest = [str(folder / "run.yaml"), f"sharding={{strategy: {strategy}}}", f"output_dir={output}"]
        started = [
            subprocess.Popen(
                [*command, *rest], cwd=REPOSITORY, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for command in commands
        ]  # fmt: skip
        try:
            said = "".join(process.communicate(timeout=150)[0] for process in started)
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * len(started), said
        assert expected in said
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        return np.array([[line["loss"], line["grad_norm"]] for line in lines])

    return run


@pytest.fixture(scope="module")
def alone(train: Train) -> np.ndarray:
    return train([sys.executable, SCRIPT], strategy="ddp", expected="ddp on 1 rank, verified")


def node(rank: int, port: int) -> list[str]:
    """One of two launches that make one run on this machine."""
    return [
        str(REPOSITORY / "launch/torchrun.sh"), "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "train",
    ]  # fmt: skip


def accelerate(*options: str) -> list[str]:
    """Accelerate's own program, as its users call it."""
    return [str(BIN / "accelerate"), "launch", "--main_process_port", "0", *options, SCRIPT]


@pytest.mark.parametrize(
    ("commands", "strategy", "expected"),
    [
        ([[str(BIN / "torchrun"), "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", SCRIPT]], "zero1", "zero1 on 2 ranks"),
        pytest.param([accelerate("--multi_gpu", "--num_processes", "2")], "ddp", "ddp on 2 ranks", marks=pytest.mark.full),
        ([accelerate("--config_file", "configs/accelerate/fsdp2.yaml")], "auto", "fsdp2 on 2 ranks"),
        pytest.param([accelerate("--config_file", "configs/accelerate/zero3.yaml")], "auto", "zero3 on 2 ranks", marks=pytest.mark.ci),
        pytest.param([["launch/accelerate.sh", "--config_file", "configs/accelerate/ddp.yaml", "train"]], "ddp", "ddp on 2 ranks", marks=pytest.mark.full),
        pytest.param([[str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", SCRIPT]], "zero2", "zero2 on 2 ranks", marks=pytest.mark.ci),
        pytest.param([["launch/deepspeed.sh", "--num_gpus", "2", "train"]], "zero3", "zero3 on 2 ranks", marks=pytest.mark.full),
        pytest.param([node(0, 0), node(1, 0)], "fsdp2", "fsdp2 on 2 ranks", marks=pytest.mark.ci),
    ],
    ids=["torchrun", "accelerate-multi_gpu", "accelerate-fsdp2", "accelerate-zero3", "accelerate.sh", "deepspeed", "deepspeed.sh", "torchrun-2-nodes"],
)  # fmt: skip
def test_the_same_losses(
    train: Train, alone: np.ndarray, commands: list[list[str]], strategy: str, expected: str
) -> None:
    port = str(free_port())
    with_port = [
        [word.replace("PORT", port).replace("127.0.0.1:0", f"127.0.0.1:{port}") for word in c] for c in commands
    ]
    trained = train(*with_port, strategy=strategy, expected=expected)
    figures.difference("launchers against one process", trained, alone)
    np.testing.assert_allclose(trained, alone, rtol=1e-5)
