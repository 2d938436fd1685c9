"""What is told of rows that cannot be read or trained on, where they do not end the run."""

from __future__ import annotations

from collections.abc import Sequence

from sft_dist.errors import DataError, RowError

# Each is one line, with its file and row.
MOST_TOLD = 5


def none_left(files: Sequence[str], count: int, first: str, *, fix: str | None = None) -> DataError:
    """The error of a source of which every row was rejected.

    Args:
        first: what is wrong with the first of them.
        fix: of that one.
    """
    place = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return DataError(
        f"{place}: none of {count:,} rows can be trained on; the first: {first}",
        fix=fix or "correct the rows, or set format and columns of the source",
    )


def refuse_rejected(count: int, first: Sequence[str]) -> None:
    """Raises ``RowError`` if any row was rejected: under ``data.on_bad_row: error``, by a store that skipped them."""
    if count:
        others = f"{count - 1:,} more {'row' if count == 2 else 'rows'}"
        more = f" (and {others} that cannot be read or trained on)" if count > 1 else ""
        raise RowError(f"{first[0]}{more}", fix="correct the rows, or leave them out: data.on_bad_row=skip")


def rejections(count: int, first: Sequence[str]) -> list[str]:
    """Lines that say how many rows were left out and name the first of them; none if none was."""
    if not count:
        return []
    told = first[:MOST_TOLD]
    more = [f"... and {count - len(told):,} more"] if count > len(told) else []
    head = f"{count:,} row{'s' if count > 1 else ''} rejected and left out (data.on_bad_row: skip)"
    return [head, *(f"rejected: {what}" for what in told), *more]
