"""``sft-dist submit`` where there is no SLURM: what it shows, keeps and refuses. The rest: tests/slurm/test_submit.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import sft_dist
from sft_dist.cli import main
from sft_dist.cluster.ready import USUAL, ready_script, recipes
from sft_dist.cluster.snapshot import (
    installed_packages,
    last_submission,
    new_submission,
    record,
    write_submission,
)
from sft_dist.cluster.submit import check_fit, jobs_of
from sft_dist.cluster.wanted import wanted
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError, ConfigError, PlanError
from sft_dist.runtime.code import checkout, code_here
from tests.helpers.job_script import sbatch_options

ROOT = Path(sft_dist.__file__).parents[1]
READY = recipes(ROOT)
Run = Callable[..., tuple[int, str, str]]

CPUS = """\
model: {{path: {base}}}
data: {{train: [{{path: a.jsonl}}], packing: none, max_seq_len: 64}}
precision: {{compute: fp32}}
train: {{global_batch_size: 2, max_steps: 3}}
hardware: {{nodes: 2, gpus_per_node: 2}}
cluster: {{request_gpus: none, memory_gib: 4, time_limit: "1:00:00"}}
output_dir: runs/x
"""


@pytest.fixture
def here(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """run.yaml for two nodes without GPUs, in the current directory; no SLURM on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CPUS.format(base=tiny_base))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


