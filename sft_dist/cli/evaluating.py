"""``sft-dist eval``. Imports no torch at module level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import Overrides, put_own_tools_on_path
from sft_dist.runtime.quiet import quiet_libraries


def evaluate(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A run's output_dir, a folder of its checkpoints/, a whole model, or a hub id in the local cache.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Held-out rows in place of the run's data.eval; may be repeated."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", metavar="STEP|latest", help="Of a run: this one in place of that of which final/ is."
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Evaluate the base model of a run, too.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write here; else into RUN/eval or MODEL.eval.")
    ] = None,
) -> None:
    """Evaluate a run beside its base, or a model: loss, perplexity, scores of answers, long texts.

    Under a launcher or in this process, as train does, and under any strategy. What is measured beside the loss is
    asked for by keys of `eval`, e.g. 'eval.scores={metrics: [chrf, exact_match]}'.
    """
    put_own_tools_on_path()
    quiet_libraries()
    from sft_dist.train.evaluating import evaluate_subject, subject_of
    from sft_dist.train.preflight import check_inputs

    subject = subject_of(path, overrides or [], data=data or [], checkpoint=checkpoint, out=out)
    check_inputs(subject.config)
    evaluate_subject(subject, with_base=base)
