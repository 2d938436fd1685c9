"""The free text of published rows: what stands under a key, its numbers and versions, which counter a peak is of."""

from __future__ import annotations

import re
from typing import Any, Literal

Row = dict[str, Any]
Counter = Literal["allocated", "reserved", "nvml", "unknown"]

# At the beginning of a text: the thing is not there.
NOT_THERE = re.compile(r"\s*(none|no|non|not|off|false|disabled|without|n/?a|nothing|null|0)\b(?![- _]?reentrant)")


def words(row: Row, *keys: str) -> str:
    """The free text under some keys, in lower case."""
    return " | ".join(str(row[k]) for k in keys if row.get(k) not in (None, "", [], False)).lower()


def said(row: Row, key: str) -> str:
    """Like ``words`` of one key, where a plain yes or no is a word too."""
    given = row.get(key)
    if isinstance(given, bool):
        return "yes" if given else "none"
    return words(row, key)


def absent(text: str) -> bool:
    """Whether a text begins by saying that there is none."""
    return bool(NOT_THERE.match(text))


def number(row: Row, *keys: str) -> float | None:
    """The first number under the first of some keys that has one: 2048, "2,048 (max)" or "8x"; None without."""
    for key in keys:
        given = row.get(key)
        if isinstance(given, int | float) and not isinstance(given, bool):
            return float(given)
        found = re.search(r"\d[\d,]*(?:\.\d+)?(?:k\b)?", given.lower()) if isinstance(given, str) else None
        if found:
            digits = found[0].replace(",", "")
            return float(digits[:-1]) * 1024 if digits.endswith("k") else float(digits)
    return None


def gpus(row: Row) -> int:
    """How many: 8, "8x", "2x8" or "2 nodes x 8", or by the name "4x A100"; 1 where nothing is said."""
    named = re.match(r"\s*(\d+)\s*x\s*[a-z]", words(row, "gpu"))
    if named and "n_gpus" not in row:
        return int(named[1])
    nodes = re.search(r"(\d+)\s*(?:nodes?)?\s*[x*]\s*(\d+)(?![\w.])", words(row, "n_gpus"))
    return int(nodes[1]) * int(nodes[2]) if nodes else int(number(row, "n_gpus") or 1)


def version(text: str, package: str, unnamed: tuple[int, int]) -> tuple[int, int]:
    """Major and minor version that a text gives for a package."""
    found = re.search(rf"\b{package}[ =v~>]*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else unnamed


def month(text: str) -> tuple[int, int]:
    """The latest year and month that a text names, as 2025-06 or 202506; (0, 0) without."""
    found = re.findall(r"(?<![0-9a-f])(20[12]\d)-?(0[1-9]|1[0-2])(?![0-9]*[a-f])", text)
    return max(((int(year), int(number)) for year, number in found), default=(0, 0))


def dtype(text: str) -> str:
    """``bf16`` where a text names no other."""
    if re.search(r"fp32|float32|32-true|\bfull precision", text):
        return "fp32"
    if re.search(r"fp16|float16(?!.*bfloat)|16-true|half", text) and not re.search(r"bf16|bfloat16", text):
        return "fp16"
    return "bf16"


def counter(row: Row) -> Counter:
    """What kind of peak a row gives; an allocator's ``active`` counts as allocated."""
    text = words(row, "peak_mem_kind")
    if "alloc" in text or "active" in text:
        return "allocated"
    if "reserved" in text or "reserve" in text:
        return "reserved"
    if re.search(r"nvml|nvidia|smi|wandb|process|device|pynvml", text):
        return "nvml"
    return "unknown"
