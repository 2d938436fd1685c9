"""``sft-dist eval``: a run beside its base, and a model alone, under any launcher and strategy."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.train.eval_subject import _step_of_final, subject_of
from sft_dist.train.evaluating import evaluate_subject
from tests.helpers.taught import PAIRS, conversation, write_rows
from tests.helpers.tiny_model import build_base
from tests.helpers.trained_run import train_run

SCORES = "eval.scores={metrics: [exact_match, chrf]}"
ANSWERS = "eval.answers={max_new_tokens: 40, rows_at_once: 2}"
LORA = {"type": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("held-out") / "rows.jsonl", [conversation(*pair) for pair in PAIRS])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """It knows the answers by heart."""
    return train_run(tiny_base, tmp_path_factory.mktemp("evaluated"), method=LORA)


def evaluate(path: Path, rows: Path, out: Path, *overrides: str, with_base: bool = True) -> dict[str, Any]:
    subject = subject_of(str(path), [SCORES, ANSWERS, *overrides], data=[str(rows)], checkpoint=None, out=out)
    evaluate_subject(subject, with_base=with_base)
    found: dict[str, Any] = json.loads((out / "eval.json").read_text())
    return found


def test_a_run_beside_its_base(trained: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # What was trained on need not be here any more.
    kept = (trained.parent / "train.jsonl").rename(trained.parent / "gone.jsonl")
    try:
        found = evaluate(trained, rows, tmp_path / "out")
    finally:
        kept.rename(trained.parent / "train.jsonl")
    assert found["checkpoint"] == str(trained / "checkpoints/step-00000060")
    base, tuned = found["metrics"]["base"], found["metrics"]["tuned"]
    assert (base["eval_scores/exact_match"], tuned["eval_scores/exact_match"]) == (0.0, 1.0)
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert tuned["eval_loss"] == pytest.approx(last["loss"], rel=1e-3)
    assert tuned["eval_loss"] < base["eval_loss"] / 2
    one = found["compared"]["exact_match"]
    assert (one["difference"], one["difference_interval"], one["tuned_better"]) == (1.0, [1.0, 1.0], 1.0)
    lines = [json.loads(line) for line in (tmp_path / "out/answers-tuned.jsonl").read_text().splitlines()]
    assert [(line["answer"], line["finish_reason"]) for line in lines] == [(answer, "stop") for _, answer in PAIRS]
    held_out = {"path": str(rows), "xxh3_128": xxhash.xxh3_128_hexdigest(rows.read_bytes())}
    assert (found["data"], found["seed"], found["files"]) == ([held_out], 0, {})
    assert (found["eval"]["answers"]["max_new_tokens"], found["eval"]["answers"]["max_examples"]) == (40, 200)
    assert found["eval"]["scores"]["metrics"] == ["exact_match", "chrf"]
    assert found["answers"]["tuned"] == {"examples": len(PAIRS), "cut": 0, "empty": 0}
    assert found["answers"]["base"]["cut"] > 0
    assert any("were cut at eval.answers.max_new_tokens" in note for note in found["notes"]["base"])
    assert {"sacrebleu", "torch", "python", "sft_dist"} <= found["versions"].keys()
    shown = capsys.readouterr().out
    assert "+1.0000  (+1.0000 to +1.0000)" in shown
    assert not (trained / "eval").exists()


def test_a_model_alone_has_the_perplexity_of_a_plain_loop(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    found = evaluate(tiny_base, rows, tmp_path / "out", "precision.compute=fp32")
    assert list(found["metrics"]) == ["base"]
    assert found["compared"] == {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    total, count = 0.0, 0
    for pair in PAIRS:
        messages = conversation(*pair)["messages"]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        asked = tokenizer.apply_chat_template(
            messages[:1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        # The template may end a turn with white space, which is no part of the answer.
        end = max(place for place, id in enumerate(ids) if tokenizer.decode([id]).strip()) + 1
        labels = torch.full((1, end), -100)
        labels[0, len(asked) :] = torch.tensor(ids[len(asked) : end])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids[:end]]), labels=labels).loss
        total, count = total + float(loss) * (end - len(asked)), count + end - len(asked)
    assert found["metrics"]["base"]["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.ci
def test_two_processes_find_what_one_finds(trained: Path, rows: Path, tmp_path: Path) -> None:
    alone = evaluate(trained, rows, tmp_path / "alone")
    done = subprocess.run(
        [
            sys.executable, "-m", "sft_dist.launch", "torchrun", "--nproc-per-node", "2", "eval", str(trained), SCORES,
            ANSWERS, "sharding={strategy: fsdp2}", "--data", str(rows), "--out", str(tmp_path / "two"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two/eval.json").read_text())
    for name in ("answers-base.jsonl", "answers-tuned.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert two["compared"] == alone["compared"]
    for state in ("base", "tuned"):
        assert two["metrics"][state]["eval_loss"] == pytest.approx(alone["metrics"][state]["eval_loss"], rel=1e-5)


def test_the_checkpoint_of_final_is_evaluated_and_not_the_newest(tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_text(json.dumps({"format": 1, "final": {"step": 20}}))
    for step in (20, 40):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    assert _step_of_final(tmp_path) == "20"
    (tmp_path / "checkpoints/step-00000020").rmdir()
    assert _step_of_final(tmp_path) == "latest", "it is gone"
    (tmp_path / "receipt.json").unlink()
    assert _step_of_final(tmp_path) == "latest"


def test_the_runs_own_long_texts_are_not_asked_of_other_rows(trained: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    settings["eval"]["long_texts"] = {"paths": ["book.txt"]}
    for file in (run / "config.yaml", *run.glob("checkpoints/*/config.yaml")):
        file.write_text(yaml.safe_dump(settings))

    def long_texts(data: list[str], *overrides: str) -> list[str] | None:
        found = subject_of(str(run), list(overrides), data=data, checkpoint=None, out=tmp_path).config.eval.long_texts
        return None if found is None else found.paths

    assert long_texts([str(rows)]) is None
    assert long_texts([str(rows), "book.txt"]) == ["book.txt"]
    assert long_texts([str(rows)], "eval.long_texts={paths: [other.txt]}") == ["other.txt"]


def test_mistakes(trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    for path, data, what in (
        (tiny_base, [], "is a model, and no rows are given"),
        (trained / "final", [], "is an adapter without its run, and no rows are given"),
        (trained, [], "the run has held out no rows"),
        (tmp_path / "nowhere", ["x.jsonl"], "nowhere"),
    ):
        with pytest.raises(ConfigError) as caught:
            subject_of(str(path), [], data=data, checkpoint=None, out=tmp_path / "out")
        assert what in caught.value.what
    with pytest.raises(ConfigError, match="no complete checkpoint of step 7"):
        subject_of(str(trained), [], data=["x.jsonl"], checkpoint="7", out=None)


def test_an_adapter_without_its_run(trained: Path, rows: Path, tmp_path: Path) -> None:
    """What it scores is what its run scores."""
    adapter = Path(shutil.copytree(trained / "final", tmp_path / "adapter"))
    of_run, alone = evaluate(trained, rows, tmp_path / "run"), evaluate(adapter, rows, tmp_path / "out")
    assert alone["adapter"] == str(adapter)
    for state in ("base", "tuned"):
        assert alone["metrics"][state] == pytest.approx(of_run["metrics"][state], rel=1e-6)
        name = f"answers-{state}.jsonl"
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "run" / name).read_text()
    assert alone["metrics"]["tuned"]["eval_scores/exact_match"] == 1.0


@pytest.mark.ci
def test_an_adapter_that_peft_made(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """Nothing of ours is beside it; a whole part comes with it, and its base is somewhere else."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    tuned = get_peft_model(model, settings)
    tuned.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "models/lost"}))
    with pytest.raises(ConfigError, match="models/lost, is not on this machine") as caught:
        subject_of(str(tmp_path / "adapter"), [], data=[str(rows)], checkpoint=None, out=None)
    assert "--base-model" in caught.value.fix
    found = {}
    for strategy in ("ddp", "zero3"):
        subject = subject_of(
            str(tmp_path / "adapter"), ["precision.compute=fp32", f"sharding.strategy={strategy}"], data=[str(rows)],
            checkpoint=None, out=tmp_path / strategy, base=str(tiny_base),
        )  # fmt: skip
        evaluate_subject(subject, with_base=True)
        found[strategy] = json.loads((tmp_path / strategy / "eval.json").read_text())["metrics"]
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "merged")
    for strategy, of_adapter in found.items():
        for state, model_folder in (("base", tiny_base), ("tuned", tmp_path / "merged")):
            out = tmp_path / f"{strategy}-{state}"
            subject = subject_of(
                str(model_folder), ["precision.compute=fp32"], data=[str(rows)], checkpoint=None, out=out
            )
            evaluate_subject(subject, with_base=False)
            expected = json.loads((out / "eval.json").read_text())["metrics"]["base"]["eval_loss"]
            assert of_adapter[state]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_adapters_that_cannot_be(trained: Path, rows: Path, tiny_base: Path, tmp_path: Path) -> None:
    def copy(name: str, **changes: object) -> Path:
        folder = Path(shutil.copytree(trained / "final", tmp_path / name))
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    for name, changes, what in (
        ("prefix", {"peft_type": "PREFIX_TUNING"}, "is a prefix tuning adapter without its run"),
        ("ranks", {"rank_pattern": {"q_proj": 2}}, "has rank_pattern"),
    ):
        with pytest.raises(ConfigError, match=what):
            subject_of(str(copy(name, **changes)), [], data=[str(rows)], checkpoint=None, out=None)
    with pytest.raises(ConfigError, match="--base-model is for an adapter without its run"):
        subject_of(str(trained), [], data=[str(rows)], checkpoint=None, out=None, base=str(tiny_base))
    other = build_base(tmp_path / "other", hidden_size=32)
    subject = subject_of(
        str(copy("wrong")), [], data=[str(rows)], checkpoint=None, out=tmp_path / "out", base=str(other)
    )
    with pytest.raises(CheckpointError, match=r"differs in .* tensors from the adapter"):
        evaluate_subject(subject, with_base=False)
