"""``plan --probe`` and ``train --dry-run`` through the command line, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sft_dist import cli
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.train.probe import longest_step, synthetic_data
from tests.helpers import cells

Cli = Callable[..., tuple[int, str, str]]

EXPLICIT = ("sharding.strategy=fsdp2", "activation_checkpointing.mode=full")


@pytest.fixture
def cli_of(tmp_path: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    """A command over a configuration; (exit code, stdout, stderr)."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"say {i}", "output": str(i)}) for i in range(30)))
    config = {
        "model": {"path": str(tiny_base)},
        "data": {"train": [{"path": str(rows)}], "max_seq_len": 128},
        "method": {"type": "lora"},
        "precision": {"compute": "fp32"},
        "train": {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 5},
        "logging": {"wandb": {"mode": "disabled"}},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def run(command: str, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            cli.main([command, str(tmp_path / "config.yaml"), *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(exit_info.value.code or 0), out, err

    return run


needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")


@needs_cpu
def test_a_probe_trains_and_leaves_nothing(cli_of: Cli, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    code, out, err = cli_of("plan", "--probe", "3", *EXPLICIT)
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    assert first.startswith("probe: 3 steps on 1 x CPU process under fsdp2, after 2 that warm up; data: the run's own")
    table = {line[:24].strip(): line[24:].split() for line in lines}
    assert table["peak of device memory"][-2:] == ["-", "-"], "not counted, not compared"
    planned, measured, unit, ratio = table["a step"]
    assert (planned, unit, ratio) == ("-", "s", "-")
    assert float(measured) > 0
    assert lines[-1].startswith("nothing was kept: a CPU ")
    assert sorted(tmp_path.iterdir()) == before


@needs_cpu
def test_without_the_rows_it_trains_full_packs(cli_of: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").unlink()
    code, out, err = cli_of("plan", "--probe", "3", *EXPLICIT)
    assert (code, err) == (0, "")
    assert "data: packs of random ids: data.train is not here" in out


def test_synthetic_rows_are_as_long_as_rows_can_be(tiny_base: Path) -> None:
    run = resolve(cells.config(str(tiny_base), "lora"), WorldShape())
    data = synthetic_data(run)
    assert set(data.num_tokens.tolist()) == {48}
    assert data.num_sequences >= 2 * run.batch.global_batch_size
    assert set(data.num_supervised.tolist()) == {47}, "the first of a row is never predicted"
    assert max(int(data.row(n)[0].max()) for n in range(data.num_rows)) < run.model.vocab_size


def test_the_first_step_takes_the_longest_sequences() -> None:
    data = cells.synthetic_data()
    step = longest_step(data, 3)
    assert sorted(data.num_tokens[step.sequences]) == sorted(data.num_tokens)[-3:]
    assert step.supervised_tokens == data.num_supervised[step.sequences].sum()


@pytest.mark.parametrize("count", ["0", "2", "x"])
def test_fewer_than_three_steps_are_no_probe(cli_of: Cli, count: str) -> None:
    assert cli_of("plan", "--probe", count)[0] == 2


def test_a_dry_run_of_train_is_the_plan(cli_of: Cli, tmp_path: Path) -> None:
    on = ("hardware.gpu=h100", "hardware.gpus_per_node=2", *EXPLICIT)
    planned = cli_of("plan", *on)
    plan = (tmp_path / "run/plan.json").read_text()
    assert planned[0] == 0
    assert cli_of("train", "--dry-run", *on) == planned
    assert (tmp_path / "run/plan.json").read_text() == plan
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"], "nothing was trained"


def test_a_dry_run_that_does_not_fit_ends_with_3(cli_of: Cli) -> None:
    long = (
        "data.max_seq_len=4000000",
        "hardware.gpu=rtx4090",
        "train.micro_batch_size=8",
        "train.global_batch_size=8",
        *EXPLICIT,
    )
    code, out, _ = cli_of("train", "--dry-run", *long)
    assert code == 3
    assert out.startswith("Does not fit")
