"""``sft-dist review``. Imports no torch."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer


def review(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output_dir, or the folder of an evaluation.")],
    second: Annotated[
        Path | None,
        typer.Argument(
            metavar="OTHER", help="Another one; without it: RUN before and after training.", show_default=False
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0: any that is free.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where choices go; else RUN/review[-OTHER].jsonl.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="S", help="Of the side on which each answer stands.")
    ] = 0,
) -> None:
    """Choose the better of two answers, blind, on a page of this machine; each choice is saved at once.

    The answers are those of `sft-dist eval`, or of eval.samples. The same command goes on where it was stopped.
    """
    from sft_dist.review.pairs import read_comparison
    from sft_dist.review.server import ReviewServer
    from sft_dist.review.votes import Votes

    comparison = read_comparison(first, second)
    name = "review.jsonl" if second is None else f"review-{second.resolve().name}.jsonl"
    file = out or first / name
    if not comparison.pairs:
        typer.echo(f"all {comparison.num_equal} pairs of answers are equal: there is nothing to choose")
        return
    votes = Votes(file, seed=seed)
    server = ReviewServer(comparison, votes, seed=seed, port=port)
    ends = threading.Event()
    # To the end of the process, and no KeyboardInterrupt: a second Ctrl-C ends it no other way.
    signal.signal(signal.SIGINT, lambda *_: ends.set())
    typer.echo(f"{len(comparison.pairs)} pairs; {comparison.num_equal} more are equal. Choices go to {file}")
    typer.echo(f"open {server.address}  (Ctrl-C ends)")
    threading.Thread(target=server.serve, daemon=True).start()
    ends.wait()
    server.close()
    tally = votes.tally(comparison)
    typer.echo(
        f"\n{comparison.names[1]} better: {tally.second}, {comparison.names[0]} better: {tally.first}, both good: "
        f"{tally.tie}, neither good: {tally.bad}, not looked at: {tally.open}"
    )
