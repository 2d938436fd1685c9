"""Two answers to the same prompt each, out of what runs and evaluations leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sft_dist.cluster.status import require_run
from sft_dist.errors import ConfigError

# Of `sft-dist eval`, and of a training with eval.samples.
EVALUATED, SAMPLES = "answers-{}.jsonl", "samples.jsonl"
BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Pair:
    """
    Args:
        answers: of the first and of the second.
        reference: the right answer, where there is one.
        question: of the prompt, without what a chat template writes around it; None: not known.
    """

    prompt: str
    answers: tuple[str, str]
    reference: str | None
    question: str | None = None

    @property
    def id(self) -> str:
        """The same whenever these answers are compared, in whatever order of pairs."""
        return xxhash.xxh3_64_hexdigest(json.dumps([self.prompt, *self.answers]).encode())

    def is_swapped(self, seed: int) -> bool:
        """Whether the second answer stands on the left: by chance, and always the same for a seed."""
        return is_swapped(self.id, seed)


def is_swapped(pair: str, seed: int) -> bool:
    """The same of a pair by its id alone."""
    return bool(xxhash.xxh3_64_intdigest(f"{seed} {pair}".encode()) & 1)


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        names: of what gave the first and the second answers.
        pairs: whose answers differ.
        num_equal: prompts that both answer alike: there is nothing to choose.
    """

    names: tuple[str, str]
    pairs: tuple[Pair, ...]
    num_equal: int


def read_comparison(first: Path, second: Path | None = None) -> Comparison:
    """
    Args:
        first: a run directory, or the folder of an evaluation; alone: its base and what became of it.
        second: another one, whose answers to the same prompts are compared.

    Raises:
        ConfigError: there are no answers, or none to the same prompts.
    """
    for folder in (first,) if second is None else (first, second):
        _require_answers_or_run(folder)
    if second is None:
        names, sides = (BASE, first.resolve().name), _before_and_after(first)
    else:
        names, sides = (first.resolve().name, second.resolve().name), (_newest(first), _newest(second))
    shared = [prompt for prompt in sides[0] if prompt in sides[1]]
    if not shared:
        raise ConfigError(
            f"{names[0]} and {names[1]} have answered no prompt in common", fix="evaluate both on the same rows"
        )
    pairs = [
        Pair(prompt, (str(one["answer"]), str(other["answer"])), one["reference"], one.get("question"))
        for prompt in shared
        for one, other in [(sides[0][prompt], sides[1][prompt])]
    ]
    different = tuple(pair for pair in pairs if pair.answers[0].strip() != pair.answers[1].strip())
    return Comparison(names, different, len(pairs) - len(different))


def _require_answers_or_run(folder: Path) -> None:
    """An evaluation's folder needs no run around it; any other has to be one."""
    has_answers = any(any(place.glob(EVALUATED.format("*"))) for place in (folder, folder / "eval"))
    if not (has_answers or (folder / SAMPLES).is_file()):
        require_run(folder)


Replies = Mapping[str, Mapping[str, Any]]  # by prompt


def _before_and_after(folder: Path) -> tuple[Replies, Replies]:
    for place in (folder, folder / "eval"):
        if all((place / EVALUATED.format(name)).is_file() for name in (BASE, TUNED)):
            before, after = (_by_prompt(_lines(place / EVALUATED.format(name))) for name in (BASE, TUNED))
            return before, after
    samples = list(_lines(folder / SAMPLES)) if (folder / SAMPLES).is_file() else []
    steps = sorted({int(line["step"]) for line in samples})
    if len(steps) < 2:
        raise ConfigError(
            f"{folder} has no answers before and after training",
            fix=f"sft-dist eval {folder} 'eval.scores={{}}' makes some; or train with eval.samples",
        )
    before, after = (_by_prompt(line for line in samples if line["step"] == step) for step in (steps[0], steps[-1]))
    return before, after


def _newest(folder: Path) -> Replies:
    for place in (folder, folder / "eval"):
        for name in (TUNED, BASE):
            if (place / EVALUATED.format(name)).is_file():
                return _by_prompt(_lines(place / EVALUATED.format(name)))
    samples = list(_lines(folder / SAMPLES)) if (folder / SAMPLES).is_file() else []
    if not samples:
        raise ConfigError(f"{folder} has no answers", fix=f"sft-dist eval {folder} 'eval.scores={{}}' makes some")
    last = max(int(line["step"]) for line in samples)
    return _by_prompt(line for line in samples if line["step"] == last)


def _by_prompt(lines: Iterator[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(line["prompt"]): line for line in lines}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    # Not str.splitlines, which ends a line at U+2028 and others that an answer may hold, too.
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            line["prompt"], line["answer"], line["reference"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}:{number} is no answer ({error})", fix="evaluate again") from None
        yield line
