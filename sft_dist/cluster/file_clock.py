"""The clock by which files are dated: that of the machine which holds them, and not of one that looks at them."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Clock:
    """A moment.

    Args:
        now: seconds since 1970.
        is_local: by the clock of this machine, because nothing can be written into the folder. It may go otherwise than
            that by which files there are dated.
    """

    now: float
    is_local: bool = False

    def age_s(self, moment: float) -> float:
        """Seconds since a file was dated so; 0 for one that was written meanwhile."""
        return max(0.0, self.now - moment)


def clock_of(folder: Path) -> Clock:
    """The moment at which a file that is written into a folder now is dated."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".clock-") as file:
            return Clock(os.fstat(file.fileno()).st_mtime)
    except OSError:
        return Clock(time.time(), is_local=True)
