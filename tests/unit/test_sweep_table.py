"""The runs of a sweep side by side, from files as runs write them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from sft_dist.cli import main
from sft_dist.cluster.sweep import plan_sweep
from sft_dist.cluster.sweep_files import read_sweeps, write_sweep
from sft_dist.cluster.sweep_table import SweepRow, sweep_rows, sweep_table, to_csv, to_json, why_not_comparable

CONFIG = """\
model: {path: m}
method: {type: lora, r: 4}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, num_epochs: 3}
output_dir: runs/x
"""
JPY_PER_USD = 150.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of four learning rates, of which no run has begun."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    return submit("optim.lr=1e-5,2e-5,5e-5,1e-4")


def submit(*texts: str, number: int = 1) -> Path:
    submission = Path("runs/x/slurm") / f"submission-{number:03}"
    submission.mkdir(parents=True)
    write_sweep(plan_sweep(Path("run.yaml"), [], texts), submission)
    return Path("runs/x")


def train(
    run: Path, losses: Sequence[float | None], evaluations: dict[int, float], *, ended: bool, usd: float | None = 1.5
) -> None:
    """Writes what a run of 1,200 steps writes that has come as far as ``losses``; None: not finite."""
    run.mkdir(parents=True)
    lines: list[dict[str, object]] = []
    for step, loss in enumerate(losses, start=1):
        cost = {} if usd is None else {"cost_usd": usd * step / 100}
        lines.append({"step": step, "loss": loss, "elapsed_s": 36.0 * step, **cost})
        if step in evaluations:
            lines.append({"step": step, "eval_loss": evaluations[step], "eval_perplexity": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    session = {
        "started": "2026-01-01T00:00:00+00:00", "first_step": 1, "elapsed_s": 36.0 * len(losses) if ended else 0.0,
        "cost_usd": usd * len(losses) / 100 if ended and usd is not None else None, "ended": ended,
        "preempted_by": None,
    }  # fmt: skip
    receipt = {
        "format": 1, "finished": ended, "planned": {"steps": 1200},
        "price": None if usd is None else {"usd": 12.0, "jpy_per_usd": JPY_PER_USD, "name": "x"},
        "sessions": [session],
    }  # fmt: skip
    (run / "receipt.json").write_text(json.dumps(receipt))
    if ended:
        (run / "final").mkdir()


def shown(rows: list[SweepRow], *notes: str) -> list[str]:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(sweep_table(rows, title="runs/x", notes=notes))
    return [line.rstrip() for line in console.export_text().splitlines()]


GOLDEN = """\
runs/x

 point       state    step of 1,200  train loss  best eval  last eval  hours     USD     JPY
 ────────────────────────────────────────────────────────────────────────────────────────────
 lr-1e-05    done             1,200      1.5000     1.4000     1.4000  12.00  $18.00  ¥2,700
 lr-2e-05 *  done             1,200      1.2000     1.1000     1.3000  12.00  $18.00  ¥2,700
 lr-5e-05    running            600      1.3000     1.2500     1.2500   6.00   $9.00  ¥1,350
 lr-0.0001   pending              0

