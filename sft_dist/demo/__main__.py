"""``python -m sft_dist.demo``: build a base model, fine-tune it on two processes, show what it learned.

Everything happens on this machine and nothing is downloaded. Training runs through the same launcher, configuration
and trainer as any other run; the demo only gives paths and reads what the run wrote.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sft_dist.demo import report
from sft_dist.demo.curve import draw, read_curve
from sft_dist.demo.dataset import data_file
from sft_dist.errors import ConfigError, SftError
from sft_dist.runtime import failure
from sft_dist.runtime.quiet import quiet_libraries
from sft_dist.train.preflight import MARKS_OF_A_RUN

DEFAULT_OUTPUT = Path("runs/demo")
RECIPE = Path(__file__).with_name("demo.yaml")
BASE_SEED = 7


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit code, the trainer's if that failed."""
    options = _parse(arguments)
    try:
        return _run(options)
    except SftError as error:
        failure.report(error, debug=False)
        return error.exit_code
    except KeyboardInterrupt:
        return failure.INTERRUPTED_EXIT_CODE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sft_dist.demo", description="Fine-tune a tiny model on this machine and show what it learned."
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder of the run (default: {DEFAULT_OUTPUT}, or the next free {DEFAULT_OUTPUT}-N)",
    )
    parser.add_argument("--processes", type=int, help="default: 2; 1 where there is one GPU, which two cannot share")
    parser.add_argument("--max-steps", type=int, help="optimizer steps (default: the recipe's)")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    console = Console(highlight=False)
    output = _fresh_folder(options.output)
    with console.status("loading PyTorch"):
        quiet_libraries()
        from sft_dist.demo import answers
        from sft_dist.demo.base_model import build_base_model
    processes, where = _processes(options.processes)
    base, picture = output / "base", output / "curve.png"

    console.rule("1/3  a base model, from nothing")
    model = build_base_model(base, seed=BASE_SEED)
    console.print(
        f"{model.num_parameters():,} parameters in Llama's architecture with random weights (seed {BASE_SEED}): "
        f"it knows no language yet -> {base}"
    )
    console.rule(f"2/3  fine-tuning on {where}")
    code = _train(output, base, processes=processes, max_steps=options.max_steps)
    if code != 0:
        return code

    console.rule("3/3  what it learned")
    rows = answers.held_out_rows()
    with console.status(f"both models answer {len(rows)} held-out prompts"):
        before, after = answers.answer(base, rows), answers.answer(output / "final", rows)
    shown = answers.shown_indices(rows)
    report.show_answers(console, [rows[i] for i in shown], [before[i] for i in shown], [after[i] for i in shown])
    curve = read_curve(output / "metrics.jsonl")
    draw(curve, picture)
    report.show_figures(console, curve, answers.score(rows, before), answers.score(rows, after))
    report.show_places(console, output, picture, processes=processes)
    console.print(f"\ndone in {time.perf_counter() - started:.0f} s")
    return 0


def _fresh_folder(wanted: Path | None) -> Path:
    """The folder of this run. An earlier run is kept: without --output the next free number is taken.

    Raises:
        ConfigError: the folder given with --output holds a run.
    """
    if wanted is None:
        numbered = (DEFAULT_OUTPUT.with_name(f"{DEFAULT_OUTPUT.name}-{n}") for n in itertools.count(2))
        return next(folder for folder in itertools.chain([DEFAULT_OUTPUT], numbered) if not _holds_a_run(folder))
    if _holds_a_run(wanted):
        raise ConfigError(f"--output: {wanted} already holds a run", fix="give another folder, or move that one away")
    return wanted


def _holds_a_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS_OF_A_RUN)


def _processes(wanted: int | None) -> tuple[int, str]:
    """How many processes to start, and in words where they run."""
    import torch

    num_gpus = torch.cuda.device_count()
    count = wanted if wanted is not None else 1 if num_gpus == 1 else 2
    if count < 1:
        raise ConfigError(f"--processes is {count}", fix="start at least 1 process")
    device = "GPU (NCCL)" if num_gpus else "CPU (gloo)"
    return count, f"{count} processes, {device}, weights sharded with FSDP2" if count > 1 else f"1 process, {device}"


def _train(output: Path, base: Path, *, processes: int, max_steps: int | None) -> int:
    """Starts the launcher as a user would, and returns its exit code."""
    train, held_out = data_file("train.jsonl"), data_file("eval.jsonl")
    overrides = [
        f"model.path={json.dumps(str(base))}",
        f"output_dir={json.dumps(str(output))}",
        f"data.train=[{{path: {json.dumps(str(train))}, format: messages}}]",
        f"data.eval=[{{path: {json.dumps(str(held_out))}, format: messages}}]",
    ]
    if max_steps is not None:
        overrides.append(f"train.max_steps={max_steps}")
    launcher = [sys.executable, "-m", "sft_dist.launch.torchrun", "--nproc-per-node", str(processes)]
    return subprocess.run([*launcher, "train", str(RECIPE), *overrides]).returncode


if __name__ == "__main__":
    sys.exit(main())
