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
        "hardware": {"price_per_hour": 1800.0, "fx": 150.0},
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
    assert "waste     of " in done.stdout
    assert "$3,600 an hour (your price)" in done.stdout
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


def test_the_bill_is_in_every_line(run_directory: Path) -> None:
    steps = metrics(run_directory, "loss")
    spent = [line["cost_usd"] for line in steps]
    assert spent == sorted(spent)
    # Two processes at $1800 an hour: a dollar a second.
    assert spent == pytest.approx([line["elapsed_s"] for line in steps])
    assert 0 < sum(line["step_time_s"] for line in steps) < steps[-1]["elapsed_s"]
    assert not any("mfu" in line for line in steps), "of what peak?"


def test_the_receipt_has_what_was_planned_and_what_came_out(run_directory: Path) -> None:
    receipt = json.loads((run_directory / "receipt.json").read_text())
    planned, actual = receipt["planned"], receipt["actual"]
    steps = metrics(run_directory, "loss")
    assert receipt["finished"]
    for key, value in (
        ("steps", len(steps)), ("tokens", sum(line["num_tokens"] for line in steps)),
        ("evaluations", len(metrics(run_directory, "eval_loss"))),
    ):  # fmt: skip
        assert planned[key] == actual[key] == value
        assert receipt["ratio"][key] == 1
    kept = sorted((run_directory / "checkpoints").iterdir())
    assert is_near(planned["checkpoint_bytes"], kept[-1])
    assert is_near(planned["final_bytes"], run_directory / "final", but=("tokenizer", "special", "chat"))
    assert is_near(actual["checkpoint_bytes"], kept[-1])
    assert is_near(actual["final_bytes"], run_directory / "final", but=("tokenizer", "special", "chat"))
    assert (planned["step_s"], actual["peak_allocated_bytes"]) == (None, None)
    assert receipt["not_planned"] == ["trained on a CPU: no seconds are planned, and device memory is not counted"]
    taken = [line["step_time_s"] for line in steps if line["epoch"] >= 0]
    assert min(taken) <= actual["step_s"] <= max(taken[2:])
    # A dollar a second; the last digit is of one rounding more.
    assert actual["cost_usd"] == pytest.approx(actual["total_s"], rel=1e-14)
    assert actual["total_s"] > steps[-1]["elapsed_s"], "with final/ and its proof"
    assert receipt["identity"]["data.train"].startswith("17 rows in ")
    assert receipt["topology"] == {
        "device": "cpu", "processes": 2, "nodes": 1, "strategy": "fsdp2", "sequence_parallel": 1, "launcher": "torchrun",
    }  # fmt: skip
    assert receipt["versions"]["torch"] == torch.__version__
    (session,) = receipt["sessions"]
    assert session["ended"]
    waste = receipt["waste"]
    beside = sum(waste[key] for key in ("starting_s", "evaluating_s", "saving_s", "finishing_s"))
    assert beside + sum(taken) <= waste["session_s"] * 1.001
    assert waste["saving_s"] > 0 < waste["evaluating_s"]
    assert not (run_directory / "plan.json").exists(), "no GPU is planned for"


def is_near(planned: int, folder: Path, *, but: tuple[str, ...] = ()) -> bool:
    """Within 1 % and 64 KiB a file."""
    sizes = [path.stat().st_size for path in folder.iterdir() if not (but and path.name.startswith(but))]
    return abs(planned - sum(sizes)) <= 0.01 * sum(sizes) + 65_536 * len(sizes)


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


def test_final_has_a_model_card(run_directory: Path) -> None:
    _, front, card = (run_directory / "final/README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    steps, (*_, evaluation) = metrics(run_directory, "loss"), metrics(run_directory, "eval_loss")
    trained = sum(line["supervised_tokens"] for line in steps)
    for told in (
        "17 rows in ", f"{len(steps)}, ", f"{trained:,} of them trained", f"{evaluation['eval_loss']:.4f} after step",
        "2 x cpu, fsdp2", f"torch {torch.__version__}", "type: full",
    ):  # fmt: skip
        assert told in card, told


def test_resolved_config_is_kept_and_loads(run_directory: Path) -> None:
    from sft_dist.config.load import load_config

    kept = load_config(run_directory / "config.yaml")
    assert kept.train.seed == 0
    assert kept.sharding.strategy == "fsdp2"


def test_wandb_wrote_offline(run_directory: Path) -> None:
    assert list((run_directory / "wandb").glob("offline-run-*/*.wandb"))
