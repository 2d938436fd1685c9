"""launch/accelerate.sh: processes start under every strategy that it can choose, and end as with the other launchers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sft_dist.errors import ConfigError
from sft_dist.launch.accelerate import _parse, _prepare, _read_config_file, main
from tests.launch.conftest import SMALLEST, InterruptedCode, Launch

TWO = ("accelerate.sh", "--num_processes", "2")
# sys.orig_argv: Python's own command line, as the launcher wrote it.
SHOWN = (
    "print(*map(os.environ.get, ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'OMP_NUM_THREADS')), "
    "os.environ['MASTER_PORT'] != '29500', os.environ.get('FSDP_VERSION'), os.environ.get('ACCELERATE_USE_DEEPSPEED'), "
    "*sys.orig_argv[sys.orig_argv.index('sft_dist'):])"
)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--use-fsdp", "--fsdp_version", "2"], ["2", "None"]),
        (["--use_deepspeed"], ["None", "true"]),
    ],
    ids=["fsdp2", "deepspeed"],
)
def test_processes_and_their_arguments(launch: Launch, options: list[str], chosen: list[str]) -> None:
    command = ["train", "run.yaml", "--resume", "auto", "data.train=[{path: a.jsonl}]", "train.seed=7"]
    finished = launch(*TWO, *options, *command, in_place_of_the_command=SHOWN)
    assert (finished.returncode, finished.stderr) == (0, "")
    starting, *printed = finished.stdout.splitlines()
    assert starting == "starting 2 processes on this machine"
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    expected = [[*r, "2", "2", threads, "True", *chosen, "sft_dist", *command] for r in ("00", "11")]
    assert sorted(printed) == [" ".join(words) for words in expected]


def test_one_process_alone(launch: Launch) -> None:
    """Accelerate does not start it by torchrun: what ended it arrives another way."""
    killed = launch("accelerate.sh", "train", "run.yaml", in_each_process="os.kill(os.getpid(), 9)")
    assert (killed.returncode, killed.stdout) == (128 + 9, "starting 1 process on this machine\n")
    assert killed.stderr.startswith("error: a process was ended by SIGKILL, and the run with it\n  fix: ")


def test_a_signal_to_the_launcher_ends_one_process_too(code_after_a_signal: InterruptedCode) -> None:
    command = ("accelerate.sh", "train", "run.yaml")
    assert code_after_a_signal(*command, number=signal.SIGTERM, processes=1) == 128 + 15


def prepared(*options: str) -> tuple[int, dict[str, object]]:
    parsed, _ = _parse([*options, "train", "run.yaml"])
    return _prepare(parsed, _read_config_file(parsed)), vars(parsed)


@pytest.fixture
def no_default_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sft_dist.launch.accelerate.default_config_file", str(tmp_path / "none.yaml"))
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back


@pytest.mark.usefixtures("no_default_file")
def test_what_is_chosen_when_nothing_is_said() -> None:
    count, options = prepared("--num-processes", "4", "--num_cpu_threads_per_process", "3")
    assert (count, options["multi_gpu"], options["main_process_port"]) == (4, True, 0)
    assert (options["mixed_precision"], options["dynamo_backend"], options["num_machines"]) == ("no", "no", 1)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert prepared("--num_processes", "2", "--main_process_port", "29511")[1]["main_process_port"] == 29511
    assert prepared("--gpu_ids", "0,3", "--use_fsdp")[0] == 2
    assert prepared("--cpu")[0] == 1


@pytest.mark.usefixtures("no_default_file")
def test_several_machines() -> None:
    place = ("--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "127.0.0.1")
    count, options = prepared("--num_processes", "8", *place)
    assert (count, options["main_process_port"]) == (4, None)  # a port that was chosen freely differs between machines
    assert prepared("--num_processes", "8", *place, "--rdzv_backend", "c10d")[1]["local_addr"] == "127.0.0.1"


@pytest.mark.usefixtures("no_default_file")
def test_values_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "fsdp.yaml"
    file.write_text("distributed_type: FSDP\nnum_processes: 2\nmixed_precision: bf16\nfsdp_config: {fsdp_version: 2}\n")
    count, options = prepared("--config_file", str(file))
    # What the file says of precision is left to Accelerate, which says so to the processes.
    assert (count, options["multi_gpu"], options["mixed_precision"]) == (2, False, None)
    assert prepared("--config_file", str(file), "--num_processes", "3")[0] == 3
    file.write_text("distributed_type: 'NO'\nnum_processes: 2\n")
    assert prepared("--config_file", str(file))[1]["multi_gpu"] is True


@pytest.mark.usefixtures("no_default_file")
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--cpu", "--num_processes", "2"], "--cpu starts one process"),
        (["--num_processes", "3", "--num_machines", "2"], "--num_processes is 3 and --num_machines 2"),
        (["--num_processes", "0"], "--num_processes is 0"),
        (["--num_processes", "4", "--num_machines", "2"], "--machine_rank and --main_process_ip not given"),
        (["--config_file", "missing.yaml"], "missing.yaml"),
        (["--config_file", "debug.yaml"], "debug: true"),
        (["--config_file", "typo.yaml"], "nm_processes"),
        (["--config_file", "broken.yaml"], "broken.yaml"),
    ],
)
def test_options_that_cannot_be_meant(
    options: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("debug.yaml").write_text("distributed_type: FSDP\nnum_processes: 2\ndebug: true\n")
    Path("typo.yaml").write_text("distributed_type: FSDP\nnm_processes: 2\n")
    Path("broken.yaml").write_text("distributed_type: [FSDP\n")
    with pytest.raises(ConfigError, match=problem):
        prepared(*options)


def test_help_and_usage(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(SMALLEST, encoding="utf-8")
    for arguments, code in ([], 0), (["--help"], 0), (["--tpu", "train", "run.yaml"], 2):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
        told = capfd.readouterr()
        usage = "usage: launch/accelerate.sh [accelerate options] train CONFIG [--resume auto|PATH|never]"
        assert (told.out + told.err).startswith(usage)
    assert "--tpu has no meaning here" in told.err
    assert main(["--num_processes", "2", "trian", "run.yaml"]) == 2
    assert capfd.readouterr().err.count("No such command") == 1
