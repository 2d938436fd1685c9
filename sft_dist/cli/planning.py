"""``sft-dist plan`` and ``sft-dist calibrate``. Imports no torch at module level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sft_dist.cli.options import (
    ConfigPath,
    Examples,
    Overrides,
    TokensPerExample,
    checked_config,
    put_own_tools_on_path,
)
from sft_dist.errors import ConfigError, PlanError
from sft_dist.runtime.quiet import quiet_libraries

if TYPE_CHECKING:
    from sft_dist.config.schema import Config


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="Plan for this GPU, e.g. a100-80gb; else hardware.gpu, else this machine's."
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, metavar="N", help="GPUs of a node.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, metavar="N", help="Nodes.")] = None,
    examples: Examples = None,
    tokens_per_example: TokensPerExample = None,
    fx: Annotated[float | None, typer.Option("--fx", metavar="JPY", help="JPY per USD.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Look for other machines, strategies and micro-batches too.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="M,...", help="Search these too: full, lora, qlora, or all of them."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="MONEY", help="Search the fastest for at most e.g. $50 or ¥8000.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option("--deadline", metavar="TIME", help="Search the cheapest within e.g. 6h or 90m.")
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option("--max-gpus", min=1, metavar="N", help="GPUs that a search may take; 16 by default.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as one HTML page too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON: docs/plan_schema.json.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With the parts of all phases and all assumptions.")
    ] = False,
    probe: Annotated[
        int | None,
        typer.Option(
            "--probe",
            min=3,
            metavar="N",
            help="Then train N steps on what is here, under a launcher or in this process, and compare; on a GPU the "
            "next plan starts from what 5 steps or more measured. Needs the weights; keeps nothing of the model.",
        ),
    ] = None,
) -> None:
    """The dry run: does it fit, how long does it take, what does it cost. Needs no GPU, no weights and no network.

    Prints the plan and writes plan.json into output_dir, unless a run has begun there. Ends with 3 where the run does
    not fit.

    With --search, or an option of it, also plans other ways to do the same training: on hardware.gpu, or on all GPUs
    that have a price where that is null. Ends with 3 where nothing fits, or nothing under the budget or the deadline.
    """
    machines = {"gpu": gpu, "gpus_per_node": gpus, "nodes": nodes, "fx": fx}
    stated = [f"hardware.{key}={value}" for key, value in machines.items() if value is not None]
    asked = {"methods": methods, "budget": budget, "deadline": deadline, "max_gpus": max_gpus}
    searches = search or any(wish is not None for wish in asked.values())
    if searches and probe is not None:
        raise ConfigError("--probe trains one configuration, and --search looks at many", fix="give one of the two")
    # What is pasted behind the command, a proposal for one, comes last.
    checked = checked_config(config, [*stated, *(overrides or [])])
    if probe is None:
        show_plan(
            checked,
            asked={**asked, "gpus": gpus, "nodes": nodes} if searches else None,
            examples=examples,
            tokens_per_example=tokens_per_example,
            html=html,
            as_json=as_json,
            verbose=verbose,
        )
        return
    put_own_tools_on_path()
    quiet_libraries()
    from sft_dist.plan.command import Views, stated_data
    from sft_dist.train.probe import probe as run_probe

    views = Views(html=html, as_json=as_json, verbose=verbose)
    run_probe(checked, steps=probe, stated=stated_data(examples, tokens_per_example), views=views)


def show_plan(
    config: Config,
    *,
    asked: dict[str, Any] | None = None,
    examples: str | None = None,
    tokens_per_example: str | None = None,
    html: Path | None = None,
    as_json: bool = False,
    verbose: bool = False,
) -> None:
    """Makes and shows a plan; ends with 3 where the run does not fit.

    Args:
        asked: of a search, as the command line has it; None: nothing is searched.
    """
    quiet_libraries()
    from sft_dist.plan.command import Views, make_plan, stated_data, wishes
    from sft_dist.train.resume import holds_a_run

    views = Views(html=html, as_json=as_json, verbose=verbose)
    wished = None if asked is None else wishes(**asked)
    begun = holds_a_run(Path(config.output_dir))
    stated = stated_data(examples, tokens_per_example)
    made = make_plan(config, stated=stated, views=views, wished=wished, keeps=not begun)
    if begun:
        typer.echo(f"{config.output_dir} holds a run: its plan.json stays as it is", err=True)
    if made.memory.verdict == "does not fit" and wished is None:
        raise typer.Exit(PlanError.exit_code)


def calibrate(
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="What this GPU is in the table; else as its driver calls it."),
    ] = None,
) -> None:
    """Measure this machine's GPU, so that plans count with it: matrix products, memory and, under a launcher, links.

    Takes under a minute and shows what was measured beside the table's figures.
    """
    quiet_libraries()
    from sft_dist.plan.calibrate import calibrate as measure_gpu

    measure_gpu(gpu)
