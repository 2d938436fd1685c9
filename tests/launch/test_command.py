"""The part of a launch that does not depend on the launcher, in one process."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from sft_dist.cli.app import app
from sft_dist.launch import accelerate, deepspeed, torchrun
from sft_dist.launch.command import (
    DRY_RUN,
    REHEARSALS,
    WITH_VALUE,
    _share_cores,
    is_for_all_processes,
    runs_everywhere,
    split_debug,
    split_resume,
    start,
)
from sft_dist.launch.wrong_words import refused
from sft_dist.runtime.failure import with_config
from tests.helpers.checkpoints import make_checkpoint
from tests.launch.conftest import REPOSITORY, SMALLEST


@pytest.mark.parametrize(
    ("command", "resume", "rest"),
    [
        ("train c.yaml a.b=1", "never", "train c.yaml a.b=1"),
        ("train c.yaml --resume auto a.b=1", "auto", "train c.yaml a.b=1"),
        ("train --resume=runs/x/step-1 c.yaml", "runs/x/step-1", "train c.yaml"),
        ("train c.yaml --resume auto --resume never", "never", "train c.yaml"),
        ("train c.yaml --resume", "never", "train c.yaml --resume"),
        ("train c.yaml --resumed auto", "never", "train c.yaml --resumed auto"),
        ("train c.yaml --profile 5 --resume auto --allow-change=train.seed", "auto", "train c.yaml"),
    ],
)
def test_resume_is_found_wherever_it_stands(command: str, resume: str, rest: str) -> None:
    assert split_resume(command.split()) == (resume, rest.split())


def test_every_option_of_train_is_known() -> None:
    """One that is not would be taken for a mistake, which a single process tells."""
    options = [each for each in get_command(app).commands["train"].params if each.param_type_name == "option"]
    flags = {each.opts[0] for each in options if each.is_flag}
    assert flags - {"--help"} == {*REHEARSALS, DRY_RUN}
    assert {each.opts[0] for each in options} - flags == set(WITH_VALUE)


def test_debug_may_stand_anywhere() -> None:
    assert split_debug(["--x", "1", "train", "--debug", "c.yaml"]) == (["--x", "1", "train", "c.yaml"], True)
    assert split_debug(["train", "c.yaml"]) == (["train", "c.yaml"], False)
    assert split_debug([]) == (["--help"], False)


def test_what_is_checked_and_what_the_processes_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("run.yaml").write_text(SMALLEST, encoding="utf-8")
    Path("a.jsonl").touch()
    make_checkpoint(Path("runs/x"), 1)
    started = []

    def go(*command: str) -> int:
        def launch(arguments: list[str]) -> int:
            started.append(arguments)
            return 6

        return start(command, debug=command[-1] == "train.seed=7", prepare=lambda: 2, launch=launch)

    # A folder that holds a run is an error, unless that run is resumed.
    assert go("train", "run.yaml") == 2
    assert "already holds a run" in capfd.readouterr().err
    assert go("train", "--resume", "runs/x/checkpoints/step-9", "run.yaml") == 2
    assert "runs/x/checkpoints/step-9: no such checkpoint" in capfd.readouterr().err
    assert started == []
    assert go("train", "--resume=auto", "run.yaml") == 6
    assert go("train", "run.yaml", "--resume", "runs/x/checkpoints/step-00000001", "train.seed=7") == 6
    assert go("train", "run.yaml", "--rehearse", "--resume=auto", "--rehearse-only") == 6
    assert go("train", "run.yaml", "--profile", "5", "--resume=auto") == 6
    assert capfd.readouterr().out == "starting 2 processes on this machine\n" * 4
    assert started.pop() == ["train", "run.yaml", "--profile", "5", "--resume=auto"]
    assert started.pop() == ["train", "run.yaml", "--rehearse", "--resume=auto", "--rehearse-only"]
    assert started == [
        ["train", "--resume=auto", "run.yaml"],
        ["train", "run.yaml", "--resume", "runs/x/checkpoints/step-00000001", "train.seed=7", "--debug"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "calibrate --gpu h100",
        "plan run.yaml --probe 5",
        "plan --probe=5 run.yaml a.b=1",
        "replay runs/x --check",
        "doctor c.yaml",
    ],
)
def test_what_measures_runs_in_all_processes(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    started: list[list[str]] = []
    assert start(command.split(), debug=False, prepare=lambda: 2, launch=lambda all: started.append(all) or 0) == 0
    assert started == [command.split()]
    assert capfd.readouterr().out == "starting 2 processes on this machine\n"


@pytest.mark.parametrize("command", ["plan run.yaml", "plan --help --probe 3", "train c.yaml --probe 3"])
def test_a_plan_without_steps_needs_one(command: str) -> None:
    assert not is_for_all_processes(command.split())


@pytest.mark.parametrize("command", ["--profile 5", "--resume auto", "--help", "status runs/x"])
def test_a_mistake_is_told_by_one(command: str) -> None:
    assert not runs_everywhere(command.split())


def test_a_dry_run_is_told_how_many_would_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process plans for those that the launcher would start, unless the configuration says how many there are."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(SMALLEST, encoding="utf-8")
    ran: list[list[str]] = []

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        ran.append(arguments[3:])
        return subprocess.CompletedProcess(arguments, 3)

    monkeypatch.setattr(subprocess, "run", run)
    for said in ([], ["hardware.gpus_per_node=8"], ["--nonsense"]):
        code = start(["train", "run.yaml", "--dry-run", *said], debug=False, prepare=lambda: 2, launch=lambda _: 9)
        assert code == 3
    assert ran == [
        ["train", "run.yaml", "--dry-run", "hardware.gpus_per_node=2"],
        ["train", "run.yaml", "--dry-run", "hardware.gpus_per_node=8"],
        ["train", "run.yaml", "--dry-run", "--nonsense"],
    ]


def test_torchrun_hands_on_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("run.yaml").write_text(SMALLEST, encoding="utf-8")
    Path("a.jsonl").touch()
    ran = []

    def run_elastic(work: Callable[[str], None], **_: object) -> int:
        work(str(tmp_path))
        return 0

    monkeypatch.setattr(torchrun, "run_elastic", run_elastic)
    monkeypatch.setattr(torchrun.torch_run, "run", ran.append)
    command = ["train", "run.yaml", "--resume", "auto", "train.seed=7"]
    assert torchrun.main(["--nproc-per-node", "2", *command]) == 0
    assert [ran[0].module, ran[0].training_script, *ran[0].training_script_args] == [True, "sft_dist", *command]


def test_the_cores_are_shared_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for said, num_processes, expected in ((None, 4, "3"), (None, 5, "2"), (None, 16, "1"), ("7", 4, "7")):
        if said is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        _share_cores(num_processes)
        assert os.environ["OMP_NUM_THREADS"] == expected


def test_the_commands_of_the_page_are_understood() -> None:
    page = (REPOSITORY / "docs" / "launching.md").read_text(encoding="utf-8")
    parsers = {"torchrun": torchrun._parse, "accelerate": accelerate._parse, "deepspeed": deepspeed._parse}
    commands = re.findall(r"`launch/(\w+)\.sh (.*?)`", page)
    assert {name for name, _ in commands} == set(parsers)
    for name, words in commands:
        _, command = parsers[name](shlex.split(words.replace(" N ", " 1 ")))
        assert command == ["train", "run.yaml"]


@pytest.mark.parametrize(
    ("launcher", "words", "what", "fix"),
    [
        ("torchrun", "--num_processes 2 train c.yaml", "has no option --num_processes", "it is called --nproc-per-node"),
        ("torchrun", "--num-gpus=2 train c.yaml", "has no option --num-gpus", "it is called --nproc-per-node here"),
        ("accelerate", "--nproc-per-node 2 train c.yaml", "has no option --nproc-per-node", "--num_processes here (of"),
        ("accelerate", "--nnodes 2 train c.yaml", "has no option --nnodes", "it is called --num_machines here"),
        ("deepspeed", "--nproc_per_node 2 train c.yaml", "has no option --nproc_per_node", "it is called --num_gpus"),
        ("deepspeed", "--num_gpus 2 c.yaml a.b=1", "c.yaml stands where the command belongs",
         "write train before it: launch/deepspeed.sh --num_gpus 2 train c.yaml a.b=1"),
        ("torchrun", "c.yaml", "c.yaml stands where the command belongs", "launch/torchrun.sh train c.yaml"),
    ],
)  # fmt: skip
def test_words_of_another_launcher(
    launcher: str, words: str, what: str, fix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    main = {"torchrun": torchrun.main, "accelerate": accelerate.main, "deepspeed": deepspeed.main}[launcher]
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    first, second = err.splitlines()
    assert (out, first.startswith(f"error: launch/{launcher}.sh")) == ("", True)
    assert what in first
    assert fix in second


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("torchrun", "--nproc-per-node 2 --nnodes 1 --master-addr a --node_rank 0 train c.yaml a.num_gpus=1"),
        ("accelerate", "--config_file c.yaml --num_processes 2 train c.yaml"),
        ("deepspeed", "--num_gpus 2 --node_rank 0 --master_addr a train c.yaml --nnodes"),
        ("torchrun", "plan c.yaml --probe 5"),
        ("torchrun", "--help"),
    ],
)
def test_a_launchers_own_words_pass(launcher: str, words: str) -> None:
    assert refused(launcher, words.split(), debug=False) is None


def test_a_fix_names_the_configuration() -> None:
    fetch = "sft-dist model fetch CONFIG"
    words = ["train", "my run.yaml", "model.path=a/b", "optim.lr=1", "--resume", "auto"]
    assert with_config(fetch, words) == "sft-dist model fetch 'my run.yaml' model.path=a/b"
    assert (
        with_config("see `sft-dist plan CONFIG`", ["submit", "c.yaml", "a.b=1"]) == "see `sft-dist plan c.yaml a.b=1`"
    )
    assert with_config(fetch, ["chat", "runs/x"]) == fetch
    assert with_config("write CONFIGS", words) == "write CONFIGS"
