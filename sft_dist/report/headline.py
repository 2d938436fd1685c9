"""Of a verdict that tells a whole error: what stands large at the top, and what stands below it."""

from __future__ import annotations

from sft_dist.cluster.verdict import Verdict

# A line up to here is read at once, and stays whole.
MAX_CHARACTERS = 120


def headline(verdict: Verdict) -> tuple[str, str]:
    """(what happened and where, the whole error); the latter is empty where the first says it all."""
    line = verdict.line
    before, colon, error = line.partition(": ")
    if verdict.kind != "failed" or not colon or len(line) <= MAX_CHARACTERS:
        return line, ""
    ends = [place for mark in ("; ", ", ", ". ", "\n") if (place := error.find(mark)) > 0]
    first = error[: min(ends, default=len(error))]
    room = MAX_CHARACTERS - len(before) - len(colon)
    if len(first) > room:
        first = first[:room].rsplit(" ", 1)[0] + " …"
    return f"{before}{colon}{first}", error
