"""Every failure that has a name: one line what, one line how to fix, one exit code.

The command line prints ``what`` and ``fix`` and exits with ``exit_code``; a stack trace appears only with ``--debug``.
Anything that is not an ``SftError`` is a defect of this project and exits 1 with its trace.
"""

from __future__ import annotations

from typing import Self


class SftError(Exception):
    """A failure that the user can act on.

    Args:
        what: one line that names the file, key or row and what is wrong with it.
        fix: one line that says what to do about it.
    """

    exit_code = 1

    # Whether every process of a launch meets it, so that it is enough if one of them tells.
    on_all_ranks = False

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def everywhere(self) -> Self:
        """This error, marked as one that is raised on every rank."""
        self.on_all_ranks = True
        return self

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # The keyword-only argument is lost by Exception's own pickling; worker processes send these over pipes.
        return (_rebuild, (type(self), self.what, self.fix))


def _rebuild(kind: type[SftError], what: str, fix: str) -> SftError:
    return kind(what, fix=fix)


class ConfigError(SftError):
    """The configuration, its overrides or the launch environment are wrong or contradict each other."""

    exit_code = 2
    on_all_ranks = True


class PlanError(SftError):
    """The run does not fit the memory of its devices, or cannot be planned."""

    exit_code = 3
    on_all_ranks = True


class UnknownHardware(PlanError):
    """A GPU, network or provider that the tables do not have, or a name that several have: a mistake of usage."""

    exit_code = 2


class DataError(SftError):
    """A data file, a row of it or the chat template cannot be trained on."""

    exit_code = 4
    on_all_ranks = True


class RowError(DataError):
    """One row cannot be read or trained on; the rows around it can. ``data.on_bad_row: skip`` goes on without it."""


class CheckpointError(SftError):
    """A model or checkpoint on disk cannot be read or written."""

    exit_code = 5


class TrainingDiverged(SftError):
    """The loss or the gradients are no longer finite."""

    exit_code = 6


class MachineError(SftError):
    """A machine or the way between machines cannot do what training needs of them."""

    exit_code = 7


class Stalled(SftError):
    """A rank makes no progress, and the others wait for it: the run goes on from a checkpoint in new processes."""

    exit_code = 8
    on_all_ranks = True


class Preempted(SftError):
    """No failure: a signal asked the run to stop, and it has saved a checkpoint first.

    ``what`` says so and ``fix`` how to go on. Every rank raises it. Schedulers know its exit code, EX_TEMPFAIL of
    sysexits.h, as that of a job to be started again.
    """

    exit_code = 75
    on_all_ranks = True


class ShardingMismatch(SftError):
    """What a rank holds is not what the plan said it would hold, or the optimizer moves nothing."""

    exit_code = 1
