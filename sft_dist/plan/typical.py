"""The tape of a micro-batch of the data: the recorded one is the longest that there can be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sft_dist.plan.operators import attended_pairs
from sft_dist.plan.tape import Segment, Tape
from sft_dist.run import Run


@dataclass(frozen=True)
class Content:
    """Of a micro-batch, on all ranks that share it.

    Args:
        tokens: with them; supervised: of them.
        segment_tokens: of the segment that a token is in, on average: sum of squared lengths over tokens.
    """

    tokens: float
    supervised: float
    segment_tokens: float


def recorded_content(run: Run) -> Content:
    """Of ``activations.trace`` by default: the longest rows, all of it supervised."""
    tokens = run.batch.micro_batch_size * run.batch.max_seq_len
    return Content(tokens, tokens, run.batch.max_seq_len)


def as_content(run: Run, tape: Tape, wanted: Content) -> Tape:
    """The tape with the work of another content; its memory stays that of the recorded one.

    What grows with tokens: products and what is read and written. With supervised ones: those of the head. With squared
    lengths: attention. Dequantising and the number of kernels stay.
    """
    was = recorded_content(run)
    tokens = wanted.tokens / was.tokens
    supervised = wanted.supervised / was.supervised
    attention = [
        _attention_factor(run, tape.forward[i].work.attention_flops, was, wanted) for i in range(len(tape.forward))
    ]

    def blocks(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        return tuple(_scaled(s, tokens, pairs) for s, pairs in zip(segments, attention, strict=True))

    return replace(
        tape,
        embed=_scaled(tape.embed, tokens, tokens),
        forward=blocks(tape.forward),
        head=_scaled(tape.head, supervised, supervised),
        head_backward=_scaled(tape.head_backward, supervised, supervised),
        backward=blocks(tape.backward),
        embed_backward=_scaled(tape.embed_backward, tokens, tokens),
    )


def _scaled(segment: Segment, factor: float, attention: float) -> Segment:
    work = segment.work
    scaled = replace(
        work,
        product_flops=round(work.product_flops * factor),
        attention_flops=round(work.attention_flops * attention),
        product_bytes=round(work.product_bytes * factor),
        moved_bytes=round(work.moved_bytes * factor),
    )
    return replace(segment, work=scaled)


def _attention_factor(run: Run, flops: int, was: Content, wanted: Content) -> float:
    """Of a block's attention: pairs of a query and a key, with the window that its recorded FLOPs betray."""
    model, length = run.model, round(was.segment_tokens)
    rows = was.tokens / was.segment_tokens
    without_window = 4 * rows * attended_pairs([length], 0) * model.num_heads * model.head_dim
    share = min(1.0, flops * run.batch.sequence_parallel / without_window)
    window = window_of(share, length)
    pairs = wanted.tokens * pairs_per_token(wanted.segment_tokens, window)
    return pairs / (was.tokens * pairs_per_token(was.segment_tokens, window))


def window_of(share: float, length: int) -> float:
    """Tokens that a query sees at most, when ``share`` of the pairs of causal attention are left: its inverse.

    (2 w L - w^2) / L^2 for a window w of L tokens.
    """
    return length if share > 0.9999 else max(1.0, length * (1 - math.sqrt(1 - share)))


def pairs_per_token(segment_tokens: float, window: float) -> float:
    """Keys that a query sees on average, in segments of equal length."""
    seen = min(window, segment_tokens)
    return seen - seen * (seen - 1) / (2 * segment_tokens)
