"""How a launch ended: one exit code from those of its processes, and a word about a process that was killed."""

from __future__ import annotations

import signal

from sft_dist.errors import SftError
from sft_dist.runtime.exit_codes import (
    ENDED_BY_USR1,
    NAMED_EXIT_CODES,
    PREEMPTED_EXIT_CODE,
    STALLED_EXIT_CODE,
    exit_code,
)
from sft_dist.runtime.failure import report

__all__ = [
    "ENDED_BY_USR1",
    "NAMED_EXIT_CODES",
    "PREEMPTED_EXIT_CODE",
    "STALLED_EXIT_CODE",
    "code_of_signal",
    "exit_code",
    "report_killed",
]


def code_of_signal(number: int) -> int:
    """The exit code of a launch that a signal ended before it had started anything."""
    return PREEMPTED_EXIT_CODE if number == signal.SIGUSR1 else 128 + number


def report_killed(number: int, *, rank: int | None = None) -> None:
    """Says which process a signal ended; what its peers printed about a lost connection is the consequence."""
    process = f"rank {rank}" if rank is not None else "a process"
    error = SftError(
        f"{process} was ended by {signal.Signals(number).name}, and the run with it",
        fix="if nobody sent it, memory ran out: see `dmesg`, then lower train.micro_batch_size or data.max_seq_len",
    )
    report(error, debug=False)
