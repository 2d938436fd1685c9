"""Memory as bars of characters: each part has a letter of its own, so that no colour is needed. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from sft_dist.plan.result import MemoryPlan, Part, Phase
from sft_dist.plan.units import gib
from sft_dist.plan.words import PARTS

# Backgrounds on which black letters can be read; the page draws the parts in the same hues.
COLOURS: dict[Part, str] = {
    "weights": "#6ea0ff",
    "quantization_state": "#a9c7ff",
    "adapters": "#3fc9d9",
    "buffers": "#9db2c9",
    "gradients": "#f0a050",
    "optimizer": "#e0765a",
    "gather_buffers": "#b394f0",
    "activations": "#5cc482",
    "logits": "#bcd65a",
    "answers": "#7fd6b5",
    "communication": "#ec86bd",
    "temporaries": "#e6cc55",
    "context": "#a3a9b3",
}

FREE, END = "·", "┃"


@dataclass(frozen=True)
class Scale:
    """How many bytes a column stands for.

    Args:
        end: the column in which usable memory ends.
    """

    columns: int
    whole_bytes: int
    end: int


def scale_of(memory: MemoryPlan, columns: int) -> Scale:
    """The device, or what a phase takes where that is more, in so many columns."""
    whole = max(memory.device_bytes, *(phase.total_bytes for phase in memory.phases))
    return Scale(columns, whole, min(columns - 1, round(columns * memory.usable_bytes / whole)))


def bar(phase: Phase, scale: Scale, *, fill_letters: bool) -> Text:
    """A phase's parts, each column the part at its middle; ``END`` stands where usable memory ends.

    Args:
        fill_letters: every column has its part's letter, not only the first of a part: for where there is no colour.
    """
    line = Text()
    before: Part | None = None
    for column in range(scale.columns):
        part = _part_at(phase, scale.whole_bytes * (column + 0.5) / scale.columns)
        if column == scale.end:
            line.append(END, "bold")
        elif part is None:
            line.append(FREE if column < scale.end else " ", "dim")
        else:
            letter = PARTS[part][0] if fill_letters or part != before else " "
            line.append(letter, swatch_style(part))
        before = part
    return line


def swatch_style(part: Part) -> Style:
    return Style(color="black", bgcolor=COLOURS[part])


def end_label(memory: MemoryPlan, scale: Scale) -> Text:
    """Names the mark, below it: ``usable 79.2 GiB ┛``."""
    label = f"usable {gib(memory.usable_bytes)} "
    if len(label) <= scale.end:
        return Text(label.rjust(scale.end) + "┛", "dim")
    return Text(" " * scale.end + f"┗ {label}".rstrip(), "dim")


def share_bar(share: float, columns: int) -> Text:
    """A share between 0 and 1 as a plain bar."""
    filled = round(columns * min(1.0, max(0.0, share)))
    return Text.assemble(("█" * filled, "cyan"), (FREE * (columns - filled), "dim"))


def _part_at(phase: Phase, place: float) -> Part | None:
    """Which part the byte at ``place`` belongs to, parts being stacked in the order of ``PARTS``."""
    reached = 0
    for part in PARTS:
        reached += phase.parts.get(part, 0)
        if place < reached:
            return part
    return None
