"""Scripts of the jobs around the training, and of sweeps; what is refused before anything is submitted."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sft_dist.cli import main
from sft_dist.cluster.script import Place
from sft_dist.cluster.side_jobs import render_prepare, render_then, words_of
from sft_dist.cluster.submit import jobs_of_point, scripts_of
from sft_dist.cluster.sweep import plan_sweep
from sft_dist.cluster.wanted import Wanted, most, wanted, wanted_sweep
from sft_dist.config.cluster_schema import ClusterConfig, ContainerConfig, PrepareJobConfig, ThenJobConfig
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.plan.assumed import AssumedData
from sft_dist.plan.dry_run import DryRun

CONFIG = """\
model: {path: m}
method: {type: lora, r: 4}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: "runs/x y"
cluster: {time_limit: "1:00:00", memory_gib: 4, request_gpus: none, then: {command: "export {run} --merge"}}
"""
PLACE = Place("/py", "/code", "/dir", "/runs/x y", "/runs/x y/slurm/submission-001")
THEN = ThenJobConfig(command="export {run} --out {run}/a --merge")


@pytest.fixture(autouse=True)
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    Path("a.jsonl").touch()


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def swept(*texts: str, max_parallel: int | None = None, prepares: bool = True) -> Wanted:
    return wanted_sweep(plan_sweep(Path("run.yaml"), [], texts), max_parallel=max_parallel, prepares=prepares)


def test_what_prepares_asks_for_no_gpu() -> None:
    cluster = ClusterConfig(
        partition="gpu", qos="long", constraint="h100", account="team", gpu_type="h100",
        prepare=PrepareJobConfig(partition="cpu", cpus=3, memory_gib=4.5, time_limit="0:30:00"),
    )  # fmt: skip
    asked = options(render_prepare(cluster, PLACE, name="x-prepare"))
    assert asked == {
        "job-name": "x-prepare", "nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "3", "mem": "5G",
        "time": "00:30:00", "requeue": "", "open-mode": "append", "output": '"/runs/x y/slurm/prepare-%j.out"',
        "partition": "cpu", "account": "team",
    }  # fmt: skip
    same = cluster.model_copy(update={"prepare": PrepareJobConfig()})
    asked = options(render_prepare(same, PLACE, name="x-prepare"))
    assert (asked["partition"], asked["qos"], asked["constraint"]) == ("gpu", "long", "h100")


def test_what_follows_may_ask_for_a_gpu() -> None:
    cluster = ClusterConfig(then=THEN.model_copy(update={"gpus": 2}), gpu_type="a100", request_gpus="gres")
    script = render_then(cluster, PLACE, name="x-then")
    assert options(script)["gres"] == "gpu:a100:2"
    assert '"$python" -m sft_dist \\\n    export "$run" --out "$run"/a --merge\n' in script
    assert "export HF_HUB_OFFLINE=1" in script


def test_in_a_container() -> None:
    cluster = ClusterConfig(container=ContainerConfig(runtime="pyxis", image="registry/a:1"), then=THEN)
    for script in (render_prepare(cluster, PLACE, name="x"), render_then(cluster, PLACE, name="x")):
        assert "--container-image=registry/a:1" in script
        assert " python3 -m sft_dist" in script
    apptainer = cluster.model_copy(update={"container": ContainerConfig(runtime="apptainer", image="/a.sif")})
    assert "apptainer exec" in render_prepare(apptainer, PLACE, name="x")


def test_the_jobs_of_a_run_and_of_a_sweep() -> None:
    single = scripts_of(wanted(load_config("run.yaml")), Path("/s"))
    assert list(single) == ["prepare.sbatch", "train.sbatch", "then.sbatch"]
    assert not any("array" in options(script) for script in single.values())
    unprepared = scripts_of(wanted(load_config("run.yaml"), prepares=False), Path("/s"))
    assert list(unprepared) == ["train.sbatch", "then.sbatch"]
    sweep = scripts_of(swept("optim.lr=1e-5,2e-5,5e-5", max_parallel=2), Path("/s"))
    assert [options(script).get("array") for script in sweep.values()] == [None, "0-2%2", "0-2%2"]
    assert "config=/s/points\n" in sweep["prepare.sbatch"]
    assert options(sweep["train.sbatch"])["output"].endswith('/runs/x y/slurm/train-%A_%a.out"')
    assert "    2) point=lr-5e-05 ;;\n" in sweep["then.sbatch"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_an_element_of_the_array_is_its_point(tmp_path: Path) -> None:
    script = scripts_of(swept("optim.lr=1e-5,2e-5"), Path("/s"))["train.sbatch"]
    head = script[script.index("run=") : script.index("export HF_HUB_OFFLINE")]
    head = "\n".join(line for line in head.splitlines() if not line.startswith("cd "))

    def of(index: int) -> subprocess.CompletedProcess[str]:
        environment = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": str(index), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            ["bash", "-euc", f'{head}\necho "$run $config $job_id"'], env=environment, capture_output=True, text=True
        )

    run = tmp_path / "runs" / "x y" / "lr-2e-05"
    assert of(1).stdout == f"{run} /s/points/lr-2e-05.yaml 12_1\n"
    assert (run / "slurm/train-12_1.out").readlink() == Path("../../slurm/train-12_1.out")
    assert of(2).returncode == 2


def test_the_scripts_pass_shellcheck(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    for number, what in enumerate((wanted(load_config("run.yaml")), swept("optim.lr=1e-5,2e-5"))):
        for name, text in scripts_of(what, Path("/s p")).items():
            (tmp_path / f"{number}-{name}").write_text(text)
    done = subprocess.run(
        ["shellcheck", *map(str, tmp_path.glob("*.sbatch"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_each_element_gets_what_the_neediest_needs() -> None:
    one = wanted(load_config("run.yaml")).resources
    other = replace(
        one, memory_gib=9, time_limit_s=7200, starts=3, reasons=one.reasons | {"memory_gib": "planned 8 GiB"}
    )
    both = most({"lr-1": one, "lr-2": other})
    assert (both.memory_gib, both.time_limit_s, both.cpus_per_task, both.starts) == (9, 7200, one.cpus_per_task, 3)
    assert both.reasons["memory_gib"] == "planned 8 GiB: of lr-2, which needs most"
    assert both.reasons["cpus_per_task"] == one.reasons["cpus_per_task"], "the same for both"


def test_points_that_a_plan_cannot_tell_apart_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_dist.cluster import wanted as module

    planned: list[str] = []
    original = module.planned_run

    def counted(config: Config, *, assumed: AssumedData | None) -> DryRun | None:
        planned.append(config.output_dir)
        return original(config, assumed=assumed)

    monkeypatch.setattr(module, "planned_run", counted)
    swept("optim.lr=1e-5,2e-5", "train.max_steps=3,5")
    assert [Path(each).name for each in planned] == ["lr-1e-05_max_steps-3", "lr-1e-05_max_steps-5"]


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("exportt {run}", "No such command 'exportt'"),
        ("sft-dist export {run}", "No such command 'sft-dist'"),
        ("export {run} --mrge", "No such option: --mrge"),
        ("export", "Missing argument"),
        ("data", "does nothing"),
        ("export 'x", "cannot be read as a command"),
        ("  ", "is empty"),
    ],
)
def test_a_command_that_would_fail_after_the_training(
    command: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["submit", "run.yaml", "--dry-run", f'cluster.then.command="{command}"'])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "error: cluster.then.command" in error
    assert what in error


def test_words_with_spaces_stay_whole() -> None:
    assert words_of("export {run} --out 'a b'") == ["export", "{run}", "--out", "a b"]
    with pytest.raises(ConfigError, match="no closing quotation"):
        words_of("export 'x")


def test_at_most_so_many_at_once_is_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["submit", "run.yaml", "--dry-run", "--max-parallel", "2"])
    assert caught.value.code == 2
    assert "give it with --sweep" in capsys.readouterr().err


def test_a_dry_run_shows_every_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main_ends(["submit", "run.yaml", "--dry-run", "--sweep", "optim.lr=1e-5,2e-5"])
    shown = capsys.readouterr().out
    folder = tmp_path / "runs" / "x y"
    assert f"2 points in {folder}: lr-1e-05, lr-2e-05" in shown
    for name in ("prepare", "train", "then"):
        assert f"{folder}/slurm/submission-001/{name}.sbatch" in shown
    assert not folder.exists(), "nothing is written"


def main_ends(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert not caught.value.code


def test_each_point_knows_its_own_elements_of_the_arrays() -> None:
    jobs = {"prepare": "7", "train": "8", "then": "9"}
    assert [jobs_of_point(jobs, index) for index in (0, 2)] == [
        {"prepare": "7", "train": "8_0", "then": "9_0"},
        {"prepare": "7", "train": "8_2", "then": "9_2"},
    ]
