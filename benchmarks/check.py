"""Whether training has become slower beside its peers: `make bench-check`.

    python -m benchmarks.check [--committed benchmarks/results/train-cpu.json] [--lengths 1024] [--rounds 2]

Measures again what the committed results hold and compares ratios, ours / the peer's, of speed and of memory; never
seconds, which another machine has others of. Ends with 1 where a ratio of speed has fallen by more than ``SLOWER``, or
one of memory has grown by more than ``LARGER``: more than such figures differ between runs on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import train
from benchmarks.train_parts.environments import ROOT

COMMITTED = ROOT / "benchmarks" / "results" / "train-cpu.json"
SLOWER, LARGER = 0.15, 0.10


@dataclass(frozen=True)
class Compared:
    """A ratio, committed and measured. Args: least, most: that pass."""

    what: str
    committed: float
    now: float
    least: float = 0.0
    most: float = float("inf")

    @property
    def is_good(self) -> bool:
        return self.least <= self.now <= self.most


def compare(committed: dict[str, Any], now: dict[str, Any]) -> list[Compared]:
    """Of every cell of a peer that both results have.

    Raises:
        ValueError: they have none in common.
    """
    before = {_cell(row): row for row in committed["rows"]}
    found = []
    for row in now["rows"]:
        known = before.get(_cell(row))
        if row["side"] in train.OWN or known is None:
            continue
        name = f"{row['method']} {row['length']:,} / {row['side']}"
        speed, memory = known["ratio"], known["memory_ratio"]
        found.append(Compared(f"{name}, tokens/s", speed, row["ratio"], least=(1 - SLOWER) * speed))
        found.append(Compared(f"{name}, memory", memory, row["memory_ratio"], most=(1 + LARGER) * memory))
    if not found:
        raise ValueError("nothing that was measured is among the committed results")
    return found


def _cell(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["side"], row["method"], row["length"]


def show(found: list[Compared], console: Console) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("ours / theirs")
    for column in ("committed", "now", "passes"):
        table.add_column(column, justify="right")
    table.add_column("")
    for each in found:
        limit = f">= {each.least:.2f}" if each.least else f"<= {each.most:.2f}"
        verdict = "[green]good" if each.is_good else "[red]worse"
        table.add_row(each.what, f"{each.committed:.2f}", f"{each.now:.2f}", limit, verdict)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--committed", type=Path, default=COMMITTED)
    parser.add_argument("--lengths", nargs="+", default=["1024"])
    parser.add_argument("--rounds", default="2")
    given = parser.parse_args(arguments)
    committed = json.loads(given.committed.read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "now.json"
        peers = sorted({row["side"] for row in committed["rows"]} - set(train.OWN))
        asked = ["--lengths", *given.lengths, "--rounds", given.rounds, "--no-compiled"]
        train.main([*asked, "--json", str(path), "--peers", *peers])
        found = compare(committed, json.loads(path.read_text()))
    show(found, Console())
    return 0 if all(each.is_good for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
