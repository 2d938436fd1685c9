"""``sft-dist chat --file``: an answer to every row of a file, written as they come; goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft_dist.errors import ConfigError
from sft_dist.evaluation.file_questions import Question, read_questions
from sft_dist.generate.engine import Answer, PromptTooLong, Sampling
from sft_dist.generate.load import Loaded

# In every row of the output: who answered, and how. Rows of another one are not mixed with these.
MADE_BY = "made_by"


@dataclass(frozen=True)
class Done:
    """
    Args:
        num_before: rows that were in the output already.
        num_tokens, seconds: of the answers that came now, of both models.
    """

    num_rows: int
    num_before: int
    num_tokens: int
    seconds: float


def answer_file(
    loaded: Loaded,
    sampling: Sampling,
    source: str,
    output: Path,
    *,
    identity: str,
    system: str | None,
    console: Console,
) -> Done:
    """Answers the rows of ``source``; each is drawn with the seed and its own number, so that order does not matter.

    Args:
        identity: of what answers; rows in ``output`` that another model answered are an error.
        console: shows how far it is.

    Raises:
        DataError: a row cannot be read.
        ConfigError: ``output`` holds something else than the first answers to ``source``, or cannot be written.
    """
    questions = list(read_questions(source, loaded.prompter, system=system))
    _check_lengths(loaded, questions, source)
    made_by = _made_by(loaded, sampling, identity)
    with _opened(output) as file:
        num_before = _already_there(file, output, questions, made_by)
        num_tokens, seconds = 0, 0.0
        with _progress(console) as progress:
            task = progress.add_task(output.name, total=len(questions), completed=num_before, speed="")
            for number, question in enumerate(questions[num_before:], start=num_before):
                row, answers = _answer(loaded, replace(sampling, seed=(sampling.seed or 0) + number), question)
                file.write((json.dumps(row | {MADE_BY: made_by}, ensure_ascii=False) + "\n").encode())
                file.flush()
                num_tokens += sum(answer.num_tokens for answer in answers)
                seconds += sum(answer.seconds for answer in answers)
                progress.update(task, advance=1, speed=f"{num_tokens / max(seconds, 1e-9):,.1f} tokens/s")
        os.fsync(file.fileno())
    return Done(len(questions), num_before, num_tokens, seconds)


def _check_lengths(loaded: Loaded, questions: Sequence[Question], source: str) -> None:
    for number, question in enumerate(questions, start=1):
        try:
            loaded.engine.room(len(question.prompt))
        except PromptTooLong as error:
            raise ConfigError(f"row {number} of {source}: {error.what}", fix="shorten the row, or remove it") from error


def _answer(loaded: Loaded, sampling: Sampling, question: Question) -> tuple[dict[str, Any], list[Answer]]:
    answer = loaded.engine.answer(loaded.tuned, question.prompt, sampling)
    row = {**question.shown, "answer": answer.text, "finish_reason": answer.finish_reason}
    answers = [answer]
    if loaded.base is not None:
        answers.append(loaded.engine.answer(loaded.base, question.prompt, sampling))
        row["base_answer"] = answers[-1].text
    if question.reference is not None:
        row["reference"] = question.reference
    return row, answers


def _made_by(loaded: Loaded, sampling: Sampling, identity: str) -> str:
    how = f"{identity}\0{loaded.about}\0{loaded.base is not None}\0{sampling}"
    return xxhash.xxh3_64_hexdigest(how.encode())


def _opened(output: Path) -> IO[bytes]:
    try:
        return output.open("r+b" if output.exists() else "x+b")
    except OSError as error:
        raise ConfigError(f"--out: {output} cannot be written: {error.strerror}", fix="name another file") from error


def _already_there(file: IO[bytes], output: Path, questions: Sequence[Question], made_by: str) -> int:
    """The number of rows that need no answer any more; a last row that was written in part is cut off."""
    number = kept_bytes = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        why = _differs(line, questions[number] if number < len(questions) else None, made_by)
        if why is not None:
            raise ConfigError(
                f"--out: {output} exists, and its row {number + 1} {why}", fix="name another file, or remove this one"
            )
        number += 1
        kept_bytes += len(line)
    else:
        return number
    if number == 0 and not line.startswith(b"{"):
        raise ConfigError(f"--out: {output} exists and holds no answers", fix="name another file, or remove this one")
    file.seek(kept_bytes)
    file.truncate()
    return number


def _differs(line: bytes, question: Question | None, made_by: str) -> str | None:
    """Why a row of the output is no answer to ``question``; None: it is one."""
    try:
        row = json.loads(line)
    except ValueError:
        return "is no answer"
    if not isinstance(row, dict) or MADE_BY not in row:
        return "is no answer"
    if question is None:
        return "is one more than the input has"
    if (
        any(row.get(key) != value for key, value in question.shown.items())
        or row.get("reference") != question.reference
    ):
        return "answers another question than this row of the input"
    if row[MADE_BY] != made_by:
        return "was answered by another model, or with other settings"
    return None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
