"""A row that makes the loss NaN, on one of two ranks: through the command, with a poisoned embedding as the cause."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.proof import verify_files
from sft_dist.checkpoint.rotation import best_of
from sft_dist.checkpoint.store import complete_checkpoints
from sft_dist.cli import main
from sft_dist.config.control_schema import Goal
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.runtime.failure import LAUNCH_FOLDER
from tests.helpers import cells, figures
from tests.helpers.ranks import Ranks

STEPS, EVERY, BATCH = 8, 2, 4
HOST = socket.gethostname()
# Of the row, counted from 1, that alone has the poisoned token.
LINE = 17
PATIENCE_S = 120
# From the line that tells of the step until no rank is left.
END_S = 30


@pytest.fixture(scope="module")
def poisoned_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with NaN for the embedding of ``~``; its output layer is another matrix."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("poisoned") / "base")
    weights = load_file(folder / "model.safetensors")
    (token,) = load_tokenizer(str(folder)).encode("~", add_special_tokens=False)
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(path: Path, *, poisoned: bool) -> None:
    end = "~" if poisoned else ""
    rows = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}" + (end if n == LINE else "")} for n in range(1, 33)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(base: Path, folder: Path, strategy: str, *, held_out: bool = False, **sections: Any) -> Path:
    """The poisoned row is among those that are trained on, or with ``held_out`` among those that are not."""
    train, evaluated = folder / "rows.jsonl", folder / "held_out.jsonl"
    write_rows(train, poisoned=not held_out)
    data: dict[str, Any] = {"train": [{"path": str(train)}], "cache_dir": str(folder / "cache"), "packing": "none"}
    if held_out:
        write_rows(evaluated, poisoned=True)
        data["eval"] = [{"path": str(evaluated)}]
        data["audit"] = {"max_share": {"leak_exact": 1.0, "leak_near": None}}
    cfg = cells.config(
        str(base), "lora", strategy,
        data=data,
        train={"global_batch_size": BATCH, "micro_batch_size": 1, "max_steps": STEPS, "seed": 4},
        checkpoint={"every_steps": EVERY, "keep_last": 99} | sections.pop("checkpoint", {}),
        **sections,
    )  # fmt: skip
    (folder / "run.yaml").write_text(cells.dump(cells.whole_run(cfg, folder / "run")))
    return folder / "run.yaml"


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.ci) for name in ("fsdp2", "zero1", "zero3"))]
)
def test_one_rank_meets_nan_and_all_end(poisoned_base: Path, tmp_path: Path, strategy: str) -> None:
    config, log, output = write_config(poisoned_base, tmp_path, strategy), tmp_path / "run.log", tmp_path / "run"
    launch = tmp_path / "launch"
    launch.mkdir()
    with Ranks(2, ["train", str(config)], log, environment={LAUNCH_FOLDER: str(launch)}) as ranks:
        deadline = time.monotonic() + PATIENCE_S
        while "loss nan" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert ranks.are_alive, log.read_text()
            time.sleep(0.02)
        told = time.monotonic()
        assert ranks.exit_codes(END_S) == [6, 6], log.read_text()
        took_s = time.monotonic() - told
    (step,) = (int(path.name.removeprefix("step-")) for path in (output / "diverged").iterdir())
    place = output / "diverged" / f"step-{step:08d}"
    about = json.loads((place / "about.json").read_text())
    (rank,) = about["ranks"]
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: step {step}: loss nan, gradient norm {about['grad_norm']}, seen by rank {rank} on {HOST}, "
        f"first in {tmp_path}/rows.jsonl:{LINE}; its batch is in {place}/"
    ]
    figures.fault(f"a NaN batch ({strategy})", took_s, [6, 6], errors[0])
    # The batch: all of it, with the guilty row as it is trained.
    sequences = [json.loads(line) for line in (place / "batch.jsonl").read_text().splitlines()]
    assert len(sequences) == BATCH
    assert {each["rank"] for each in sequences} == {0, 1}
    (guilty,) = (each for each in sequences if "~" in each["rows"][0]["text"])
    assert guilty["rank"] == rank
    (row,) = guilty["rows"]
    assert row["origin"] == f"{tmp_path}/rows.jsonl:{LINE}"
    assert row["supervised_text"] == [f"= {2 * LINE}~<|im_end|>"]
    end = len(row["input_ids"]) - 1  # the line break behind a turn is not trained
    assert row["supervised"] == [[end - len(f"= {2 * LINE}~<"), end]]
    assert about["largest_loss"] | {"loss": "nan", "loss_sum": "nan"} == about["largest_loss"]
    assert about["largest_loss"]["sequences"] == [guilty["sequence"]]
    finite = [each["loss"] for each in about["micro_batches"] if each["sequences"] != [guilty["sequence"]]]
    assert len(finite) == BATCH - 1
    assert all(isinstance(loss, float) for loss in finite)
    if strategy in ("ddp", "fsdp2"):
        assert ".layers.0." in about["non_finite_gradients"][0]
    # What was saved before is good.
    newest = complete_checkpoints(output / "checkpoints")[-1]
    manifest = Manifest.read(newest)
    assert manifest.completed_steps == (step - 1) // EVERY * EVERY > 0
    assert verify_files(newest, manifest, part=0, parts=1) == []
    for file in manifest.files:
        if file.endswith(".safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(newest / file).values())
    # JSON that any reader takes.
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (output / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if line.get("event") == "non_finite"] == [step]
    assert not (output / "final").exists()


@pytest.mark.ci
@pytest.mark.parametrize("remedy", ["skip", "roll_back"])
def test_it_goes_on_without_the_row(poisoned_base: Path, tmp_path: Path, remedy: str) -> None:
    config, log = write_config(poisoned_base, tmp_path, "fsdp2", spikes={"non_finite": remedy}), tmp_path / "run.log"
    with Ranks(2, ["train", str(config)], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    (step,) = (line["step"] for line in lines if line.get("event") == "skipped")
    assert [line["step"] for line in lines if "loss" in line] == [n for n in range(1, STEPS + 1) if n != step]
    said = "its update was not made" if remedy == "skip" else f"back at step {(step - 1) // EVERY * EVERY}"
    assert (
        f"seen by rank {step_rank(tmp_path, step)} on {HOST}, first in {tmp_path}/rows.jsonl:{LINE}; {said}"
        in log.read_text()
    )


@pytest.mark.ci
def test_a_held_out_row_that_is_no_number(
    poisoned_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every evaluation is NaN, training is not: told at once, never the best, and no improvement."""
    config = write_config(
        poisoned_base, tmp_path, "ddp", held_out=True, eval={"every_steps": 2},
        early_stopping={"patience": 3}, checkpoint={"keep_best": True},
    )  # fmt: skip
    log, output = tmp_path / "run.log", tmp_path / "run"
    with Ranks(2, ["train", str(config)], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    said = log.read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (output / "metrics.jsonl").open()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [None] * 3
    assert [line["step"] for line in lines if line.get("event") == "non_finite_evaluation"] == [0, 2, 4]
    for step in (0, 2, 4):
        assert (
            f"evaluation at step {step}: eval_loss is not finite; it is not the best state; early stopping counts it as "
            "no improvement" in said
        )
    assert "stopped early at step 4: eval_loss never was a number, and 3 evaluations since then" in said
    assert max(line["step"] for line in lines if "loss" in line) == 4
    manifests = [Manifest.read(path) for path in complete_checkpoints(output / "checkpoints")]
    assert [manifest.position.eval_loss for manifest in manifests] == [None] * len(manifests)
    assert best_of([manifest.position for manifest in manifests], Goal("eval_loss", "min")) is None
    page = (output / "report.html").read_text()
    assert "The loss on held-out rows is not finite in 3 of 3 evaluations, the last one that of step 4" in page
    with pytest.raises(SystemExit):
        main(["status", str(output)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Events step 4: its evaluation is not finite (eval_loss) (3 of these, this is the last)" in shown


def step_rank(folder: Path, step: int) -> int:
    about = json.loads((folder / "run/diverged" / f"step-{step:08d}" / "about.json").read_text())
    (rank,) = about["ranks"]
    return int(rank)
