"""A whole run from the shell: two processes under FSDP2, from JSON rows to an artefact."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [
    {"messages": [{"role": "user", "content": f"{n} たす {n}"}, {"role": "assistant", "content": f"{2 * n} です。"}]}
    for n in range(24)
]

# Not the tokenizer's own, which names the roles in full.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a\n{% endif %}"
)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, rows in (("train", ROWS[:17]), ("eval", ROWS[17:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    (folder / "template.jinja").write_text(TEMPLATE)
    config = {
        "model": {"path": str(tiny_base)},
        "data": {
            "chat_template": str(folder / "template.jinja"),
            "train": [{"path": str(folder / "train.jsonl")}], "eval": [{"path": str(folder / "eval.jsonl")}],
            "max_seq_len": 256,
        },
        "precision": {"compute": "fp32"},
        "sharding": {"strategy": "fsdp2"},
        "optim": {"lr": 3.0e-3},
        "train": {"global_batch_size": 3, "num_epochs": 4},
        "eval": {"every_steps": 3},
        "logging": {"wandb": {"mode": "offline", "project": "tests"}},
        "output_dir": str(folder / "out"),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist.launch.torchrun", "--nproc-per-node", "2", "train", str(folder / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "a run that goes well has nothing to say on stderr"
    assert "fsdp2 on 2 ranks, verified" in done.stdout
    return folder / "out"


def metrics(run_directory: Path, key: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def test_every_step_is_written(run_directory: Path) -> None:
    steps = metrics(run_directory, "loss")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["epoch"] == 4
    one_epoch = steps[: len(steps) // 4]
    supervised = sum(len(f"{2 * n} です。".encode()) + 1 for n in range(17))
    assert sum(line["supervised_tokens"] for line in one_epoch) == supervised, "each answer and its end of turn, once"
    for line in steps:
        assert line["tokens_per_s"] == pytest.approx(line["num_tokens"] / line["step_time_s"])
        assert line["tokens_per_s_per_device"] == pytest.approx(line["tokens_per_s"] / 2)
        assert 0 <= line["data_wait_s"] < line["step_time_s"]
        assert line["peak_memory_gib"] > 0


def test_evaluations_are_where_they_should_be(run_directory: Path) -> None:
    num_steps = len(metrics(run_directory, "loss"))
    at = [line["step"] for line in metrics(run_directory, "eval_loss")]
    assert at == sorted({0, *range(3, num_steps + 1, 3), num_steps})
    for line in metrics(run_directory, "eval_loss"):
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))


def test_lines_are_in_the_order_of_events(run_directory: Path) -> None:
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines, key=lambda line: (line["step"], "eval_loss" in line))


def test_final_has_the_loss_that_was_measured(run_directory: Path) -> None:
    """Recomputed from the artefact by plain transformers: its tokenizer, its template, its weights, its masks by hand."""
    tokenizer = AutoTokenizer.from_pretrained(run_directory / "final")
    assert tokenizer.chat_template == TEMPLATE, "the one that the run was given"
    model = AutoModelForCausalLM.from_pretrained(run_directory / "final", dtype=torch.float32)
    total, count = 0.0, 0
    for row in ROWS[17:]:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(row["messages"][1]["content"] + "<|im_end|>", add_special_tokens=False)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert total / count == pytest.approx(metrics(run_directory, "eval_loss")[-1]["eval_loss"], rel=1e-5)


def test_generation_stops_where_training_taught_it_to(run_directory: Path) -> None:
    eos = json.loads((run_directory / "final/generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(run_directory / "final")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ([eos] if isinstance(eos, int) else eos)


def test_resolved_config_is_kept_and_loads(run_directory: Path) -> None:
    from sft_dist.config.load import load_config

    kept = load_config(run_directory / "config.yaml")
    assert kept.train.seed == 0
    assert kept.sharding.strategy == "fsdp2"


def test_wandb_wrote_offline(run_directory: Path) -> None:
    assert list((run_directory / "wandb").glob("offline-run-*/*.wandb"))
