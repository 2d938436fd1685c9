"""``lr-find`` through the command line: what it writes, and that it leaves a run's directory alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_probe import cli_of
from tests.helpers.ranks import Ranks

__all__ = ["cli_of"]

Cli = Callable[..., tuple[int, str, str]]

QUICK = ("activation_checkpointing.mode=none", "sharding.strategy=ddp")
TEST = ("--steps", "25", "--min-lr", "1e-5", "--max-lr", "10", *QUICK)


def test_a_test_suggests_a_rate_and_leaves_the_run_alone(cli_of: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("of a run that has trained here")
    code, out, err = cli_of("lr-find", *TEST, "data.train.0.weight=1")
    assert (code, err) == (0, "")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml"}
    found = json.loads((tmp_path / "run.lr-find/lr_find.json").read_text())
    assert found["lr"][0] == 1e-5
    assert len(found["lr"]) == len(found["loss"]) <= 25
    assert 1e-5 < found["suggested_lr"] < 10
    assert f"suggested: optim.lr={found['suggested_lr']:.1e}" in out
    assert (tmp_path / "run.lr-find/lr_find.svg").read_text().lstrip().startswith("<?xml")
    assert not (tmp_path / "run.lr-find/metrics.jsonl").exists()
    assert not (tmp_path / "run.lr-find/checkpoints").exists()
    # Once more into the same folder.
    code, _, _ = cli_of("lr-find", *TEST)
    again = json.loads((tmp_path / "run.lr-find/lr_find.json").read_text())
    assert (code, again["loss"]) == (0, found["loss"])


def test_rates_that_do_not_rise_are_refused(cli_of: Cli) -> None:
    code, _, err = cli_of("lr-find", "--min-lr", "1e-2", "--max-lr", "1e-3")
    assert code == 2
    assert "--min-lr is 0.01 and --max-lr is 0.001" in err


@pytest.mark.ci
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_two_processes_find_the_losses_of_one(cli_of: Cli, tmp_path: Path, strategy: str) -> None:
    steps = ("--steps", "12", "--min-lr", "1e-5", "--max-lr", "1e-2")
    assert cli_of("lr-find", *steps, *QUICK, "--out", str(tmp_path / "one"))[0] == 0
    others = [*QUICK[:1], f"sharding.strategy={strategy}", "--out", str(tmp_path / "two")]
    command = ["lr-find", str(tmp_path / "config.yaml"), *steps, *others]
    with Ranks(2, command, tmp_path / "ranks.log") as ranks:
        assert ranks.exit_codes(120) == [0, 0], (tmp_path / "ranks.log").read_text()
    one, two = (json.loads((tmp_path / name / "lr_find.json").read_text()) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
