"""``sft-dist chat`` and ``sft-dist serve``. Imports no torch at module level."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli.options import CheckpointOf
from sft_dist.runtime.failure import INTERRUPTED_EXIT_CODE
from sft_dist.runtime.quiet import quiet_libraries


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


Answering = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A run's output_dir (its final/, or its newest checkpoint where there is none yet), a folder of its "
        "checkpoints/, a model or adapter in Hugging Face layout, or a hub id in the local cache.",
        show_default=False,
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: the GPU, if there is one.")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="auto: what the run computed in; where that is not known, the files'.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens of an answer.")]


def chat(
    path: Answering,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="The base model answers too, beside what training made of it.")
    ] = False,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", metavar="INPUT", help="Answer the rows of this file, in any format of training data; needs --out."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="OUTPUT.jsonl", help="Where the answers go, a line a row; goes on where it was stopped."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this, and leave.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0,
            max=10,
            metavar="T",
            help="0: always the most probable token. By default 0.7 in a "
            "conversation; 0 with --compare-base and --file.",
        ),
    ] = None,
    top_p: Annotated[
        float, typer.Option("--top-p", min=1e-6, max=1, metavar="P", help="Draw from the tokens that make up P.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, metavar="S", help="Of the draws: the same answers again.")
    ] = None,
    checkpoint: CheckpointOf = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Talk to a run in the terminal, compare it with its base, or let it answer the rows of a file.

    What answers is loaded with plain transformers and peft and prompted as it was trained; a 4-bit base is quantised as
    in training. Paths in an adapter count from the current directory, as they did in training.
    """
    quiet_libraries()
    from sft_dist.generate.command import Options
    from sft_dist.generate.command import chat as run_chat

    options = Options(
        system=system, prompt=prompt, file=file, output=out, compare_base=compare_base, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    try:
        run_chat(path, options, checkpoint=checkpoint, device=device.value, dtype=dtype.value)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted" + ("" if file is None else ": the same command goes on"), err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def serve(
    path: Answering,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Another than this machine's own needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="SFT_DIST_API_KEY",
            show_envvar=True,
            help="What clients have to show; the environment does not show it to other users of the machine.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 1024,
    checkpoint: CheckpointOf = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Serve /v1/chat/completions and /v1/completions to clients of the OpenAI API: to try a run in a real client.

    One answer at a time, whoever asks; for production `sft-dist export` makes a folder for vLLM. --max-new-tokens is
    for requests that say nothing of it.
    """
    from sft_dist.generate.serve import Address, require_packages

    require_packages()
    quiet_libraries()
    from sft_dist.generate.serve import serve as run_server

    run_server(
        path, Address(host, port, api_key), max_new_tokens=max_new_tokens, checkpoint=checkpoint, device=device.value,
        dtype=dtype.value,
    )  # fmt: skip
