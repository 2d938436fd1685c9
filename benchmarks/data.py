"""Preparing data: packing, rows a second, and memory, beside TRL's SFTTrainer where it does the same.

    python benchmarks/data.py [--only packing rows memory] [--json FILE] [--no-peer]
                              [--lengths 10000000] [--peer-lengths 1000000] [--rows 20000]
                              [--memory-rows 100000 1000000]

Times are CPU seconds of one core, which other processes on the machine do not add to, but for the last part's. The
first run installs TRL into .build/peers/trl. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.data_parts import memory, packing, rows
from benchmarks.data_parts.peers import TRL_VERSION

PARTS = ("packing", "rows", "memory")


def main(arguments: list[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    made: dict[str, list[Any]] = {}
    if "packing" in given.only:
        made["packing"] = list(
            packing.measure(
                rows=given.lengths, peer_rows=0 if given.no_peer else min(given.lengths, given.peer_lengths)
            )
        )
    if "rows" in given.only:
        made["rows"] = list(rows.measure(rows=given.rows, with_peer=not given.no_peer))
    if "memory" in given.only:
        made["memory"] = list(memory.measure(given.memory_rows))
    # As wide as the tables need where nobody looks at a terminal.
    console = Console(width=None if sys.stdout.isatty() else 132)
    names = ", ".join(f"{name} {version}" for name, version in versions(with_peer=not given.no_peer).items())
    console.print(f"\n{names}\n", highlight=False)
    for part, table in (("packing", packing_table), ("rows", rows_table), ("memory", memory_table)):
        if part in made:
            console.print(table(made[part]), "", sep="\n", highlight=False)
    if given.json is not None:
        figures = {part: [asdict(each) for each in measured] for part, measured in made.items()}
        given.json.write_text(json.dumps({"versions": versions(with_peer=not given.no_peer)} | figures, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", type=int, default=10_000_000, help="to pack, of each distribution")
    parser.add_argument("--peer-lengths", type=int, default=1_000_000, help="the first of them, that TRL packs too")
    parser.add_argument("--rows", type=int, default=20_000, help="of each language")
    parser.add_argument("--memory-rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--no-peer", action="store_true", help="measure this project alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser


def versions(*, with_peer: bool) -> dict[str, str]:
    packages = ("sft-dist", "numpy", "tokenizers", "transformers", "datasets")
    found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    return found | ({"trl": TRL_VERSION} if with_peer else {})


def packing_table(measured: Iterable[packing.Packed]) -> Table:
    table = Table(
        title=f"Packing at {packing.CAPACITY:,} tokens",
        caption="bound: the larger of all tokens / capacity and L2 (Martello and Toth 1990), no packing is below.\n"
        "time ratio: to sft_dist on the same rows.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("distribution", "packed by"):
        table.add_column(name)
    for name in ("rows", "time", "time ratio", "packs", "packs / bound"):
        table.add_column(name, justify="right")
    for distribution, group in groupby(measured, lambda each: each.distribution):
        each_way = list(group)
        ours = {each.rows: each for each in each_way if each.way == "sft_dist"}
        for number, each in enumerate(each_way):
            table.add_row(
                distribution if number == 0 else "",
                each.way,
                f"{each.rows:,}",
                f"{each.seconds:.2f} s",
                f"{each.seconds / ours[each.rows].seconds:,.1f}",
                f"{each.packs:,}",
                f"{each.excess:.6f}",
                end_section=number == len(each_way) - 1,
            )
    return table


def rows_table(measured: Iterable[rows.RowRate]) -> Table:
    measured = list(measured)
    table = Table(
        title=f"Tokenise, mask and pack {measured[0].rows:,} rows on one core",
        caption="ratio: rows/s to that of TRL's SFTTrainer with assistant_only_loss=True or, where it refuses the "
        "template, with all tokens trained.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("rows", "template", "prepared by"):
        table.add_column(name)
    for name in ("rows/s", "ratio", "tokens", "trained", "packs"):
        table.add_column(name, justify="right")
    for (language, template), group in groupby(measured, lambda each: (each.language, each.template)):
        each_side = list(group)
        peers = [each for each in each_side if each.side.startswith("TRL") and not each.error]
        for number, each in enumerate(each_side):
            names = (language, template) if number == 0 else ("", "")
            last = number == len(each_side) - 1
            if each.error:
                table.add_row(*names, f"{each.side}: refused ({each.error})", "-", "", "", "", "", end_section=last)
                continue
            ratio = f"{each.rows_per_s / peers[0].rows_per_s:.2f}" if peers else ""
            counts = (f"{count:,}" if count else "" for count in (each.tokens, each.supervised, each.packs))
            table.add_row(*names, each.side, f"{each.rows_per_s:,.0f}", ratio, *counts, end_section=last)
    return table


def memory_table(measured: Iterable[memory.Footprint]) -> Table:
    measured = list(measured)
    table = Table(
        title="Memory and time of preparing English rows, with all processes that a run would start",
        caption="PSS and anonymous memory sampled every "
        f"{memory.SAMPLE_EVERY_S} s; imports are part of it. Ratios are to the line above.",
        title_justify="left",
        caption_justify="left",
    )
    shown = {
        "CPU time": ("cpu_seconds", "s"),
        "wall time": ("wall_seconds", "s"),
        "peak PSS": ("peak_pss_gib", "GiB"),
        "anonymous": ("peak_anonymous_gib", "GiB"),
        "peak RSS, main process": ("peak_rss_gib", "GiB"),
    }
    table.add_column("rows", justify="right")
    for name in shown:
        table.add_column(name, justify="right")
        table.add_column("ratio", justify="right")
    for before, each in zip([None, *measured], measured, strict=False):
        cells = [f"{each.rows:,}"]
        for value, unit in shown.values():
            now = getattr(each, value)
            cells += [f"{now:.2f} {unit}", "" if before is None else f"{now / getattr(before, value):.2f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
