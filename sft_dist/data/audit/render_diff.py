"""Whether an answer is trained after the prompt that the model gets at inference.

A model is asked with ``apply_chat_template(messages, add_generation_prompt=True)``. Templates exist whose generation
prompt differs from how they write a finished turn (a reasoning block that only one of the two opens, white space), or
that leave something of earlier turns out: then the model is asked in another way than it was taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from sft_dist.data.audit.findings import RenderDiff
from sft_dist.data.jinja_template import JinjaTemplate, TemplateFailure
from sft_dist.data.messages import Conversation

if TYPE_CHECKING:
    from sft_dist.data.chat_template import ChatRenderer, TemplateSample

# Tokens shown before and after the first one that differs; of prompts that are the same, their end.
TOKENS_BEFORE = 60
TOKENS_AFTER = 40

# A template is a program: besides raising an error of its own it can add a string to a dict or index past the end.
_TEMPLATE_ERRORS = (
    TemplateFailure, TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
)  # fmt: skip


def compare_prompts(renderer: ChatRenderer, conversation: Conversation) -> list[RenderDiff]:
    """The prompt of every trained answer, as it is trained and as ``apply_chat_template`` tokenises it.

    Templates that print the date are given the same one on both sides. Where two answers follow each other with nothing
    between, they cannot be told apart in the tokens, and the first answer alone is compared.

    Raises:
        DataError: as ``ChatRenderer.render``.
    """
    row, sample = renderer.render(conversation), renderer.sample(conversation)
    starts = _starts(row.supervised)
    is_trained = [message.trained for message in conversation.messages if message.role == "assistant"]
    answers = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"]
    turns = [index for index, trained in zip(answers, is_trained, strict=True) if trained]
    if len(starts) != len(turns):
        starts, turns = starts[:1], turns[:1]
    found = []
    for number, (start, turn) in enumerate(zip(starts, turns, strict=True), start=1):
        trained = row.input_ids[:start]
        try:
            asked = _asked(renderer, sample, turn)
        except _TEMPLATE_ERRORS as error:
            refused = f"(the template refuses to ask for this answer: {error})"
            found.append(RenderDiff(str(conversation.origin), number, _shown(renderer, trained, start), refused, 0))
            continue
        differs_at = _first_difference(trained, asked)
        place = start if differs_at is None else differs_at
        found.append(
            RenderDiff(
                origin=str(conversation.origin),
                answer=number,
                trained_text=_shown(renderer, trained, place),
                inference_text=_shown(renderer, asked, place),
                differs_at=differs_at,
            )
        )
    return found


def _asked(renderer: ChatRenderer, sample: TemplateSample, turn: int) -> list[int]:
    """The prompt at inference for the message number ``turn``."""
    tokenizer, messages = renderer.tokenizer, sample.messages[:turn]
    if sample.changes_with_time:
        # transformers has no way to hold the clock still; but for that, both render alike (``ChatRenderer``).
        jinja = JinjaTemplate(sample.template, name="the chat template", variables=tokenizer.special_tokens_map)
        text = jinja.render(messages, sample.tools, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer.apply_chat_template(
        messages, tools=sample.tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(ids)


def _starts(supervised: Sequence[bool]) -> list[int]:
    """Where each run of supervised tokens begins."""
    return [
        place for place, is_trained in enumerate(supervised) if is_trained and (place == 0 or not supervised[place - 1])
    ]


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


def _shown(renderer: ChatRenderer, ids: Sequence[int], place: int) -> str:
    """The text of the tokens around ``place``."""
    start, stop = max(0, place - TOKENS_BEFORE), place + TOKENS_AFTER
    text = str(renderer.tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False))
    return ("…" if start else "") + text + ("…" if stop < len(ids) else "")