* best so far by evaluation
train loss: mean of the last 10 steps
"""


def three_of_four(folder: Path) -> None:
    train(folder / "lr-1e-05", [1.5] * 1200, {600: 1.45, 1200: 1.4}, ended=True)
    train(folder / "lr-2e-05", [2.0] * 1190 + [1.2] * 10, {600: 1.1, 1200: 1.3}, ended=True)
    train(folder / "lr-5e-05", [1.3] * 600, {600: 1.25}, ended=False)
    with (folder / "lr-5e-05" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 601, "lo')


STATES = {"lr-1e-05": "COMPLETED", "lr-2e-05": "COMPLETED", "lr-5e-05": "RUNNING", "lr-0.0001": "PENDING"}


def test_it_reads_at_a_glance(folder: Path) -> None:
    three_of_four(folder)
    assert shown(sweep_rows(folder, job_states=STATES)) == GOLDEN.splitlines()


def test_without_slurm_the_files_say_what_they_can(folder: Path) -> None:
    three_of_four(folder)
    assert [row.state for row in sweep_rows(folder)] == ["done", "done", "stopped", "not begun"]


def test_without_price_and_evaluation(folder: Path) -> None:
    train(folder / "lr-1e-05", [1.5] * 1200, {}, ended=True, usd=None)
    train(folder / "lr-2e-05", [1.4] * 1200, {}, ended=True, usd=None)
    lines = shown(sweep_rows(folder))
    assert lines[2].split() == ["point", "state", "step", "of", "1,200", "train", "loss", "hours"]
    assert [line.split()[0] for line in lines if " * " in line] == ["lr-2e-05"]
    assert lines[-2:] == [
        "* best so far by training loss, as there is no evaluation",
        "train loss: mean of the last 10 steps",
    ]


def test_a_point_that_diverged_has_no_training_loss(folder: Path) -> None:
    """Low as it was until then."""
    train(folder / "lr-1e-05", [1.5] * 20, {}, ended=False)
    train(folder / "lr-2e-05", [1.4] * 20, {}, ended=False)
    train(folder / "lr-5e-05", [*[1.1] * 19, None], {}, ended=False)
    losses = {row.point: (row.train_loss, row.is_best) for row in sweep_rows(folder) if row.step}
    assert losses == {"lr-1e-05": (1.5, False), "lr-2e-05": (1.4, True), "lr-5e-05": (None, False)}


def test_a_single_loss_is_not_the_best_of_anything(folder: Path) -> None:
    train(folder / "lr-1e-05", [1.5] * 10, {10: 1.0}, ended=False)
    assert not any(row.is_best for row in sweep_rows(folder))


@pytest.mark.parametrize(
    ("texts", "key"),
    [
        (["data.max_seq_len=1024,2048"], "data.max_seq_len"),
        (["model.path=a,b"], "model.path"),
        (["data.train.0.weight=1,2", "data.eval_split={share: 0.1}"], "data.train.0.weight"),
    ],
)
def test_losses_of_other_data_are_not_compared(folder: Path, texts: list[str], key: str) -> None:
    submit(*texts, number=2)
    (_, second) = read_sweeps(folder)
    assert (
        why_not_comparable([second]) == f"{key} differs, and with it what the loss is taken of: none is called the best"
    )
    three_of_four(folder)
    rows = sweep_rows(folder, job_states=STATES)
    assert not any(row.is_best for row in rows)
    assert any("none is called the best" in line for line in shown(rows, why_not_comparable([second]) or ""))


def test_a_mixture_is_compared_on_its_own_evaluation(folder: Path) -> None:
    submit("data.train.0.weight=1,2", number=2)
    assert why_not_comparable(read_sweeps(folder)) is None


def test_several_submissions_are_one_table(folder: Path) -> None:
    submit("optim.lr=1e-4,3e-4", number=2)
    assert [row.point for row in sweep_rows(folder)] == ["lr-1e-05", "lr-2e-05", "lr-5e-05", "lr-0.0001", "lr-0.0003"]


def test_csv_and_json_say_the_same(folder: Path) -> None:
    three_of_four(folder)
    rows = sweep_rows(folder, job_states=STATES)
    from_json = json.loads(to_json(rows))
    assert from_json[1] == {
        "point": "lr-2e-05", "state": "done", "step": 1200, "num_steps": 1200, "train_loss": pytest.approx(1.2),
        "best_eval_loss": 1.1, "last_eval_loss": 1.3, "hours": 12.0, "usd": 18.0, "jpy": 2700.0, "is_best": True,
    }  # fmt: skip
    from_csv = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert list(from_csv[0]) == list(from_json[0])
    assert from_csv[3] == {
        "point": "lr-0.0001", "state": "pending", "step": "", "num_steps": "", "train_loss": "", "best_eval_loss": "",
        "last_eval_loss": "", "hours": "", "usd": "", "jpy": "", "is_best": "False",
    }  # fmt: skip


def test_the_command_says_what_it_does_not_know(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    three_of_four(folder)
    (folder / "slurm/submission-001/submission.json").write_text(json.dumps({"jobs": {"train": "12"}}))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as caught:
        main(["sweep-table", str(folder), "--csv"])
    assert not caught.value.code
    printed = capsys.readouterr()
    assert printed.err == (
        "what SLURM says of the jobs is not known: SLURM is not installed here: there is no program scontrol\n"
    )
    assert [row["state"] for row in csv.DictReader(io.StringIO(printed.out))] == [
        "done",
        "done",
        "stopped",
        "not begun",
    ]


def test_a_folder_without_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sweep-table", str(tmp_path)])
    assert caught.value.code == 2
    assert "holds no sweep" in capsys.readouterr().err
