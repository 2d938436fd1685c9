"""``sft-dist prepare``: what training finds ready, and what is shared by several runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from sft_dist.checkpoint.manifest import MANIFEST, Manifest
from sft_dist.config.load import read_config
from sft_dist.config.schema import Config
from sft_dist.data.prepared import open_prepared
from sft_dist.errors import ConfigError, DataError
from sft_dist.train import data as train_data
from sft_dist.train.data import showing
from sft_dist.train.prepare import distinct, prepare
from sft_dist.train.resume import holds_a_run
from sft_dist.train.run import run_training
from tests.helpers.taught import PAIRS, conversation, write_rows


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Config:
    rows = write_rows(tmp_path / "rows.jsonl", [conversation(*pair) for pair in PAIRS])
    held_out = write_rows(tmp_path / "eval.jsonl", [conversation("What is new here?", "Quite a lot.")])
    return read_config(
        {
            "model": {"path": str(tiny_base)},
            "data": {"train": [{"path": str(rows)}], "eval": [{"path": str(held_out)}], "max_seq_len": 128},
            "precision": {"compute": "fp32"},
            "sharding": {"strategy": "ddp"},
            "activation_checkpointing": {"mode": "none"},
            "train": {"global_batch_size": 1, "micro_batch_size": 1, "max_steps": 2},
            "checkpoint": {"prove_final": False},
            "logging": {"wandb": {"mode": "disabled"}},
            "output_dir": str(tmp_path / "runs" / "x"),
        },
        source="run.yaml",
    )


def files_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of the last change of each."""
    found = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def test_training_finds_all_of_it_and_makes_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    output, said = Path(config.output_dir), []
    prepare([config], say=said.append)
    assert f"model     {config.model.path} is a folder on this machine: there is nothing to fetch" in said
    cache = output.parent / "data_cache"
    assert f"data      in {cache}" in said
    shown = capsys.readouterr().out
    assert "data.train" in shown
    assert "data.eval" in shown
    assert not holds_a_run(output), "the run directory is free for the run"
    sets = {str(open_prepared(folder).digest) for folder in (cache / "sets").iterdir() if folder.name != "locks"}
    before = files_of(cache)
    assert {name.split("/")[0] for name in before} >= {"tokens", "sets", "audits"}
    run_training(config)
    assert files_of(cache) == before, "no file was written, none replaced"
    (checkpoint,) = output.glob(f"checkpoints/*/{MANIFEST}")
    identity = Manifest.read(checkpoint.parent).identity.values["data.train"]
    assert str(identity).rpartition(", ")[2] in sets
    assert json.loads((output / "receipt.json").read_text())["identity"]["data.train"] == identity


def test_what_the_audit_found_and_what_was_there_is_told(config: Config) -> None:
    said: list[str] = []
    prepare([config], say=said.append)
    (audit,) = (line for line in said if line.startswith("audit     "))
    assert re.fullmatch(r"audit     (nothing was found|\d+ (note|warning)s?.*; `sft-dist data audit CONFIG` .*)", audit)
    assert not any("prepared before" in line for line in said)
    again: list[str] = []
    prepare([config], say=again.append)
    assert audit in again
    assert any(line.startswith("data      in ") and line.endswith(": all of it was prepared before") for line in again)


def test_a_bad_row_points_to_the_audit(config: Config, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{no row\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+: ") as caught:
        prepare([config], say=lambda line: None)
    assert caught.value.fix.endswith("; `sft-dist data audit CONFIG` lists all such rows")


def test_what_may_be_shared_is_prepared_once(config: Config) -> None:
    def changed(**sections: object) -> Config:
        return read_config(config.model_dump(mode="json") | sections, source="run.yaml")

    other_rate = changed(optim={"lr": 5.0e-5})
    shorter = changed(data=config.data.model_dump(mode="json") | {"max_seq_len": 64})
    assert distinct([config, other_rate, shorter]) == [config, shorter]


def test_a_fault_of_a_later_run_is_told_before_anything_is_made(config: Config, tmp_path: Path) -> None:
    absent = read_config(
        config.model_dump(mode="json") | {"data": {"train": [{"path": str(tmp_path / "absent.jsonl")}]}}, source="x"
    )
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist"):
        prepare([config, absent], say=lambda line: None)
    assert not (tmp_path / "runs").exists()


def test_data_that_training_would_refuse_is_refused(config: Config) -> None:
    data = config.data.model_dump(mode="json")
    leaked = read_config(config.model_dump(mode="json") | {"data": data | {"eval": data["train"]}}, source="x")
    with pytest.raises(DataError, match="leak_exact: 3 of 3 rows"):
        prepare([leaked], say=lambda line: None)


def test_a_model_that_is_nowhere_needs_a_network(config: Config) -> None:
    other = read_config(config.model_dump(mode="json") | {"model": {"path": "org/absent"}}, source="x")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set: org/absent cannot be fetched"):
        prepare([other], say=lambda line: None)


def test_a_file_of_output_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with showing(Console(highlight=False), line_every_s=0.0) as display:
        on_progress = display.source("rows.jsonl", is_there=False)
        on_progress(1000, 20_000)
        on_progress(500, 11_000)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d.]+ s so far", "T", line) for line in lines] == [
        "tokenising rows.jsonl: 1,000 rows, 20,000 tokens, T",
        "tokenising rows.jsonl: 1,500 rows, 31,000 tokens, T",
    ]
    assert train_data.LINE_EVERY_S >= 10, "a job of a day writes a file of bearable length"
