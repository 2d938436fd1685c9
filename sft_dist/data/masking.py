r"""Find, in a rendered conversation, exactly what the model has to produce.

A turn's **span** starts where the generation prompt ends and ends after the end-of-turn token: what the model writes at
inference, from its first token to the one that stops it. For ChatML::

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
                                                          ^^^^^^^^^^^^^^^^

Three ways to find it, tried in this order; each is checked, and what none can show is an error, never a guess:

1. ``{% generation %}`` blocks, where the template has them, extended over an end-of-turn token that stands outside.
2. Prefixes: the conversation up to the turn with the generation prompt, and up to and with the turn. Both must be a
   prefix of the whole text.
3. Perturbation, for templates that write a turn differently once others follow (Qwen3 removes earlier reasoning, some
   Mistral templates move the tools to the last question): the whole conversation with only this turn's content replaced
   by a made-up word. What stands before and after the word must be found again in the real text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from sft_dist.data.jinja_template import JinjaTemplate, Span, TemplateFailure
from sft_dist.data.presentation import ChatMessage, Tools

_REASONING_TAGS = re.compile(r"</?think(?:ing)?>")
_WORD = "perturbedQxzvj"
_PAST_ALL: Span = (sys.maxsize, sys.maxsize)


class SpanFinder:
    """Finds the spans of a template's assistant turns.

    Args:
        template: the template that renders the conversations.
        special_tokens: the texts of the tokenizer's special tokens.
    """

    def __init__(self, template: JinjaTemplate, special_tokens: Collection[str]) -> None:
        self._template = template
        self._special_tokens = frozenset(special_tokens) - {""}
        self.generation_prompt, self.end_of_turn = _probe(template)

    def find(self, messages: Sequence[ChatMessage], tools: Tools, text: str, turns: Sequence[int]) -> list[Span]:
        """The spans of ``messages[i]`` for every ``i`` in ``turns``, in order; ``text`` is the whole rendering.

        Raises:
            TemplateFailure: the spans cannot be located exactly, or the template loses text.
        """
        _check_nothing_lost(messages, tools, text)
        all_turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self._template.marks_answers and list(turns) == all_turns:
            spans = self._from_generation_blocks(messages, tools, text)
            if spans:
                return spans
        spans = []
        for index in turns:
            span = self._from_prefixes(messages, tools, text, index)
            if span is None:
                span = self._from_perturbation(messages, tools, text, index)
            _check_answer(messages[index], text[slice(*span)], _name(messages, index), is_last=index == all_turns[-1])
            spans.append(span)
        for before, after in pairwise(spans):
            if before[1] > after[0]:
                raise TemplateFailure(f"the answers at characters {before} and {after} overlap")
        return spans

    def _from_generation_blocks(self, messages: Sequence[ChatMessage], tools: Tools, text: str) -> list[Span]:
        """Empty where the marks change what the template writes (it trims or compares a block): they prove nothing."""
        marked, spans = self._template.render_marked(messages, tools)
        if marked != text:
            return []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                _check_answer(message, text, _name(messages, index), is_last=index == len(messages) - 1)
        return [self._complete(text, span) for span in spans]

    def _complete(self, text: str, span: Span) -> Span:
        """Take in the end-of-turn token after a generation block, and the space before one that the prompt leaves out.

        ``[/INST] {% generation %}Hello`` has its space outside, but "Hello" with its space is one token, and the
        generation prompt ends before it: the model produces both.
        """
        start, end = _trim(text, *span)
        end_of_turn = self.end_of_turn
        if end_of_turn and not text[start:end].endswith(end_of_turn):
            rest = text[end:].lstrip()
            if rest.startswith(end_of_turn):
                end = len(text) - len(rest) + len(end_of_turn)
        before, prompt = text[:start], self.generation_prompt
        head = before.rstrip(" ")
        if prompt == "" or (prompt and head.endswith(prompt) and not before.endswith(prompt)):
            start = len(head)
        return start, end

    def _from_prefixes(self, messages: Sequence[ChatMessage], tools: Tools, text: str, index: int) -> Span | None:
        try:
            prompt = self._template.render(messages[:index], tools, add_generation_prompt=True)
            if not text.startswith(prompt):
                return None
            # The last turn's rendering is the text itself; nearly all rows of one question and one answer end here.
            whole = text if index == len(messages) - 1 else self._template.render(messages[: index + 1], tools)
        except TemplateFailure:  # some templates refuse a conversation that stops early
            return None
        if not text.startswith(whole) or len(whole) <= len(prompt):
            return None
        return _trim(text, len(prompt), len(whole))

    def _from_perturbation(self, messages: Sequence[ChatMessage], tools: Tools, text: str, index: int) -> Span:
        name = _name(messages, index)
        word = _WORD
        while word in text:
            word += "x"
        changed = _perturb(messages[index], word)
        whole = self._template.render([*messages[:index], changed, *messages[index + 1 :]], tools)
        alone = self._template.render([*messages[:index], changed], tools)
        if word not in whole or word not in alone:
            raise TemplateFailure(f"the template does not write the text of {name}")
        before, after = whole[: whole.index(word)], whole[whole.rindex(word) + len(word) :]
        start = self._start(messages[:index], tools, before, alone[: alone.index(word)], name)
        tail = alone[alone.rindex(word) + len(word) :].rstrip()
        closing_length = self._closing_length(after, tail, name)
        closing, following = after[:closing_length], after[closing_length:]
        end = len(text) - len(following)
        # Arguments of a call may end in a quote, a bracket or nothing: only what is no part of the JSON has to agree.
        closes = self.end_of_turn or "" if "tool_calls" in changed else closing
        is_found = text.startswith(before[:start]) and text.endswith(following) and start < end
        if not is_found or (closing.endswith(closes) and not text[:end].endswith(closes)):
            raise TemplateFailure(f"what the template writes around {name} depends on the text of that turn")
        if tail and not closing:
            return start, end  # nothing of the template's is left to trim: the white space is the answer's own
        return _trim(text, start, end)

    def _start(self, earlier: Sequence[ChatMessage], tools: Tools, before: str, shown_last: str, name: str) -> int:
        """Where the generation prompt ends in ``before``, the text up to the content of the turn.

        ``shown_last`` is the same text when the turn is the last one. Between prompt and content a template may write
        something of its own that the model produces (a space, an empty reasoning block, the head of a tool call).
        """
        generation_prompt, lead = self.generation_prompt, ""
        try:
            prompt = self._template.render(earlier, tools, add_generation_prompt=True)
            without = self._template.render(earlier, tools)
        except TemplateFailure:  # some templates refuse a conversation that stops early; the probe's prompt remains
            pass
        else:
            if before.startswith(prompt):
                return len(prompt)
            if prompt.startswith(without):
                generation_prompt = prompt[len(without) :]
            if shown_last.startswith(prompt):
                lead = shown_last[len(prompt) :]
        if generation_prompt is None:
            raise TemplateFailure(f"the template shows no generation prompt for {name}")
        for own in (lead, ""):
            if before.endswith(generation_prompt + own):
                return len(before) - len(own)
        # The prompt may open a reasoning block that finished turns do not have (DeepSeek-R1): its head remains.
        for length in range(len(generation_prompt) - 1, 0, -1):
            if before.endswith(generation_prompt[:length]):
                return len(before)
        raise TemplateFailure(f"the generation prompt {generation_prompt!r} does not stand before {name}")

    def _closing_length(self, after: str, tail: str, name: str) -> int:
        """How much of ``after``, what follows the content in mid-conversation, belongs to the turn.

        ``tail`` is what follows the content when the turn is the last one: it closes a tool call and ends the turn. In
        mid-conversation a template may leave the end-of-turn token out, or put one in its place that no turn is asked
        to end with (gpt-oss): that one does not belong to the turn.
        """
        if after.startswith(tail):
            return len(tail)
        ending = next((token for token in self._special_tokens if tail.endswith(token)), None)
        closing = tail.removesuffix(ending or "").rstrip()
        if ending and after.startswith(closing):
            return len(closing)
        raise TemplateFailure(f"the template ends {name} in another way when a turn follows: {after.strip()[:20]!r}")


def _probe(template: JinjaTemplate) -> tuple[str | None, str | None]:
    """The generation prompt, and what ends a turn, without white space around; None where the template fails."""
    question = {"role": "user", "content": "question"}
    generation_prompt = end_of_turn = None
    try:
        without, prompt = (template.render([question], None, add_generation_prompt=add) for add in (False, True))
        if prompt.startswith(without):
            generation_prompt = prompt[len(without) :]
        answered = template.render([question, {"role": "assistant", "content": _WORD}], None)
        if _WORD in answered:
            end_of_turn = answered[answered.rindex(_WORD) + len(_WORD) :].strip()
    except TemplateFailure:
        pass
    return generation_prompt, end_of_turn


def _perturb(message: ChatMessage, word: str) -> ChatMessage:
    """``message`` with another text: its content, which begins what it writes, and its calls' arguments, which end it.

    A turn without content gets one all the same. It shows where the turn begins; what it may change after that is
    held against the real text.
    """
    changed = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
    changed["content"] = word
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _perturbed_arguments(call, word)}}
            for call in message["tool_calls"]
        ]
    return changed


def _perturbed_arguments(call: ChatMessage, word: str) -> object:
    arguments = {word: word}
    return json.dumps(arguments) if isinstance(call["function"]["arguments"], str) else arguments


def _trim(text: str, start: int, end: int) -> Span:
    """Leave out the white space at the end: the template's, after the end of the turn, which the model never writes."""
    return start, start + len(text[start:end].rstrip())


