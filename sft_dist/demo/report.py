"""What the demo says at its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.demo.answers import Scores
from sft_dist.demo.curve import NUM_LAST_STEPS, Curve
from sft_dist.demo.house_format import Row, prompt_of
from sft_dist.pages.answer import NO_VISIBLE_TEXT

MAX_SHOWN_CHARACTERS = 160

# The run's own resolved configuration has the data's full paths, so that this works from any folder.
NEXT_MODEL = "model.path=Qwen/Qwen2.5-0.5B-Instruct"
NEXT_COMMANDS = (
    "{python} -m sft_dist model fetch {config} {model}",
    "{python} -m sft_dist.launch.torchrun --nproc-per-node {processes} train {config} {model} optim.lr=1e-5 "
    "train.max_steps=50 output_dir={output}",
)


def show_answers(console: Console, rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> None:
    """Prompts with what the base and the fine-tuned model answer, side by side."""
    console.print(Text("Held-out prompts, greedy answers", style="italic"), justify="center")
    for row, *answers in zip(rows, before, after, strict=True):
        # fold: Japanese has no spaces at which Rich would break a line, and it would cut the text off.
        table = Table(title=Text(prompt_of(row), style="bold"), title_justify="left", expand=True)
        table.add_column("before", ratio=1, overflow="fold", style="dim")
        table.add_column("after", ratio=2, overflow="fold", style="green")
        table.add_row(*(Text(_printable(text)) for text in answers))
        console.print(table)


def show_figures(console: Console, curve: Curve, before: Scores, after: Scores) -> None:
    """Loss, perplexity, rates of good answers, speed."""
    table = Table(title="What the run did", expand=True)
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    first, last = curve.perplexities[0], curve.perplexities[-1]
    label = f"training loss (first step, mean of the last {NUM_LAST_STEPS})"
    table.add_row(label, f"{curve.losses[0]:.3f}", f"{curve.last_loss:.3f}")
    table.add_row("held-out perplexity", f"{first:,.1f}", f"{last:,.2f}")
    count = after.num_answers
    table.add_row(
        f"answers in the house format, of {count} held out", str(before.num_in_format), str(after.num_in_format)
    )
    table.add_row("answers that equal the reference word for word", str(before.num_exact), str(after.num_exact))
    console.print(table)
    if after.num_exact < after.num_in_format:
        console.print("The form is learned first; names, dates and amounts a model this small still mixes up.")
    console.print(f"held-out perplexity fell {first / last:,.0f}-fold in {curve.steps[-1]} steps")
    console.print(f"speed: {curve.tokens_per_s:,.0f} tokens/s over all processes")


def show_places(console: Console, output: Path, picture: Path, *, processes: int) -> None:
    """Where everything lies, and what to try next."""
    console.print(f"model:   {output / 'final'}   (Hugging Face layout: from_pretrained loads it)")
    console.print(f"curve:   {picture}")
    console.print(f"metrics: {output / 'metrics.jsonl'}")
    console.print("\nNext, the same data with a real model (the first command downloads 1 GB; better with GPUs):")
    for command in NEXT_COMMANDS:
        said = command.format(
            python=_from_here(Path(sys.executable)),
            model=NEXT_MODEL,
            processes=processes,
            config=output / "config.yaml",
            output=output.with_name(output.name + "-qwen"),
        )
        console.print(Text("  " + said, style="bold"), soft_wrap=True)


def _from_here(program: Path) -> Path:
    return program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program


def _printable(answer: str) -> str:
    """Short and on few lines: an untrained model writes control characters, halves of characters and empty lines."""
    lines = answer.replace("\ufffd", "·").split("\n")
    text = "\n".join("".join(c if c.isprintable() else "·" for c in line) for line in lines if line.strip())
    if not text.strip():
        return NO_VISIBLE_TEXT
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…"
