"""``kill -9`` of one rank or of all, again and again: the run always goes on from the newest checkpoint, which is whole,
and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sft_dist.checkpoint.manifest import MANIFEST, Manifest
from sft_dist.checkpoint.proof import verify_files
from sft_dist.checkpoint.store import DELETED, UNFINISHED, complete_checkpoints, name_of
from tests.helpers import cells, figures
from tests.helpers.checkpoints import final_bytes, numbers_of
from tests.helpers.ranks import Ranks

STEPS, EVERY, KEPT, WORLD = 48, 4, 2, 2
PATIENCE_S = 60

# What the ranks that are left get to notice that one is gone and to end by themselves.
NOTICE_S = 10

# So long the ranks run between two looks at what they wrote: less than most parts of a save take.
GLIMPSE_S = 0.0001

# What takes long to delete is caught in it.
BALLAST, BALLAST_FILES = "ballast", 3000

METHODS = ("full", "lora", "qlora")
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero3")

# What the log has when the model's weights are read and the checkpoint is next, and when the first step is.
LOADING, BEGUN = " of weights, as much as rank 0 keeps", "schedule  "

# In every eleven kills of the table; six more are in `SOON`.
MIX = (
    "writing",
    "step",
    "rotating",
    "copying",
    "written",
    "loading",
    "writing",
    "committed",
    "start",
    "step",
    "rotating",
)
SOON = ("step", "writing", "rotating", "loading", "committed", "copying")


@dataclass
class Row:
    """A kill as it turned out.

    Args:
        sought, found: the part of the run that was waited for, and that it was in by what it left behind.
        step: the last one that was trained.
        kept: the newest checkpoint's; 0: none.
        waiting: a rank that was left had to be ended.
        mismatches: of numbers that were written before it with the uninterrupted run's.
    """

    where: str
    sought: str
    found: str
    victims: str
    step: int
    kept: int
    left: list[str]
    waiting: bool
    mismatches: int

    def __str__(self) -> str:
        return (
            f"{self.where:11} kill of {self.victims:7} sought in {self.sought:9} found in {self.found:9} at step {self.step:2}, "
            f"{self.step - self.kept} lost, mismatches {self.mismatches}; left {', '.join(self.left) or 'nothing'}"
            + ("; the others were ended" if self.waiting else "")
        )


@dataclass
class Run:
    """The run directory that is killed, and what has been seen of it.

    Args:
        committed: steps of all checkpoints that have been there.
    """

    output: Path
    log: Path
    committed: set[int] = field(default_factory=set)

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def names(self) -> list[str]:
        return [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.exists() else []

    def last_step(self) -> int:
        return max(steps_of(self.output), default=0)

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def part(self) -> str:
        """What the run is doing, by what it has written."""
        if not self.says(BEGUN):
            return "loading" if self.says(LOADING) else "start"
        names, last = self.names(), self.last_step()
        there = [name for name in names if re.fullmatch(r"step-\d+", name)]
        if any(name.endswith(DELETED) for name in names):
            return "rotating"
        if len(there) > KEPT:
            return "committed"
        for name in names:
            if name.endswith(UNFINISHED):
                return "written" if (self.checkpoints / name / MANIFEST).exists() else "writing"
        return "copying" if last and last % EVERY == 0 and name_of(last) not in there else "step"


def write_config(base: Path, folder: Path, strategy: str, method: str) -> Path:
    rows = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = cells.config(
        str(base), method, strategy,
        data={"train": [{"path": str(folder / "rows.jsonl")}]},
        train={"global_batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS},
        checkpoint={"every_steps": EVERY, "keep_last": KEPT},
    )  # fmt: skip
    (folder / "run.yaml").write_text(cells.dump(cells.whole_run(cfg, folder / "unused")))
    return folder / "run.yaml"


def steps_of(output: Path) -> list[int]:
    return [int(line["step"]) for line in numbers_of(output)]


def wait_for(event: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        assert ranks.are_alive or event(), ranks.log.read_text()
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.0005)


def catch(sought: str, run: Run, ranks: Ranks) -> None:
    """Lets the ranks run a little at a time, until they are in that part of the run. They are held then."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert ranks.are_alive, ranks.log.read_text()
        assert time.monotonic() < deadline, f"the run is never {sought}"
        ranks.hold()
        if run.part() == sought:
            return
        ranks.let_go()
        time.sleep(GLIMPSE_S)


