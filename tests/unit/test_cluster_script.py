"""A job's script, as sbatch and the shell understand it."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_dist.cluster.header import quoted_option
from sft_dist.cluster.resources import Resources
from sft_dist.cluster.script import TEMPLATES, Place, quoted, render_train
from sft_dist.cluster.time_limit import limit_of_seconds, rounded_up, seconds_of_limit
from sft_dist.config.schema import Config
from sft_dist.config.validate import validate
from tests.helpers.job_script import Played, play, programs, sbatch_options, sbatch_words

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "srun")
CONTAINERS: dict[str, Any] = {
    "none": None,
    "pyxis": {"runtime": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.09-py3", "mounts": ["/scratch/my data:/data"]},
    "apptainer": {"runtime": "apptainer", "image": "/images/a b.sif", "mounts": ["/scratch/my data:/data"]},
}
ABOUT = {"recipe": "configs/recipes/x.yaml", "data": "10,000 rows of 400 tokens"}


def config(**cluster: Any) -> Config:
    value = {
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.jsonl"}]},
        "train": {"global_batch_size": 4, "max_steps": 10},
        "output_dir": "runs/x",
        "cluster": cluster,
    }
    found = Config.model_validate(value)
    validate(found)
    return found


def resources(nodes: int = 2, gpus: int = 8, launcher: str = "torchrun") -> Resources:
    tasks = gpus if launcher == "srun" else 1
    names = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "memory_gib", "time_limit_s")
    return Resources(
        nodes, gpus, tasks, 4 * gpus // tasks, 204, 5400, 180, 1,
        dict.fromkeys((*names, "signal_before_s", "starts"), "because"),
    )  # fmt: skip


def place(folder: Path, run: str = "runs/x", python: str = "python") -> Place:
    output = folder / run
    return Place(str(folder / python), str(ROOT), str(folder), str(output), str(output / "slurm/submission-001"))


# The options


@pytest.mark.parametrize("request_gpus", ["gpus-per-node", "gres", "none"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("nodes", [1, 2, 16, 64])
def test_every_option_of_sbatch(nodes: int, launcher: str, request_gpus: str) -> None:
    here = Place("/v/bin/python", None, "/home/me", "/data/runs/x", "/data/runs/x/slurm/submission-001")
    script = render_train(
        config(launcher=launcher, request_gpus=request_gpus), resources(nodes, launcher=launcher), here, name="x"
    )
    asked = {"gpus-per-node": {"gpus-per-node": "8"}, "gres": {"gres": "gpu:8"}, "none": {}}[request_gpus]
    assert sbatch_options(script) == {
        "job-name": "x",
        "nodes": str(nodes),
        "ntasks-per-node": "8" if launcher == "srun" else "1",
        "cpus-per-task": "4" if launcher == "srun" else "32",
        **asked,
        "mem": "204G",
        "time": "01:30:00",
        "signal": "USR1@180",  # to the steps: B: would be the script alone
        "requeue": None,
        "open-mode": "append",
        "output": "/data/runs/x/slurm/train-%j.out",
    }


def test_what_the_cluster_wants_to_know() -> None:
    named = {
        "account": "lab",
        "qos": "long",
        "constraint": "h100&ib",
        "reservation": "our week",
        "exclude": ["n1", "n2"],
    }
    asked = config(
        partition="gpu", request_gpus="gres", gpu_type="h100", options=["--nice=100 --mail-type=END"], **named
    )
    options = sbatch_options(render_train(asked, resources(), None, name="x", about=ABOUT))
    assert options["gres"] == "gpu:h100:8"
    assert {name: options[name] for name in (*named, "partition", "nice", "mail-type")} == {
        **named, "exclude": "n1,n2", "partition": "gpu", "nice": "100", "mail-type": "END",
    }  # fmt: skip
    typed = config(gpu_type="a100")
    assert sbatch_options(render_train(typed, resources(), None, name="x", about=ABOUT))["gpus-per-node"] == "a100:8"


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1))
def test_sbatch_reads_every_value_as_it_was_meant(value: str) -> None:
    assert sbatch_words(quoted_option("job-name", value)) == [f"--job-name={value}"]


def test_a_percent_sign_is_no_pattern() -> None:
    here = Place("python", None, "/", "/r/50%j", "/r/50%j/slurm/submission-001")
    assert (
        sbatch_options(render_train(config(), resources(), here, name="x"))["output"] == "/r/50%%j/slurm/train-%j.out"
    )


# The steps


def played(tmp_path: Path, nodes: int, launcher: str, container: str, **answers: str) -> Played:
    programs(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    asked = config(launcher=launcher, container=CONTAINERS[container], environment={"NCCL_DEBUG": "INFO"})
    script = render_train(asked, resources(nodes, launcher=launcher), place(tmp_path), name="x")
    return play(script, tmp_path, SLURM_JOB_NUM_NODES=str(nodes), **answers)


PROCESSES = {
    "torchrun": ["--nproc-per-node", "8"], "accelerate": ["--num_processes", "{all}"], "deepspeed": ["--num_gpus", "8"],
    "srun": [],
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_step(tmp_path: Path, launcher: str, container: str) -> None:
    for nodes in (1, 64):
        folder = tmp_path / str(nodes)
        done = played(folder, nodes, launcher, container)
        assert done.code == 0, done.output
        run, submission = f"{folder}/runs/x", f"{folder}/runs/x/slurm/submission-001"
        inside, python = [], str(folder / "python")
        options: list[str] = []
        if container == "pyxis":
            options = [
                "--container-image=nvcr.io#nvidia/pytorch:25.09-py3",
                f"--container-mounts={folder}:{folder},{ROOT}:{ROOT},/scratch/my data:/data",
                f"--container-workdir={folder}",
                "--container-env=HF_HUB_OFFLINE,PYTHONPATH,SFT_DIST_JOB_NOTES,NCCL_DEBUG",
            ]
        elif container == "apptainer":
            binds = [f"{folder}:{folder}", f"{ROOT}:{ROOT}", "/scratch/my data:/data"]
            inside = ["apptainer", "exec", "--nv", *(word for bind in binds for word in ("--bind", bind))]
            inside += ["--pwd", str(folder), "/images/a b.sif"]
        if container != "none":
            python = "python3"
        tasks, cpus = (8, 4) if launcher == "srun" else (1, 32)
        doctor, training = done.of("srun")
        assert doctor == [
            f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpus-per-task=32", *options,
            *inside, python, "-m", "sft_dist", "doctor", f"{submission}/config.yaml",
        ]  # fmt: skip
        processes = [word.format(all=8 * nodes) for word in PROCESSES[launcher]]
        assert training == [
            f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}", "--kill-on-bad-exit=0", "--wait=40", *options,
            *inside, python, "-m", "sft_dist.launch", launcher, *processes,
            "train", f"{submission}/config.yaml", "--resume", "auto",
        ]  # fmt: skip
        outside = [call for call in done.of("python") if "sft_dist.cluster.job" in call]
        assert outside == [
            ["-m", "sft_dist.cluster.job", "begin", run, "--max-restarts", "3"],
            ["-m", "sft_dist.cluster.job", "end", run, "--code", "0", "--max-restarts", "3"],
        ]  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_node_is_told_its_rank_by_the_batch_shell(launcher: str) -> None:
    for container in CONTAINERS.values():
        here = Place("/v/bin/python", None, "/home/me", "/data/x", "/data/x/slurm/submission-001")
        script = render_train(
            config(launcher=launcher, container=container), resources(launcher=launcher), here, name="x"
        )
        for variable in ("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODELIST", "MASTER_ADDR", "hostname"):
            assert variable not in script
        assert not [line for line in script.splitlines() if line.startswith("#SBATCH") and "$" in line]


def test_what_a_step_ends_with_is_told_and_decides(tmp_path: Path) -> None:
    done = played(tmp_path, 2, "torchrun", "none", TRAIN="75", END="0")
    assert done.code == 0
    assert done.of("python")[-1][-4:-2] == ["--code", "75"]
    shutil.rmtree(tmp_path / "runs")
    done = played(tmp_path, 2, "torchrun", "none", TRAIN="6", END="6")
    assert (done.code, done.of("python")[-1][-4:-2]) == (6, ["--code", "6"])


def test_a_node_that_is_not_well_is_not_trained_on(tmp_path: Path) -> None:
    done = played(tmp_path, 2, "torchrun", "none", DOCTOR="7", END="7")
    assert done.code == 7
    assert len(done.of("srun")) == 1
    assert done.of("python")[-1][-4:-2] == ["--code", "7"]


def test_nothing_is_trained_where_the_job_must_not_begin(tmp_path: Path) -> None:
    done = played(tmp_path, 2, "torchrun", "none", BEGIN="3")
    assert done.code == 3
    assert not done.of("srun")
    assert len(done.of("python")) == 1
    shutil.rmtree(tmp_path / "runs")
    done = played(tmp_path, 2, "torchrun", "none", BEGIN="99")
    assert (done.code, len(done.calls)) == (0, 1), "99: the run is done already"


def test_how_often_a_job_starts_again_is_for_the_user_to_say() -> None:
    script = render_train(config(max_restarts=7), resources(), None, name="x", about=ABOUT)
    assert 'sft_dist.cluster.job "$@" --max-restarts 7; }' in script


def test_the_doctor_may_be_left_out(tmp_path: Path) -> None:
    programs(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    done = play(render_train(config(doctor=False), resources(), place(tmp_path), name="x"), tmp_path)
    assert done.code == 0
    assert [call[4] for call in done.of("srun")] == [str(tmp_path / "python")]


def test_modules_and_setup_come_first_and_may_use_variables_that_are_not_set(tmp_path: Path) -> None:
    programs(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    asked = config(modules=["cuda/13.0", "nccl 2"], setup=['export FOUND="$NOT_SET/x"', "module use here"])
    done = play(render_train(asked, resources(), place(tmp_path), name="x"), tmp_path)
    assert done.code == 0, done.output
    assert [call[0] for call in done.calls[:4]] == ["module", "module", "module", "python"]
    assert done.of("module") == [["load", "cuda/13.0"], ["load", "nccl 2"], ["use", "here"]]
    failing = config(setup=["false"])
    done = play(render_train(failing, resources(), place(tmp_path), name="x"), tmp_path)
    assert (done.code, done.calls) == (1, [])


NAMES = st.text(st.characters(exclude_characters="/\0\\", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) < 200),
    value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
)
def test_the_shell_takes_every_name_as_it_is(tmp_path: Path, name: str, value: str) -> None:
    programs(tmp_path)
    run = tmp_path / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    here = Place(str(tmp_path / "python"), None, str(run), str(run), str(run / "slurm/submission-001"))
    show = 'printf "%s" "$TOLD" > "$CALLS.told"'
    script = render_train(config(environment={"TOLD": value}), resources(), here, name=name)
    done = play(script.replace("job begin", f"{show}\njob begin"), tmp_path)
    assert done.code == 0, done.output
    assert done.of("python")[0][:4] == ["-m", "sft_dist.cluster.job", "begin", str(run)]
    assert done.of("srun")[1][-3:] == [f"{run}/slurm/submission-001/config.yaml", "--resume", "auto"]
    assert (tmp_path / "calls.told").read_bytes().decode() == value
    assert sbatch_options(script)["job-name"] == name
    assert sbatch_options(script)["output"] == f"{run}/slurm/train-%j.out".replace("%", "%%").replace(
        "%%j.out", "%j.out"
    )


def test_commas_are_quoted_for_the_reader() -> None:
    assert (quoted("a,b"), quoted("a b"), quoted("ab")) == ("'a,b'", "'a b'", "ab")


# A script for every configuration


def test_a_ready_script_takes_its_configuration_from_the_command_line(tmp_path: Path) -> None:
    programs(tmp_path)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/python.sh").touch()
    script = render_train(config(), resources(), None, name="train_x", about=ABOUT)
    assert sbatch_options(script)["output"] == "%x-%j.out"
    run = tmp_path / "my runs/x"
    given = ("my run.yaml", "train.seed=3", "data.eval=[{path: a b.jsonl}]")
    done = play(script, tmp_path, arguments=given, RUN="my runs/x", VIRTUAL_ENV="/somewhere")
    assert done.code == 0, done.output
    assert done.of("python")[0] == ["-m", "sft_dist", "config", "get", given[0], "output_dir", *given[1:]]
    assert done.of("python")[1][2:4] == ["begin", str(run)]
    assert done.of("srun")[0][-5:] == ["sft_dist", "doctor", *given]
    assert done.of("srun")[1][-6:] == ["train", given[0], "--resume", "auto", *given[1:]]
    assert (run / "slurm/train-7.out").is_symlink()

    assert "give a configuration: sbatch SCRIPT CONFIG" in play(script, tmp_path).output
    elsewhere = play(script, tmp_path, arguments=given, SLURM_SUBMIT_DIR="/tmp")
    assert (elsewhere.code, elsewhere.calls) == (2, [])
    assert elsewhere.output == "/tmp is not the checkout: run sbatch there\n"


def test_a_ready_script_finds_the_environment_of_the_checkout(tmp_path: Path) -> None:
    """As ``launch/python.sh`` does: the active one, else .venv, else what is there."""
    programs(tmp_path)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/python.sh").touch()
    script = render_train(config(), resources(), None, name="train_x", about=ABOUT)
    assert play(script, tmp_path, arguments=("c.yaml",), RUN="r").calls[0][0] == "python3"
    programs(tmp_path / ".venv/bin")
    done = play(script, tmp_path, arguments=("c.yaml",), RUN="r")
    assert done.of("srun")[0][3] == f"{tmp_path}/.venv/bin/python"


# The files


def test_the_editable_copies_are_the_shipped_templates() -> None:
    assert sorted(p.name for p in TEMPLATES.iterdir()) == sorted(p.name for p in (ROOT / "slurm").glob("*.j2"))
    for path in TEMPLATES.iterdir():
        assert path.read_bytes() == (ROOT / "slurm" / path.name).read_bytes(), f"slurm/{path.name}"


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    here = Place(
        "/v/bin/python", "/home/me/code", "/home/me", "/data/runs/my x", "/data/runs/my x/slurm/submission-001"
    )
    files = sorted((ROOT / "slurm").glob("*.sbatch")) + sorted((ROOT / "launch").glob("*.sh"))
    files += sorted((ROOT / "scripts").glob("*.sh"))
    for number, (launcher, container) in enumerate(itertools.product(LAUNCHERS, CONTAINERS.values())):
        doctor = number % 2 == 0
        asked = config(launcher=launcher, container=container, doctor=doctor, modules=["cuda/13.0"] * doctor)
        for nodes in (1, 64):
            file = tmp_path / f"{number}-{nodes}.sbatch"
            file.write_text(render_train(asked, resources(nodes, launcher=launcher), here, name="x"))
            files.append(file)
    done = subprocess.run(["shellcheck", "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bash_reads_every_committed_script() -> None:
    for file in (ROOT / "slurm").glob("*.sbatch"):
        assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
        assert file.stat().st_mode & 0o111 == 0o111


# Time limits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-3", 183600), ("2-3:30", 185400), ("2-03:30:15", 185415)],
)
def test_time_limits_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert seconds_of_limit(text) == seconds
    assert seconds_of_limit(limit_of_seconds(seconds)) == seconds


def test_limits_that_people_would_write() -> None:
    limits = [limit_of_seconds(rounded_up(seconds)) for seconds in (1, 3601, 7201, 86_401, 100_000)]
    assert limits == ["00:05:00", "01:05:00", "02:30:00", "1-01:00:00", "1-04:00:00"]
