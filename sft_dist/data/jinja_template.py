"""A chat template as transformers runs it, with three differences: no clock, bounds, the answer's place on request.

The environment is that of ``PreTrainedTokenizerBase.apply_chat_template`` (sandboxed, the same filters and globals),
kept here because that function gives neither character positions nor a way to hold ``strftime_now`` still, and because
a template that never ends would not end there either (``bounded_jinja``).
``ChatRenderer`` compares the two on the first row it renders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro

from sft_dist.data.bounded_jinja import BoundedEnvironment, ForbiddenNode, LimitReached
from sft_dist.errors import DataError

Span = tuple[int, int]
"""Characters ``[start, end)`` of a rendered conversation."""

# A template that prints today's date would make another data set of the same files every day: caches would not match
# and a resumed run would train on other tokens. The day is the one that Llama 3.1's template prints without a clock.
FIXED_NOW = datetime(2024, 7, 26, 12, 0, 0)

# Private-use characters, so that no trim or JSON filter of a template touches them.
_OPEN, _CLOSE = "\ue0b5\ue0b1\ue0b5", "\ue0b5\ue0b2\ue0b5"


_PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


class TemplateFailure(Exception):
    """The template refused a conversation, in its own words; the caller knows which row it was."""


class JinjaTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        name: where it is from, for error messages.
        variables: the tokenizer's special tokens by name (``bos_token``, ``eos_token``, ...), which templates print.

    Raises:
        DataError: it is not Jinja, or asks for another file or Python's inside; naming the template and the line.
    """

    def __init__(self, source: str, *, name: str, variables: Mapping[str, Any]) -> None:
        self.source = source
        self.name = name
        self.uses_clock = "strftime_now" in source
        self._environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
        )
        self._environment.add_filter("tojson", _tojson)
        self._environment.globals.update(variables, raise_exception=_raise_exception, strftime_now=FIXED_NOW.strftime)
        try:
            self._compiled = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise self._refusal(f"is not valid Jinja: {error.message}", error.lineno) from error
        except ForbiddenNode as error:
            raise self._refusal(str(error), error.line) from error
        # Python compiles what Jinja made of it: 21 loops inside each other, or a thousand brackets, are too much.
        except (SyntaxError, RecursionError, ValueError, MemoryError) as error:
            raise self._refusal(f"cannot be compiled: {error}", None) from error
        # Jinja copies them for each rendering, and a ChainMap, which it makes of them, is copied slowly.
        self._compiled.globals = dict(self._compiled.globals)
        self.marks_answers = "endgeneration" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text.

        Raises:
            TemplateFailure: with the template's own message.
            DataError: it does not end, or writes without measure.
        """
        self._environment.start()
        try:
            return self._compiled.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt
            )
        except LimitReached as error:
            raise self._refusal(str(error), _line_of(error)) from error
        except RecursionError as error:
            raise self._refusal("a macro or loop calls itself without end", _line_of(error)) from error
        except MemoryError as error:
            raise self._refusal("it needs more memory than there is", _line_of(error)) from error
        # A template is a program: besides its own raise_exception it can add a string to a dict or index past the end.
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
        ) as error:
            line = _line_of(error)
            where = "" if line is None else f" (line {line} of the template)"
            raise TemplateFailure(f"{str(error) or type(error).__name__}{where}") from error

    def _refusal(self, what: str, line: int | None) -> DataError:
        place = "the chat template" if line is None else f"line {line}"
        separator = " " if what.startswith(("is ", "cannot ")) else ": "
        return DataError(f"{self.name}: {place}{separator}{what}", fix="correct the chat template")

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        """The text, and the places that its ``{% generation %}`` blocks wrote. Raises ``TemplateFailure``."""
        blocks = self._environment.extensions[_GenerationBlocks.identifier]
        assert isinstance(blocks, _GenerationBlocks)
        blocks.active = True
        try:
            marked = self.render(messages, tools)
        finally:
            blocks.active = False
        return _unmark(marked)


def _line_of(error: BaseException) -> int | None:
    """The template's line that raised ``error``: Jinja puts frames of the template into the traceback."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _unmark(marked: str) -> tuple[str, list[Span]]:
    """Take the marks out of a text and return where they stood. A block inside a block counts as part of the outer."""
    parts: list[str] = []
    spans: list[Span] = []
    length, depth, start = 0, 0, 0
    rest = marked
    while True:
        opened, closed = rest.find(_OPEN), rest.find(_CLOSE)
        cut = min((place for place in (opened, closed) if place >= 0), default=-1)
        if cut < 0:
            break
        parts.append(rest[:cut])
        length += cut
        if cut == opened:
            start = length if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0 and length > start:
                spans.append((start, length))
        rest = rest[cut + len(_OPEN) :]
    parts.append(rest)
    return "".join(parts), spans


class _GenerationBlocks(Extension):
    """``{% generation %} ... {% endgeneration %}``, transformers' tag around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so
    active = False

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        text = str(caller())
        return f"{_OPEN}{text}{_CLOSE}" if self.active else text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; chat templates want plain JSON, Japanese as it is.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
