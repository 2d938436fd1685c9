"""What the command line prints and exits with. ``run_training`` is replaced: the commands are tested, not training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

import sft_dist
from sft_dist.cli import main
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError, ConfigError, DataError, ShardingMismatch, TrainingDiverged
from sft_dist.runtime import failure
from sft_dist.train.asked import Asked

SMALLEST = """\
model: {path: m}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: runs/x
"""
REPOSITORY = Path(sft_dist.__file__).parents[1]


@pytest.fixture(autouse=True)
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.yaml in the current directory, and no launcher around this test."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(SMALLEST, encoding="utf-8")
    Path("a.jsonl").parent.mkdir(exist_ok=True)
    Path("a.jsonl").touch()
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exit_code(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], list[Config]]:
    """Lets ``run_training`` raise what is given; yields the configs it was called with."""

    def replace(error: BaseException | None) -> list[Config]:
        calls: list[Config] = []

        def run_training(config: Config, asked: Asked) -> None:
            calls.append(config)
            if asked.rehearsing != "no":
                print(f"rehearsing {asked.rehearsing}")
            if asked.resume != "never":
                print(f"resume {asked.resume}")
            if error is not None:
                raise error

        module = types.ModuleType("sft_dist.train.run")
        module.run_training = run_training  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sft_dist.train.run", module)
        return calls

    return replace


Run = Callable[..., tuple[int, str, str]]
Training = Callable[[BaseException | None], list[Config]]


# config


def test_version(exit_code: Run) -> None:
    assert exit_code("--version") == (0, f"sft-dist {sft_dist.__version__}\n", "")


def test_check(exit_code: Run) -> None:
    code, out, err = exit_code("config", "check", "run.yaml")
    assert (code, err) == (0, "")
    valid, model, rest = out.splitlines()
    assert valid == "run.yaml: valid"
    assert model.startswith("  not checked: model.path: m is not in the local hub cache")
    assert model.endswith(
        "(nothing of it is there), nor is it among the known models: neither the model nor what goes together with it "
        "was checked; bring it here by: "
        "sft-dist model fetch CONFIG --no-weights"
    )
    assert rest == "  not checked: data, chat template, weights, the memory of the devices"
    code, out, _ = exit_code("config", "check", "run.yaml", "model.path=runs/demo/base")
    assert code == 0
    assert "runs/demo/base is neither a model folder nor a hub id" in out
    assert "was checked; give an existing folder or ORGANISATION/NAME" in out, "no fetching would bring it"


def test_check_with_a_model(exit_code: Run, tiny_base: Path) -> None:
    lora = ("method.type=lora", "method.target_modules=[q_proj]", "sharding.strategy=fsdp2", f"model.path={tiny_base}")
    code, out, err = exit_code("config", "check", "run.yaml", "--processes", "3", *lora)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "run.yaml: valid",
        f"  checked: every key; {tiny_base}: 160,448 parameters, 4,096 of them trained",
        "  checked: lora with adamw on 3 processes under fsdp2 with activation checkpointing none, selective or full",
        "  not checked: data, chat template, weights, the memory of the devices",
    ]
    code, out, _ = exit_code("config", "check", "run.yaml", f"model.path={tiny_base}")
    assert (
        "full with adamw on 1 process under ddp or fsdp2 with activation checkpointing none, selective or full" in out
    )


def test_check_with_a_known_model(exit_code: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    known = ("model.path=meta-llama/Llama-3.2-1B", "sharding.strategy=fsdp2")
    code, out, err = exit_code("config", "check", "run.yaml", "--processes", "2", *known)
    assert (code, err) == (0, "")
    assert out.splitlines()[1:4] == [
        "  checked: every key; meta-llama/Llama-3.2-1B: 1,235,814,400 parameters, 1,235,814,400 of them trained",
        "  checked: full with adamw on 2 processes under fsdp2 with activation checkpointing none, selective or full",
        "  not checked: the model's own config.json is not here; in its place: the table of known models (config.json of "
        "meta-llama/Llama-3.2-1B)",
    ]
    code, _, err = exit_code("config", "check", "run.yaml", "model.path=google/gemma-2-9b")
    assert (code, "attn_logit_softcapping=50.0, which is not supported" in err) == (2, True)


def test_check_says_which_files_are_not_here(exit_code: Run, tiny_base: Path) -> None:
    files = ("method={type: lora, init_from: adapter}", "data.chat_template=chat.jinja", f"model.path={tiny_base}")
    code, out, _ = exit_code("config", "check", "run.yaml", *files)
    assert code == 0
    assert "  not checked: method.init_from adapter is not here\n" in out
    assert "  not checked: data.chat_template chat.jinja is not here\n" in out
    code, out, _ = exit_code("config", "check", "run.yaml", "data.chat_template=chatml", f"model.path={tiny_base}")
    assert (code, "is not here" in out) == (0, False)


def test_check_says_which_files_of_evaluations_are_not_here(exit_code: Run, tmp_path: Path, tiny_base: Path) -> None:
    def said(scorer: str, texts: str, *more: str) -> str:
        section = (
            f"eval={{scores: {{metrics: [custom, json_schema], custom: '{scorer}:judge', json_schema: schema.json}}, "
            f"samples: {{file: questions.jsonl}}, long_texts: {{paths: ['{texts}']}}}}"
        )
        code, out, _ = exit_code("config", "check", "run.yaml", "data.eval=[{path: held_out.jsonl}]", section, *more)
        assert code == 0
        return out

    for more in ([], [f"model.path={tiny_base}"]):
        out = said("nowhere.py", "books/*.txt", *more)
        for file in (
            "eval.scores.custom nowhere.py", "eval.scores.json_schema schema.json", "eval.samples.file questions.jsonl",
            "eval.long_texts.paths.0 books/*.txt",
        ):  # fmt: skip
            assert f"  not checked: {file} is not here\n" in out
    (tmp_path / "own.py").write_text("raise RuntimeError")
    (tmp_path / "book.txt").write_text("Once upon a time.")
    out = said(f"{tmp_path}/own.py", f"{tmp_path}/*.txt")
    assert "eval.long_texts" not in out
    assert f"not checked: eval.scores.custom {tmp_path}/own.py:judge is loaded when training starts" in out


def test_check_counts_weights_before_they_are_packed(exit_code: Run, tiny_base: Path) -> None:
    for kind in ("nf4", "int8"):
        qlora = f"method={{type: qlora, target_modules: [q_proj], quantization: {{type: {kind}}}}}"
        _, out, _ = exit_code("config", "check", "run.yaml", qlora, f"model.path={tiny_base}")
        assert f"{tiny_base}: 160,448 parameters, 4,096 of them trained\n" in out


def test_check_refuses_what_does_not_go_together(exit_code: Run, tiny_base: Path) -> None:
    knobs = "sharding={strategy: zero1, deepspeed_config: {zero_optimization: {reduce_bucket_size: 7}}}"
    code, out, err = exit_code("config", "check", "run.yaml", f"model.path={tiny_base}", knobs)
    assert (code, out) == (2, "")
    assert "zero_optimization.reduce_bucket_size has no effect in stage 1 with precision.compute bf16" in err
    Path("moe").mkdir()
    Path("moe/config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 8}))
    code, out, err = exit_code("config", "check", "run.yaml", "model.path=./moe")
    assert (code, out) == (2, "")
    assert "is a mixtral model with a mixture of 8 experts" in err


def test_check_reads_and_validates(exit_code: Run) -> None:
    assert exit_code("config", "check", "run.yaml", "train.sede=3") == (
        2,
        "",
        "error: run.yaml with 'train.sede=3': train.sede is not a key\n  fix: did you mean train.seed?\n",
    )
    assert exit_code("config", "check", "run.yaml", "train.max_steps=null") == (
        2,
        "",
        "error: run.yaml: the length of the run is missing\n  fix: set train.num_epochs or train.max_steps\n",
    )


def test_several_mistakes_stand_below_each_other(exit_code: Run) -> None:
    _, _, err = exit_code("config", "check", "run.yaml", "train.seed=-1", "optim.lr=-1")
    assert err.splitlines() == [
        "error: run.yaml with 'optim.lr=-1': optim.lr is -1; set optim.lr to a number > 0",
        "       run.yaml with 'train.seed=-1': train.seed is -1; set train.seed to a whole number >= 0",
        "  fix: correct these 2 places; `sft-dist config schema` describes every key",
    ]


def test_brackets_in_a_message_are_not_markup(exit_code: Run) -> None:
    _, _, err = exit_code("config", "check", "run.yaml", "output_dir=[red]")
    assert err == "error: run.yaml with 'output_dir=[red]': output_dir is [\"red\"]\n  fix: set output_dir to text\n"


def test_show_is_loadable_and_equal(exit_code: Run) -> None:
    code, out, err = exit_code("config", "show", "run.yaml", "optim.lr=1e-9")
    assert (code, err) == (0, "")
    Path("shown.yaml").write_text(out, encoding="utf-8")
    assert load_config("shown.yaml") == load_config("run.yaml", ["optim.lr=1e-9"])


def test_schema_describes_every_section(exit_code: Run) -> None:
    code, out, _ = exit_code("config", "schema")
    assert code == 0
    assert set(json.loads(out)["properties"]) == set(Config.model_fields)


# train


def test_train_passes_the_checked_config_on(exit_code: Run, training: Training) -> None:
    calls = training(None)
    assert exit_code("train", "run.yaml", "train.seed=7") == (0, "", "")
    assert [config.train.seed for config in calls] == [7]


@pytest.mark.parametrize("place", range(1, 4))
def test_resume_may_stand_anywhere(exit_code: Run, training: Training, place: int) -> None:
    training(None)
    arguments = ["train", "run.yaml", "train.seed=7"]
    arguments.insert(place, "--resume=auto")
    assert exit_code(*arguments) == (0, "resume auto\n", "")


@pytest.mark.parametrize(("option", "said"), [("--rehearse", "first"), ("--rehearse-only", "only")])
def test_a_rehearsal(exit_code: Run, training: Training, option: str, said: str) -> None:
    training(None)
    assert exit_code("train", option, "run.yaml") == (0, f"rehearsing {said}\n", "")
    code, _, err = exit_code("train", "run.yaml", option, "--dry-run")
    assert (code, err.splitlines()[1]) == (2, "  fix: give one of the two")


def test_a_checkpoint_that_is_not_there(exit_code: Run, training: Training) -> None:
    calls = training(None)
    code, _, err = exit_code("train", "run.yaml", "--resume", "absent")
    assert (code, err.splitlines()[0]) == (2, "error: --resume absent: no such checkpoint")
    assert calls == []


def test_train_validates_before_it_starts(exit_code: Run, training: Training) -> None:
    calls = training(None)
    assert exit_code("train", "run.yaml", "train.num_epochs=1")[0] == 2
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 4), (CheckpointError, 5), (TrainingDiverged, 6), (ShardingMismatch, 1)],
)
def test_named_failure(exit_code: Run, training: Training, error: type[ConfigError], code: int) -> None:
    training(error("a.jsonl: row 3 is empty", fix="remove it"))
    assert exit_code("train", "run.yaml") == (code, "", "error: a.jsonl: row 3 is empty\n  fix: remove it\n")


@pytest.mark.parametrize("place", range(3))
def test_debug_anywhere_shows_the_trace_too(exit_code: Run, training: Training, place: int) -> None:
    training(DataError("a", fix="b"))
    arguments = ["train", "run.yaml"]
    arguments.insert(place, "--debug")
    code, _, err = exit_code(*arguments)
    assert code == 4
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("error: a\n  fix: b\n")


def test_unexpected_failure_shows_its_trace(exit_code: Run, training: Training) -> None:
    training(ZeroDivisionError("our mistake"))
    code, _, err = exit_code("train", "run.yaml")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: our mistake\n")


def test_interrupt_is_one_line_without_a_trace(
    exit_code: Run, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(KeyboardInterrupt())
    code, out, err = exit_code("train", "run.yaml")
    assert (code, out, err.strip()) == (
        130,
        "",
        "interrupted: what was saved stays; --resume auto goes on from the last checkpoint",
    )
    monkeypatch.setenv("RANK", "1")
    assert exit_code("train", "run.yaml") == (130, "", "")


def test_exit_code_of_the_trainer_passes_through(exit_code: Run, training: Training) -> None:
    training(SystemExit(75))
    assert exit_code("train", "run.yaml") == (75, "", "")


@pytest.mark.parametrize(
    ("arguments", "what", "command"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?", "sft-dist"),
        (["--fast"], "No such option: --fast", "sft-dist"),
        (["train"], "Missing argument 'CONFIG'", "sft-dist train"),
        (["train", "run.yaml", "--fast"], "No such option: --fast", "sft-dist train"),
        (["train", "run.yaml", "--profile", "five"], "Invalid value for '--profile': ", "sft-dist train"),
        (["config", "chekc"], "No such command 'chekc'. Did you mean 'check'?", "sft-dist config"),
    ],
)
def test_usage_error(exit_code: Run, arguments: list[str], what: str, command: str) -> None:
    code, out, err = exit_code(*arguments)
    assert (code, out) == (2, "")
    error, fix = err.splitlines()
    assert error.startswith(f"error: {what}")
    assert fix.startswith(f"  fix: {command} [OPTIONS]")
    assert fix.endswith(f"; `{command} --help` explains each of them")


def test_a_group_of_commands_alone_shows_its_help(exit_code: Run) -> None:
    code, out, err = exit_code("data")
    assert (code, out) == (2, "")
    assert err.startswith("Usage: sft-dist data [OPTIONS] COMMAND")
    assert "error:" not in err


# Under a launcher


def test_a_mistake_that_all_ranks_share_is_told_once_under_torchrun(
    exit_code: Run, training: Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training(DataError("a", fix="b"))
    told = []
    for rank in ("1", "0", "2"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        told.append(exit_code("train", "run.yaml"))
    assert told == [(4, "", "error: a\n  fix: b\n"), (4, "", ""), (4, "", "")]
    training(DataError("another", fix="b"))
    assert exit_code("train", "run.yaml")[2] == "error: another\n  fix: b\n"


def test_under_other_launchers_it_is_left_to_the_first_of_the_node(
    exit_code: Run, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait long enough for the launcher to end them, and speak only if it does not."""
    waits: list[float] = []
    monkeypatch.setattr(failure.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    training(DataError("a", fix="b"))
    assert exit_code("train", "run.yaml") == (4, "", "error: a\n  fix: b\n")
    assert waits == [failure.SIBLING_GRACE_S]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code("train", "run.yaml")[2] == "error: a\n  fix: b\n"
    assert len(waits) == 1


def test_a_failure_of_one_rank_is_printed_at_once_with_its_rank(
    exit_code: Run, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure.time, "sleep", lambda _: pytest.fail("waited"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    training(CheckpointError("a", fix="b"))
    assert exit_code("train", "run.yaml") == (5, "", "[rank 1] error: a\n[rank 1]   fix: b\n")
    training(ZeroDivisionError("our mistake"))
    code, _, err = exit_code("train", "run.yaml")
    assert code == 1
    assert all(line.startswith("[rank 1] ") for line in err.splitlines())


# As a process


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_module_exits_with_the_code() -> None:
    finished = python("-m", "sft_dist", "config", "check", "run.yaml", "train.seed=-1")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (
        "error: run.yaml with 'train.seed=-1': train.seed is -1\n  fix: set train.seed to a whole number >= 0\n"
    )


def test_commands_answer_without_loading_torch() -> None:
    """Loading torch takes seconds; ``--help`` and a mistake in the configuration must not wait for it."""
    program = (
        "import sys, sft_dist.cli\n"
        "try: sft_dist.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "slow = ('torch', 'transformers', 'numpy', 'sft_dist.config.schema', 'rich.console')\n"
        "print([name for name in slow if name in sys.modules], file=sys.stderr)"
    )

    def loaded(*arguments: str) -> str:
        return python("-c", program, *arguments).stderr.splitlines()[-1]

    # Neither the schema nor what prints an error in colours: help has no use for them, and they are most of its time.
    assert loaded("--help") == loaded("train", "--help") == "[]"
    assert loaded("config", "show", "run.yaml") == "['sft_dist.config.schema']"
    assert loaded("train", "run.yaml", "train.seed=-1") == "['sft_dist.config.schema', 'rich.console']"


def test_help_takes_less_than_a_second() -> None:
    """Best of three: the first may still compile the modules it imports, and the machine may be busy."""

    def seconds() -> float:
        # Processor time of the child: on a busy machine the clock on the wall measures the neighbours.
        before = os.times()
        assert "train" in python("-m", "sft_dist", "--help").stdout
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 1
