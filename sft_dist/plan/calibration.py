"""What finished runs measured against their plan, kept on this machine: the next plan starts from it.

One JSON file for each GPU, in ``$SFT_DIST_CACHE/calibration`` or else ``$XDG_CACHE_HOME/sft_dist/calibration``. A file
that is damaged or of another format counts as absent, and the next record replaces it: all of it can be measured again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_dist.config.schema import QloraMethod
from sft_dist.hardware.gpus import normal_name
from sft_dist.run import Run
from sft_dist.runtime.whole_file import replace_file

# Of the file, and of what the ratios are over: plan/rates.py and step_efficiency.yaml. Older ones do not count.
FORMAT = 1

# Fewer steps are start-up noise.
LEAST_STEPS = 5


@dataclass(frozen=True)
class Calibration:
    """One kind of run on one kind of GPU.

    Args:
        gpu: its name in the table of GPUs; key: see ``calibration_key``.
        time_ratio: measured over planned seconds of a step, of a plan without calibration.
        memory_ratio: measured over planned allocated bytes at the peak; None where the device does not count them.
        steps: that were measured, without the first ones.
        date: ISO 8601; versions: of sft_dist, torch and what else decides speed.
    """

    gpu: str
    key: str
    time_ratio: float
    memory_ratio: float | None
    steps: int
    date: str
    versions: dict[str, str]


def calibration_key(run: Run) -> str:
    """What runs must share for one's speed to say something of the other's, e.g. ``qlora nf4 bf16``."""
    method = run.model.method
    stored = [method.quantization.type] if isinstance(method, QloraMethod) else []
    return " ".join([method.type, *stored, run.precision.compute])


def cache_root(env: Mapping[str, str] = os.environ) -> Path:
    """What plans keep: ``$SFT_DIST_CACHE``, else ``sft_dist`` in the user's cache folder."""
    own = env.get("SFT_DIST_CACHE")
    return Path(own) if own else Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_dist"


def calibration_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where the files are."""
    return cache_root(env) / "calibration"


def lookup(gpu: str, key: str, *, folder: Path | None = None) -> Calibration | None:
    """What was measured last, or None."""
    return _read(_path(gpu, folder)).get(key)


def record(calibration: Calibration, *, folder: Path | None = None) -> bool:
    """Keeps a measurement in the place of the last one of its kind; whether it was worth keeping.

    Raises:
        OSError: the folder cannot be written.
    """
    if calibration.steps < LEAST_STEPS or not _sound(calibration):
        return False
    path = _path(calibration.gpu, folder)
    entries = _read(path) | {calibration.key: calibration}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "entries": [asdict(entries[key]) for key in sorted(entries)]}, indent=1)
    replace_file(path, text + "\n")
    return True


def _path(gpu: str, folder: Path | None) -> Path:
    return (folder or calibration_folder()) / f"{normal_name(gpu)}.json"


def _read(path: Path) -> dict[str, Calibration]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        return {}
    entries = [entry for raw in content["entries"] if (entry := _entry(raw)) is not None]
    return {entry.key: entry for entry in entries}


def _entry(raw: Any) -> Calibration | None:
    if not isinstance(raw, dict) or set(raw) != set(Calibration.__dataclass_fields__):
        return None
    entry = Calibration(**raw)
    return entry if _sound(entry) else None


def _sound(entry: Calibration) -> bool:
    """Whether the ratios are such as a working plan can have."""
    ratios = [entry.time_ratio, *([] if entry.memory_ratio is None else [entry.memory_ratio])]
    numbers = all(isinstance(r, int | float) and math.isfinite(r) and 0.02 < r < 50 for r in ratios)
    texts = all(isinstance(t, str) for t in (entry.gpu, entry.key, entry.date))
    return numbers and texts and isinstance(entry.steps, int) and isinstance(entry.versions, dict)
