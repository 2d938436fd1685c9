"""What all scripts of launch/ answer alike."""

from __future__ import annotations

import pytest

from tests.launch.conftest import Launch, without_logs_line

TWO_PROCESSES = (
    ("torchrun.sh", "--nproc-per-node", "2"),
    ("accelerate.sh", "--num_processes", "2"),
    ("deepspeed.sh", "--num_gpus", "2"),
)


@pytest.mark.parametrize("script", TWO_PROCESSES, ids=lambda script: script[0])
def test_a_configuration_mistake_starts_no_process(launch: Launch, script: tuple[str, ...]) -> None:
    finished = launch(*script, "train", "run.yaml", "train.num_epochs=1", in_each_process="print('started')")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        "error: run.yaml: train.num_epochs is 1 and train.max_steps is 3: both set the length of the run\n"
        "  fix: remove one of them (as an override: train.num_epochs=null or train.max_steps=null)\n"
    )


@pytest.mark.parametrize("script", TWO_PROCESSES, ids=lambda script: script[0])
def test_a_failure_that_all_processes_share_is_told_once(launch: Launch, script: tuple[str, ...]) -> None:
    finished = launch(
        *(*script, "train", "run.yaml"),
        in_each_process="assert os.environ['WORLD_SIZE'] == '2'\n"
        "from sft_dist.errors import DataError; raise DataError('a.jsonl: row 3', fix='mend it')",
    )
    assert finished.returncode == 4
    assert without_logs_line(finished.stdout) == [
        "starting 2 processes on this machine"
    ]  # accelerate's --multi_gpu need not be said
    assert finished.stderr == "error: a.jsonl: row 3\n  fix: mend it\n"
