"""``sft-dist resume``: goes on with a run's own settings, says where it is, and proves that steps come out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.test_kill import write_config
from tests.helpers.ranks import Ranks

PATIENCE_S = 120


def run(size: int, *arguments: str, log: Path) -> tuple[set[int | None], str]:
    """Exit codes and what was printed."""
    with Ranks(size, list(arguments), log) as ranks:
        return set(ranks.exit_codes(PATIENCE_S)), log.read_text()


@pytest.fixture(scope="module")
def stopped(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on two processes, and what it has left of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    config = write_config(tiny_base, folder, "fsdp2", "lora")
    output = folder / "run"
    codes, said = run(2, "train", str(config), "train.max_steps=6", f"output_dir={output}", log=folder / "log")
    assert codes == {0}, said
    return output


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the lock, which names the last process that held it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_recorded_steps_come_out_again(stopped: Path, tmp_path: Path) -> None:
    before = contents(stopped)
    codes, said = run(2, "resume", str(stopped), "--verify", "5", log=tmp_path / "two")
    assert codes == {0}, said
    assert "step-00000004: 4 steps and " in said
    assert "are behind it; its shards of fsdp2 on 2 processes go to fsdp2 on 2 processes" in said
    assert "next      step 5 of 6: sequences " in said
    assert "2 steps replayed: 2 to the bit" in said, "steps 5 and 6 are all that there is"
    codes, said = run(1, "resume", str(stopped), "--verify", "1", "sharding={strategy: ddp}", log=tmp_path / "one")
    assert codes == {0}, said
    assert "go to ddp on 1 process" in said
    assert "1 steps replayed: " in said
    assert contents(stopped) == before, "nothing is written"


def test_what_comes_out_otherwise_is_told(stopped: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 6:
            line["loss"] *= 1 + 1e-4
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    codes, said = run(2, "resume", str(output), "--verify", "5", log=tmp_path / "log")
    assert codes == {5}
    assert "step 6 differs by 1.0e-04 from what was recorded" in said


def test_a_damaged_one_is_named_set_aside_and_skipped(stopped: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    shutil.rmtree(output / "final")
    newest = output / "checkpoints/step-00000006"
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    codes, said = run(1, "resume", str(output), "train.micro_batch_size=2", log=tmp_path / "log")
    assert codes == {0}, said
    assert f"{newest} is damaged and skipped, it is kept as step-00000006.damaged: {shard.name} is not the file" in said
    assert f"resumed   {output}/checkpoints/step-00000004: 4 steps" in said
    assert "changed   train.micro_batch_size: 1 -> 2" in said
    then, now = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (stopped, output)
    )
    assert [line["loss"] for line in now] == pytest.approx([line["loss"] for line in then], rel=1e-5)
    assert newest.is_dir()
    assert newest.with_name("step-00000006.damaged").is_dir()


def test_when_all_are_damaged_nothing_begins_anew(stopped: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    for checkpoint in (output / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text("{")
    codes, said = run(2, "resume", str(output), log=tmp_path / "log")
    assert codes == {5}
    assert all(f"step-0000000{step} is damaged: " in said for step in (4, 6))
    assert len(list((output / "checkpoints").glob("step-????????"))) == 2, "nor the next time"


def test_mistakes(stopped: Path, tmp_path: Path) -> None:
    codes, said = run(1, "resume", str(tmp_path), log=tmp_path / "a")
    assert (codes, "is no folder of a run: it has no config.yaml" in said) == ({2}, True)
    codes, said = run(1, "resume", str(stopped), "--allow-change", "seed", log=tmp_path / "b")
    assert (codes, "--allow-change seed: nothing of this name has to stay as it is" in said) == ({2}, True)
    assert "data.train, method.alpha" in said
