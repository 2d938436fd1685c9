"""One exit code from several: of the processes of a launch, or of the launches of a job. Standard library only."""

from __future__ import annotations

import signal
from collections.abc import Mapping

from sft_dist.errors import Preempted, Stalled

# Exit codes after which the process has already told the user what happened.
NAMED_EXIT_CODES = frozenset({2, 3, 4, 5, 6, 7, 8})
PREEMPTED_EXIT_CODE = Preempted.exit_code
# A failure that may go well the next time, unlike the other named ones; beside one of those the consequence.
STALLED_EXIT_CODE = Stalled.exit_code
# One that had not begun to listen when it was told to save and stop: there was nothing to save.
ENDED_BY_USR1 = -signal.SIGUSR1
SIGTERM_EXIT_CODE = -signal.SIGTERM  # as multiprocessing reports a process that the launcher ended


def exit_code(by_rank: Mapping[int, int]) -> int:
    """The exit code of a launch from those of its failed processes.

    A named failure is the cause and an unnamed one beside it the consequence: a process that finds its peer gone fails
    in a collective with code 1. So is it beside a process that a signal ended, and "stalled" beside another name.
    "Preempted" counts only if nothing else happened, since a process that the launcher ends because another one failed
    may say so too, and the job must not be put back into the queue then.

    Args:
        by_rank: exit codes other than 0 by global rank; negative where a signal ended the process.

    Returns:
        The code of the lowest rank among those that count; 128 + signal where a signal ended it.
    """
    by_rank = {rank: PREEMPTED_EXIT_CODE if code == ENDED_BY_USR1 else code for rank, code in by_rank.items()}
    causes = {rank: code for rank, code in by_rank.items() if code != SIGTERM_EXIT_CODE}
    named = {rank: code for rank, code in causes.items() if code in NAMED_EXIT_CODES}
    killed = {rank: code for rank, code in causes.items() if code < 0}
    unnamed = {rank: code for rank, code in causes.items() if code != PREEMPTED_EXIT_CODE}
    explained = {rank: code for rank, code in named.items() if code != STALLED_EXIT_CODE}
    counting = explained or named or killed or unnamed or causes or by_rank
    code = counting[min(counting)]
    return code if code > 0 else 128 - code
