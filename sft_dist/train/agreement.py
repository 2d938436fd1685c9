"""What all ranks decide together at the end of a step, from what each of them knows alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.runtime.process_group import gathered

T = TypeVar("T")


@dataclass(frozen=True)
class Agreed:
    """The same on all ranks.

    Args:
        signal: the largest number of a signal that any rank has noted; 0: none has.
        save_is_due: whether any rank says so.
        save_failed: whether any rank knows that a save went wrong in a way that ends the run.
    """

    signal: int
    save_is_due: bool
    save_failed: bool


class Agreement:
    """Made once, by all ranks at the same place of the program; needs the process group.

    It has a gloo group of its own, on GPUs too: it waits for the other hosts, never for a device, and what it sends is
    no part of the collectives of training.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._begun: tuple[Tensor, dist.Work] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether an agreement is on its way; the same on all ranks."""
        return self._begun is not None

    def begin(self, *, signal: int, save_is_due: bool, save_failed: bool) -> None:
        """Sends on its way what this rank says, in place of what was on its way; all ranks call this at the same place.

        Args:
            signal: number of a signal that this rank has noted, or 0.
            save_is_due, save_failed: by what this rank alone knows, such as its clock.
        """
        if self._begun is not None:
            self._begun[1].wait()
        # int64 [fields], the largest of each over the ranks.
        said = torch.tensor([signal, save_is_due, save_failed], dtype=torch.int64)
        work = dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "this process is of the group"
        self._begun = said, work

    def reached(self) -> Agreed:
        """What came of what was begun; waits until all ranks have begun it."""
        assert self._begun is not None, "nothing was begun"
        (said, work), self._begun = self._begun, None
        work.wait()
        number, is_due, has_failed = said.tolist()
        return Agreed(signal=number, save_is_due=bool(is_due), save_failed=bool(has_failed))

    def told(self, value: T) -> list[T]:
        """``value`` of every rank; all of them call this at the same place."""
        return gathered(value, self._group)
