"""What one micro-batch of a model allocates, frees and computes, cut into segments: embedding, each decoder block, the
loss, and the same back again.

``plan/record.py`` writes a tape. The rest of the dry run plays it: ``plan/memory.py`` with the transients of a sharding
strategy between the segments, ``plan/time.py`` with the rates of a GPU. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

TapePart = Literal["activations", "logits", "gradients"]
PARTS: tuple[TapePart, ...] = ("activations", "logits", "gradients")

# Of a unit of sharding inside a segment: a pass begins; its forward ends; its gradients are there. Or: nothing follows.
Moment = Literal["open", "close", "reduce", "end"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Work:
    """What a segment computes.

    Args:
        product_flops, attention_flops: multiplications and additions, two for each pair of numbers.
        product_bytes, dequantize_bytes, moved_bytes: read and written by matrix products, by dequantising, by
            everything else that is neither product nor attention.
        kernels: operators that start one.
        operators: all that the host runs through the dispatcher, views included.
    """

    product_flops: int = 0
    attention_flops: int = 0
    product_bytes: int = 0
    dequantize_bytes: int = 0
    moved_bytes: int = 0
    kernels: int = 0
    operators: int = 0

    @property
    def flops(self) -> int:
        return self.product_flops + self.attention_flops

    def __add__(self, other: Work) -> Work:
        return Work(**{name: amount + getattr(other, name) for name, amount in vars(self).items()})


@dataclass(frozen=True)
class Segment:
    """A stretch of the tape.

    Args:
        sizes: [events] bytes that an event allocates, negative where it frees.
        parts: [events] index into ``PARTS``.
        stretches: where units of sharding lie inside: their moments, each with the work before it; together ``work``.
    """

    name: str
    sizes: Numbers
    parts: Numbers
    work: Work
    stretches: tuple[tuple[Work, Moment], ...] = ()

    @cached_property
    def net(self) -> dict[TapePart, int]:
        """By how much each part has grown at the end."""
        return self._grown(len(self.sizes))

    @cached_property
    def peak(self) -> dict[TapePart, int]:
        """By how much each part has grown when all of them together are highest; nothing where they never grow."""
        total = np.cumsum(self.sizes)
        at = int(total.argmax()) if total.size else 0
        return self._grown(at + 1 if total.size and total[at] > 0 else 0)

    @property
    def peak_bytes(self) -> int:
        """Most bytes beyond those at the beginning."""
        return sum(self.peak.values())

    @cached_property
    def gradients_move(self) -> Segment:
        """The segment where each gradient goes, as it comes, to a place that is counted already."""
        kept = self.parts != PARTS.index("gradients")
        return Segment(self.name, self.sizes[kept], self.parts[kept], self.work)

    @cached_property
    def gradients_leave(self) -> Segment:
        """The segment where each gradient takes another one of its size, which is there, along to such a place."""
        sign = np.where(self.parts == PARTS.index("gradients"), -1, 1)
        return Segment(self.name, self.sizes * sign, self.parts, self.work)

    def _grown(self, events: int) -> dict[TapePart, int]:
        sizes, parts = self.sizes[:events], self.parts[:events]
        return {part: int(sizes[parts == i].sum()) for i, part in enumerate(PARTS)}


@dataclass(frozen=True)
class Tape:
    """One micro-batch of a model.

    Args:
        embed, head: forward of what is before and behind the blocks; the loss belongs to ``head``.
        forward, backward: of the blocks that were recorded.
        head_backward, embed_backward: the rest of backward.
        recorded: for every block of the model, first to last, the index of the recorded one that is like it.
        saved_bytes: of tensors that autograd keeps from forward to backward, parameters aside, for each recorded block
            and, last, for everything else; a storage counts once, where it is kept first.
    """

    embed: Segment
    forward: tuple[Segment, ...]
    head: Segment
    head_backward: Segment
    backward: tuple[Segment, ...]
    embed_backward: Segment
    recorded: tuple[int, ...]
    saved_bytes: tuple[int, ...]

    def segments(self) -> Iterator[Segment]:
        """Of the whole model, in the order in which they run."""
        yield self.embed
        yield from (self.forward[i] for i in self.recorded)
        yield self.head
        yield self.head_backward
        yield from (self.backward[i] for i in reversed(self.recorded))
        yield self.embed_backward

    @property
    def kept_bytes(self) -> int:
        """What autograd keeps from forward to backward in the whole model."""
        return sum(self.saved_bytes[i] for i in self.recorded) + self.saved_bytes[-1]

    def work(self) -> Work:
        """Of the whole model."""
        return sum((segment.work for segment in self.segments()), Work())
