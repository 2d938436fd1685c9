"""``sft-dist diff``: in what two runs differ, and from which step on that shows. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.cluster.status import require_run
from sft_dist.config.secrets import without_secrets
from sft_dist.config.text import read_yaml
from sft_dist.errors import ConfigError
from sft_dist.export.provenance import read_receipt
from sft_dist.metrics.recorded import Apart, apart, recorded_steps
from sft_dist.report.compare import differences

# Parts of a receipt, what a difference in them means, in the order in which it explains others.
AREAS = {
    "identity": "what a step learns",
    "settings": "settings",
    "versions": "versions",
    "topology": "where it ran: the same steps, rounded otherwise",
}

# Settings that have no say in what a run does.
NO_MATTER = ("output_dir", "logging.")


@dataclass(frozen=True)
class Difference:
    """
    Args:
        area: a key of ``AREAS``.
        values: of the first and of the second run; None: not known there, or not set.
    """

    area: str
    name: str
    values: tuple[str | None, str | None]


@dataclass(frozen=True)
class Diff:
    names: tuple[str, str]
    differences: tuple[Difference, ...]
    apart: Apart | None


def diff(first: Path, second: Path) -> Diff:
    """
    Raises:
        ConfigError: one of the folders holds no run, or they are the same.
    """
    for folder in (first, second):
        require_run(folder)
    if first.resolve() == second.resolve():
        raise ConfigError(f"{first} and {second} are the same run", fix="give two runs")
    facts = [_facts(folder) for folder in (first, second)]
    directories = [each["directory"] for each in facts]
    found = [
        Difference(area, name, (values[0], values[1]))
        for area in AREAS
        for name, values in differences([each.get(area) for each in facts], directories).items()
        if not (area == "settings" and name.startswith(NO_MATTER))
    ]
    return Diff((str(first), str(second)), tuple(found), apart(recorded_steps(first), recorded_steps(second)))


def _facts(folder: Path) -> dict[str, Any]:
    receipt = read_receipt(folder)
    try:
        settings = without_secrets(read_yaml((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        settings = None
    return {**{area: receipt.get(area) for area in AREAS}, "settings": settings, "directory": receipt.get("directory")}


def told(found: Diff) -> list[str]:
    """The lines that people read."""
    lines = []
    for area, heading in AREAS.items():
        own = [each for each in found.differences if each.area == area]
        if own:
            lines.append(f"{heading}:")
            lines += [f"  {e.name}: {_text(e.values[0])} | {_text(e.values[1])}" for e in own]
    if not lines:
        lines.append("nothing in identity, settings, versions and topology differs")
    return [*lines, told_apart(found.apart)]


def _text(value: str | None) -> str:
    return "-" if value is None else value


def told_apart(found: Apart | None) -> str:
    if found is None:
        return "losses: no step in common"
    if found.equal_steps == found.shared_steps:
        return f"losses and norms: equal to the bit in all {found.shared_steps:,} shared steps"
    return (
        f"losses and norms: equal to the bit in the first {found.equal_steps:,} of {found.shared_steps:,} shared "
        f"steps; losses differ by {found.largest:.1e} at most, at step {found.largest_step:,}"
    )
