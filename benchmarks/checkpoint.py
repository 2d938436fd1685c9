"""What saving costs a run: the share of its time that training waits, and the processor time beside it.

    python benchmarks/checkpoint.py [--processes 2] [--steps 40] [--every 10] [--hidden 512] [--layers 8]

Trains one model three times, on data made here: saving only at the end, asynchronously and synchronously every
``--every`` steps; full fine-tuning under FSDP2 in fp32 with AdamW, which has the most to save for its size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

ROWS, ROW_WORDS = 400, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sft_dist_checkpoint_") as folder:
        base = make_base(Path(folder) / "base", hidden=given.hidden, layers=given.layers)
        rows = make_rows(Path(folder) / "rows.jsonl")
        found = {
            name: train(Path(folder), name, base, rows, given, every=every, asynchronous=asynchronous)
            for name, every, asynchronous in (
                ("at the end only", given.steps, True),
                ("asynchronous", given.every, True),
                ("synchronous", given.every, False),
            )
        }
        same = same_shards(Path(folder), "asynchronous", "synchronous")
    show(found, same)


def make_base(folder: Path, *, hidden: int, layers: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft_dist.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for n in range(ROWS):
            words = " ".join(str((n * 7919 + k * 104729) % 1000) for k in range(ROW_WORDS))
            file.write(json.dumps({"prompt": f"count {n}", "completion": words}) + "\n")
    return path


def train(
    folder: Path, name: str, base: Path, rows: Path, given: argparse.Namespace, *, every: int, asynchronous: bool
) -> dict[str, float]:
    """Seconds of a run, from the first step to the last, and what saving took of them."""
    output = folder / name.replace(" ", "_")
    config = {
        "model": {"path": str(base)},
        "method": {"type": "full"},
        "data": {"train": [{"path": str(rows)}], "max_seq_len": 512, "cache_dir": str(folder / "cache")},
        "sharding": {"strategy": "fsdp2"},
        "precision": {"compute": "fp32"},
        "train": {"global_batch_size": 4 * given.processes, "micro_batch_size": 1, "max_steps": given.steps},
        "checkpoint": {"every_steps": every, "asynchronous": asynchronous, "prove_final": False, "keep_last": 99},
        "logging": {"wandb": {"mode": "disabled"}},
        "output_dir": str(output),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    launch(folder / "run.yaml", given.processes)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    receipt = json.loads((output / "receipt.json").read_text())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_time_s" in line]
    shutil.rmtree(output / "final", ignore_errors=True)
    return {
        "saves": len(list((output / "checkpoints").glob("step-*"))),
        "bytes": sum(path.stat().st_size for path in next((output / "checkpoints").glob("step-*")).iterdir()),
        "steps_s": sum(line["step_time_s"] for line in steps),
        "blocked_s": receipt["waste"]["saving_s"],
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def launch(config: Path, processes: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "sft_dist", "train", str(config)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        sys.exit("a process failed")


def same_shards(folder: Path, *names: str) -> bool:
    """Whether the files of every checkpoint are the same bytes."""
    found = []
    for name in names:
        root = folder / name / "checkpoints"
        found.append({path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))})
    return found[0] == found[1] and bool(found[0])


def show(found: dict[str, dict[str, float]], same: bool) -> None:
    table = Table("saving", "checkpoints", "each", "steps", "training waits", "share", "processor", "beside", box=None)
    alone = found["at the end only"]
    for name, run in found.items():
        extra = run["saves"] - alone["saves"]
        table.add_row(
            name, f"{run['saves']:.0f}", f"{run['bytes'] / 1e6:,.0f} MB", f"{run['steps_s']:.1f} s",
            f"{run['blocked_s']:.2f} s", f"{run['blocked_s'] / (run['steps_s'] + run['blocked_s']):.2%}",
            f"{run['cpu_s']:.1f} s", f"{(run['cpu_s'] - alone['cpu_s']) / extra:+.2f} s a save" if extra else "",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    console.print(f"files of asynchronous and synchronous checkpoints are {'the same bytes' if same else 'DIFFERENT'}")
    console.print(f"at {time.strftime('%Y-%m-%d %H:%M')}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
