"""``sft-dist plan``: the dry run of a configuration, shown, written down, and judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from sft_dist.config.load import read_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.plan.assumed import AssumedData, parse_count
from sft_dist.plan.candidates import DEFAULT_MAX_GPUS, Space, gpus_to_search, parse_methods
from sft_dist.plan.dry_run import dry_run
from sft_dist.plan.front import Budget, check_wishes, parse_budget, parse_deadline, picks_of
from sft_dist.plan.html import render
from sft_dist.plan.machines import Machines, machines_of
from sft_dist.plan.result import Plan, Search
from sft_dist.plan.search import search
from sft_dist.plan.terminal import render_plan
from sft_dist.plan.terminal_search import render_search
from sft_dist.plan.to_json import PLAN, plan_text

# In the run directory.


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


@dataclass(frozen=True)
class Wishes:
    """What a search is asked for.

    Args:
        deadline_s: seconds of wall time.
    """

    space: Space
    budget: Budget | None = None
    deadline_s: float | None = None


def wishes(
    *,
    methods: str | None,
    budget: str | None,
    deadline: str | None,
    max_gpus: int | None,
    gpus: int | None,
    nodes: int | None,
) -> Wishes:
    """From the command line.

    Args:
        gpus, nodes: that are stated: a search then keeps to them.

    Raises:
        ConfigError: one of them cannot be read, or no machine is left.
    """
    most = DEFAULT_MAX_GPUS if max_gpus is None else max_gpus
    if max_gpus is None and gpus is not None:
        most = max(most, gpus * (nodes or 1))
    space = Space(methods=parse_methods(methods), max_gpus=most, gpus_per_node=gpus, nodes=nodes)
    if not space.layouts():
        raise ConfigError(
            f"--max-gpus {most} leaves none of the machines that --gpus and --nodes ask for", fix="raise --max-gpus"
        )
    return Wishes(
        space,
        None if budget is None else parse_budget(budget),
        None if deadline is None else parse_deadline(deadline),
    )


def make_plan(
    config: Config, *, stated: AssumedData | None, views: Views, wished: Wishes | None = None, keeps: bool = True
) -> Plan:
    """Plans a configuration, shows the plan and writes it to ``plan.json`` in the run directory.

    Args:
        keeps: whether ``plan.json`` is written; not where a run has begun, whose plan it is.
        wished: searches for other ways to do the same training too.

    Raises:
        SftError: as ``dry_run``.
        PlanError: a search found nothing that is wished for; what it found is shown before.
    """
    planned = dry_run(config, first_machines(config) if wished else machines_of(config.hardware), assumed=stated)
    plan = planned.plan
    if wished is not None:
        found = _searched(config, plan, wished)
        if config.hardware.gpu is None and found.picks:
            # Nobody named a GPU: what is shown above the search is its first answer.
            said = config.model_dump(mode="json", exclude_unset=True)
            answer = read_config(said, source="the configuration", overrides=found.picks[0].point.overrides)
            plan = dry_run(answer, machines_of(answer.hardware), assumed=stated).plan
        plan = replace(plan, search=found)
    show(plan, Path(config.output_dir) if keeps else None, views)
    if plan.search is not None and wished is not None:
        check_wishes(plan.search.front, budget=wished.budget, deadline_s=wished.deadline_s)
    return plan


def first_machines(config: Config) -> Machines:
    """Those of the configuration, or the largest of the GPUs that are searched where it names none."""
    gpus = [gpu for gpu in gpus_to_search(config) if config.precision.compute in gpu.flops]
    if config.hardware.gpu is not None or not gpus:
        return machines_of(config.hardware)
    return machines_of(config.hardware.model_copy(update={"gpu": gpus[0].name}))


def _searched(config: Config, plan: Plan, wished: Wishes) -> Search:
    console = Console(stderr=True)
    columns = (TextColumn("searching"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("searching")
        found = search(
            config, plan.data, wished.space, progress=lambda done, of: shown.update(task, completed=done, total=of)
        )
    picks = picks_of(found.front, budget=wished.budget, deadline_s=wished.deadline_s)
    return replace(found, picks=picks)


def show(plan: Plan, folder: Path | None, views: Views) -> None:
    """Prints a plan and writes its files.

    Args:
        folder: for ``plan.json``; None: that is not written.
    """
    text = plan_text(plan)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PLAN).write_text(text + "\n", encoding="utf-8")
        if views.html is not None:
            views.html.parent.mkdir(parents=True, exist_ok=True)
            points = () if plan.search is None else plan.search.points
            views.html.write_text(render(plan, points=points), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the plan cannot be written: {error}", fix="set output_dir, or --html, to a place that can be written to"
        ) from error
    if views.as_json:
        print(text)
        return
    render_plan(plan, Console(), verbose=views.verbose)
    if plan.search is not None:
        render_search(plan.search, Console(), verbose=views.verbose)
