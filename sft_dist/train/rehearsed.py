"""What a rehearsal leaves behind: a folder if it was killed, and a note for the launcher's next try if it passed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sft_dist.runtime.process_group import gathered

# In the run directory, while a rehearsal lasts.
FOLDER = "rehearsal"

NOTE = "rehearsed"


def remove_leftovers(output_dir: str) -> None:
    """Of a rehearsal whose process was killed."""
    shutil.rmtree(Path(output_dir) / FOLDER, ignore_errors=True)


def was_rehearsed() -> bool:
    """Whether a launcher starts these processes again after their rehearsal passed; every rank must call it.

    A rehearsal that failed, or a process on a machine that has just joined, is rehearsed.
    """
    folder = _folder_of_all_tries()
    return all(gathered(folder is not None and (folder / NOTE).exists()))


def note_rehearsed() -> None:
    """For the next try of this launch, on this machine."""
    folder = _folder_of_all_tries()
    if folder is not None:
        (folder / NOTE).touch()


def _folder_of_all_tries() -> Path | None:
    """torchrun gives each process FOLDER/attempt_N/LOCAL_RANK/error.json; other launchers do not start again."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return None if error_file is None else Path(error_file).parents[2]
