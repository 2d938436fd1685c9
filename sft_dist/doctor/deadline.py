"""Nothing that is looked at may hold up the doctor: a file system or name server that hangs is a finding."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Overdue(Exception):
    """No answer within the time."""


def all_within(seconds: float, calls: Mapping[str, Callable[[], T]]) -> dict[str, T | Exception]:
    """Results of calls that run side by side, by name; the exception where one was raised, ``Overdue`` where one hangs.

    A thread that hangs is left behind: it ends with the process.
    """
    answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def answer(name: str, call: Callable[[], T]) -> None:
        try:
            answers.put((name, call()))
        except Exception as error:
            answers.put((name, error))

    for name, call in calls.items():
        threading.Thread(target=answer, args=(name, call), name=name, daemon=True).start()
    found: dict[str, T | Exception] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(calls):
        try:
            name, result = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        found[name] = result
    return {name: found.get(name, Overdue(f"no answer within {seconds:.1f} s")) for name in calls}


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of one call.

    Raises:
        Overdue: there is none in that time.
        Exception: what the call raised.
    """
    result = all_within(seconds, {"": call})[""]
    if isinstance(result, Exception):
        raise result
    return result
