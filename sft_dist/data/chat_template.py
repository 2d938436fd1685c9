"""From a conversation to token ids and to which of them are trained on.

A row is rendered once to text and tokenised once, without special tokens of the tokenizer's own: the template writes
the BOS where there is one, so it is never doubled, exactly as ``apply_chat_template`` does at inference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import xxhash

from sft_dist.data.jinja_template import JinjaTemplate, Span, TemplateFailure
from sft_dist.data.masking import SpanFinder
from sft_dist.data.messages import Conversation, Message
from sft_dist.data.named_templates import template_for
from sft_dist.data.presentation import ChatMessage, Presentation, Tools, find_presentation
from sft_dist.data.row_tokenizer import RowTokenizer, Tokens
from sft_dist.data.supervision import DEFAULT, Supervision, after_reasoning, complement
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import DataError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_FIX = "set data.chat_template to a template made for this kind of conversation, or correct the row"


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """Token ids of one conversation, and for each whether the model is trained to produce it."""

    input_ids: list[int]
    supervised: list[bool]


class ChatRenderer:
    """Renders and tokenises conversations with a tokenizer and its chat template, or another one.

    Args:
        tokenizer: a fast tokenizer. Its ``chat_template`` becomes the one that is used, and its EOS what ends an answer
            there, so that a copy saved with the model carries the template that the model was trained with.
        template: a Jinja file, Jinja text or the name of a built-in template; None for the tokenizer's own, or for one
            that is built where it has none (``named_templates``).

    Attributes:
        notice: one line about a template that was built because there was none, else None.
        document_eos_id: of the tokenizer's own EOS, which ends a document; a built template may have another.
        rewritten_rows: rows so far with tools, calls or results that the template does not print and that were
            written into the messages instead.

    Raises:
        ConfigError, DataError: as ``template_for`` and ``JinjaTemplate``, or the tokenizer is a slow one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer is a slow one, which gives no character positions of tokens",
                fix="convert it to a fast tokenizer (a tokenizer.json beside the model)",
            )
        self.document_eos_id: int | None = tokenizer.eos_token_id
        own = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        replacement = template_for(template, tokenizer)
        if replacement is not None:
            tokenizer.chat_template = replacement.source
            tokenizer.eos_token = replacement.eos or tokenizer.eos_token
        self.notice = None if replacement is None else replacement.notice
        self.tokenizer = tokenizer
        templates = str(tokenizer.chat_template)
        marks = {token for token in tokenizer.added_tokens_encoder if token in templates}
        self._backend = tokenizer.backend_tokenizer
        self._tokenise = RowTokenizer(tokenizer, marks.union(tokenizer.all_special_tokens))
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._name = own if replacement is None else replacement.name
        self._templates: dict[str, _Template] = {}
        self._is_compared = False
        self.rewritten_rows = 0
        self._template_for(None)  # a template that is not Jinja is refused here, before any row

    @property
    def row_tokenizer(self) -> RowTokenizer:
        """Tokenises texts that no template writes."""
        return self._tokenise

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokenizer and the template: renderers with equal ones make equal rows."""
        parts = [
            self._backend.to_str(),
            json.dumps(self.tokenizer.chat_template, sort_keys=True),
            json.dumps(self.tokenizer.special_tokens_map, default=str, sort_keys=True),
        ]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    @property
    def end_tokens(self) -> list[str]:
        """What ends a turn, as the template writes it: an added token, or nothing."""
        template = self._template_for(None)
        end = template.finder.end_of_turn
        return [end] if end and end in self.tokenizer.added_tokens_encoder else []

    @property
    def special_ids(self) -> list[int]:
        """Ids of every special token, those that a base model reserves too."""
        marked = (id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return sorted(self._special_ids.union(marked))

    def render(self, conversation: Conversation, supervision: Supervision = DEFAULT) -> TokenizedRow:
        """Tokenise one conversation.

        Messages after the last trained answer are left out: nothing is learned from them. If the template does not end
        that answer with an end-of-turn token, the EOS token is appended and supervised, in place of the white space
        that the template may put there; without it the model would never learn to stop.

        Raises:
            RowError: naming the row, when the template refuses it, loses a part of it, or hides where an answer is.
        """
        try:
            return self._render(supervision.choose(conversation), supervision)
        except TemplateFailure as failure:
            raise RowError(f"{conversation.origin}: {self._name}: {failure}", fix=_TEMPLATE_FIX) from failure

    def text(self, conversation: Conversation) -> str:
        """The conversation as the template writes it, complete, before anything is cut or appended."""
        template = self._template_for(conversation.tools)
        try:
            return template.jinja.render(*template.presentation.present(conversation.messages, conversation.tools))
        except TemplateFailure as failure:
            raise RowError(f"{conversation.origin}: {self._name}: {failure}", fix=_TEMPLATE_FIX) from failure

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text that an answer to ``messages`` goes on from, with the header of the assistant's turn.

        Raises:
            TemplateFailure: the template refuses the messages, or would leave a system message out.
        """
        template = self._template_for(list(tools) or None)
        presentation = template.presentation
        if not presentation.system_role and any(message.role == "system" for message in messages):
            raise TemplateFailure("it has no place for a system message")
        return template.jinja.render(*presentation.present(messages, tools), add_generation_prompt=True)

    def sample(self, conversation: Conversation) -> TemplateSample:
        """A conversation as it is put to the template, and what becomes of it."""
        template = self._template_for(conversation.tools)
        messages, tools = template.presentation.present(conversation.messages, conversation.tools)
        text = self.text(conversation)
        return TemplateSample(
            template=template.jinja.source,
            messages=messages,
            tools=list(tools) if tools else None,
            text=text,
            input_ids=self._tokenise(text, []).input_ids,
            changes_with_time=template.jinja.uses_clock,
        )

    def _render(self, conversation: Conversation, supervision: Supervision) -> TokenizedRow:
        template = self._template_for(conversation.tools)
        trained = [message.trained for message in conversation.messages if message.role == "assistant"]
        messages, tools = template.presentation.present(conversation.messages, conversation.tools)
        self.rewritten_rows += template.presentation.rewrites(conversation.messages, conversation.tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [index for index, is_trained in zip(answers, trained, strict=True) if is_trained]
        if not turns:
            raise TemplateFailure("the conversation has no answer to train on")
        if supervision.train_on != "all":
            messages = messages[: turns[-1] + 1]
        text = template.jinja.render(messages, tools)
        spans = template.finder.find(messages, tools, text, turns)
        if not supervision.reasoning:
            said = [message for message in conversation.messages if message.role == "assistant" and message.trained]
            spans = [after_reasoning(span, text, message) for span, message in zip(spans, said, strict=True)]
        if supervision.train_on == "all":
            context = [index for index in answers if index not in turns]
            hidden = template.finder.find(messages, tools, text, context) if context else []
            spans = complement(hidden, len(text.rstrip()))
        if not self._is_compared:
            self._compare_with_transformers(template.jinja, messages, tools, text)
        if template.finder.end_of_turn == "" and not text[spans[-1][1] :].strip():
            text = text[: spans[-1][1]]  # known in advance to need an EOS; spares tokenising twice
        tokens = self._tokenise(text, spans)
        if not self._ends_turn(tokens, spans[-1], text, template.finder.end_of_turn):
            tokens = self._end_with_eos(tokens, text, spans)
        for number, place in enumerate(tokens.reached, start=1):
            # Its tokens all hold characters of the prompt: the answer would be lost in silence.
            if place is None:
                raise TemplateFailure(f"no token of answer {number} lies wholly after the generation prompt")
        return TokenizedRow(tokens.input_ids, tokens.supervised)

    def _template_for(self, tools: Tools) -> _Template:
        """The template that transformers picks: a tokenizer may have one by name for conversations with tools."""
        try:
            source = self.tokenizer.get_chat_template(tools=list(tools) if tools else None)
        except ValueError as error:
            raise DataError(f"{self._name}: {error}", fix="set data.chat_template") from error
        if source not in self._templates:
            special = self.tokenizer.special_tokens_map
            tokens = self.tokenizer.convert_ids_to_tokens(self.special_ids)
            self._templates[source] = _Template.load(source, self._name, special, tokens)
        return self._templates[source]

    def _ends_turn(self, tokens: Tokens, last: Span, text: str, end_of_turn: str | None) -> bool:
        """Whether the last answer ends in a token that stops generation: a special one, or the template's own."""
        if tokens.last is None or (tokens.reached[-1] or 0) < last[1]:
            return False
        id = tokens.input_ids[tokens.last]
        is_templates_own = bool(end_of_turn) and text[: last[1]].endswith(end_of_turn or "")
        return id in self._special_ids or (id in self._added_ids and is_templates_own)

    def _end_with_eos(self, tokens: Tokens, text: str, spans: list[Span]) -> Tokens:
        end = spans[-1][1]
        if text[end:].strip():
            raise TemplateFailure(f"{text[end:].strip()[:20]!r} follows the last answer and is no end-of-turn token")
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise TemplateFailure("it ends an answer without an end-of-turn token, and the tokenizer has no EOS token")
        if end < len(text):
            tokens = self._tokenise(text[:end], spans)
        return replace(
            tokens,
            input_ids=[*tokens.input_ids, eos],
            supervised=[*tokens.supervised, True],
            reached=[*tokens.reached[:-1], end],
        )

    def _compare_with_transformers(
        self, jinja: JinjaTemplate, messages: list[ChatMessage], tools: Tools, text: str
    ) -> None:
        """The model will be asked through transformers: a row must come out there as it does here."""
        if not jinja.uses_clock:
            theirs = self.tokenizer.apply_chat_template(
                messages, tools=list(tools) if tools else None, chat_template=jinja.source, tokenize=False
            )
            if theirs != text:
                raise TemplateFailure("transformers renders this row differently")
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != self._tokenise(text, []).input_ids:
            raise TemplateFailure("transformers tokenises this row differently")
        self._is_compared = True


@dataclass(frozen=True)
class TemplateSample:
    """One conversation through the chat template: what another program that renders ``messages`` must get.

    Args:
        changes_with_time: the template prints the date, so ``text`` may differ on another day.
    """

    template: str
    messages: list[ChatMessage]
    tools: list[Mapping[str, Any]] | None
    text: str
    input_ids: list[int]
    changes_with_time: bool


@dataclass(frozen=True)
class _Template:
    """A compiled template and what was found out about it once."""

    jinja: JinjaTemplate
    presentation: Presentation
    finder: SpanFinder

    @classmethod
    def load(cls, source: str, name: str, variables: Mapping[str, Any], special_tokens: list[str]) -> _Template:
        jinja = JinjaTemplate(source, name=name, variables=variables)
        return cls(jinja, find_presentation(jinja), SpanFinder(jinja, special_tokens))


def load_renderer(
    model_path: str, revision: str | None, template: str | None, *, added_tokens: Sequence[str] = ()
) -> ChatRenderer:
    """The renderer of a model's tokenizer.

    Args:
        model_path: folder in Hugging Face layout, or hub id.
        revision: branch, tag or commit of a hub id.
        template: as for ``ChatRenderer``.
        added_tokens: special tokens that the tokenizer gets.

    Raises:
        CheckpointError, ConfigError: as ``load_tokenizer``.
        DataError: as ``ChatRenderer``.
    """
    return ChatRenderer(load_tokenizer(model_path, revision, added=added_tokens), template)
