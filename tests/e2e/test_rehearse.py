"""``train --rehearse-only`` and ``--rehearse`` from the command line, in processes of their own."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from sft_dist.train.resume import holds_a_run
from tests.helpers import cells
from tests.helpers.ranks import Ranks

PATIENCE_S = 120

ITEMS = (
    "room on the disk", "save the start", "longest batch", "save beside a step", "reload", "resume", "export and proof",
    "back to the start",
)  # fmt: skip


def write_config(base: Path, folder: Path) -> Path:
    rows = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = cells.config(
        str(base), "lora", "fsdp2", data={"train": [{"path": str(folder / "rows.jsonl")}]}, train={"max_steps": 3},
        checkpoint={"every_steps": 2},
    )  # fmt: skip
    (folder / "run.yaml").write_text(cells.dump(cells.whole_run(cfg, folder / "out")))
    return folder / "run.yaml"


@pytest.mark.ci
def test_a_rehearsal_is_not_in_the_way_of_the_run(tiny_base: Path, tmp_path: Path) -> None:
    """Not one that was killed while it saved, and not one that came to its end."""
    config, out, log = write_config(tiny_base, tmp_path), tmp_path / "out", tmp_path / "log"
    with Ranks(2, ["train", str(config), "--rehearse"], log) as ranks:
        deadline = time.monotonic() + PATIENCE_S
        while not list(out.glob("rehearsal/step-*")):
            assert time.monotonic() < deadline, log.read_text()
            assert ranks.are_alive, log.read_text()
            time.sleep(0.001)
        ranks.kill()
    assert (out / "rehearsal").exists()
    assert not holds_a_run(out)
    log.write_text("")
    with Ranks(2, ["train", str(config), "--rehearse-only", "checkpoint.prove_final=true"], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    # The heartbeat and the logs are those of the run that was killed.
    assert {path.name for path in out.iterdir()} <= {"audit.json", "cache", ".lock", "heartbeat.json", "logs"}
    assert len(list((out / "logs").iterdir())) == 1
    said = log.read_text()
    passed = [line[4:24].strip() for line in said.splitlines() if line.startswith("  ✓ ")]
    assert passed == list(ITEMS)
    assert "loaded and compared in a fresh process" in said
    assert re.search(r"^rehearsed in .*: every item passed", said, re.MULTILINE)
    assert "step 1/3" not in said
    with Ranks(2, ["train", str(config)], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    assert "step 1/3" in log.read_text()
    assert (out / "final").exists()
