"""What the command line asks of an export. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_dist.errors import ConfigError

WrittenDtype = Literal["bf16", "fp16", "fp32"]

# Which weights of a base that was quantised for training an adapter is merged into.
Base = Literal["dequantized", "original"]

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """
    Args:
        merge: an adapter into its base.
        dtype: of the weights; None: what the run computed in, or an adapter as it is.
        base: None: as it was trained.
        out: folder; None: beside what is exported.
        max_file_bytes: of the weights in a file.
        check: load the result in a fresh process.
    """

    merge: bool = False
    dtype: WrittenDtype | None = None
    base: Base | None = None
    out: Path | None = None
    max_file_bytes: int = 5 * 10**9
    check: bool = True


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or a number.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in UNITS or int(float(match[1]) * UNITS[match[2]]) < 1:
        raise ConfigError(f"--max-shard-size {text} is no size", fix="say a number and its unit, e.g. 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])
