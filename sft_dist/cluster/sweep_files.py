"""What a submission keeps of a sweep, beside its scripts: ``sweep.json`` and a configuration for each point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist.cluster.slurm import show_array
from sft_dist.cluster.snapshot import RECORD
from sft_dist.cluster.sweep import Sweep
from sft_dist.config.load import dump_config
from sft_dist.errors import ConfigError, SftError

FORMAT = 1

SWEEP, POINTS = "sweep.json", "points"


@dataclass(frozen=True)
class SweepFile:
    """A sweep that was submitted.

    Args:
        submission: its folder.
        configs: file of the configuration by name of the point, in the order of the array's indices.
    """

    submission: Path
    keys: tuple[str, ...]
    configs: Mapping[str, Path]


def write_sweep(sweep: Sweep, submission: Path) -> list[Path]:
    """Writes ``sweep.json`` and ``points/NAME.yaml`` of each point; returns the latter in the array's order.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = submission / POINTS
    folder.mkdir(parents=True)
    for point in sweep.points:
        (folder / f"{point.name}.yaml").write_text(dump_config(point.config), encoding="utf-8")
    document = {
        "format": FORMAT,
        "keys": list(sweep.keys),
        "points": [{"name": point.name, "overrides": list(point.overrides)} for point in sweep.points],
    }
    (submission / SWEEP).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [folder / f"{point.name}.yaml" for point in sweep.points]


def read_sweeps(folder: Path) -> list[SweepFile]:
    """All that were submitted into the folder of a sweep, the oldest first.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for path in sorted(folder.glob(f"slurm/submission-*/{SWEEP}")):
        document = json.loads(path.read_text(encoding="utf-8"))
        names = [point["name"] for point in document["points"]]
        configs = {name: path.parent / POINTS / f"{name}.yaml" for name in names}
        found.append(SweepFile(path.parent, tuple(document["keys"]), configs))
    if not found:
        raise ConfigError(
            f"{folder} holds no sweep", fix="give the output_dir of a configuration that was submitted with --sweep"
        )
    return found


def job_states(sweeps: Sequence[SweepFile], notes: list[str]) -> dict[str, str]:
    """SLURM's word for the job of each point; those that it has forgotten are left out.

    Args:
        notes: told where SLURM is not here or does not answer; nothing is known of its jobs then.
    """
    states: dict[str, str] = {}
    for sweep in sweeps:
        record = sweep.submission / RECORD
        if not record.is_file():
            continue  # not handed to SLURM yet, or refused by it
        names = list(sweep.configs)
        try:
            jobs = show_array(json.loads(record.read_text(encoding="utf-8"))["jobs"]["train"])
        except SftError as error:
            notes.append(f"what SLURM says of the jobs is not known: {error.what}")
            return {}
        for job in jobs:
            states |= {names[index]: job.state for index in expand_indices(job.job_id.partition("_")[2])}
    return states


def expand_indices(text: str) -> list[int]:
    """Those of ``3``, and of what waits together: ``0-2,5%2``, ``[0-2,5%2]``; none of an empty text."""
    indices: list[int] = []
    for part in filter(None, text.strip("[]").partition("%")[0].split(",")):
        first, _, last = part.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return indices
