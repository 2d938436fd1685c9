"""Small files of the run directory that say what a run is: replaced whole or left as they are. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_dist.errors import ConfigError
from sft_dist.runtime.whole_file import replace_file

# In the run directory: the resolved configuration, and what was found in the data.
CONFIG, AUDIT = "config.yaml", "audit.json"


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turns the refusal of a file system, before anything is trained, into that of the run.

    Raises:
        ConfigError: instead of ``OSError``.
    """
    try:
        yield
    except OSError as e:
        raise ConfigError(
            f"output_dir: {folder} cannot be written ({e.strerror or e})",
            fix="set output_dir to a folder you may write, on a disk with room",
        ) from e


def keep_file(path: Path, text: str) -> None:
    """Makes a file hold ``text``: in one step, and not at all if it does, which a full disk allows too.

    Raises:
        OSError: it cannot be written; it is as before, then.
    """
    if path.exists() and path.read_bytes() == text.encode():
        return
    replace_file(path, text, unfinished=path.with_name(path.name + ".new"))
