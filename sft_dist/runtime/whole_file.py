"""Small files that others read while they are written."""

from __future__ import annotations

import secrets
from pathlib import Path


def replace_file(path: Path, text: str, *, unfinished: Path | None = None) -> None:
    """Writes a file in one step: who reads it meanwhile sees the old one or the new one, whole, as UTF-8.

    Args:
        unfinished: what it is called until then, beside it; a process that is killed may leave it. None: a name that
            no other process uses.

    Raises:
        OSError: its folder cannot be written; the file is as before, then.
    """
    if unfinished is None:  # not mkstemp's, which nobody else may read
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
