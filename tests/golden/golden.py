"""The text of a golden file: what is trained on, to be read by eye, with the ids.

A line is a run of whole tokens that are all trained or all not, or a part of it up to a line break::

          |<|im_start|>assistant\n| 300 86 198
    train |Hello there.<|im_end|>| 17 18 13 301

``\n`` at the end of a line is a line break of the text. What a template refuses is a golden file too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sft_dist.data.chat_template import ChatRenderer, TokenizedRow
from sft_dist.data.messages import Conversation
from sft_dist.errors import DataError
from tests.golden.vocabularies import token_bytes

FOLDER = Path(__file__).parent
REGENERATE = "python -m tests.golden.regenerate"


def golden_path(family: str, conversation: str) -> Path:
    return FOLDER / family / f"{conversation}.txt"


def golden_text(renderer: ChatRenderer, conversation: Conversation) -> str:
    try:
        row = renderer.render(conversation)
    except DataError as error:
        return f"refused: {error.what}\n"
    return "".join(f"{line}\n" for line in _lines(renderer.tokenizer, row))


def read_golden(text: str) -> TokenizedRow:
    """The ids and labels of a golden file."""
    ids: list[int] = []
    supervised: list[bool] = []
    for line in text.splitlines():
        numbers = [int(number) for number in line.rpartition("|")[2].split()]
        ids += numbers
        supervised += [line.startswith("train ")] * len(numbers)
    return TokenizedRow(ids, supervised)


def _lines(tokenizer: PreTrainedTokenizerFast, row: TokenizedRow) -> Iterator[str]:
    tokens = zip(row.input_ids, row.supervised, strict=True)
    for is_supervised, run in groupby(tokens, key=lambda token: token[1]):
        held: list[int] = []
        for id, _ in run:
            held.append(id)
            if token_bytes(tokenizer, id).endswith(b"\n"):
                yield _line(tokenizer, held, is_supervised)
                held = []
        if held:
            yield _line(tokenizer, held, is_supervised)


def _line(tokenizer: PreTrainedTokenizerFast, ids: list[int], is_supervised: bool) -> str:
    text = b"".join(token_bytes(tokenizer, id) for id in ids).decode(errors="backslashreplace").replace("\n", "\\n")
    return f"{'train' if is_supervised else '     '} |{text}| {' '.join(str(id) for id in ids)}"
