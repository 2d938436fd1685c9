"""Damaged checkpoints, disks that are full or read-only, clocks that go back: through the command, as a user meets them.

Never a wrong resume: what goes on has the losses of the run that nothing happened to, bit for bit, or does not go on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist import cli
from sft_dist.checkpoint import checkpointer
from sft_dist.checkpoint.manifest import MANIFEST, Manifest
from sft_dist.checkpoint.proof import verify_files
from sft_dist.checkpoint.shard_file import file_name
from sft_dist.checkpoint.store import DAMAGED, complete_checkpoints
from tests.helpers import cells
from tests.helpers.checkpoints import edit_manifest, final_bytes, flip, numbers_of
from tests.helpers.disks import Trouble, read_only, troubled_disk
from tests.helpers.ranks import Ranks

STEPS, EVERY = 8, 2
PATIENCE_S = 120
SHARD = file_name(0, 1)

# (exit code, stdout, stderr)
Result = tuple[int, str, str]
Train = Callable[..., Result]


def write_config(base: Path, folder: Path, method: str, strategy: str, *, steps: int = STEPS) -> Path:
    rows = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = cells.config(
        str(base), method, strategy,
        data={"train": [{"path": str(folder / "rows.jsonl")}], "cache_dir": str(folder / "cache")},
        train={"global_batch_size": 4, "micro_batch_size": 1, "max_steps": steps},
        checkpoint={"every_steps": EVERY, "keep_last": 99},
    )  # fmt: skip
    (folder / "run.yaml").write_text(cells.dump(cells.whole_run(cfg, folder / "whole")))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that nothing happened to; it is in ``whole`` beside it."""
    path = write_config(tiny_base, tmp_path_factory.mktemp("faults"), "full", "ddp")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(path)])
    assert ended.value.code == 0
    return path