def strike(sought: str, run: Run, ranks: Ranks, chance: random.Random) -> None:
    """Waits until the run is in the part that is sought, and in some of them a little longer."""
    if sought == "start":
        time.sleep(chance.uniform(0.05, 1.5))
        return
    if sought == "loading":
        wait_for(lambda: run.says(LOADING), ranks)
        time.sleep(chance.uniform(0, 0.02))
        return
    wait_for(lambda: run.says(BEGUN), ranks)
    reached = run.last_step() + chance.randint(1, EVERY + 1)
    wait_for(lambda: run.last_step() >= reached, ranks)
    if sought == "rotating":
        wait_for(lambda: len(complete_checkpoints(run.checkpoints)) >= KEPT, ranks)
        put_ballast(run, ranks)
    catch(sought, run, ranks)
    if sought in ("step", "writing"):
        ranks.let_go()
        time.sleep(chance.uniform(0, 0.01))


def put_ballast(run: Run, ranks: Ranks) -> None:
    """Makes the checkpoint that goes next a slow one to delete."""
    ranks.hold()
    time.sleep(0.01)
    folder = complete_checkpoints(run.checkpoints)[0] / BALLAST
    folder.mkdir()
    for number in range(BALLAST_FILES):
        (folder / str(number)).touch()
    ranks.let_go()


def drop_ballast(run: Run) -> None:
    for folder in complete_checkpoints(run.checkpoints):
        shutil.rmtree(folder / BALLAST, ignore_errors=True)


def kill(victims: tuple[int, ...], run: Run, ranks: Ranks) -> bool:
    """Ends the victims, and as a launcher does, after a while those that have not noticed; whether there were any.

    Those are in the middle of making a process group, or wait for what rank 0 finds out before there is one.
    """
    ranks.kill(*victims)
    ranks.let_go()
    deadline = time.monotonic() + (NOTICE_S if run.says(LOADING) else 0)
    while ranks.are_alive and time.monotonic() < deadline:
        time.sleep(0.001)
    waiting = ranks.are_alive
    ranks.kill()
    assert 0 not in ranks.exit_codes(1), "a rank took the end of another for the end of the run"
    return waiting


def run_to_the_end(config: Path, output: Path, *arguments: str) -> list[dict[str, float]]:
    """Metrics of a run that is let alone."""
    log = output.with_name(output.name + ".log")
    with Ranks(WORLD, ["train", str(config), f"output_dir={output}", *arguments], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S * 2) == [0] * WORLD, log.read_text()
    return numbers_of(output)


def check_what_is_there(run: Run, whole: Path) -> None:
    """Every checkpoint is whole and that of the uninterrupted run, and none is gone but those that gave way to newer."""
    for path in complete_checkpoints(run.checkpoints):
        manifest = Manifest.read(path)
        assert verify_files(path, manifest, part=0, parts=1) == [], "complete or absent, never half"
        there = Manifest.read(whole / "checkpoints" / path.name)
        assert shards(manifest) == shards(there), f"{path.name} is of another run than the uninterrupted one"
        run.committed.add(manifest.completed_steps)
    now = {int(path.name[5:]) for path in complete_checkpoints(run.checkpoints)}
    assert now >= set(sorted(run.committed)[-KEPT:]), "what was committed is not lost"


def shards(manifest: Manifest) -> dict[str, str]:
    return {name: record.digest for name, record in manifest.files.items() if name.endswith(".safetensors")}