@pytest.fixture
def exit_code(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def test_a_dry_run_shows_the_script_and_writes_nothing(here: Path, exit_code: Run) -> None:
    before = sorted(here.rglob("*"))
    code, out, err = exit_code("submit", "run.yaml", "--dry-run", "--no-prepare", "cluster.partition=cpu")
    assert (code, err) == (0, "")
    shown, _, script = out.partition("#!/bin/bash")
    assert shown.startswith("Not planned: no GPU is known (hardware.gpu).\n")
    assert f"\n{here}/runs/x/slurm/submission-001/train.sbatch\n" in shown
    options = sbatch_options(script)
    assert (options["nodes"], options["mem"], options["partition"], options["time"]) == ("2", "4G", "cpu", "01:00:00")
    assert f"python={sys.executable}" in script
    assert f"export PYTHONPATH={ROOT}" in script
    assert sorted(here.rglob("*")) == before


def test_what_does_not_fit_is_not_submitted(here: Path) -> None:
    what = wanted(load_config("run.yaml", ["hardware={gpu: l4, gpus_per_node: 1}", "cluster={time_limit: '60'}"]))
    assert what.plan is not None
    check_fit(what)
    memory = replace(what.plan.memory, verdict="does not fit")
    with pytest.raises(PlanError, match="Does not fit on 1 x L4: peak allocated") as caught:
        check_fit(replace(what, plan=replace(what.plan, memory=memory)))
    assert caught.value.fix == "see `sft-dist plan CONFIG` for what makes it fit; --anyway submits it as it is"
    assert caught.value.exit_code == 3


@pytest.mark.ci
def test_a_dry_run_of_what_does_not_fit_ends_with_3(here: Path, exit_code: Run) -> None:
    recipe = str(ROOT / "configs/recipes/gemma3_1b_full_1xa100_40.yaml")
    wish = ["submit", recipe, "hardware.gpu=l4", "train.micro_batch_size=8", "--dry-run", "--no-prepare"]
    code, out, _ = exit_code(*wish)
    assert (code, out.splitlines()[0]) == (3, "Does not fit on 1 x L4")
    assert "#SBATCH --gpus-per-node=1\n" in out
    assert exit_code(*wish, "--anyway")[0] == 0


def test_without_slurm_nothing_is_left(here: Path, exit_code: Run) -> None:
    for options in ([], ["--test-only"]):
        code, _, err = exit_code("submit", "run.yaml", *options)
        assert code == 2
        assert err.startswith("error: SLURM is not installed here: there is no program sbatch\n")
    assert sorted(path.name for path in here.iterdir()) == ["a.jsonl", "run.yaml"]
    assert exit_code("submit", "run.yaml", "--sweep", "optim.lr=1e-4,2e-4")[0] == 2
    assert sorted(path.name for path in here.iterdir()) == ["a.jsonl", "run.yaml"]
    (here / "runs").mkdir()
    assert exit_code("submit", "run.yaml")[0] == 2
    assert list((here / "runs").iterdir()) == []
    code, _, err = exit_code("status", "runs/x")
    assert code == 2
    assert "runs/x" in err.splitlines()[0]


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_where_slurm_refuses_nothing_is_left(here: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = here / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    program(programs, "sbatch", 'echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    for options in ([], ["--test-only"]):
        code, _, err = exit_code("submit", "run.yaml", *options)
        assert (code, "invalid partition specified: gpu" in err) == (2, True)
    assert not (here / "runs").exists()
    said = "sbatch: fatal: Could not establish a configuration source"
    program(programs, "sbatch", f'echo "{said}" >&2; exit 1')
    code, _, err = exit_code("submit", "run.yaml")
    assert (code, err.splitlines()[0]) == (
        2,
        f"error: this machine is not attached to a cluster: SLURM is installed here and has no configuration ({said})",
    )
    assert "login node" in err
    assert not (here / "runs").exists()


def test_a_dry_run_says_that_the_folder_holds_a_run(here: Path, exit_code: Run) -> None:
    (here / "runs/x").mkdir(parents=True)
    (here / "runs/x/metrics.jsonl").touch()
    before = sorted(here.rglob("*"))
    code, out, err = exit_code("submit", "run.yaml", "--dry-run")
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "error: output_dir: runs/x already holds a run (it has metrics.jsonl)"
    code, out, _ = exit_code("submit", "run.yaml", "--dry-run", "--resume", "auto")
    assert (code, "#!/bin/bash" in out) == (0, True)
    assert sorted(here.rglob("*")) == before


@pytest.mark.ci
def test_a_model_that_the_prepare_job_fetches_need_not_be_here(
    here: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    wish = ["submit", "run.yaml", "model.path=Qwen/Qwen2.5-0.5B-Instruct", "hardware={gpu: l4, gpus_per_node: 1}"]
    wish += ["cluster={}", "precision.compute=bf16"]
    code, out, err = exit_code(*wish, "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("Fits on 1 x L4\n")
    assert "! the model's tokenizer is not here: tokens, times and prices are estimated from the text" in out
    assert "--job-name=x-prepare" in out
    code, out, err = exit_code(*wish)
    assert err.startswith("error: SLURM is not installed here"), "and nothing before that was refused"


def test_what_train_would_refuse_is_refused_before(here: Path, exit_code: Run) -> None:
    code, _, err = exit_code("submit", "run.yaml", "model.path=./nowhere")
    assert (code, err.splitlines()[0]) == (2, "error: model.path: the folder ./nowhere does not exist")
    assert exit_code("submit", "run.yaml", "data.train.0.path=b.jsonl")[0] == 4
    (here / "runs/x").mkdir(exist_ok=True, parents=True)
    (here / "runs/x/metrics.jsonl").touch()
    code, _, err = exit_code("submit", "run.yaml")
    assert (code, err.splitlines()[0]) == (2, "error: output_dir: runs/x already holds a run (it has metrics.jsonl)")
    assert "no program sbatch" in exit_code("submit", "run.yaml", "--resume", "auto")[2]
    code, _, err = exit_code("submit", "run.yaml", "--resume", "runs/x/checkpoints/step-3")
    assert (code, "give --resume auto, or none for a new run" in err) == (2, True)


def test_one_value_of_a_configuration(here: Path, exit_code: Run) -> None:
    assert exit_code("config", "get", "run.yaml", "output_dir", "output_dir=my runs/é") == (0, "my runs/é\n", "")
    assert exit_code("config", "get", "run.yaml", "data.train.0.path") == (0, "a.jsonl\n", "")
    assert exit_code("config", "get", "run.yaml", "hardware")[1].startswith('{"gpu": null, "gpus_per_node": 2')
    code, _, err = exit_code("config", "get", "run.yaml", "data.train.1.path")
    assert (code, err.splitlines()[0]) == (2, "error: data.train.1.path: data.train has no 1")
    code, _, err = exit_code("config", "get", "run.yaml", "hardware.gpu.name")
    assert (code, err.splitlines()[0]) == (2, "error: hardware.gpu.name: hardware.gpu has no name")


# What is kept


def small_config(output: Path) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"}, "data": {"train": [{"path": "日本.jsonl"}]},
            "train": {"global_batch_size": 2, "max_steps": 3}, "output_dir": str(output),
        }
    )  # fmt: skip


def test_a_submission_keeps_what_it_runs(tmp_path: Path) -> None:
    run, config = tmp_path / "x", small_config(tmp_path / "x")
    assert (last_submission(run), jobs_of(run, 0)) == (0, {})
    folder = new_submission(run)
    assert folder == run / "slurm/submission-001"
    assert new_submission(run).name == "submission-002"
    code = code_here()
    write_submission(folder, config, {"train.sbatch": "#!/bin/bash\n"}, code)
    record(folder, code=code, source=Path("x.yaml"), overrides=["train.seed=3"], jobs={"train": "17"})
    assert load_config(folder / "config.yaml") == config
    assert (folder / "train.sbatch").stat().st_mode & 0o100
    packages = (folder / "packages.txt").read_text().splitlines()
    assert packages == installed_packages().splitlines()
    assert any(line.startswith("torch==") for line in packages)
    said = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert said["code"]["checkout"] == str(ROOT)
    assert {name: said[name] for name in ("submission", "jobs", "config", "overrides", "directory")} == {
        "submission": 1, "jobs": {"train": "17"}, "config": "x.yaml", "overrides": ["train.seed=3"],
        "directory": str(Path.cwd()),
    }  # fmt: skip
    assert jobs_of(run, 1) == {"train": "17"}
    (folder / "submission.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        jobs_of(run, 1)


def test_the_commit_and_what_differs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "code/sft_dist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(sft_dist, "__file__", str(package / "__init__.py"))
    assert checkout() is None, "no checkout without pyproject.toml"
    (tmp_path / "code/pyproject.toml").touch()
    assert (code_here().commit, code_here().checkout) == (None, str(tmp_path / "code"))

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(tmp_path / "code"), *who, *arguments], check=True, capture_output=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = code_here()
    assert (clean.commit, clean.changed, clean.difference) == (git("rev-parse", "HEAD"), False, "")
    (package / "__init__.py").write_text("a = 2\n")
    (package / "新.py").touch()
    dirty = code_here()
    assert (dirty.commit, dirty.changed, dirty.new_files) == (clean.commit, True, ("sft_dist/新.py",))
    assert "-a = 1\n+a = 2\n" in dirty.difference
    folder = new_submission(tmp_path / "x")
    write_submission(folder, small_config(tmp_path / "x"), {}, dirty)
    assert (folder / "uncommitted.diff").read_text() == dirty.difference


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    with pytest.raises(ConfigError, match=r"output_dir: .*x cannot be written"):
        new_submission(tmp_path / "x")


# The scripts of the recipes


def test_every_recipe_has_its_script() -> None:
    assert {path.stem for path in (ROOT / "slurm").glob("*.sbatch")} == set(READY)
    assert {f"train_{name}" for name in USUAL} <= set(READY)


QUICK = "train_70b_lora"


@pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(name, marks=pytest.mark.ci) for name in READY if name != QUICK)]
)
def test_a_ready_script_is_what_is_rendered(name: str) -> None:
    committed = (ROOT / f"slurm/{name}.sbatch").read_text(encoding="utf-8")
    assert ready_script(READY[name], name=name) == committed, "render it again: python -m sft_dist.cluster.ready"