@pytest.fixture
def train(config: Path, capfd: pytest.CaptureFixture[str]) -> Train:
    """``train(output, *arguments)``: the command, in this process."""

    def run(output: Path, *arguments: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", str(config), f"output_dir={output}", *arguments])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in err
        return ended.value.code, out, err

    return run


@pytest.fixture
def whole(config: Path) -> Path:
    return config.with_name("whole")


@pytest.fixture
def interrupted(whole: Path, tmp_path: Path) -> Path:
    """The same run, ended between its last checkpoint and its artefact."""
    output = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(output / "final")
    return output


def checkpoint(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def forge(folder: Path) -> None:
    """A manifest that is good in itself, and says that it is of the step before."""
    edit_manifest(folder, lambda content: content["position"].update(completed_steps=STEPS - 1))


# What is done to the newest checkpoint, and what is said of it.
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated file": (lambda folder: cut(folder / SHARD, 1000), f"{SHARD} has 1000 bytes instead of"),
    "an empty file": (lambda folder: cut(folder / SHARD, 0), f"{SHARD} has 0 bytes instead of"),
    "a flipped bit": (lambda folder: flip(folder / SHARD), f"{SHARD} is not the file that was written at this step"),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "a shard of another step": (
        lambda folder: shutil.copy(checkpoint(folder.parents[1], STEPS - EVERY) / SHARD, folder),
        f"{SHARD} is not the file that was written at this step",
    ),
    "a stray file": (lambda folder: (folder / "shard-of-somebody").touch(), "shard-of-somebody does not belong to it"),
    "half a manifest": (lambda folder: cut(folder / MANIFEST, 300), f"{MANIFEST} cannot be read"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"is no checkpoint: it has no {MANIFEST}"),
    "a flipped bit in the manifest": (
        lambda folder: flip(folder / MANIFEST, (folder / MANIFEST).read_bytes().index(b'"completed_steps":8') + 18),
        f"{MANIFEST} cannot be read: it is not as it was written",
    ),
    "a manifest of another step": (
        lambda folder: shutil.copy(checkpoint(folder.parents[1], STEPS - EVERY) / MANIFEST, folder),
        "is not the file that was written at this step; its manifest.json is that of step 6",
    ),
    "a whole checkpoint of another step": (
        lambda folder: shutil.copytree(checkpoint(folder.parents[1], STEPS - EVERY), folder, dirs_exist_ok=True),
        "its manifest.json is that of step 6",
    ),
    "a forged step": (forge, "its manifest.json is that of step 7"),
    "a changed config.yaml": (
        lambda folder: (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "\n# mine\n"),
        "config.yaml has ",
    ),
    "a folder in its place": (
        lambda folder: (shutil.rmtree(folder), folder.mkdir()), f"is no checkpoint: it has no {MANIFEST}"
    ),
    "a folder for a file": (
        lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir()), f"{SHARD} "
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_newest_is_damaged(train: Train, whole: Path, interrupted: Path, fault: str) -> None:
    """It is named and set aside, and the run goes on from the one before."""
    change, message = FAULTS[fault]
    newest = checkpoint(interrupted, STEPS)
    change(newest)
    code, out, err = train(interrupted, "--resume", "auto")
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith(f"{newest} is damaged and skipped, it is kept as {newest.name}{DAMAGED}: ")
    assert message in line
    assert f"resumed   {checkpoint(interrupted, STEPS - EVERY)}:" in out
    assert newest.with_name(newest.name + DAMAGED).is_dir()
    assert numbers_of(interrupted) == numbers_of(whole)
    assert final_bytes(interrupted) == final_bytes(whole)
    for path in complete_checkpoints(interrupted / "checkpoints"):
        assert verify_files(path, Manifest.read(path), part=0, parts=1) == []
    assert Manifest.read(newest).files[SHARD] == Manifest.read(checkpoint(whole, STEPS)).files[SHARD], "saved again"


def test_several_in_a_row_are_damaged(train: Train, whole: Path, interrupted: Path) -> None:
    for step, fault in ((8, "a flipped bit"), (6, "no manifest"), (4, "a missing shard")):
        FAULTS[fault][0](checkpoint(interrupted, step))
    code, out, err = train(interrupted, "--resume", "auto")
    assert code == 0
    assert [line.split()[0] for line in err.splitlines()] == [str(checkpoint(interrupted, n)) for n in (8, 6, 4)]
    assert f"resumed   {checkpoint(interrupted, 2)}:" in out
    assert numbers_of(interrupted) == numbers_of(whole)
    assert final_bytes(interrupted) == final_bytes(whole)


@pytest.mark.parametrize("again", ["auto", "never"])
def test_all_are_damaged(train: Train, interrupted: Path, again: str) -> None:
    """A launcher that starts the run again must not make it begin anew, either."""
    faults = ("a flipped bit", "half a manifest", "a truncated file", "a stray file")
    before = numbers_of(interrupted)
    for step, fault in zip((8, 6, 4, 2), faults, strict=True):
        FAULTS[fault][0](checkpoint(interrupted, step))
    code, _, err = train(interrupted, "--resume", "auto")
    assert code == 5
    for step, fault in zip((8, 6, 4, 2), faults, strict=True):
        assert f"{checkpoint(interrupted, step)} is damaged: " in err
        assert FAULTS[fault][1] in err
    assert "\n  fix: " in err
    code, _, once_more = train(interrupted, "--resume", again)
    assert (code, once_more) == (5, err) if again == "auto" else code == 2
    assert numbers_of(interrupted) == before


def test_one_that_is_asked_for_and_damaged(train: Train, interrupted: Path, tmp_path: Path) -> None:
    """Somebody else's checkpoint stays where it is, whatever is wrong with it."""
    wanted = checkpoint(interrupted, 4)
    flip(wanted / SHARD)
    code, _, err = train(tmp_path / "branch", "--resume", str(wanted))
    assert code == 5
    assert f"{wanted} is damaged: {SHARD} is not the file that was written at this step" in err
    assert wanted.is_dir()
    assert not (tmp_path / "branch/metrics.jsonl").exists()


def test_every_rank_finds_what_only_one_reads(tiny_base: Path, tmp_path: Path) -> None:
    """Two ranks, each of which reads a part of the files."""
    config = write_config(tiny_base, tmp_path, "lora", "fsdp2", steps=6)
    outputs = [tmp_path / "whole", tmp_path / "run"]
    logs = []
    for output, resume in zip(outputs, ("never", "auto"), strict=True):
        log = output.with_name(f"{output.name}.log")
        with Ranks(2, ["train", str(config), "--resume", resume, f"output_dir={output}"], log) as ranks:
            assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
        logs.append(log.read_text())
        if output == outputs[0]:
            shutil.copytree(output, outputs[1])
            shutil.rmtree(outputs[1] / "final")
            flip(checkpoint(outputs[1], 6) / file_name(1, 2))
            (checkpoint(outputs[1], 4) / file_name(0, 2)).unlink()
    for step, name in ((6, file_name(1, 2)), (4, file_name(0, 2))):
        assert f"{checkpoint(outputs[1], step).name}.damaged: {name} is " in logs[1]
        assert logs[1].count(f"{checkpoint(outputs[1], step)} is damaged") == 1, "one rank tells"
    assert f"resumed   {checkpoint(outputs[1], 2)}:" in logs[1]
    assert numbers_of(outputs[1]) == numbers_of(outputs[0])
    assert final_bytes(outputs[1]) == final_bytes(outputs[0])


def test_the_run_directory_is_read_only(train: Train, interrupted: Path) -> None:
    with read_only(interrupted):
        before = sorted(interrupted.rglob("*"))
        for resume in ("auto", str(checkpoint(interrupted, STEPS))):
            code, _, err = train(interrupted, "--resume", resume)
            assert code == 2
            assert f"output_dir: {interrupted} cannot be written (" in err
        assert sorted(interrupted.rglob("*")) == before


def test_the_clock_goes_back(train: Train, whole: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is the one with the most steps, whatever the files' times say; hours are those that were trained."""
    for step in (2, 4, 6, 8):
        for path in (checkpoint(interrupted, step), *checkpoint(interrupted, step).iterdir()):
            os.utime(path, (time.time() - 1e6 * step,) * 2)
    os.utime(checkpoint(interrupted, 4), (time.time() + 1e6,) * 2)
    shutil.rmtree(checkpoint(interrupted, 8))
    now, elapsed = time.time(), iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now - 3600.0 * next(elapsed))
    code, out, _ = train(interrupted, "--resume", "auto", "checkpoint.keep_last=1", "checkpoint.keep_every_hours=1e-7")
    assert code == 0
    assert f"resumed   {checkpoint(interrupted, 6)}:" in out
    assert numbers_of(interrupted) == numbers_of(whole)
    there = [Manifest.read(path) for path in complete_checkpoints(interrupted / "checkpoints")]
    assert [manifest.completed_steps for manifest in there] == [2, 4, 6, 8], "each is the first of its hours"
    trained_s = [manifest.position.trained_s for manifest in there]
    assert trained_s == sorted(trained_s)
    assert trained_s[0] > 0


def test_a_step_diverges_while_the_one_before_is_saved(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being written is good, and stays; what diverged is never saved."""
    write, output = checkpointer.write_shard, tmp_path / "run"
    waited = []

    def late(*arguments: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while "non_finite" not in (output / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        waited.append(True)
        return write(*arguments)

    monkeypatch.setattr(checkpointer, "write_shard", late)
    overrides = ("optim.lr=1e30", "optim.max_grad_norm=null", "optim.warmup_ratio=0", "checkpoint.every_steps=1")
    code, out, err = train(output, *overrides)
    assert code == 6
    assert waited == [True]
    assert "error: step 2: " in err
    assert "nan" in err
    (there,) = complete_checkpoints(output / "checkpoints")
    assert f"saved and read back {there}" in out
    assert verify_files(there, Manifest.read(there), part=0, parts=1) == []
    assert Manifest.read(there).completed_steps == 1


def wait_for(event: Callable[[], bool], ranks: Ranks, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        assert ranks.are_alive, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.001)


def hold_between_saves(ranks: Ranks, folder: Path) -> None:
    """Holds the ranks while nothing is written or deleted, so that what there is of room stays as it is."""
    while True:
        ranks.hold()
        time.sleep(0.005)
        if not [path for path in folder.iterdir() if path.suffix] and len(complete_checkpoints(folder)) == 2:
            return
        ranks.let_go()
        time.sleep(0.005)


def state_bytes(manifest: Manifest) -> int:
    """Of all tensors, without headers."""
    return sum(4 * (stop - first) for file in manifest.files.values() for first, stop in file.ranges.values())


LONG = 80


def spoil(how: str, trouble: Trouble, ranks: Ranks, folder: Path) -> None:
    hold_between_saves(ranks, folder)
    if how == "full":
        trouble.fill(ranks.pids)
    elif how == "nearly full":
        # Enough for the numbers, not for what stands around them: found while it is written.
        newest = complete_checkpoints(folder)[-1]
        trouble.fill(ranks.pids, but_for_bytes=state_bytes(Manifest.read(newest)))
    else:
        trouble.forbid(ranks.pids)
    ranks.let_go()


@pytest.mark.ci
def test_a_disk_in_trouble_costs_checkpoints_and_no_training(tiny_base: Path, tmp_path: Path) -> None:
    """Old ones stay, a line says why there is no new one, training goes on, and when there is room it saves again."""
    config = write_config(tiny_base, tmp_path, "full", "fsdp2", steps=LONG)
    output, log, folder = tmp_path / "run", tmp_path / "run.log", tmp_path / "run/checkpoints"
    command = ["train", str(config), "--resume", "auto", f"output_dir={output}", "checkpoint.keep_last=2"]
    with troubled_disk(folder, num_bytes=16 << 20) as trouble:
        with Ranks(2, command, log) as ranks:
            for how in ("full", "nearly full", "read-only"):
                saved = log.read_text().count("saved and read back")
                wait_for(lambda n=saved + 2: log.read_text().count("saved and read back") >= n, ranks, log)
                before = complete_checkpoints(folder)
                failed = log.read_text().count("cannot write")
                spoil(how, trouble, ranks, folder)
                wait_for(lambda n=failed + 1: log.read_text().count("cannot write") >= n, ranks, log)
                (*_, line) = (line for line in log.read_text().splitlines() if "cannot write" in line)
                assert trouble.reason in line, how
                assert "; fix: make room on the disk, or see who may write there; then go on with --resume auto" in line
                there = complete_checkpoints(folder)
                assert len(there) >= 2, "the old ones stay"
                assert there[-1] >= before[-1]
                for path in there:
                    assert verify_files(path, Manifest.read(path), part=0, parts=1) == []
                trouble.mend(ranks.pids)
            assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
        assert checkpoint(output, LONG) in complete_checkpoints(folder)
        assert {path.suffix for path in folder.iterdir()} == {""}
    with Ranks(2, ["train", str(config), "checkpoint.every_steps=999"], tmp_path / "whole.log") as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0]
    assert numbers_of(output) == numbers_of(tmp_path / "whole")
    assert final_bytes(output) == final_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    "how", [pytest.param("nearly full", marks=pytest.mark.full), pytest.param("read-only", marks=pytest.mark.ci)]
)
def test_a_disk_in_trouble_stops_the_run_if_that_is_the_policy(tiny_base: Path, tmp_path: Path, how: str) -> None:
    config = write_config(tiny_base, tmp_path, "full", "fsdp2", steps=LONG)
    output, log, folder = tmp_path / "run", tmp_path / "run.log", tmp_path / "run/checkpoints"
    command = ["train", str(config), "--resume", "auto", f"output_dir={output}", "checkpoint.keep_last=2"]
    with troubled_disk(folder, num_bytes=16 << 20) as trouble:
        with Ranks(2, [*command, "checkpoint.on_failure=stop"], log) as ranks:
            wait_for(lambda: log.read_text().count("saved and read back") >= 3, ranks, log)
            spoil(how, trouble, ranks, folder)
            assert ranks.exit_codes(PATIENCE_S) == [5, 5], log.read_text()
        assert "error: cannot write " in log.read_text()
        assert trouble.reason in log.read_text()
        trouble.mend([])
        (*_, newest) = there = complete_checkpoints(folder)
        assert len(there) == 2
        with Ranks(2, command, log) as ranks:
            assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
        assert f"resumed   {newest}:" in log.read_text()
    with Ranks(2, ["train", str(config), "checkpoint.every_steps=999"], tmp_path / "whole.log") as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0]
    assert numbers_of(output) == numbers_of(tmp_path / "whole")
    assert final_bytes(output) == final_bytes(tmp_path / "whole")


def test_nothing_can_be_saved_from_the_start(train: Train, tmp_path: Path) -> None:
    """A run that trains for days and has nothing to go back to ends at its first save instead."""
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    with read_only(folder):
        code, _, err = train(folder.parent, "--resume", "auto")
    assert code == 5
    assert f"cannot write {folder / 'step-00000002'}: " in err
    assert yaml.safe_load((folder.parent / "config.yaml").read_text())["checkpoint"]["on_failure"] == "continue"