def torture(base: Path, folder: Path, strategy: str, method: str, moments: tuple[str, ...], seed: int) -> Iterator[Row]:
    """Kills a run at each of the moments, one after the other, and lets it end."""
    chance = random.Random(seed)
    config = write_config(base, folder, strategy, method)
    whole = run_to_the_end(config, folder / "whole", "checkpoint.keep_last=99")
    run = Run(folder / "killed", folder / "killed.log")
    for number, sought in enumerate(moments):
        newest = max(complete_checkpoints(run.checkpoints), default=None)
        run.log = folder / f"attempt-{number}.log"
        with Ranks(WORLD, ["train", str(config), "--resume", "auto", f"output_dir={run.output}"], run.log) as ranks:
            strike(sought, run, ranks, chance)
            assert ranks.are_alive, ranks.log.read_text()
            victims = () if (number + seed) % 2 else (chance.randrange(WORLD),)
            waiting = kill(victims, run, ranks)
        left, found = [name for name in run.names() if not re.fullmatch(r"step-\d+", name)], run.part()
        drop_ballast(run)
        check_what_is_there(run, folder / "whole")
        if newest is not None and run.says("resumed"):
            assert run.says(f"resumed   {newest}:"), "the newest one"
        before = numbers_of(run.output)
        yield Row(
            where=f"{strategy} {method}",
            sought=sought,
            found=found,
            victims="all" if not victims else f"rank {victims[0]}",
            step=max((int(line["step"]) for line in before), default=0),
            kept=max(run.committed, default=0),
            left=left,
            waiting=waiting,
            mismatches=sum(a != b for a, b in zip(before, whole, strict=False)),
        )
    # Of steps that the run will not come by again.
    for name in ("step-00000099.unfinished", "step-00000098.deleted"):
        (run.checkpoints / name).mkdir()
    assert run_to_the_end(config, run.output, "--resume", "auto") == whole
    assert final_bytes(run.output) == final_bytes(folder / "whole")
    assert not [path for path in run.output.rglob("*") if path.suffix in (UNFINISHED, DELETED, ".rejected", ".damaged")]


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    """Every kill of this file, printed at the end."""
    rows: list[Row] = []
    yield rows
    lost = [row.step - row.kept for row in rows]
    found = ", ".join(f"{sum(r.found == part for r in rows)} {part}" for part in sorted({r.found for r in rows}))
    alone = [row for row in rows if row.victims != "all"]
    figures.lines += [
        *map(str, rows),
        f"{len(rows)} kills ({len(rows) - len(alone)} of all ranks): {found}; steps lost {sum(lost)}, at most "
        f"{max(lost, default=0)} (saved every {EVERY}); mismatches {sum(row.mismatches for row in rows)}; the other rank "
        f"ended by itself in {sum(not row.waiting for row in alone)} of {len(alone)}",
    ]


def assert_nothing_is_lost(rows: list[Row]) -> None:
    assert [row.mismatches for row in rows] == [0] * len(rows)
    # A save is in flight while the next steps are trained; the one after it waits for it.
    assert max(row.step - row.kept for row in rows) <= 2 * EVERY


def test_six_kills_lose_nothing(tiny_base: Path, tmp_path: Path, table: list[Row]) -> None:
    rows = list(torture(tiny_base, tmp_path, "fsdp2", "lora", SOON, seed=7))
    table += rows
    assert_nothing_is_lost(rows)
    assert {"writing", "rotating"} & {row.found for row in rows}, "at least one kill was in a save"


OTHERS = [
    (strategy, method) for strategy in STRATEGIES for method in METHODS if (strategy, method) != ("fsdp2", "lora")
]


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(OTHERS)), ids=[" ".join(cell) for cell in OTHERS])
def test_every_strategy_and_method(tiny_base: Path, tmp_path: Path, table: list[Row], number: int) -> None:
    """With the six above, fifty kills."""
    moments = sorted((MIX[(4 * number + n) % len(MIX)] for n in range(4)), key=lambda moment: moment == "loading")
    rows = list(torture(tiny_base, tmp_path, *OTHERS[number], tuple(moments), seed=number))
    table += rows
    assert_nothing_is_lost(rows)
