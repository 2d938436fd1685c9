"""From a row that no template touches to token ids and to which of them are trained on."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING

from sft_dist.data.chat_template import ChatRenderer, TokenizedRow
from sft_dist.data.messages import Conversation, Row, Segment, Segments, TokenIds
from sft_dist.data.row_tokenizer import RowTokenizer
from sft_dist.errors import DataError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_row(renderer: ChatRenderer, row: Row) -> TokenizedRow:
    """Tokenise a row of any kind; ``renderer``'s template is used for conversations only.

    Raises:
        RowError: the row cannot be trained on.
        DataError: there is a document and no EOS token.
    """
    return renderer.render(row) if isinstance(row, Conversation) else tokenize_literal(renderer, row)


def tokenize_literal(renderer: ChatRenderer, row: Segments | TokenIds) -> TokenizedRow:
    """Tokenise a row that no template touches. Raises as ``tokenize_row``."""
    if isinstance(row, TokenIds):
        return take_tokens(renderer.tokenizer, row)
    if row.is_document:
        text = "".join(segment.text for segment in row.segments)
        return tokenize_text(renderer.tokenizer, text, tokenise=renderer.row_tokenizer, eos_id=renderer.document_eos_id)
    return _some_supervised(tokenize_segments(renderer.row_tokenizer, row.segments), row)


def tokenize_segments(tokenise: RowTokenizer, segments: Sequence[Segment]) -> TokenizedRow:
    """Tokenise the joined text once, so that no token ends only because a segment does; nothing is added to it.

    A token is trained only if every character of it lies in trained segments.
    """
    text = "".join(segment.text for segment in segments)
    bounds = pairwise(accumulate((len(segment.text) for segment in segments), initial=0))
    spans: list[tuple[int, int]] = []
    for segment, (start, end) in zip(segments, bounds, strict=True):
        if segment.trained and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)  # a token may lie across two that are trained
        elif segment.trained and end > start:
            spans.append((start, end))
    tokens = tokenise(text, spans)
    return TokenizedRow(tokens.input_ids, tokens.supervised)


def tokenize_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, tokenise: RowTokenizer, eos_id: int | None
) -> TokenizedRow:
    """Tokenise a document: BOS where the tokenizer itself puts one, EOS at the end, neither of them twice; all trained.

    Raises:
        DataError: the tokenizer has no EOS token.
    """
    bos = tokenizer.bos_token_id
    if eos_id is None:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has no EOS token to end a document with",
            fix="use the tokenizer of a causal language model, or write the rows with format segments",
        )
    ids = tokenise(text, []).input_ids
    puts_bos = bos is not None and tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[0] == bos
    if puts_bos and ids[:1] != [bos]:
        ids = [bos, *ids]
    if ids[-1:] != [eos_id]:
        ids = [*ids, eos_id]
    return TokenizedRow(ids, [True] * len(ids))


def take_tokens(tokenizer: PreTrainedTokenizerBase, row: TokenIds) -> TokenizedRow:
    """The row as it is, if each of its ids is a token.

    Raises:
        RowError: one is not.
    """
    to_token = tokenizer.backend_tokenizer.id_to_token
    unknown = {id for id in set(row.input_ids) if to_token(id) is None}
    if unknown:
        place = next(place for place, id in enumerate(row.input_ids) if id in unknown)
        raise RowError(
            f"{row.origin}: input_ids[{place}] is {row.input_ids[place]}, which is no token of the tokenizer of "
            f"{tokenizer.name_or_path} ({len(tokenizer):,} tokens)",
            fix="tokenise the rows with the model's own tokenizer",
        )
    return TokenizedRow(list(row.input_ids), list(row.trained))


def prompt_of(row: Row) -> Iterator[bytes]:
    """What comes before the first trained answer; of a row that begins with it, all of it."""
    if isinstance(row, Conversation):
        for message in takewhile(lambda each: each.role != "assistant" or not each.trained, row.messages):
            yield f"{message.role}\0{message.content}\0".encode()
    elif isinstance(row, Segments):
        context = list(takewhile(lambda each: not each.trained, row.segments))
        yield "".join(each.text for each in context or row.segments).encode()
    else:
        first = row.trained.index(True) or len(row.input_ids)
        yield array("i", row.input_ids[:first]).tobytes()


def _some_supervised(tokens: TokenizedRow, row: Segments) -> TokenizedRow:
    if not any(tokens.supervised[1:]):
        raise RowError(
            f"{row.origin}: no token lies wholly in trained segments and has a token before it",
            fix="put the borders of the segments where tokens begin: before the space of a word, not after it",
        )
    return tokens
