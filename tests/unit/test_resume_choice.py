"""Which checkpoint ``--resume`` means, and what stands in its way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sft_dist.checkpoint import store
from sft_dist.checkpoint.identity import identity_of
from sft_dist.checkpoint.manifest import Identity
from sft_dist.checkpoint.rotation import rotate
from sft_dist.config.load import dump_config
from sft_dist.config.schema import CheckpointConfig, Config
from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.packing import Packs
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape, restarts
from sft_dist.train.resume import changed_settings, check_position, find_checkpoints, resume_after_restart
from tests.helpers import cells
from tests.helpers.checkpoints import make_checkpoint


def test_auto_takes_the_newest_complete_one(tmp_path: Path) -> None:
    assert find_checkpoints("auto", str(tmp_path)) == []
    for step in (90, 100, 9):
        make_checkpoint(tmp_path, step)
    store.begin(tmp_path / "checkpoints", 110)
    store.reject(store.begin(tmp_path / "checkpoints", 105))
    found = find_checkpoints("auto", str(tmp_path))
    assert [path.name for path in found] == ["step-00000100", "step-00000090", "step-00000009"]
    assert find_checkpoints("never", str(tmp_path)) == []


def test_auto_does_not_overwrite_what_is_finished(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(ConfigError, match="has final/ of a finished run and no checkpoint"):
        find_checkpoints("auto", str(tmp_path))
    assert find_checkpoints("auto", str(make_checkpoint(tmp_path, 3).parents[1]))


def test_a_launch_that_was_started_again_goes_on_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"TORCHELASTIC_RESTART_COUNT": "0"}
    assert [restarts({}), restarts(first), restarts({"TORCHELASTIC_RESTART_COUNT": "2"})] == [0, 0, 2]
    # Another node's process failed: the count of this node is what it was.
    assert restarts({**first, "SFT_DIST_ATTEMPT": "1-abc"}) == 1

    begun = tmp_path / "branch"
    begun.mkdir()
    (begun / "metrics.jsonl").touch()
    trunk = str(make_checkpoint(tmp_path / "trunk", 5))
    with pytest.raises(ConfigError, match="is of another run"):
        find_checkpoints(trunk, str(begun))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [resume_after_restart(resume, str(begun)) for resume in ("never", "auto", trunk)] == ["auto", "auto", trunk]
    assert find_checkpoints(trunk, str(begun)) == [Path(trunk)]
    make_checkpoint(begun, 7)
    assert [resume_after_restart(resume, str(begun)) for resume in ("never", "auto", trunk)] == ["auto"] * 3


def test_what_was_changed_is_told(tmp_path: Path) -> None:
    before = cells.config("m", "lora", "ddp")
    (tmp_path / "config.yaml").write_text(dump_config(before))
    assert changed_settings(tmp_path, before) == []
    now = before.model_dump(mode="json")
    now["optim"]["lr"] = 1e-4
    now["sharding"] = {"strategy": "fsdp2"}
    now["output_dir"] = "elsewhere"
    now["logging"]["wandb"]["mode"] = "disabled"
    now["hardware"] = {"gpu": "h100", "nodes": 2, "owned": {"price_per_kwh": 0.2}}
    assert changed_settings(tmp_path, Config.model_validate(now)) == [
        "optim.lr: 0.003 -> 0.0001",
        "sharding.cpu_offload: None -> False",
        "sharding.dp_replicate: None -> 1",
        "sharding.reduce_once_a_step: None -> False",
        "sharding.reshard_after_forward: None -> True",
        "sharding.strategy: ddp -> fsdp2",
    ]


def test_more_than_eight_digits_are_newer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 99_999_999)
    found = find_checkpoints("auto", str(make_checkpoint(tmp_path, 100_000_000).parents[1]))
    assert found[0] == tmp_path / "checkpoints/step-100000000"


def test_a_path_of_another_run_goes_on_in_an_empty_folder(tmp_path: Path) -> None:
    wanted = make_checkpoint(tmp_path / "old", 3)
    assert find_checkpoints(str(wanted), str(tmp_path / "new")) == [wanted]
    make_checkpoint(tmp_path / "new", 1)
    with pytest.raises(ConfigError, match="is of another run than the one that output_dir"):
        find_checkpoints(str(wanted), str(tmp_path / "new"))


def test_an_older_one_of_the_same_run_would_contradict_the_newer(tmp_path: Path) -> None:
    older = make_checkpoint(tmp_path, 3)
    assert find_checkpoints(str(older), str(tmp_path)) == [older]
    make_checkpoint(tmp_path, 5)
    with pytest.raises(ConfigError, match="has a newer checkpoint, step-00000005"):
        find_checkpoints(str(older), str(tmp_path))


def test_a_run_knows_its_own_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_checkpoint(tmp_path, 3)
    monkeypatch.chdir(tmp_path / "checkpoints")
    for resume in (own.name, f"../checkpoints/{own.name}"):
        assert find_checkpoints(resume, str(tmp_path)) == [Path(resume)]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 7)
    for given in (str(tmp_path), str(tmp_path / "checkpoints"), "absent", ""):
        with pytest.raises(ConfigError, match=r"no such checkpoint\n.*there are: step-00000007$"):
            find_checkpoints(given, str(tmp_path))


def test_the_next_samples_must_be_those_that_were_next(tmp_path: Path) -> None:
    plan = BatchPlan(global_batch_size=4, micro_batch_size=1, world_size=1, max_seq_len=48)
    order = TrainingOrder(cells.synthetic_data(), plan, seed=3)
    following = tuple(order.step(2).sequences.tolist())
    none = Identity(values={})
    good = make_checkpoint(tmp_path / "a", 2, following)
    assert check_position(good, none, order, num_steps=10) == 2
    assert check_position(make_checkpoint(tmp_path / "b", 2), none, order, num_steps=10) == 2
    with pytest.raises(ConfigError, match="has 2 steps behind it, but the run is 1 steps long"):
        check_position(good, none, order, num_steps=1)
    with pytest.raises(ConfigError, match=r"belongs to another run:\ntrain\.seed is 4 here and None in the checkpoint"):
        check_position(good, Identity(values={"train.seed": 4}), order, num_steps=10)
    bad = make_checkpoint(tmp_path / "c", 2, tuple(np.roll(following, 1).tolist()))
    with pytest.raises(CheckpointError, match="step 3 would train other sequences"):
        check_position(bad, none, order, num_steps=10)


def test_the_last_are_kept_and_the_rest_is_gone(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        make_checkpoint(tmp_path, step)
    folder = tmp_path / "checkpoints"
    rotate(folder, CheckpointConfig(keep_last=2))
    assert [path.name for path in store.complete_checkpoints(folder)] == ["step-00000010", "step-00000011"]
    assert len(list(folder.iterdir())) == 2


def test_what_was_left_half_done_is_swept_up(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store.sweep(folder)
    kept = [make_checkpoint(tmp_path, 1), store.reject(store.begin(folder, 2))]
    store.begin(folder, 3)
    make_checkpoint(tmp_path, 4).rename(folder / "step-00000004.deleted")
    store.sweep(folder)
    assert sorted(folder.iterdir()) == sorted(kept)


def test_a_step_is_never_saved_twice(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    with pytest.raises(FileExistsError):
        store.begin(tmp_path / "checkpoints", 1)


def test_half_a_deleted_checkpoint_does_not_look_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, 2)
    newest = make_checkpoint(tmp_path, 3)

    def end(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", end)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path / "checkpoints", CheckpointConfig(keep_last=1))
    assert store.complete_checkpoints(tmp_path / "checkpoints") == [newest]


@pytest.mark.parametrize("changed", ["input_ids", "supervised", "bounds", "packs"])
def test_other_data_are_another_run(tiny_base: Path, tmp_path: Path, changed: str) -> None:
    run = resolve(cells.config(str(tiny_base)), WorldShape())
    rows = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])]
    before = identity_of(run, PreparedData.of(rows, Packs.of([[0, 1]])))
    before.require_same(identity_of(run, PreparedData.of(rows, Packs.of([[0, 1]]))), checkpoint=tmp_path)
    packs = Packs.of([[0], [1]] if changed == "packs" else [[0, 1]])
    if changed == "input_ids":
        rows[0][0][0] = 7
    elif changed == "supervised":
        rows[0][1][1] = 0
    elif changed == "bounds":
        rows = [([1, 2], [0, 1]), ([3, 4, 5], [1, 0, 1])]
    other = PreparedData.of(rows, packs)
    with pytest.raises(ConfigError, match=r"belongs to another run:\ndata\.train is 2 rows in [^\n]*\n  fix"):
        before.require_same(identity_of(run, other), checkpoint=tmp_path)


@pytest.mark.parametrize("place", [0, -1])
def test_other_weights_are_another_run(tiny_base: Path, tmp_path: Path, place: int) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    run, data = resolve(cells.config(str(base)), WorldShape()), cells.synthetic_data()
    before = identity_of(run, data)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[place] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"belongs to another run:\nmodel\.weights is [^\n]*\n  fix"):
        before.require_same(identity_of(run, data), checkpoint=tmp_path)


def test_other_tokens_make_another_run(tiny_base: Path, tmp_path: Path) -> None:
    """Rows of the embedding belong to tokens by their order, whether the training data has any of them or not."""
    data = cells.synthetic_data()

    def identity(*added: str) -> Identity:
        cfg = cells.config(str(tiny_base), model={"add_tokens": list(added)})
        return identity_of(resolve(cfg, WorldShape()), data)

    identity("<a>", "<b>").require_same(identity("<a>", "<b>"), checkpoint=tmp_path)
    for others in (("<b>", "<a>"), ("<a>", "<c>"), ()):
        with pytest.raises(ConfigError, match=r"model\.add_tokens is "):
            identity(*others).require_same(identity("<a>", "<b>"), checkpoint=tmp_path)
