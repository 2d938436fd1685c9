"""Jobs that follow each other, with programs that answer for SLURM and note how they were called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_dist.cluster.chain import Link, submit_chain
from sft_dist.cluster.submit import check_run_directory
from sft_dist.config.load import load_config
from sft_dist.errors import ConfigError

SBATCH = """#!/bin/sh
for script; do :; done
echo "sbatch $*" >> {folder}/calls
[ "$script" = no.sbatch ] && echo "sbatch: error: invalid partition specified" && exit 1
echo "$(/usr/bin/wc -l < {folder}/calls | /usr/bin/tr -d ' ');cluster"
"""
SCANCEL = """#!/bin/sh
echo "scancel $*" >> {folder}/calls
"""
JOB = (
    "JobId=7 JobName=x JobState=$STATE Reason=None Requeue=1 Restarts=0 ExitCode=0:0 TimeLimit=01:00:00 Partition=main "
    "SubmitTime=Unknown StartTime=Unknown EndTime=Unknown"
)
SCONTROL = f'#!/bin/sh\necho "{JOB}"\n'
CONFIG = """\
model: {path: m}
method: {type: lora, r: 4}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: run
"""
AFTER = "--kill-on-invalid-dep=yes"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "calls"


def test_each_waits_for_the_success_of_the_one_before(calls: Path) -> None:
    names = ("prepare", "train", "then")
    assert submit_chain([Link(name, Path(f"{name}.sbatch")) for name in names]) == dict(zip(names, "123", strict=True))
    assert calls.read_text().splitlines() == [
        "sbatch --parsable prepare.sbatch",
        f"sbatch --parsable --dependency=afterok:1 {AFTER} train.sbatch",
        f"sbatch --parsable --dependency=afterok:2 {AFTER} then.sbatch",
    ]


def test_each_element_waits_for_its_own(calls: Path) -> None:
    submit_chain([Link("train", Path("a.sbatch")), Link("then", Path("b.sbatch"), each_after_its_own=True)])
    assert calls.read_text().splitlines()[-1] == f"sbatch --parsable --dependency=aftercorr:1 {AFTER} b.sbatch"


def test_where_one_is_refused_none_is_left(calls: Path) -> None:
    with pytest.raises(ConfigError, match=r"`then` was not taken: .*invalid partition.*cancelled \(a 1, train 2\)"):
        submit_chain([Link("a", Path("a.sbatch")), Link("train", Path("b.sbatch")), Link("then", Path("no.sbatch"))])
    assert calls.read_text().splitlines()[-1] == "scancel 1 2"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_two_jobs_do_not_write_into_one_folder(calls: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", state)
    folder = Path("run/slurm/submission-001")
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(json.dumps({"jobs": {"train": "7"}}))
    Path("run.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=rf"job 7 \(train\) of .* is {state.lower()}, and writes there"):
        check_run_directory(load_config(Path("run.yaml"), []), resume="auto")
