"""In what two runs differ, read from their folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist.errors import ConfigError
from sft_dist.metrics.recorded import Apart, apart
from sft_dist.report.compare import differences
from sft_dist.report.differ import diff, told


def run(folder: Path, losses: list[float | None], *, lr: float = 1e-4, seed: int = 0, processes: int = 2) -> Path:
    folder.mkdir()
    settings = {
        "optim": {"lr": lr}, "output_dir": str(folder), "logging": {"wandb": {"name": folder.name}},
        "cluster": {"environment": {"HF_TOKEN": folder.name}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    receipt: dict[str, Any] = {
        "identity": {"train.seed": seed, "data.train": "10 rows"}, "versions": {"torch": "2.13"},
        "topology": {"processes": processes, "strategy": "fsdp2"},
    }  # fmt: skip
    (folder / "receipt.json").write_text(json.dumps(receipt))
    lines = [{"step": n, "loss": loss, "grad_norm": 1.0} for n, loss in enumerate(losses, start=1)]
    text = json.dumps({"step": 0, "eval_loss": 2.0}) + "\n" + "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9, "lo')
    return folder


def test_what_differs_is_named_and_what_does_not_matter_is_not(tmp_path: Path) -> None:
    first = run(tmp_path / "a", [3.0, 2.0, 1.0])
    second = run(tmp_path / "b", [3.0, 2.0, 1.1, 0.9], lr=2e-4, seed=1, processes=4)
    found = diff(first, second)
    assert [(each.area, each.name, each.values) for each in found.differences] == [
        ("identity", "train.seed", ("0", "1")),
        ("settings", "optim.lr", ("0.0001", "0.0002")),
        ("topology", "processes", ("2", "4")),
    ]
    assert told(found)[-1] == (
        "losses and norms: equal to the bit in the first 2 of 3 shared steps; losses differ by 9.1e-02 at most, at step 3"
    )


def test_a_file_is_the_same_by_any_path_and_a_section_is_told_once() -> None:
    def settings(path: str, paths: list[str], scores: Any) -> dict[str, Any]:
        return {"data": {"train": [{"path": path}]}, "eval": {"scores": scores, "paths": paths}, "seed": 1}

    scored = {"metrics": ["chrf"], "normalise": True}
    first, second = settings("demo/x.jsonl", ["a", "b"], scored), settings("/at/demo/x.jsonl", ["a", "/at/b"], None)
    assert differences([first, second], ["/at", "/elsewhere"]) == {
        "eval.scores.metrics": ('["chrf"]', None),
        "eval.scores.normalise": ("true", None),
        "eval.paths": ('["a", "b"]', '["a", "/at/b"]'),
    }
    assert "eval.paths" not in differences([first, second], ["/at", "/at"])
    assert differences([first, second], ["/other", "/at"])["data.train.0.path"] == ("demo/x.jsonl", "/at/demo/x.jsonl")
    assert "data.train.0.path" in differences([first, second])
    assert differences([{"a": {"b": 1}}, {"a": 0}]) == {"a.b": ("1", None), "a": (None, "0")}


def test_equal_runs(tmp_path: Path) -> None:
    found = diff(run(tmp_path / "a", [3.0, None]), run(tmp_path / "b", [3.0, None]))
    assert told(found) == [
        "nothing in identity, settings, versions and topology differs",
        "losses and norms: equal to the bit in all 2 shared steps",
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {1: (1.0, 1.0)}, None),
        ({1: (1.0, 1.0)}, {1: (1.0, 2.0)}, Apart(0, 1, 0.0, 1)),
        ({1: (2.0, 1.0), 2: (math.nan, 1.0)}, {1: (1.0, 1.0), 2: (1.0, 1.0)}, Apart(0, 2, math.inf, 2)),
    ],
)
def test_how_far_they_went_together(first: Any, second: Any, expected: Apart | None) -> None:
    assert apart(first, second) == expected


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, [3.0, 2.0]) for name in ("a", "b"))
    whole = (second / "metrics.jsonl").read_text()
    (second / "metrics.jsonl").write_text('{"step": 1, "lo\n7\n' + whole)
    assert diff(first, second).apart == Apart(2, 2, 0.0, 1)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", [1.0])
    with pytest.raises(ConfigError, match="are the same run"):
        diff(folder, folder)
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        diff(folder, tmp_path / "b")