def _name(messages: Sequence[ChatMessage], index: int) -> str:
    return f"assistant turn {sum(message['role'] == 'assistant' for message in messages[: index + 1])}"


def _check_nothing_lost(messages: Sequence[ChatMessage], tools: Tools, text: str) -> None:
    """Every question, system prompt, tool result and tool must be in the text, as it is or inside a JSON string."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and not _holds(text, message["content"]):
            raise TemplateFailure(f"the template drops the text of message {index + 1} (role {message['role']})")
    for tool in tools or ():
        if tool["function"]["name"] not in text:
            raise TemplateFailure(f"the template drops the tool {tool['function']['name']}")


def _check_answer(message: ChatMessage, written: str, name: str, *, is_last: bool) -> None:
    """What an assistant says must be in ``written``; reasoning of earlier turns may be left out, as at inference."""
    pieces = [piece for piece in _REASONING_TAGS.split(message["content"]) if piece.strip()]
    required = [*pieces, message.get("reasoning_content", "")] if is_last else pieces[-1:]
    for piece in required:
        if not _holds(written, piece):
            raise TemplateFailure(f"the template drops a part of {name}: {piece.strip()[:40]!r}")
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in written:
            raise TemplateFailure(f"the template drops the call of {call['function']['name']} in {name}")


def _holds(text: str, content: str) -> bool:
    stripped = content.strip()
    return stripped in text or any(json.dumps(stripped, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def supervised_tokens(text: str, offsets: Iterable[Span], added: Iterable[bool], spans: Sequence[Span]) -> list[bool]:
    """Which tokens lie inside ``spans``.

    A token is supervised only if **every** character of it is generated. One that begins in the prompt (a space of the
    prompt joined to the first word) is not: at inference the prompt is tokenised alone, so the model never chooses it.

    Args:
        text: the rendered conversation.
        offsets: each token's characters. Byte-level tokenizers leave out the space that a token begins with; it is
            given back here, as what lies between a token and the one before it.
        added: whether a token is an added one (special tokens are). Such a token may swallow white space beside it,
            which does not count; one that is nothing else (Gemma has such for line breaks) is like any other token.
        spans: what the model produces, in order and without overlap.
    """
    supervised = []
    remaining = iter(spans)
    start, stop = next(remaining, _PAST_ALL)
    covered = 0
    for (begin, end), is_added in zip(offsets, added, strict=True):
        if is_added and (piece := text[begin:end]).strip():
            first, last = end - len(piece.lstrip()), begin + len(piece.rstrip())
        else:
            first, last = (covered, end) if end > covered else (begin, end)
        if end > covered:
            covered = end
        while stop <= first:  # this loop runs for every token of the data: it looks at one span only
            start, stop = next(remaining, _PAST_ALL)
        supervised.append(start <= first and last <= stop)
    return supervised
