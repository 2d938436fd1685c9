"""What merging an adapter into a model of two billion parameters takes: memory of the process, seconds, MB/s.

    python -m benchmarks.merge [--method lora|dora|qlora] [--dtype bf16|fp16|fp32] [--check] [--folder /tmp]

Makes a Llama of 2.1B random parameters in bf16 (4.2 GB) and an adapter of rank 16 on all its linear layers, runs
``sft-dist export --merge`` in a process of its own, and compares the most memory that this process ever had
(``VmHWM``, mapped files included) with the bound: two of the largest tensors and 1 GB. All is deleted in the end.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

from sft_dist.config.schema import LoraMethod, QloraMethod
from sft_dist.model.card import KEY, TrainedWith, card, front_matter
from tests.helpers.big_model import LLAMA_2B, write_checkpoint
from tests.helpers.tiny_model import build_tokenizer

RANK, ALPHA = 16, 32
SPARE_BYTES = 10**9

METHODS: dict[str, LoraMethod] = {
    "lora": LoraMethod(type="lora", r=RANK, alpha=ALPHA),
    "dora": LoraMethod(type="lora", r=RANK, alpha=ALPHA, dora=True),
    "qlora": QloraMethod(type="qlora", r=RANK, alpha=ALPHA),
}

# Runs the command and tells what its process had at its peak.
PROGRAM = """\
import sys
from pathlib import Path
from sft_dist.cli import main
try:
    main(sys.argv[1:])
finally:
    print([line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0])
"""


@dataclass(frozen=True)
class Merged:
    """Args:
    peak_bytes: of the memory of the process, files that it maps included.
    bound_bytes: two of the largest tensors as they are written, and 1 GB.
    written_bytes: weights; write_s: in which they were merged and written; total_s: of the process.
    proven: what the command says of the proof.
    """

    peak_bytes: int
    bound_bytes: int
    written_bytes: int
    write_s: float
    total_s: float
    proven: str

    def __str__(self) -> str:
        speed = self.written_bytes / self.write_s / 1e6
        return (
            f"peak RSS {self.peak_bytes / 1e9:.2f} GB, bound {self.bound_bytes / 1e9:.2f} GB; "
            f"{self.written_bytes / 1e9:.2f} GB in {self.write_s:.1f} s ({speed:,.0f} MB/s), {self.total_s:.1f} s in "
            f"all; {self.proven}"
        )


def make_base(folder: Path) -> Path:
    """2.1B random parameters in bf16, in four files, with a tokenizer."""
    folder.mkdir()
    write_checkpoint(folder, LLAMA_2B, num_files=4)
    build_tokenizer(folder)
    return folder


def make_adapter(base: Path, folder: Path, method: LoraMethod) -> Path:
    """A random adapter in PEFT's format on every linear layer but the output layer."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(1), {}
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        if not name.endswith("_proj.weight"):
            continue
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        with safe_open(base / file, framework="pt") as opened:
            rows, columns = opened.get_slice(name).get_shape()
            weight = opened.get_tensor(name).float() if method.dora else None
        tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[f"{layer}.lora_B.weight"] = 0.01 * torch.randn(rows, RANK, generator=generator)
        if weight is not None:
            tensors[f"{layer}.lora_magnitude_vector"] = weight.norm(dim=1) * 1.05
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=method.dora,
        base_model_name_or_path=str(base), inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(str(folder))
    trained = TrainedWith(path=str(base), revision=None, method=method, compute="bf16", add_tokens=[], seed=0)
    front: dict[str, Any] = front_matter(str(base), is_adapter=True, tags=[]) | {KEY: trained.model_dump(mode="json")}
    (folder / "README.md").write_text(card(front, "A random adapter", []))
    return folder


def measure(adapter: Path, out: Path, *, dtype: str, check: bool) -> Merged:
    """Merges in a process of its own.

    Raises:
        RuntimeError: the command failed.
    """
    arguments = ["export", str(adapter), "--merge", "--out", str(out), "--dtype", dtype]
    started = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, *arguments, "--check" if check else "--no-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    total_s = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    wrote = re.search(r"in ([\d.]+) s \(", done.stdout)
    proven = re.search(r"^(?:checked +)?(.*(?:not checked|merged = adapter).*)$", done.stdout, re.M)
    if peak is None or wrote is None or proven is None:
        raise RuntimeError(done.stdout)
    sizes = []
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            sizes += [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
    return Merged(
        peak_bytes=int(peak[1]) * 1024,
        bound_bytes=2 * max(sizes) + SPARE_BYTES,
        written_bytes=sum(sizes),
        write_s=float(wrote[1]),
        total_s=total_s,
        proven=proven[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, action="append", help="all of them by default")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--check", action="store_true", help="compare logits in a fresh process too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="with room for 10 to 14 GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sft_dist_merge_", dir=arguments.folder) as temporary:
        base = make_base(Path(temporary) / "base")
        for method in arguments.method or METHODS:
            adapter = make_adapter(base, Path(temporary) / f"adapter-{method}", METHODS[method])
            with tempfile.TemporaryDirectory(dir=temporary) as out:
                merged = measure(adapter, Path(out), dtype=arguments.dtype, check=arguments.check)
            print(f"{method:6} {arguments.dtype}  {merged}", flush=True)


if __name__ == "__main__":
    main()
