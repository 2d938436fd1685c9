#!/usr/bin/env python3
"""Trains in every process of a launcher that the user calls: the script to give to torchrun, accelerate or deepspeed.

    torchrun --nproc-per-node 2 launch/train.py CONFIG [--resume auto|PATH|never] [KEY.PATH=VALUE ...]
    accelerate launch --multi_gpu --num_processes 2 launch/train.py CONFIG
    deepspeed --num_gpus 2 launch/train.py CONFIG
    python launch/train.py CONFIG                                             # one process

The same as `sft-dist train`. The scripts beside it do more: see docs/launching.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def without_local_rank(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> list[str]:
    """The arguments without ``--local_rank=N``, which deepspeed puts first; N has to agree with the environment."""
    from sft_dist.errors import ConfigError

    if not arguments or not arguments[0].startswith(("--local_rank=", "--local-rank=")):
        return list(arguments)
    option, _, given = arguments[0].partition("=")
    known = env.get("LOCAL_RANK")
    if given != known:
        raise ConfigError(
            f"{option} is {given} and LOCAL_RANK is {known if known is not None else 'not set'}",
            fix="start with a launcher that sets both, and do not write the option by hand",
        )
    return list(arguments[1:])


def main(arguments: Sequence[str]) -> None:
    """Trains, and exits with the code of ``sft-dist train``."""
    # The checkout's own code, installed or not; in place of this folder, in which there is nothing to import.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from sft_dist.cli import main as run_command
    from sft_dist.errors import ConfigError
    from sft_dist.runtime.failure import report

    try:
        rest = without_local_rank(arguments)
    except ConfigError as error:
        report(error, debug="--debug" in arguments)
        sys.exit(error.exit_code)
    run_command(["train", *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
