"""Run directories for reports: with everything that a run may leave, of any length."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft_dist.config.text import write_yaml
from tests.helpers import run_folders
from tests.helpers.run_folders import put

SECRETS = {
    "token": "hf_abcdefghijklmnopqrstuvwx",
    "wandb": "0123456789abcdef0123456789abcdef01234567",
    "variable": "swordfish-in-the-environment",
    "password": "correct-horse-battery",
}

SETTINGS: dict[str, Any] = {
    "model": {"path": "meta-llama/Llama-3.1-8B", "revision": "0e9e39f249a16976918f6564b8830bc894c89659"},
    "method": {"type": "lora", "r": 16, "target_modules": "all-linear"},
    "data": {
        "train": [{"path": "support.jsonl", "name": None}, {"path": "manuals.jsonl", "name": "manuals"}],
        "eval": [],
    },
    "optim": {"lr": 2.0e-4},
    "checkpoint": {"prove_final": True, "mirror": f"s3://user:{SECRETS['password']}@bucket/runs"},
    "cluster": {
        "environment": {"MY_VARIABLE": SECRETS["variable"], "HF_TOKEN": SECRETS["token"]},
        "setup": [f"export WANDB_API_KEY={SECRETS['wandb']}", "module load cuda"],
    },
    "output_dir": "runs/support",
}

PROMPTS = (
    ("返品したいのですが、レシートをなくしました。どうすればよいですか？",
     "レシートがなくても、購入日とお支払い方法がわかれば返品を承ります。お近くの店舗か、サポート窓口（平日9時〜18時）までご連絡ください。"),
    ("Summarise the warranty in one sentence.", "Two years from the day of purchase, parts and labour, against the receipt."),
)  # fmt: skip


def line(step: int, rng: random.Random, *, steps: int) -> dict[str, Any]:
    """Of a step of a run whose loss falls from 2.6 with noise."""
    warm = min(1.0, step / max(1, steps // 30))
    loss = 0.82 + 1.8 / (1 + 40 * step / steps) + rng.gauss(0, 0.05)
    return {
        "step": step, "epoch": 3 * step / steps, "loss": loss,
        "grad_norm": 0.3 + 1.2 / (1 + 30 * step / steps) + abs(rng.gauss(0, 0.08)),
        "lr": 2e-4 * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)), "num_tokens": 65_000 + rng.randrange(500),
        "supervised_tokens": 21_000, "step_time_s": 4.1 + rng.gauss(0, 0.05), "tokens_per_s": 15_900 + rng.gauss(0, 200),
        "tokens_per_s_per_device": 1990.0, "data_wait_s": 0.01, "peak_memory_gib": 61.2 if step > 3 else 48.0,
        "elapsed_s": 120 + 4.2 * step, "cost_usd": (120 + 4.2 * step) / 360, "mfu": 0.41,
    }  # fmt: skip


def lines(steps: int, *, every: int = 100, seed: int = 0) -> list[dict[str, Any]]:
    """Of a whole run, with an evaluation of the base, every so many steps and at the end."""
    rng, written = random.Random(seed), []
    for step in range(steps + 1):
        if step:
            written.append(line(step, rng, steps=steps))
        if step % every == 0 or step == steps:
            share = step / steps
            written.append({
                "step": step, "eval_loss": 0.95 + 1.7 / (1 + 25 * share), "eval_perplexity": 3.0,
                "eval_loss/support.jsonl": 0.9 + 1.6 / (1 + 25 * share), "eval_loss/manuals": 1.0 + 1.8 / (1 + 25 * share),
                "eval_scores/bleu": 4 + 27 * share**0.4, "eval_scores/chrf": 18 + 33 * share**0.4,
            })  # fmt: skip
    return written


def write_metrics(folder: Path, written: Iterable[dict[str, Any]], *, cut: str = "") -> None:
    put(folder / "metrics.jsonl", "".join(json.dumps(each) + "\n" for each in written) + cut, ago_s=4)


def answers(folder: Path, steps: Iterable[int], *, hostile: str = "") -> None:
    """Two prompts, one in Japanese, answered better and better."""
    written = []
    for step in steps:
        for number, (prompt, reference) in enumerate(PROMPTS):
            known = min(len(reference), len(reference) * (step + 40) // 300)
            is_done = known == len(reference)
            answer = reference if is_done else reference[:known] + reference[:6] * 12
            written.append({"step": step, "sample": number, "prompt": prompt + hostile, "answer": answer + hostile,
                            "reference": reference, "finish_reason": "stop" if is_done else "length"})  # fmt: skip
    put(folder / "samples.jsonl", "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in written), ago_s=4)


def audit(folder: Path) -> None:
    def source(name: str, rows: int) -> dict[str, Any]:
        return {"source": name, "rows": rows, "tokens": rows * 410, "supervised_tokens": rows * 130,
                "lengths": {"edges": [0, 2048], "counts": [rows]}, "longest": 1999}  # fmt: skip

    def found(check: str, severity: str, what: str, count: int) -> dict[str, Any]:
        return {"check": check, "severity": severity, "set": "train", "source": "support.jsonl", "count": count,
                "total": 48_210, "share": count / 48_210, "limit": None, "unit": "rows", "examples": [], "what": what,
                "fix": "look at them"}  # fmt: skip

    figures = {
        "set": "train", "rows": 60_000, "tokens": 60_000 * 410, "supervised_tokens": 60_000 * 130,
        "sources": [source("support.jsonl", 48_210), source("manuals", 11_790)], "distinct_prompts": 59_000,
        "prompt_prefixes": [], "answer_prefixes": [], "distinct_n": {}, "question_languages": {},
        "answer_languages": {}, "packs": None, "num_clusters": None, "clusters": [],
    }  # fmt: skip
    findings = [found("exact_duplicate", "warning", "rows that are in the set before, word for word", 412),
                found("answer_cut", "info", "answers that do not end", 31)]  # fmt: skip
    document = {"findings": findings, "figures": [figures], "render_diffs": [], "max_seq_len": 2048, "is_cheap": True,
                "seconds": 2.5, "version": 1}  # fmt: skip
    put(folder / "audit.json", json.dumps(document), ago_s=3600)


def receipt(folder: Path, *, steps: int, finished: bool, restart_at: int | None = None) -> None:
    """With a plan, a price, and two sessions where ``restart_at`` says before which step the second begins."""
    total_s = 120 + 4.2 * steps
    sessions: list[dict[str, Any]] = []
    if restart_at is not None:
        sessions.append({"started": "2026-03-04T08:00:00+00:00", "first_step": 1, "elapsed_s": 120 + 4.2 * restart_at,
                         "cost_usd": (120 + 4.2 * restart_at) / 360, "ended": False, "preempted_by": "SIGTERM"})  # fmt: skip
    before = sum(each["elapsed_s"] for each in sessions)
    sessions.append({"started": run_folders.iso(3590), "first_step": (restart_at or 0) + 1, "elapsed_s": total_s - before,
                     "cost_usd": (total_s - before) / 360, "ended": finished, "preempted_by": None})  # fmt: skip
    planned = {"peak_allocated_bytes": 63 * 2**30, "steps": steps, "tokens": 65_200 * steps, "evaluations": 10,
               "checkpoints": 4, "checkpoint_bytes": 512 * 2**20, "final_bytes": 168 * 2**20, "step_s": 3.9,
               "tokens_per_s": 16_700, "total_s": 4.1 * steps}  # fmt: skip
    document: dict[str, Any] = {
        "format": 1, "finished": finished, "planned": planned,
        "versions": {"python": "3.11.7", "sft_dist": "0.1.0", "torch": "2.13.0+cu130"},
        "identity": {"model.path": "meta-llama/Llama-3.1-8B", "data.train": "60,000 rows in 12,211 sequences, 9c1d",
                     "train.seed": 1},
        "topology": {"device": "NVIDIA H100 80GB HBM3", "processes": 8, "nodes": 1, "strategy": "fsdp2",
                     "sequence_parallel": 1},
        "price": {"usd": 10.0, "jpy_per_usd": 150.0, "name": "p5.48xlarge, on demand"}, "sessions": sessions,
    }  # fmt: skip
    if finished:
        document["actual"] = {"peak_allocated_bytes": 61.2 * 2**30, "first_step": 1, "steps": steps,
                              "tokens": 65_250 * steps, "evaluations": 10, "checkpoint_bytes": 511 * 2**20,
                              "final_bytes": 168 * 2**20, "step_s": 4.1, "steady_steps": steps - 3,
                              "tokens_per_s": 15_900.0, "total_s": total_s, "cost_usd": total_s / 360}  # fmt: skip
        document["waste"] = {"session_s": total_s, "starting_s": 95.0, "rehearsing_s": 0.0, "evaluating_s": 110.0,
                             "saving_s": 12.0, "finishing_s": 31.0, "data_wait_s": 4.0, "idle_s": 0.0, "uneven_s": 66.0,
                             "fill": 0.997}  # fmt: skip
    put(folder / "receipt.json", json.dumps(document), ago_s=600)


def whole_run(
    folder: Path, *, steps: int = 1200, finished: bool = True, settings: dict[str, Any] | None = None
) -> Path:
    """A run with all that a report can show: restarted once, with events, answers, audit, bill."""
    written = lines(steps)
    event = {"step": steps // 2, "event": "skipped", "because": "spike", "of_step": steps // 2, "ranks": [1],
             "of_loss": 9.1, "median_loss": 0.9}  # fmt: skip
    write_metrics(folder, [*written, event])
    receipt(folder, steps=steps, finished=finished, restart_at=steps // 3)
    audit(folder)
    answers(folder, range(0, steps + 1, max(1, steps // 6)))
    put(folder / "config.yaml", write_yaml(SETTINGS if settings is None else settings), ago_s=3600)
    for step in (steps // 3, 2 * steps // 3, steps):
        run_folders.checkpoint(folder, step, ago_s=600)
    if finished:
        (folder / "final").mkdir(exist_ok=True)
        run_folders.beat(folder, phase="done", step=steps, num_steps=steps, exit_code=0)
    else:
        run_folders.beat(folder, step=steps, num_steps=2 * steps, step_s=4.2)
    return folder
