"""``sft-dist data``: prepares, audits and shows training data. Imports no torch at module level."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import ConfigPath, Overrides, checked_config
from sft_dist.errors import ConfigError
from sft_dist.runtime.quiet import quiet_libraries

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Training data, on a machine without GPUs.")


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError(f"--shard {text} is no part", fix="say --shard i/n with i from 1 to n, e.g. 1/4")
    return int(number) - 1, int(of)


@data_app.command("prepare")
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="i/n",
            help="Do the i-th of n parts, on a machine that shares the folder of the cache with those that do the "
            "others; who ends last puts them together.",
        ),
    ] = "1/1",
) -> None:
    """Tokenise, mask and pack the data of a run into its cache, with all CPUs; training then opens it at once.

    Goes on where it was stopped or killed. What is prepared already, by this or another run, is used.
    """
    number, of = _shard(shard)
    checked = checked_config(config, overrides)
    from sft_dist.data.tokenising import Shard

    quiet_libraries()
    from sft_dist.train.data import prepare_data

    prepare_data(checked, shard=Shard(number, of))


@data_app.command("audit")
def audit(
    config: ConfigPath,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page too.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON too.")
    ] = None,
) -> None:
    """Say what is wrong with the data of a run: labels, duplicates, leaks, answers, encodings.

    Ends with 4 where more is wrong than data.audit allows. Training does the part that takes seconds by itself.
    """
    checked = checked_config(config, overrides)
    quiet_libraries()
    from sft_dist.train.audit import audit_data

    audit_data(checked, html=html, json=json_file)


class Set(StrEnum):
    train = "train"
    eval = "eval"


@data_app.command("show")
def show_data(
    config: ConfigPath,
    overrides: Overrides = None,
    side: Annotated[Set, typer.Option("--set", help="Which set.")] = Set.train,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="N|N-M", help="This row, or these, from 0; may be given several times."),
    ] = None,
    random: Annotated[int | None, typer.Option(min=1, metavar="N", help="N rows drawn at random.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="S", help="For --random; 0 by default.")] = None,
    longest: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N longest rows.")] = None,
    least_supervised: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The N rows with the fewest trained tokens.")
    ] = None,
    packs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N packs, with the borders of their rows.")
    ] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Only rows of this source.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="With the borders of the tokens and their ids.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write them to one HTML page that needs nothing else.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids, labels and origins as JSON.")] = False,
) -> None:
    """Look at rows of the data as a run trains them: what is trained, what is context, where each token ends.

    Shows the first 3 rows of the training set unless told otherwise. Prepares the data first, as `data prepare` does.
    """
    from sft_dist.data.show_choice import Choice, Form

    form = Form(tokens=tokens, html=html, as_json=as_json)
    choice = Choice(
        side="eval" if side is Set.eval else "train",
        rows=tuple(row or ()),
        random=random,
        seed=seed,
        longest=longest,
        least_supervised=least_supervised,
        packs=packs,
        source=source,
    )
    checked = checked_config(config, overrides)
    quiet_libraries()
    from sft_dist.train.show_data import show_data

    show_data(checked, choice, form)
