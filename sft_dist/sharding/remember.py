"""Remembers what follows from how a run is sharded: a plan asks many times, and a search for many runs that differ in
other things."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from sft_dist.run import Run

# Of each function; a search goes through the runs that are sharded alike one after the other.
MOST_REMEMBERED = 8

P = ParamSpec("P")
T = TypeVar("T")


def for_alike_runs(function: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
    """``function``, called once for runs whose model, ranks, sharding, precision and optimizer are the same."""
    known: tuple[tuple[Run, tuple[object, ...], T], ...] = ()

    @wraps(function)
    def remembered(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal known
        given = (*args, *kwargs.items())
        for other, of, result in known:
            if of == given and _alike(run, other):
                return result
        result = function(run, *args, **kwargs)
        known = ((run, given, result), *known[: MOST_REMEMBERED - 1])
        return result

    return remembered


def _alike(run: Run, other: Run) -> bool:
    return (
        run.model is other.model
        and run.world.size == other.world.size
        and run.sharding == other.sharding
        and run.deepspeed == other.deepspeed
        and run.precision == other.precision
        and run.optim == other.optim
    )
