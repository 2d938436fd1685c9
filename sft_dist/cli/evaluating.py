"""``sft-dist eval``. Imports no torch at module level."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import Overrides, put_own_tools_on_path
from sft_dist.errors import ConfigError
from sft_dist.runtime.quiet import quiet_libraries


def evaluate(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A run's output_dir, a folder of its checkpoints/, a whole model, a LoRA adapter, or a hub id in the "
            "local cache.",
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
    lm_eval: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-eval, too; may be repeated."),
    ] = None,
    lm_eval_tasks: Annotated[
        str | None,
        typer.Option("--lm-eval-tasks", metavar="DIR", help="With YAML files of tasks of your own (its include_path)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Ask each of these tasks its first N examples.")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Prompts of these tasks go through the chat template; else as the model was trained.",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="PATH", help="Base of an adapter, where it is not where it says."),
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Evaluate its base, too.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write here; else into RUN/eval or MODEL.eval.")
    ] = None,
) -> None:
    """Evaluate a run or an adapter beside its base, or a model: loss, perplexity, scores of answers, long texts.

    Under a launcher or in this process, as train does, and under any strategy. What is measured beside the loss is
    asked for by keys of `eval`, e.g. 'eval.scores={metrics: [chrf, exact_match]}'.
    """
    put_own_tools_on_path()
    quiet_libraries()
    names = tuple(name for given in lm_eval or [] for name in given.split(",") if name)
    _check_tasks(names, lm_eval_tasks, limit, chat_template)
    from sft_dist.train.eval_subject import subject_of
    from sft_dist.train.evaluating import AskedTasks, evaluate_subject
    from sft_dist.train.preflight import check_inputs

    tasks = AskedTasks(names, lm_eval_tasks, limit, chat_template) if names else None
    subject = subject_of(
        path,
        overrides or [],
        data=data or [],
        checkpoint=checkpoint,
        out=out,
        base=base_model,
        needs_rows=tasks is None,
    )
    check_inputs(subject.config, with_rows=subject.has_rows)
    evaluate_subject(subject, with_base=base, tasks=tasks)


def _check_tasks(names: Sequence[str], folder: str | None, limit: int | None, chat_template: bool | None) -> None:
    """
    Raises:
        ConfigError: lm-eval is not installed, an option has no effect, or the folder is not there.
    """
    if not names:
        given = {"--lm-eval-tasks": folder, "--limit": limit, "--chat-template": chat_template}
        for option, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{option} has no effect without --lm-eval", fix="add --lm-eval TASK, or leave it out"
                )
        return
    if find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval: the package lm-eval is not installed", fix="pip install 'sft-dist[lm-eval]'")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"--lm-eval-tasks: {folder} is no folder here", fix="give the folder of your tasks' YAML files"
        )
