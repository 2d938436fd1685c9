"""Where a run begins that has copies of its checkpoints elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sft_dist.checkpoint import store
from sft_dist.checkpoint.mirror import Mirror
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.config.validate import validate
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.train.from_mirror import bring, check_mirror, replace_damaged
from sft_dist.train.preflight import preflight
from tests.unit.test_mirror import checkpoint


def config(tmp_path: Path, *, mirror: str | None = None, output: str = "run") -> Config:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return Config.model_validate(
        {
            "model": {"path": "some/model"},
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
            "train": {"global_batch_size": 1, "max_steps": 1},
            "checkpoint": {"mirror": mirror or f"file://{tmp_path}/mirror"},
            "output_dir": str(tmp_path / output),
        }
    )


def mirrored(tmp_path: Path, *steps: int, output: str = "run") -> list[Path]:
    """Checkpoints of a run directory, and their copies."""
    paths = [checkpoint(tmp_path / output, step) for step in steps]
    for path in paths:
        Mirror(f"file://{tmp_path}/mirror").upload(path)
    return paths


def steps_of(tmp_path: Path, output: str = "run") -> list[int | None]:
    return [store.step_of(path.name) for path in store.complete_checkpoints(tmp_path / output / "checkpoints")]


def damage(tmp_path: Path, step: int) -> None:
    """Changes a byte, not the size, of a copy."""
    path = tmp_path / "mirror" / store.name_of(step) / "shard-1.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])


def test_auto_fetches_what_the_run_directory_has_lost(tmp_path: Path) -> None:
    said: list[str] = []
    mirrored(tmp_path, 3, 5)
    shutil.rmtree(tmp_path / "run")
    preflight(config(tmp_path), resume="auto")
    assert bring(config(tmp_path), "auto", say=said.append) == "auto"
    assert steps_of(tmp_path) == [5], "the newest one alone"
    (only,) = said
    assert only.startswith(f"fetching  file://{tmp_path}/mirror/step-00000005, ")
    assert only.endswith("bytes")


@pytest.mark.parametrize(("local", "copies", "then"), [((7,), (5,), [7]), ((5,), (5,), [5]), ((5,), (5, 8), [5, 8])])
def test_the_newer_one_counts(tmp_path: Path, local: tuple[int], copies: tuple[int, ...], then: list[int]) -> None:
    mirrored(tmp_path, *copies, output="lost")
    for step in local:
        checkpoint(tmp_path / "run", step)
    assert bring(config(tmp_path), "auto", say=str) == "auto"
    assert steps_of(tmp_path) == then


def test_a_damaged_copy_is_named_and_skipped(tmp_path: Path) -> None:
    said: list[str] = []
    mirrored(tmp_path, 3, 5)
    shutil.rmtree(tmp_path / "run")
    damage(tmp_path, 5)
    assert bring(config(tmp_path), "auto", say=said.append) == "auto"
    assert steps_of(tmp_path) == [3]
    assert (
        "mirror/step-00000005 is damaged: shard-1.safetensors is not the file that was uploaded; it is skipped"
        in said[1]
    )
    url = f"file://{tmp_path}/mirror/step-00000005"
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="step-00000005 is damaged") as caught:
        bring(config(tmp_path), url, say=said.append)
    assert type(caught.value) is CheckpointError, "as which it is known on other ranks"


def test_a_damaged_checkpoint_is_replaced_by_its_copy(tmp_path: Path) -> None:
    said: list[str] = []
    older, newest = mirrored(tmp_path, 3, 5)
    (newest / "shard-1.safetensors").write_bytes(b"lost")
    assert replace_damaged(config(tmp_path), newest, say=said.append)
    assert (newest / "shard-1.safetensors").read_bytes() == b"weights" * 6
    assert (newest.parent / "step-00000005.damaged/shard-1.safetensors").read_bytes() == b"lost"
    assert len(said) == 1
    assert said[0].startswith(f"{newest} is damaged, it is kept as step-00000005.damaged; fetching its copy, ")
    damage(tmp_path, 3)
    assert not replace_damaged(config(tmp_path), older, say=said.append)
    assert not replace_damaged(config(tmp_path), checkpoint(tmp_path / "run", 9), say=pytest.fail), "there is no copy"
    assert steps_of(tmp_path) == [3, 5, 9], "what is not replaced keeps its name"


def test_storage_that_fails_is_not_passed_over_for_an_older_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(tmp_path, 3, 5)
    shutil.rmtree(tmp_path / "run")

    def fail(*_: object) -> Path:
        raise CheckpointError("the network is down", fix="wait")

    monkeypatch.setattr(Mirror, "fetch", fail)
    with pytest.raises(CheckpointError, match="the network is down"):
        bring(config(tmp_path), "auto", say=str)


def test_the_url_of_a_copy_goes_on_in_any_empty_folder(tmp_path: Path) -> None:
    mirrored(tmp_path, 3, 5)
    url = f"file://{tmp_path}/mirror/step-00000003"
    other = config(tmp_path, mirror=f"file://{tmp_path}/other", output="branch")
    preflight(other, resume=url)
    expected = str(tmp_path / "branch/checkpoints/step-00000003")
    assert bring(other, url, say=str) == expected
    assert bring(other, url, say=pytest.fail) == expected, "the same command once more"
    assert steps_of(tmp_path, "branch") == [3]
    without = other.model_copy(update={"checkpoint": other.checkpoint.model_copy(update={"mirror": None})})
    again = without.model_copy(update={"output_dir": str(tmp_path / "third")})
    assert bring(again, url, say=str) == str(tmp_path / "third/checkpoints/step-00000003")


def test_what_a_start_would_contradict_is_refused_and_nothing_is_fetched(tmp_path: Path) -> None:
    local = mirrored(tmp_path, 3, 5)
    copy = f"file://{tmp_path}/mirror/step-00000003"
    for resume, output, mirror, what in (
        ("never", "new", "mirror", r"checkpoint\.mirror: file://\S+ already holds a run \(the newest is step-00000005\)"),
        (copy, "run", "mirror", r"output_dir \S+ has a newer checkpoint, step-00000005, which"),
        (copy, "new", "mirror", r"checkpoint\.mirror \S+ has a newer checkpoint, step-00000005, which"),
        (copy, "run2", "other", r"is of another run than the one that output_dir \S+ holds"),
        (str(local[1]), "new", "mirror", r"is of another run than the one that checkpoint\.mirror \S+ holds"),
        (copy + "0", "new", "other", r"step-000000030: no complete checkpoint\n.*mirror: step-00000003, step-00000005$"),
        (copy.rpartition("/")[0], "new", "other", r"mirror: no such checkpoint\n.*ends in step-"),
    ):  # fmt: skip
        if output == "run2" and not (tmp_path / output).exists():
            checkpoint(tmp_path / output, 9)
        there = config(tmp_path, mirror=f"file://{tmp_path}/{mirror}", output=output)
        for start in (lambda at=there, r=resume: check_mirror(at, r), lambda at=there, r=resume: bring(at, r, say=str)):
            with pytest.raises(ConfigError, match=what):
                start()
        assert steps_of(tmp_path, output) == {"run": [3, 5], "run2": [9]}.get(output, [])
    store.delete(local[1])
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror \S+ has a newer checkpoint, step-00000005"):
        bring(config(tmp_path), str(local[0]), say=str)


def test_an_older_checkpoint_of_the_same_run_and_a_first_start_pass(tmp_path: Path) -> None:
    there = config(tmp_path)
    preflight(there)
    assert bring(there, "never", say=pytest.fail) == "never"
    assert bring(there, "auto", say=pytest.fail) == "auto"
    (only,) = mirrored(tmp_path, 3)
    assert bring(there, str(only), say=pytest.fail) == str(only)


def test_mistakes_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    for mirror, what in (
        (f"file://{tmp_path}/run/copies", r"checkpoint\.mirror: \S+ is in output_dir"),
        ("nowhere://x", "nowhere:// is no storage that is known"),
    ):
        with pytest.raises(ConfigError, match=what):
            preflight(config(tmp_path, mirror=mirror))
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror runs/x is no URL\n  fix: write s3://"):
        validate(config(tmp_path, mirror="runs/x"))


def test_ranks_do_not_ask_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    preflight(config(tmp_path, mirror="nowhere://x"), resume="auto")


def test_the_key_is_one_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\ndata: {train: [{path: a}]}\ntrain: {global_batch_size: 1, max_steps: 1}\noutput_dir: o\n"
    )
    assert load_config(tmp_path / "c.yaml", ["checkpoint.mirror=s3://b/x"]).checkpoint.mirror == "s3://b/x"
