"""``sft-dist eval --lm-eval``: tasks over local files, as lm-eval itself scores the artefact of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sft-dist[lm-eval]'")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sft_dist.cli import main
from sft_dist.errors import ConfigError
from sft_dist.train.eval_subject import subject_of
from sft_dist.train.evaluating import AskedTasks, evaluate_subject
from tests.helpers.harness import write_tasks
from tests.helpers.trained_run import train_run

LORA = {"type": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"}
NAMES = ("choices", "answers", "texts")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """It knows the answers by heart."""
    return train_run(tiny_base, tmp_path_factory.mktemp("asked"), method=LORA)


def ask(path: Path, out: Path, asked: AskedTasks, *overrides: str) -> dict[str, Any]:
    subject = subject_of(str(path), list(overrides), data=[], checkpoint=None, out=out, needs_rows=False)
    evaluate_subject(subject, with_base=True, tasks=asked)
    found: dict[str, Any] = json.loads((out / "eval.json").read_text())
    return found


def by_lm_eval(base: Path, adapter: Path | None, tasks: Path, *, chats: bool) -> dict[str, float]:
    model: Any = HFLM(
        pretrained=str(base),
        peft=None if adapter is None else str(adapter),
        dtype="float32",
        batch_size=2,
        device="cpu",
    )
    found: Any = simple_evaluate(
        model, tasks=list(NAMES), task_manager=TaskManager(include_path=str(tasks)), apply_chat_template=chats,
        fewshot_as_multiturn=chats, bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    return {
        f"lm_eval/{task}/{key.removesuffix(',none')}": value
        for task, of_task in found["results"].items()
        for key, value in of_task.items()
        if key.endswith(",none") and "_stderr" not in key
    }


@pytest.mark.ci
@pytest.mark.parametrize("chats", [True, False])
def test_a_run_and_its_base_have_the_scores_that_lm_eval_finds(
    trained: Path, tiny_base: Path, tasks: Path, tmp_path: Path, chats: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows that the run was trained on are not there, and none are held out."""
    kept = (trained.parent / "train.jsonl").rename(trained.parent / "gone.jsonl")
    try:
        found = ask(trained, tmp_path / "out", AskedTasks(NAMES, str(tasks), None, None if chats else False))
    finally:
        kept.rename(trained.parent / "train.jsonl")
    base, tuned = found["metrics"]["base"], found["metrics"]["tuned"]
    assert base == pytest.approx(by_lm_eval(tiny_base, None, tasks, chats=chats), rel=1e-5)
    assert tuned == pytest.approx(by_lm_eval(tiny_base, trained / "final", tasks, chats=chats), rel=1e-5)
    if chats:
        assert tuned["lm_eval/answers/exact_match"] == 0.6  # of five questions, two were never seen
        assert base["lm_eval/answers/exact_match"] == 0
    assert found["lm_eval"]["standard_errors"]["base"]["lm_eval/choices/acc"] > 0
    assert found["lm_eval"]["apply_chat_template"] is chats
    assert found["lm_eval"]["num_examples"]["choices"]["effective"] == 5
    shown = capsys.readouterr().out
    assert "lm_eval/choices/acc" in shown
    assert " ± " in shown
    assert ("prompts go through the chat template" in shown) is chats


@pytest.mark.ci
def test_two_processes_find_what_one_finds(trained: Path, tasks: Path, tmp_path: Path) -> None:
    alone = ask(trained, tmp_path / "alone", AskedTasks(NAMES, str(tasks), 3))
    done = subprocess.run(
        [
            sys.executable, "-m", "sft_dist.launch", "torchrun", "--nproc-per-node", "2", "eval", str(trained),
            "sharding={strategy: fsdp2}", "--lm-eval", ",".join(NAMES), "--lm-eval-tasks", str(tasks), "--limit", "3",
            "--out", str(tmp_path / "two"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two/eval.json").read_text())
    assert two["metrics"] == alone["metrics"]
    assert two["lm_eval"] == alone["lm_eval"]
    assert two["lm_eval"]["num_examples"]["answers"]["effective"] == 3


def test_a_model_without_rows(tiny_base: Path, tasks: Path, tmp_path: Path) -> None:
    found = ask(tiny_base, tmp_path / "out", AskedTasks(("choices",), str(tasks)), "precision.compute=fp32")
    assert list(found["metrics"]) == ["base"]
    assert set(found["metrics"]["base"]) == {"lm_eval/choices/acc", "lm_eval/choices/acc_norm"}


def test_tasks_that_are_not_there(trained: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no task nowhere"):
        ask(trained, tmp_path / "out", AskedTasks(("nowhere",), str(tasks)))
    broken = tmp_path / "broken"
    broken.mkdir()
    text = (tasks / "choices.yaml").read_text().replace("questions.jsonl", "lost.jsonl").replace("choices\n", "lost\n")
    (broken / "lost.yaml").write_text(text)
    with pytest.raises(ConfigError, match="the tasks cannot be loaded: FileNotFoundError"):
        ask(trained, tmp_path / "out", AskedTasks(("lost",), str(broken)))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--limit", "3"], "--limit has no effect without --lm-eval"),
        (["--lm-eval", "choices", "--lm-eval-tasks", "nowhere"], "nowhere is no folder here"),
    ],
)
def test_options_that_cannot_be(
    trained: Path, options: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(trained), *options])
    assert caught.value.code == 2
    assert what in capsys.readouterr().err


def test_without_the_package(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sft_dist.cli.evaluating.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(trained), "--lm-eval", "choices"])
    assert caught.value.code == 2
    assert "pip install 'sft-dist[lm-eval]'" in " ".join(capsys.readouterr().err.split())
