"""Text generation with the model that is being trained, where its shards are: on all ranks, under every strategy.

Prompts form groups by their number alone, and a group is computed in the same passes whatever rank does it: a sum of
floating-point numbers depends on what else is in its batch, so that is how one process and three have the same tokens.
A rank's groups come one after the other. All ranks run equally many passes of the same kind, because a sharded weight
is gathered by all of them: those whose rows have ended go on with one row that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.errors import ConfigError
from sft_dist.evaluation.continuation import Cached, Continuation, Recomputed, whole
from sft_dist.evaluation.room import depends_on_neighbours, num_positions
from sft_dist.model.build import SftModel
from sft_dist.runtime import progress
from sft_dist.sharding.strategy import Strategy

T = TypeVar("T")

# Passes between two looks at what was generated: a look waits for the device and for the other ranks. Rows that have
# ended go on until the next one.
STRETCH = 8


@dataclass(frozen=True)
class Generated:
    """
    Args:
        tokens: the one that ended it among them.
        finish_reason: stop: the last token is one of the stop ids; length: there was no room for more, or no need.
    """

    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@dataclass
class _Row:
    """A prompt that is being answered.

    Args:
        number: of the prompt.
        limit: most tokens of the answer; 0 for a row that nobody reads.
        has_stopped: by a stop id; has_been_cut: by what its tokens say.
    """

    number: int
    prompt: Sequence[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    has_stopped: bool = False
    has_been_cut: bool = False

    @property
    def has_ended(self) -> bool:
        return self.has_stopped or self.has_been_cut or len(self.tokens) >= self.limit

    def take(self, tokens: Sequence[int], stop_ids: frozenset[int], ends: Callable[[Sequence[int]], bool]) -> None:
        """Goes on with ``tokens``, as far as it goes on at all."""
        for token in tokens:
            if self.has_ended:
                return
            self.tokens.append(token)
            self.has_stopped = token in stop_ids
        self.has_been_cut = not self.has_ended and ends(self.tokens)

    def answer(self) -> Generated:
        return Generated(tuple(self.tokens), "stop" if self.has_stopped else "length")


def generate(
    strategy: Strategy,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    rank: int,
    world_size: int,
    device: torch.device,
    rows_at_once: int,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Callable[[Sequence[int]], bool] = lambda _: False,
    on_progress: Callable[[int], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> dict[int, Generated]:
    """Answers to this rank's share of ``prompts``, by their numbers; every rank must call it with the same arguments.

    Nothing of a training is changed: no parameter, no generator of random numbers, no mode.

    Args:
        max_new_tokens: most tokens of an answer; fewer where the model has no positions for them.
        stop_ids: tokens that end an answer.
        world_size: ranks that share the prompts: all of the process group.
        rows_at_once: most prompts of a forward pass; another number may round otherwise.
        temperature: 0: the most probable token; else tokens are drawn by their probabilities at this temperature.
        seed: of the draws, which follow from it and the number of a prompt.
        ends: whether an answer of these tokens needs no more of them; it is asked now and then, so there may be more.
        on_progress: is told how many prompts are answered on all ranks, whenever they have looked.
        on_note: is told what makes this slower than it could be.

    Raises:
        ConfigError: a prompt is empty or longer than the model allows, or its rotary frequencies would depend on what
            else is generated.
    """
    assert max_new_tokens > 0
    assert rows_at_once > 0
    limits = _limits(strategy.model, prompts, max_new_tokens)
    positions = num_positions(strategy.model)
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
    recompute = depends_on_neighbours(strategy.model, longest, what="prompts with answers")
    if recompute is not None:
        on_note(f"{recompute}: each token is computed from its whole row, and one row at a time")
    size = 1 if recompute is not None else rows_at_once
    groups = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    answers: dict[int, Generated] = {}
    for first in range(0, len(groups), world_size):
        numbers = groups[first + rank] if first + rank < len(groups) else ()
        rows = [_Row(number, prompts[number], limits[number]) for number in numbers] or [_Row(0, [0], 0)]
        of_rows = [row.prompt for row in rows]
        passes = (Cached if recompute is None else Recomputed)(strategy, whole(of_rows).to(device), positions)
        draw = _Draw(rows, max(limits), temperature=temperature, seed=seed, device=device)
        for num_ended in _answer(rows, passes, draw, max(limits), frozenset(stop_ids), ends, device):
            on_progress(first * size + num_ended)
        answers.update({row.number: row.answer() for row in rows if row.limit})
    return answers


def _answer(
    rows: list[_Row],
    passes: Continuation,
    draw: _Draw,
    limit: int,
    stop_ids: frozenset[int],
    ends: Callable[[Sequence[int]], bool],
    device: torch.device,
) -> Iterator[int]:
    """Generates until the rows of all ranks have ended, and yields how many have."""
    generated = [draw(passes.first())]
    num_passes, running = 1, rows
    while True:
        # [rows, passes]; here the host waits for the device.
        columns = torch.stack(generated, dim=1).tolist()
        for row, tokens in zip(running, columns, strict=True):
            row.take(tokens, stop_ids, ends)
        going_on = [place for place, row in enumerate(running) if not row.has_ended]
        said = torch.tensor([len(going_on), sum(row.has_ended and row.limit > 0 for row in rows)], device=device)
        dist.all_reduce(said)
        num_going_on, num_ended = said.tolist()
        progress.tick()
        yield num_ended
        if not num_going_on:
            return
        places = going_on or [0]
        running = [running[place] for place in places]
        stretch = min(STRETCH, limit - num_passes)
        passes.keep(places, room=stretch)
        draw.keep(places)
        last = generated[-1][places]
        generated = []
        for _ in range(stretch):
            last = draw(passes.next(last))
            generated.append(last)
        num_passes += stretch


class _Draw:
    """Chooses the next token of each row.

    A draw is a number between 0 and 1 by (seed, prompt, place in the answer), looked up in the cumulated probabilities:
    no generator has a state that others could share.

    Args:
        limit: most tokens of an answer.
    """

    def __init__(
        self, rows: Sequence[_Row], limit: int, *, temperature: float, seed: int, device: torch.device
    ) -> None:
        self._temperature = temperature
        self._place = 0
        if temperature:
            # [rows, limit]
            drawn = np.stack([np.random.Generator(np.random.PCG64([seed, r.number])).random(limit) for r in rows])
            self._drawn = torch.from_numpy(drawn).to(device)

    def keep(self, places: Sequence[int]) -> None:
        if self._temperature:
            self._drawn = self._drawn[places]

    def __call__(self, logits: Tensor) -> Tensor:
        """[rows, V] -> [rows] tokens."""
        if not self._temperature:
            return logits.argmax(-1)
        cumulated = torch.softmax(logits.double() / self._temperature, -1).cumsum(-1)
        wanted = self._drawn[:, self._place, None] * cumulated[:, -1:]
        self._place += 1
        return torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def gather(answers: dict[int, T], *, rank: int, world_size: int) -> list[T] | None:
    """What all ranks have by number, in that order: on rank 0; elsewhere None. Every rank must call it."""
    parts: list[dict[int, T] | None] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(answers, parts)
    if parts is None:
        return None
    whole = {number: answer for part in parts if part is not None for number, answer in part.items()}
    return [whole[number] for number in sorted(whole)]


def _limits(model: SftModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Most tokens of the answer to each prompt."""
    positions = num_positions(model)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number} is empty: it has no token", fix="write a text to go on from")
        if positions is not None and len(prompt) >= positions:
            raise ConfigError(
                f"prompt {number} has {len(prompt):,} tokens, and the model has {positions:,} positions, the answer's "
                "among them",
                fix="shorten the prompt, or remove it",
            )
    return [max_new_tokens if positions is None else min(max_new_tokens, positions - len(p)) for p in prompts]
