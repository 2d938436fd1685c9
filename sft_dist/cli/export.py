"""``sft-dist export``. Imports no torch at module level."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import CheckpointOf
from sft_dist.runtime.quiet import quiet_libraries


class WrittenDtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Base(StrEnum):
    dequantized = "dequantized"
    original = "original"


def export(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Run directory, checkpoint, or folder of an adapter or a model.")
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Put the adapter into the weights of its base.")] = False,
    checkpoint: CheckpointOf = None,
    dtype: Annotated[
        WrittenDtype | None,
        typer.Option(help="Of the weights; else what the run computed in, or an adapter as it is."),
    ] = None,
    base: Annotated[
        Base | None,
        typer.Option(
            help="With --merge after training on a quantised base: into its dequantised weights, which is exactly what "
            "was trained and the default, or into the original ones in its files.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to; else merged, adapter or model in the run directory."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most weights of one file, e.g. 5GB or 500MB.")
    ] = "5GB",
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Load the folder in a fresh process with plain transformers and peft, and compare logits; takes "
            "memory for the model in fp32.",
        ),
    ] = True,
) -> None:
    """Write what a run or a checkpoint made as a folder that transformers, vLLM and TGI load by itself.

    An adapter stays one unless --merge puts it into its base, which needs memory for two tensors and no GPU. A whole
    model is written in another dtype or in other files. Tokenizer, chat template, settings for generation and a model
    card are with it.
    """
    from sft_dist.export.wish import Wish, parse_size

    wish = Wish(
        merge=merge,
        dtype=None if dtype is None else dtype.value,
        base=None if base is None else base.value,
        out=out,
        max_file_bytes=parse_size(max_shard_size),
        check=check,
    )
    quiet_libraries()
    from sft_dist.export.command import run_export

    run_export(path, wish, checkpoint=checkpoint)
