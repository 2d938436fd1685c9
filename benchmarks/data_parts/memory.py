"""What preparing takes in memory and in time, for two numbers of rows: both must not grow faster than the rows."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data_parts import rows as row_rates

SAMPLE_EVERY_S = 0.2


@dataclass(frozen=True)
class Footprint:
    """Of all processes that prepare ``rows`` rows, imports included.

    Args:
        cpu_seconds: of all processes, imports included; other processes on the machine do not add to it.
        wall_seconds: without eight rows prepared first.
        peak_pss_gib: most of the sum of their proportional set sizes; mapped pages of files count.
        peak_anonymous_gib: of memory that no file backs.
        peak_rss_gib: of the main process, as the kernel recorded it.
    """

    rows: int
    cpu_seconds: float
    wall_seconds: float
    peak_pss_gib: float
    peak_anonymous_gib: float
    peak_rss_gib: float


def measure(counts: Sequence[int]) -> Iterator[Footprint]:
    from benchmarks.data_parts import texts

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts.save_tokenizer(folder / "tokenizer", texts.CHATML_WITH_TAGS)
        texts.write_rows(folder / "first.jsonl", "en", row_rates.WARM_UP_ROWS, seed=2)
        for count in counts:
            print(f"writing and preparing {count:,} rows", file=sys.stderr)
            file, result = folder / "rows.jsonl", folder / "result.json"
            texts.write_rows(file, "en", count, seed=3)
            process = row_rates.start("sft_dist", folder / "tokenizer", folder / "first.jsonl", file, result, core=None)
            pss = anonymous = 0
            cpu_ticks: dict[int, int] = {}
            while process.poll() is None:
                now = _memory_kib(process.pid, cpu_ticks)
                pss, anonymous = max(pss, now[0]), max(anonymous, now[1])
                time.sleep(SAMPLE_EVERY_S)
            figures = row_rates.finish(process, result)
            cpu_seconds = sum(cpu_ticks.values()) / os.sysconf("SC_CLK_TCK")
            yield Footprint(
                count, cpu_seconds, figures["wall_seconds"], pss / 2**20, anonymous / 2**20, figures["peak_rss_gib"]
            )


def _memory_kib(pid: int, cpu_ticks: dict[int, int]) -> tuple[int, int]:
    """(proportional set size, of it anonymous) of a process and all below it; nothing for one that has ended.

    Args:
        cpu_ticks: gets the CPU time of each.
    """
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        # After the name in parentheses, which may hold anything; user and system time are fields 14 and 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    cpu_ticks[pid] = int(fields[11]) + int(fields[12])
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    below = [_memory_kib(child, cpu_ticks) for child in children]
    return (
        sizes.get("Pss", 0) + sum(pss for pss, _ in below),
        sizes.get("Pss_Anon", 0) + sum(anonymous for _, anonymous in below),
    )
