"""``kill -9`` of all ranks, again and again: the run always goes on from a complete checkpoint, and ends as if nothing
had happened."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.proof import verify_files
from sft_dist.checkpoint.store import complete_checkpoints
from tests.helpers import cells, figures
from tests.helpers.ranks import Ranks

STEPS, EVERY = 60, 2
PATIENCE_S = 60


def write_config(base: Path, folder: Path, strategy: str, method: str) -> Path:
    rows = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = cells.config(
        str(base), method, strategy,
        data={"train": [{"path": str(folder / "rows.jsonl")}]},
        train={"global_batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS},
        checkpoint={"every_steps": EVERY, "keep_last": 2},
    )  # fmt: skip
    (folder / "run.yaml").write_text(cells.dump(cells.whole_run(cfg, folder / "unused")))
    return folder / "run.yaml"


def steps_of(output: Path) -> list[int]:
    """Steps in metrics.jsonl; a dying process may have left half a line."""
    if not (output / "metrics.jsonl").exists():
        return []
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for(event: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while ranks.are_alive and not event():
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.0005)


def strike(moment: str, output: Path, ranks: Ranks, chance: random.Random) -> None:
    """Waits until the run is in the part that ``moment`` names, and a little longer."""
    if moment == "start":
        time.sleep(chance.uniform(0.05, 1.5))
    elif moment == "step":
        reached = max(steps_of(output), default=0) + chance.randint(1, 2 * EVERY)
        wait_for(lambda: max(steps_of(output), default=0) >= reached, ranks)
        time.sleep(chance.uniform(0, 0.05))
    else:
        wait_for(lambda: any((output / "checkpoints").glob("*.unfinished")), ranks)
        time.sleep(chance.uniform(0, 0.06))


def run_to_the_end(config: Path, output: Path, *arguments: str) -> list[dict[str, float]]:
    """Metrics of a run that is let alone."""
    log = output.with_name(output.name + ".log")
    with Ranks(2, ["train", str(config), f"output_dir={output}", *arguments], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S * 2) == [0, 0], log.read_text()
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in lines]


def torture(base: Path, folder: Path, strategy: str, method: str, kills: int, seed: int) -> list[str]:
    """Kills a run ``kills`` times and lets it end; a line for each kill."""
    chance = random.Random(seed)
    config, output, table = write_config(base, folder, strategy, method), folder / "killed", []
    kinds = ["save", "step", "start", "save", "step"]
    for number in range(kills):
        before = complete_checkpoints(output / "checkpoints")
        log = folder / f"attempt-{number}.log"
        with Ranks(2, ["train", str(config), "--resume", "auto", f"output_dir={output}"], log) as ranks:
            strike(kinds[number % len(kinds)], output, ranks, chance)
            assert ranks.are_alive, log.read_text()
            ranks.kill()
        after = complete_checkpoints(output / "checkpoints")
        for path in after:
            assert verify_files(path, Manifest.read(path), part=0, parts=1) == [], "complete or absent, never half"
        assert len(after) >= min(len(before), 2), "what was committed is not lost"
        if before and "resumed" in log.read_text():
            assert f"resumed   {before[-1]}:" in log.read_text(), "the newest one"
        lost = max(steps_of(output), default=0) - (int(after[-1].name[5:]) if after else 0)
        leftovers = [p.name for p in output.glob("checkpoints/*") if p not in after]
        table.append(
            f"{strategy} {method} kill {number + 1:2}: in {kinds[number % len(kinds)]:5} at step "
            f"{max(steps_of(output), default=0):2}, {lost} to repeat; left {', '.join(leftovers) or 'nothing'}"
        )
    # Of steps that the run will not come by again.
    for name in ("step-00000099.unfinished", "step-00000098.deleted"):
        (output / "checkpoints" / name).mkdir()
    whole = run_to_the_end(config, folder / "whole")
    assert run_to_the_end(config, output, "--resume", "auto") == whole
    names = {path.name for path in (output / "final").glob("*.safetensors")}
    assert names
    for name in names:
        assert (output / "final" / name).read_bytes() == (folder / "whole/final" / name).read_bytes()
    assert not [path for path in output.rglob("*") if path.suffix in (".unfinished", ".deleted", ".rejected")]
    return table


@pytest.mark.full
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_under_every_strategy(tiny_base: Path, tmp_path: Path, strategy: str, method: str) -> None:
    table = torture(tiny_base, tmp_path, strategy, method, kills=8, seed=11)
    figures.lines += table


def test_ten_kills_lose_nothing(tiny_base: Path, tmp_path: Path) -> None:
    table = torture(tiny_base, tmp_path, "fsdp2", "lora", kills=10, seed=7)
    figures.lines += table
    assert sum("unfinished" in line for line in table) >= 1, "at least one kill was in a save"
