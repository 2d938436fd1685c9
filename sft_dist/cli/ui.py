"""``sft-dist ui``. Imports no torch."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer


def ui(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Only what is in it is shown.")] = Path("."),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0: any that is free.")] = 0,
) -> None:
    """Plan, audit, watch and compare on a page of this machine, which runs the commands and shows what they say.

    Prints the address of the page; Ctrl-C ends it, with all that it has started.
    """
    from sft_dist.ui.server import UiServer

    server = UiServer(folder, port=port)
    # A closed terminal, or a scheduler, ends it as Ctrl-C does: what it has started must not outlive it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    serving = threading.Thread(target=server.serve, daemon=True)
    try:
        serving.start()
        typer.echo(f"open {server.address}  (Ctrl-C ends)")
        serving.join()
    except KeyboardInterrupt:
        typer.echo("")
    finally:
        # It takes a few seconds where a command does not end when it is asked to.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        server.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
