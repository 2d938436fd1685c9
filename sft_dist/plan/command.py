"""``sft-dist plan``: the dry run of a configuration, shown, written down, and judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.plan.assumed import AssumedData, parse_count
from sft_dist.plan.dry_run import dry_run
from sft_dist.plan.html import render
from sft_dist.plan.machines import machines_of
from sft_dist.plan.result import ParetoPoint, Plan
from sft_dist.plan.terminal import render_plan
from sft_dist.plan.to_json import plan_json

# In the run directory.
PLAN = "plan.json"


@dataclass(frozen=True)
class Views:
    """What is shown and written beside ``plan.json``.

    Args:
        html: file for the page.
        as_json: print JSON in place of the tables.
        verbose: all parts of all phases, and all assumptions.
    """

    html: Path | None = None
    as_json: bool = False
    verbose: bool = False


def stated_data(examples: str | None, tokens_per_example: str | None) -> AssumedData | None:
    """What the command line says of the data; None where it says nothing.

    Raises:
        ConfigError: it says one of the two only, or a number cannot be read.
    """
    if examples is None and tokens_per_example is None:
        return None
    if examples is None or tokens_per_example is None:
        raise ConfigError(
            "--examples and --tokens-per-example go together",
            fix="say both, e.g. --examples 10k --tokens-per-example 400",
        )
    return AssumedData(rows=round(parse_count(examples)), tokens_per_row=parse_count(tokens_per_example))


def make_plan(config: Config, *, stated: AssumedData | None, views: Views) -> Plan:
    """Plans a configuration, shows the plan and writes it to ``plan.json`` in the run directory.

    Raises:
        SftError: as ``dry_run``.
    """
    planned = dry_run(config, machines_of(config.hardware), assumed=stated)
    show(planned.plan, Path(config.output_dir), views)
    return planned.plan


def show(plan: Plan, folder: Path, views: Views, *, points: Sequence[ParetoPoint] = ()) -> None:
    """Prints a plan and writes its files."""
    text = json.dumps(plan_json(plan), indent=1, ensure_ascii=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PLAN).write_text(text + "\n", encoding="utf-8")
        if views.html is not None:
            views.html.parent.mkdir(parents=True, exist_ok=True)
            views.html.write_text(render(plan, points=points), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the plan cannot be written: {error}", fix="set output_dir, or --html, to a place that can be written to"
        ) from error
    if views.as_json:
        print(text)
        return
    render_plan(plan, Console(), verbose=views.verbose)
