"""How answers look in a terminal: as they come, or those of two models beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sft_dist.generate.engine import Answer, Generation
from sft_dist.generate.terminal_text import WrappedText, visible

# Below that two answers stand one under the other: 40 cells are 20 characters of Japanese.
SIDE_BY_SIDE_CELLS = 84
REFRESHES_PER_S = 12
BASE, TUNED = "before training", "after training"


@dataclass(frozen=True)
class Shown:
    """An answer, and whether the user cut it off."""

    answer: Answer
    interrupted: bool


def show(console: Console, generation: Generation) -> Shown:
    """Shows an answer while it comes; Ctrl-C ends it and leaves what there is."""
    width = (lambda: console.width - 1) if console.is_terminal else None
    text = WrappedText(lambda part: _write(console, part), width)
    interrupted = False
    try:
        for piece in generation:
            text.push(piece)
    except KeyboardInterrupt:
        generation.cancel()
        interrupted = True
    text.finish()
    _write(console, "\n")
    return Shown(generation.answer, interrupted)


def speed_line(shown: Shown) -> str:
    """Tokens and tokens a second, and why an answer ended early."""
    answer = shown.answer
    why = ""
    if shown.interrupted or answer.finish_reason == "cancelled":
        why = ", stopped"
    elif answer.finish_reason == "length":
        why = ", cut off by --max-new-tokens"
    elif not answer.text.strip():
        why = ": nothing was said"
    tokens = f"{answer.num_tokens:,} token" + ("s" if answer.num_tokens != 1 else "")
    return f"{tokens}, {answer.tokens_per_s:,.1f} tokens/s{why}"


class Comparison:
    """Shows the answers of the base and of the tuned model to one prompt, in this order as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_wide = console.is_terminal and console.width >= SIDE_BY_SIDE_CELLS

    def show(self, generations: Iterator[Generation]) -> list[Shown]:
        """
        Args:
            generations: of the base, then of the tuned model; the second is asked for when the first has ended.

        Returns:
            both answers; only the first where the user cut that off.
        """
        return self._beside(generations) if self._is_wide else self._below(generations)

    def _below(self, generations: Iterator[Generation]) -> list[Shown]:
        found: list[Shown] = []
        for name, generation in zip((BASE, TUNED), generations, strict=True):
            self._console.print(f"[bold]{name}[/]")
            found.append(show(self._console, generation))
            self._console.print(f"[dim]{speed_line(found[-1])}[/]")
            if found[-1].interrupted:
                return found
        return found

    def _beside(self, generations: Iterator[Generation]) -> list[Shown]:
        texts = ["", ""]
        found: list[Shown] = []
        with Live(console=self._console, refresh_per_second=REFRESHES_PER_S, transient=True) as live:
            for number, generation in enumerate(generations):
                interrupted = False
                try:
                    for piece in generation:
                        texts[number] += piece
                        live.update(_columns(texts, found))
                except KeyboardInterrupt:
                    generation.cancel()
                    interrupted = True
                found.append(Shown(generation.answer, interrupted))
                if interrupted:
                    break
        self._console.print(_columns(texts, found))
        return found


def _columns(texts: list[str], found: list[Shown]) -> RenderableType:
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), show_edge=False)
    for name in (BASE, TUNED):
        table.add_column(name, ratio=1, header_style="bold", overflow="fold")
    table.add_row(*(Text(visible(text).strip("\n"), overflow="fold") for text in texts))
    if found:
        lines = [Text(speed_line(shown), style="dim") for shown in found]
        table.add_row(*lines)
    return table


def _write(console: Console, text: str) -> None:
    console.file.write(text)
    console.file.flush()


def dim(console: Console, line: str) -> None:
    """A line that is not the model's."""
    console.print(f"[dim]{escape(line)}[/]", soft_wrap=not console.is_terminal)
