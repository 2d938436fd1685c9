"""The program ``sft-dist``: its commands in the order of ``--help``, and its exit codes.

Nothing here imports torch at module level, so that ``--help`` and configuration mistakes answer at once: each command
imports what does its work when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sft_dist import __version__
from sft_dist.cli.answers import chat, serve
from sft_dist.cli.cluster import submit
from sft_dist.cli.config import config_app
from sft_dist.cli.data import data_app
from sft_dist.cli.doctor import doctor
from sft_dist.cli.evaluating import evaluate
from sft_dist.cli.export import export
from sft_dist.cli.lr_find import lr_find
from sft_dist.cli.model import model_app
from sft_dist.cli.planning import calibrate, plan
from sft_dist.cli.prepare import prepare
from sft_dist.cli.replaying import replay
from sft_dist.cli.reports import compare, diff, report_run
from sft_dist.cli.review import review
from sft_dist.cli.sweeps import sweep_table
from sft_dist.cli.training import resume, train
from sft_dist.cli.ui import ui
from sft_dist.cli.usage import USAGE_ERROR, mistake
from sft_dist.cli.watching import logs, status
from sft_dist.errors import SftError
from sft_dist.runtime.failure import INTERRUPTED_EXIT_CODE, report, report_interrupt, report_unexpected

UNEXPECTED_EXIT_CODE = 1

EPILOG = (
    "Exit codes: 0 done, 1 unexpected, 2 usage or configuration, 3 does not fit, 4 data, "
    "5 checkpoint or model on disk, 6 training diverged, 7 a machine or the network, 8 a rank made no progress, "
    "75 stopped by a signal and saved, 130 interrupted."
)


@dataclass(frozen=True)
class _Given:
    """The command line: its words, and whether ``--debug`` was among them."""

    words: list[str]
    debug: bool


class _Commands(TyperGroup):
    """Turns a failure of any command into its message and exit code, in one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SftError as error:
            report(error, debug=ctx.obj.debug, words=ctx.obj.words)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            report_interrupt()
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich's renderer of Markdown would be half of the time that help takes.
    rich_markup_mode=None,
    epilog=EPILOG,
    help="Supervised fine-tuning of causal language models on any number of GPUs.",
)
app.command()(train)
app.command()(resume)
app.command(short_help="Before training: the model, and the data in tokens and packs.")(prepare)
app.command(short_help="The dry run: does it fit, how long, how much money.")(plan)
app.command(short_help="Try rising learning rates, and suggest one.")(lr_find)
app.command("eval", short_help="Evaluate a run beside its base, or a model.")(evaluate)
app.command(short_help="Measure this machine's GPU for plans.")(calibrate)
app.command(short_help="Check machines and network before a run.")(doctor)
app.command(short_help="How a run stands, also while it runs elsewhere.")(status)
app.command(short_help="What the processes of a run have printed.")(logs)
app.command("report", short_help="A run as a page: curves, plan, bill, answers.")(report_run)
app.command(short_help="Runs side by side: results, curves, settings.")(compare)
app.command(short_help="In what two runs differ, and from which step on.")(diff)
app.command(short_help="Repeat a run from its receipt, and compare.")(replay)
app.command(short_help="Choose the better of two answers, blind.")(review)
app.command(short_help="The runs of a sweep side by side.")(sweep_table)
app.command(short_help="A page of this machine: plan, audit, watch, compare.")(ui)
app.command(short_help="Train as a job of SLURM, from start to end.")(submit)
app.command(short_help="Talk to a run, or let it answer a file.")(chat)
app.command(short_help="Answer over HTTP, as the OpenAI API does.")(serve)
app.command(short_help="Write an adapter, a merged or a whole model for others to load.")(export)
app.add_typer(config_app, name="config")
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sft-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the stack trace of an error; may stand anywhere.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    # Here for the help text only: main() takes --debug out before the command line is parsed.
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code.

    Args:
        arguments: of the command line, without the program's name; those of this process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest = [argument for argument in given if argument != "--debug"]
    said = _Given(rest, debug=len(rest) < len(given))
    try:
        # Not standalone: what typer's parser raises comes here instead of being printed in its own form.
        code = app(args=rest, prog_name="sft-dist", obj=said, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except USAGE_ERROR as error:
        found = mistake(error)
        if found is None:
            error.show()
        else:
            report(found, debug=said.debug)
        sys.exit(error.exit_code)
    except typer.Abort:
        typer.echo("aborted", err=True)
        sys.exit(UNEXPECTED_EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        report_unexpected(error)
        sys.exit(UNEXPECTED_EXIT_CODE)
