"""Rows that are too long, as several rows: by whole turns where that is possible.

A conversation is cut before questions. Each part begins with the system prompt of the whole, as each would at
inference, and has as many exchanges as fit. One that does not fit by itself is cut every ``max_seq_len`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sft_dist.data.messages import Conversation, Message

Tokens = tuple[list[int], list[bool]]
"""input_ids [t], supervised [t]."""


@dataclass(frozen=True)
class Part:
    """A part of a row.

    Args:
        is_cut: it begins or ends inside a turn.
    """

    input_ids: list[int]
    supervised: list[bool]
    is_cut: bool

    @property
    def is_trained(self) -> bool:
        return True in self.supervised[1:]


def split_conversation(
    conversation: Conversation, max_seq_len: int, render: Callable[[Conversation], Tokens]
) -> Iterator[Part]:
    """The parts of a conversation that is too long, in order; parts without a trained answer are left out.

    Args:
        render: tokenises a conversation with a trained answer.
    """
    system, exchanges = _exchanges(conversation.messages)

    def rendered(first: int, stop: int) -> Tokens | None:
        messages = (*system, *(message for exchange in exchanges[first:stop] for message in exchange))
        if not any(message.role == "assistant" and message.trained for message in messages):
            return None
        return render(replace(conversation, messages=messages))

    first = 0
    while first < len(exchanges):
        stop, tokens = first + 1, rendered(first, first + 1)
        while stop < len(exchanges):
            longer = rendered(first, stop + 1)
            if longer is not None and len(longer[0]) > max_seq_len:
                break
            stop, tokens = stop + 1, longer
        if tokens is not None and len(tokens[0]) <= max_seq_len:
            yield Part(*tokens, is_cut=False)
        elif tokens is not None:
            yield from split_tokens(tokens, max_seq_len)
        first = stop


def split_tokens(tokens: Tokens, max_seq_len: int) -> Iterator[Part]:
    """Consecutive parts of ``max_seq_len`` tokens."""
    ids, supervised = tokens
    for start in range(0, len(ids), max_seq_len):
        part = slice(start, start + max_seq_len)
        yield Part(ids[part], supervised[part], is_cut=len(ids) > max_seq_len)


def _exchanges(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], list[list[Message]]]:
    """The messages before the first question, and those from each question up to the next."""
    exchanges: list[list[Message]] = []
    system: list[Message] = []
    for message in messages:
        if message.role == "user":
            exchanges.append([message])
        elif exchanges:
            exchanges[-1].append(message)
        else:
            system.append(message)
    if not exchanges or any(message.role == "assistant" for message in system):
        return (), [list(messages)]  # a conversation that does not begin with a question is not taken apart
    return tuple(system), exchanges
