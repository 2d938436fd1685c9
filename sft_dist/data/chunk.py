"""A chunk of a source becomes tokens: its rows are parsed, rendered, split where they are too long, and counted."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from sft_dist.data.literal_rows import prompt_of, tokenize_literal
from sft_dist.data.messages import Conversation, Origin, Row
from sft_dist.data.sources import Raw, RowParser
from sft_dist.data.splitting import Part, split_conversation, split_tokens
from sft_dist.data.supervision import DEFAULT, Supervision, vary_prompt
from sft_dist.data.token_store import MAX_REJECTIONS, ROW, TokenizedChunk
from sft_dist.errors import DataError, RowError

if TYPE_CHECKING:
    from sft_dist.data.chat_template import ChatRenderer


@dataclass(frozen=True)
class RowSettings:
    """How a row becomes tokens, beside the tokenizer and its template.

    Args:
        split_at: rows with more tokens become several; None: they stay as they are.
        templates: for the first question, one of which is drawn by ``seed``; empty: it stays as it is.
        skips_bad_rows: rows that cannot be read or trained on are left out and counted.
    """

    supervision: Supervision = DEFAULT
    split_at: int | None = None
    templates: tuple[str, ...] = ()
    seed: int = 0
    skips_bad_rows: bool = False


@dataclass(frozen=True)
class Rows:
    """A chunk of a source: consecutive rows of a file, as ``read_raw`` gives them."""

    number: int
    file: int
    path: str
    by_line: bool
    places: list[int]
    rows: list[Raw]


def tokenise_chunk(rows: Rows, parser: RowParser, renderer: ChatRenderer, settings: RowSettings) -> TokenizedChunk:
    """Tokens, masks and records of a chunk.

    Counts rejected_rows, rewritten_rows (see ``ChatRenderer``), and what ``_parts`` does.

    Raises:
        RowError: a row cannot be read or trained on, unless such rows are skipped.
    """
    chunk = TokenizedChunk(rows.file, rows.by_line)
    ids, masks = array("i"), bytearray()
    records: list[tuple[int, ...]] = []
    rewritten = renderer.rewritten_rows
    for raw, place in zip(rows.rows, rows.places, strict=True):
        try:
            row = parser.parse(raw, Origin(rows.path, place, rows.by_line))
            parts = _parts(row, renderer, settings, chunk.counts)
        except RowError as error:
            if not settings.skips_bad_rows:
                raise
            chunk.counts["rejected_rows"] += 1
            chunk.rejected += [error.what] * (len(chunk.rejected) < MAX_REJECTIONS)
            continue
        prompt = _digest_of_prompt(row)
        for part in parts:
            mask, tokens = bytes(part.supervised), array("i", part.input_ids)
            ids += tokens
            masks += mask
            last, content = tokens[mask.rindex(1)], xxhash.xxh3_64_intdigest(tokens.tobytes() + mask)
            records.append((len(mask), mask.count(1, 1), rows.file, place, last, prompt, content))
    chunk.counts["rewritten_rows"] = renderer.rewritten_rows - rewritten
    chunk.input_ids, chunk.supervised = ids.tobytes(), bytes(masks)
    chunk.rows = np.array(records, ROW).tobytes()
    return chunk


def _parts(row: Row, renderer: ChatRenderer, settings: RowSettings, counts: Counter[str]) -> list[Part]:
    """What is trained of a row: one part, or several of one that is too long.

    Counts: split_rows, cut_parts (that begin or end inside a turn), untrained_parts (left out).
    """
    if not isinstance(row, Conversation):
        if settings.templates:
            raise DataError(
                f"{row.origin}: the row has no question that templates of the source could vary",
                fix="remove templates from the source",
            )
        tokens = tokenize_literal(renderer, row)
        whole = _trained(Part(tokens.input_ids, tokens.supervised, is_cut=False), row)
        if settings.split_at is None or len(whole.input_ids) <= settings.split_at:
            return [whole]
        return _counted(list(split_tokens((whole.input_ids, whole.supervised), settings.split_at)), counts)
    conversation = row
    if settings.templates:
        conversation = vary_prompt(conversation, settings.templates, settings.seed)
    conversation = settings.supervision.choose(conversation)

    def render(conversation: Conversation) -> tuple[list[int], list[bool]]:
        row = renderer.render(conversation, settings.supervision)
        return row.input_ids, row.supervised

    whole = _trained(Part(*render(conversation), is_cut=False), row)
    if settings.split_at is None or len(whole.input_ids) <= settings.split_at:
        return [whole]
    return _counted(list(split_conversation(conversation, settings.split_at, render)), counts)


def _trained(part: Part, row: Row) -> Part:
    if not part.is_trained:
        raise RowError(
            f"{row.origin}: no token of the row would be trained on, every label is masked",
            fix="give the row an answer, or check that the chat template renders the assistant's turns",
        )
    return part


def _counted(parts: Sequence[Part], counts: Counter[str]) -> list[Part]:
    """The parts that have something to train."""
    trained = [part for part in parts if part.is_trained]
    counts["split_rows"] += 1
    counts["cut_parts"] += sum(part.is_cut for part in trained)
    counts["untrained_parts"] += len(parts) - len(trained)
    return trained


def _digest_of_prompt(row: Row) -> int:
    """XXH3-64 of what comes before the first trained answer."""
    digest = xxhash.xxh3_64()
    for part in prompt_of(row):
        digest.update(part)
    return digest.intdigest()
