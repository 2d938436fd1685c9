"""How near the dry run comes to published measurements of other trainers.

    python benchmarks/plan_accuracy.py [--points FILE] [--json] [--docs PAGE]
    python benchmarks/plan_accuracy.py [--points FILE] --efficiencies

FILE (``benchmarks/published.yaml``) is a YAML list of rows: model, method, GPUs, sharding, lengths, kernels, versions
in words, and what was measured (``peak_mem_gib`` with ``peak_mem_kind``, ``tokens_per_s_per_gpu``, ``oom``). For each
row the other trainer's model is built from Transformers' modules with its kernels, adapters and loss
(``benchmarks/peers``), recorded on tensors without data as a run's own model is, and played with its sharding. Nothing
is fitted to the rows. A row that cannot be mapped is counted with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers.efficiencies import efficiencies
from benchmarks.peers.page import page
from benchmarks.peers.score import Scores, score, summary
from sft_dist.errors import PlanError

PUBLISHED = Path(__file__).with_name("published.yaml")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=PUBLISHED, help="YAML list of published rows")
    parser.add_argument("--json", action="store_true", help="print JSON; errors are shares, not percent")
    parser.add_argument("--docs", type=Path, help="also write this Markdown page")
    parser.add_argument("--rows", action="store_true", help="also list every compared figure")
    parser.add_argument("--efficiencies", action="store_true", help="print rows of step_efficiency.yaml and stop")
    options = parser.parse_args(arguments)
    rows = read_points(options.points)
    if options.efficiencies:
        timed = [row for row in rows if isinstance(row.get("tokens_per_s_per_gpu"), int | float)]
        for row in efficiencies(score(timed).speeds):
            print(f"- {json.dumps(row).replace(chr(34), '')}")
        return
    scores = score(rows)
    result = summary(scores)
    if options.docs:
        options.docs.write_text(page(result), encoding="utf-8")
    print(json.dumps(result, indent=2) if options.json else text(result))
    if options.rows:
        print(listing(scores), file=sys.stderr if options.json else sys.stdout)


def read_points(path: Path) -> list[dict[str, Any]]:
    """The rows of a file: a list, or a mapping with one under ``points``."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = loaded.get("points") if isinstance(loaded, dict) else loaded
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PlanError(f"{path} is no list of rows", fix="give a YAML list of mappings, one for each measurement")
    return rows


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def text(result: dict[str, Any]) -> str:
    """Tables for a terminal."""
    width = max([len(name) for name in result["families"]] + [6])
    lines = [f"{'family':{width}}  rows  mapped  median     p90   worst  in band"]
    for name, f in result["families"].items():
        band = f"{f['within_band']:.0%}" if "within_band" in f else ""
        lines.append(
            f"{name:{width}}  {f['rows']:4}  {f['mapped']:6}  {percent(f['median_abs_error']):>6}"
            f"  {percent(f['p90']):>6}  {percent(f['worst']):>6}  {band:>7}"
        )
    overall, fits, speed = result["allocated"], result["fits"], result["throughput"]
    if "median_abs_error" in overall:
        lines.append(f"\nallocated, {overall['rows']} rows: median {percent(overall['median_abs_error'])}, "
                     f"p90 {percent(overall['p90'])}, worst {percent(overall['worst'])}")  # fmt: skip
    lines.append(f"fits: {fits['fits_called_fits']} called fits, {fits['fits_called_oom']} called out of memory")
    lines.append(f"out of memory: {fits['oom_called_oom']} called so, {fits['oom_called_fits']} called fits")
    lines += [f"  {miss}" for miss in fits["miscalled"]]
    if "median_abs_error" in speed:
        lines.append(f"throughput on several GPUs, {speed['mapped']} of {speed['rows']} rows:")
        for name, found in (("by the plan's step", speed), ("by FLOPs alone", speed["by_flops"])):
            lines.append(f"  {name}: median {percent(found['median_abs_error'])}, p90 {percent(found['p90'])}")
    lines.append(f"mapped: {result['mapped']} of {result['rows']} rows")
    lines += [f"  {count} not: {reason}" for reason, count in result["unmapped"].items()]
    return "\n".join(lines)


def listing(scores: Scores) -> str:
    """Every compared figure."""
    return "\n".join(
        f"{c.row.get('id', '')}  {c.counter}  {c.measured_gib:.2f}  {c.predicted_gib:.2f}  {c.error:+.2%}  {c.phase}"
        for compared in scores.compared.values()
        for c in compared
    )


if __name__ == "__main__":
    main()
