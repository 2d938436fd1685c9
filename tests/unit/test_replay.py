"""What a receipt is compared with before a repetition, and what its outcome is called."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sft_dist.config.flat import flat
from sft_dist.config.secrets import HIDDEN
from sft_dist.errors import CheckpointError, ConfigError, DataError, SftError
from sft_dist.replay.here import Difference, Found, differences, is_by_user, override_keys, refusal
from sft_dist.replay.outcome import Compared, Outcome, Weights, compare_series, compare_weights, series_of
from sft_dist.replay.receipt import NEEDED, Recorded, config_of_replay, read_recorded
from sft_dist.replay.verdict import lines_of, verdict, write_replay
from sft_dist.runtime.machine import cpu_name, driver_version, gpu_names
from sft_dist.train.run_inputs import PART_BYTES, PARTS, inputs_of
from tests.helpers import cells

VALUES = st.dictionaries(st.integers(1, 30), st.floats(0.001, 100.0), min_size=1, max_size=10)


@given(VALUES)
def test_the_same_values_are_equal(losses: dict[int, float]) -> None:
    outcome = Outcome(compare_series({"loss": losses}, {"loss": dict(losses)}), Weights(True))
    assert outcome.is_equal
    assert verdict(outcome, 0.0).startswith(f"bit-equal: loss of {len(losses)} steps, final weights")


@given(VALUES, st.data(), st.floats(1e-12, 0.5))
def test_one_other_value_is_found_and_measured(losses: dict[int, float], data: Any, by: float) -> None:
    step = data.draw(st.sampled_from(sorted(losses)))
    now = losses | {step: losses[step] * (1 + by)}
    (found,) = compare_series({"loss": losses}, {"loss": now})
    assert (found.first, found.largest_step, found.lost) == (step, step, 0)
    assert found.largest == pytest.approx(by / (1 + by), rel=1e-3)
    outcome = Outcome((found,), Weights(False))
    assert outcome.is_within(found.largest)
    assert not outcome.is_within(found.largest / 2)
    assert verdict(outcome, 1.0) == f"within {found.largest:.1e} of it, first difference at step {step} (loss)"
    assert verdict(outcome, 0.0).startswith(f"differs by {found.largest:.1e} (loss at step {step}), first")


@given(VALUES, st.data())
def test_a_step_that_did_not_come_again_is_no_same_run(losses: dict[int, float], data: Any) -> None:
    step = data.draw(st.sampled_from(sorted(losses)))
    (found,) = compare_series({"loss": losses}, {"loss": {s: v for s, v in losses.items() if s != step}})
    outcome = Outcome((found,), Weights(True))
    assert (found.lost, outcome.is_equal, outcome.is_within(0.5)) == (1, False, False)
    assert verdict(outcome, 0.5) == "differs: 1 recorded values of loss did not come again"


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "eval_loss": 2.0, "eval_loss/x": 1.0, "eval_s": 3},
        {"step": 1, "loss": None, "grad_norm": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    found = series_of(tmp_path)
    assert sorted(found) == ["eval_loss", "eval_loss/x", "grad_norm", "loss"]
    assert math.isnan(found["loss"][1])
    assert Outcome(compare_series(found, found), None).is_equal
    assert Outcome(compare_series(found, found | {"loss": {1: 1.0}}), None).largest == math.inf


@pytest.mark.parametrize(
    ("outcome", "said", "same"),
    [
        (Outcome((), None), "nothing to compare: neither metrics.jsonl of the run nor a digest of its weights is there", False),
        (Outcome((), Weights(True)), "bit-equal: final weights", True),
        (Outcome((), Weights(False)),
         "differs: the weights, by how much is not known without the run's metrics.jsonl and final/", False),
        (Outcome((Compared("loss", 3, 0, None, 0.0, None),), Weights(False, 1e-3, 1e-2, "w")),
         "differs by 1.0e-03 (final weights), the final weights alone differ", False),
    ],
)  # fmt: skip
def test_verdicts_at_the_edges(outcome: Outcome, said: str, same: bool) -> None:
    assert verdict(outcome, 1e-5) == said
    assert outcome.is_within(1e-5) == same


def test_weights_are_measured_where_the_files_are(tmp_path: Path) -> None:
    for name, value in (("a", 3.0), ("b", 3.5)):
        (tmp_path / name / "final").mkdir(parents=True)
        save_file({"w": torch.tensor([value, 4.0]), "v": torch.ones(2)}, tmp_path / name / "final/model.safetensors")
    one, other = {"weights": "1"}, {"weights": "2"}
    found = compare_weights(one, other, (tmp_path / "a", tmp_path / "b"))
    assert found == Weights(False, pytest.approx(0.5 / math.sqrt(27)), 0.5, "w")
    assert compare_weights(one, one, (tmp_path / "a", tmp_path / "b")) == Weights(True)
    assert compare_weights(one, other, (tmp_path / "none", tmp_path / "b")) == Weights(False)
    assert compare_weights({}, other, (tmp_path / "a", tmp_path / "b")) is None


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("optim.lr", ["optim.lr=1"], True), ("optim.lr", ["optim={lr: 1}"], True), ("optim.lr", ["optim.lrx=1"], False),
        ("data.train", ["train.seed=1"], True), ("data.train", ["optim.lr=1"], False),
        ("data.train.1 (b.jsonl)", ["data.train.1.path=c"], True), ("data.train.1 (b.jsonl)", ["data.train.0.path=c"], False),
        ("model (weights)", ["model.path=c"], True), ("the chat template", ["data.train.0.path=c"], False),
    ],
)  # fmt: skip
def test_what_the_user_changed(name: str, overrides: list[str], expected: bool) -> None:
    assert is_by_user(name, override_keys(overrides)) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [("data.train.0 (x)", DataError), ("model (weights)", CheckpointError), ("train.seed", ConfigError)],
)
def test_the_exit_code_is_that_of_what_changed(name: str, kind: type[SftError], tmp_path: Path) -> None:
    error = refusal([Difference(name, "1", None)], Recorded(tmp_path / "receipt.json", tmp_path, {}))
    assert type(error) is kind
    assert f"  {name}: 1 -> -" in error.what
    assert error.on_all_ranks


def test_groups_are_told_in_their_order() -> None:
    found = Found((Difference("a", "1", "2"),), (Difference("b", "1", "2"),), (Difference("c", None, "2"),))
    assert found.lines() == [
        "changes the numbers:", "  a: 1 -> 2", "may change last digits:", "  b: 1 -> 2", "changed by you:", "  c: - -> 2"
    ]  # fmt: skip
    assert Found().lines() == ["all is as it was"]


SETTINGS = st.recursive(
    st.none() | st.integers() | st.text("xy", max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), SETTINGS, max_size=4))
def test_settings_differ_from_themselves_in_nothing(settings: dict[str, Any]) -> None:
    assert differences(settings, settings) == []
    keys = [key for key, _ in flat(settings)]
    assert [each.name for each in differences(settings, {})] == [k for k, v in flat(settings) if v is not None]
    assert len(set(keys)) == len(keys)


def receipt(folder: Path, **more: Any) -> Path:
    base = folder / "model"
    settings = cells.config(str(base)).model_dump(mode="json")
    content: dict[str, Any] = {key: {} for key in NEEDED}
    content |= {"format": 2, "finished": True, "settings": settings, "sessions": [{"first_step": 1}]} | more
    (folder / "receipt.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"format": 3}, "is of format 3, which this version does not know"),
        ({"inputs": None, "inputs_unread": "x.jsonl is gone"}, "it lacks: digests of what it read (x.jsonl is gone)"),
        ({"format": 1, "code": None}, r"it lacks: the code of this project \(format 1; from 2 on receipts have them\)"),
        ({"sessions": [{"first_step": 5}]}, "went on from a checkpoint of another one, at step 5"),
    ],
)
def test_receipts_that_cannot_be_repeated(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(x", r"\(x").replace("gone)", r"gone\)")):
        read_recorded(receipt(tmp_path, **more))


def test_a_repetition_is_quiet_and_copies_nothing_elsewhere(tmp_path: Path) -> None:
    settings = cells.config("m", checkpoint={"mirror": "s3://x/y"}).model_dump(mode="json")
    recorded = read_recorded(receipt(tmp_path, settings=settings))
    config = config_of_replay(recorded, ["optim.lr=0.5"], tmp_path / "out")
    assert (config.logging.wandb.mode, config.checkpoint.mirror) == ("disabled", None)
    assert (config.optim.lr, config.output_dir) == (0.5, str(tmp_path / "out"))
    config = config_of_replay(recorded, ["logging.wandb.mode=online"], tmp_path / "out")
    assert config.logging.wandb.mode == "online"


def test_hidden_values_that_matter_are_asked_for(tmp_path: Path) -> None:
    settings = cells.config("m").model_dump(mode="json")
    settings["data"]["train"][0]["path"] = f"s3://{HIDDEN}@x/rows.jsonl"
    recorded = read_recorded(receipt(tmp_path, settings=settings))
    with pytest.raises(ConfigError, match=r"data\.train\.0\.path is hidden in it"):
        config_of_replay(recorded, [], tmp_path / "out")
    assert config_of_replay(recorded, ["data.train.0.path=a"], tmp_path / "out").data.train[0].path == "a"
    settings["data"]["train"][0]["path"] = "s3://me:word@x/rows.jsonl"
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert "me:word" in config_of_replay(recorded, [], tmp_path / "out").data.train[0].path


def test_parts_of_a_large_file_tell_it_from_another(tmp_path: Path, tiny_base: Path) -> None:
    """Both ends of the files of two merged adapters are the same."""
    import shutil

    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = cells.config(
        str(tmp_path / "base"), data={"train": [{"path": str(tmp_path / "rows.jsonl")}], "cache_dir": str(tmp_path)}
    )
    big = bytearray(3 * PARTS * PART_BYTES)
    (tmp_path / "base/model.safetensors").write_bytes(big)
    before = inputs_of(config)
    big[len(big) // 3 : 2 * len(big) // 3] = b"\1" * (2 * len(big) // 3 - len(big) // 3)
    (tmp_path / "base/model.safetensors").write_bytes(big)
    assert [each.name for each in differences(before, inputs_of(config))] == ["model (weights)"]


def test_what_was_compared_is_written(tmp_path: Path) -> None:
    recorded = read_recorded(receipt(tmp_path))
    outcome = Outcome((Compared("loss", 2, 0, 1, math.inf, 1),), Weights(False, 0.5, 0.1, "w"))
    by_user = Found(by_user=(Difference("optim.lr", "1", "2"),))
    after = [Difference("torch", "1", "2")]
    write_replay(
        tmp_path, recorded, ["optim.lr=2", "cluster.environment.MY_TOKEN=s3cret"], by_user, after, outcome, 1e-5
    )
    written = json.loads((tmp_path / "replay.json").read_text())
    assert written["compared"][0]["largest"] == "inf"
    assert (written["overrides"].pop(), "s3cret" in json.dumps(written)) == (
        f"cluster.environment.MY_TOKEN={HIDDEN}",
        False,
    )
    assert (written["overrides"], written["is_within"], written["after"][0]["name"]) == (["optim.lr=2"], False, "torch")
    lines = lines_of(recorded, outcome, by_user, after, 1e-5)
    assert lines[1] == "weights   differ by 1.0e-01 at most (w), 5.0e-01 of their norm"
    assert lines[2:] == ["with      optim.lr: 1 -> 2 (by you)", "and       torch: 1 -> 2"]


def test_the_machine_is_read_from_proc(tmp_path: Path) -> None:
    assert (driver_version(tmp_path), gpu_names(tmp_path)) == (None, [])
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n")
    for number in range(2):
        gpu = tmp_path / f"driver/nvidia/gpus/0000:0{number}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    (tmp_path / "driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: gcc 12\n"
    )
    assert cpu_name(tmp_path) == "A CPU @ 2 GHz"
    assert driver_version(tmp_path) == "535.104.05"
    assert gpu_names(tmp_path) == ["NVIDIA H100 80GB HBM3"]
