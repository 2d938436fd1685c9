"""launch/train.py under launchers that a user calls."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers.pool import free_port
from tests.launch.conftest import REPOSITORY, Launch

SCRIPT = str(REPOSITORY / "launch" / "train.py")
BIN = Path(sys.executable).parent
SHOWN = "print(*map(os.environ.get, ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')), config.train.seed)"

# The launcher ends the others as soon as one has failed: none may fail before all have printed.
MEET = """
import pathlib, time
pathlib.Path(f"met{rank}").touch()
while len(list(pathlib.Path().glob("met*"))) < 2:
    time.sleep(0.01)
"""


def test_alone(launch: Launch) -> None:
    ended = launch(sys.executable, SCRIPT, "run.yaml", "train.seed=7", in_each_process="print(rank, config.train.seed)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0 7\n", "")
    mistaken = launch(sys.executable, SCRIPT, "run.yaml", "train.num_epochs=1")
    assert mistaken.returncode == 2
    assert mistaken.stderr.startswith("error: run.yaml: train.num_epochs is 1")
    assert len(mistaken.stderr.splitlines()) == 2
    asked = launch(sys.executable, SCRIPT, "--help")
    assert asked.returncode == 0
    assert "KEY.PATH=VALUE" in asked.stdout


def test_a_local_rank_that_contradicts_the_environment(launch: Launch) -> None:
    ended = launch(sys.executable, SCRIPT, "--local_rank=1", "run.yaml", in_each_process="print('trained')")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "error: --local_rank is 1 and LOCAL_RANK is not set\n"
        "  fix: start with a launcher that sets both, and do not write the option by hand\n"
    )


def test_deepspeed_which_inserts_the_local_rank(launch: Launch) -> None:
    ended = launch(
        *(
            str(BIN / "deepspeed"),
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            SCRIPT,
            "run.yaml",
            "train.seed=7",
        ),
        in_each_process=f"{SHOWN}\n{MEET}\nfrom sft_dist.errors import DataError\nraise DataError('row 3', fix='mend it')",
    )
    assert ended.returncode == 4
    printed = [line for line in ended.stdout.splitlines() if line[:1].isdigit()]
    assert sorted(printed) == ["0 0 2 7", "1 1 2 7"]
    assert ended.stderr == "error: row 3\n  fix: mend it\n"
