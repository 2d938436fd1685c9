"""Jinja for templates from other people: transformers' sandbox, which also ends.

The sandbox keeps a template from Python's internals. What it lacks is an end: a few loops inside each other, a macro
that calls itself or a text that doubles with every turn take a machine down. Here loops and macros are counted, texts
and lists have a greatest size, and what a chat template has no use for (other files, names with two underscores) is
refused as it is compiled. The bounds are far above what any conversation needs; they stop mistakes and crude attacks,
while memory that a template fills by nesting small lists is not counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Of one rendering: turns of all loops and calls of macros together; characters that it writes.
MAX_STEPS = 3_000_000
MAX_CHARACTERS = 1 << 25
# Bits of a whole number, and the digits of a width in a format.
MAX_BITS = 4096
_WIDE_FORMAT = re.compile(r"\d{7,}")
# Filters and methods of texts that take a width.
_WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "tojson"}
_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock)
_OF_OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_STEP, _SIZED = "_count_step", "_check_size"


class LimitReached(Exception):
    """A template that does more than any conversation needs."""


class ForbiddenNode(Exception):
    """A template asks for what no chat template may have; ``line`` says where."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with bounds, which ``start`` sets back before each rendering.

    Raises from the rendering, besides what Jinja raises:
        LimitReached: one of the bounds.
    and from compiling:
        ForbiddenNode: the template names another file or a Python internal.
    """

    # Intercepted operators are also left alone by the optimizer, which would compute 9 ** 9 ** 9 while compiling.
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._written, **options)
        self._steps = self._characters = 0
        for name, function in self.filters.items():
            self.add_filter(name, function)
        self.filters |= {_STEP: self._step, _SIZED: _checked}
        del self.globals["lipsum"]  # random text

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Have ``function`` as a filter, with bounds."""
        self.filters[name] = _bounded(name, function)

    def start(self) -> None:
        """Begin to count anew."""
        self._steps = self._characters = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _refuse_forbidden(template)
        bodies: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *template.find_all(nodes.For), *template.find_all(nodes.Macro), *template.find_all(nodes.CallBlock)
        ]  # fmt: skip
        for node in bodies:
            count = nodes.Filter(nodes.Const(_constant_characters(node.body)), _STEP, [], [], None, None)
            node.body = [nodes.ExprStmt(count).set_lineno(node.lineno), *node.body]
        # Texts grow without measure only where their sum is kept, or handed on, for another turn.
        for assignment in template.find_all(nodes.Assign):
            value = assignment.node
            assert isinstance(value, nodes.Expr)
            assignment.node = _sized(value)
        for call in template.find_all(nodes.Call):
            call.args = [_sized(argument) for argument in call.args]
            for keyword in call.kwargs:
                keyword.value = _sized(keyword.value)
        # What is put in has no line and no environment of its own yet.
        template.set_environment(self)
        return template

    @pass_context  # not for the context: such a filter is not computed while compiling
    def _step(self, context: Context, constant_characters: int) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise LimitReached(f"its loops and macros take more than {MAX_STEPS:,} steps for one conversation")
        self._charge(constant_characters)

    def _written(self, value: Any) -> str:
        """Every value that is printed passes here."""
        text = value if type(value) is str else str(value)
        self._charge(len(text))
        return text

    def _charge(self, characters: int) -> None:
        self._characters += characters
        if self._characters > MAX_CHARACTERS:
            raise LimitReached(f"it writes more than {MAX_CHARACTERS:,} characters for one conversation")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if _is_sized(many) and isinstance(times, int):
                    _check_length(len(many) * times)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            if method.__name__ in _WIDENING:
                _check_numbers([*args, *kwargs.values()])
            elif method.__name__ in ("format", "format_map"):
                _check_format(owner)
            elif method.__name__ == "replace" and len(args) >= 2:
                _check_replaced(owner, args[0], args[1])
            elif method.__name__ == "join" and args:
                args = (_joinable(args[0], owner), *args[1:])
        return super().call(context, called, *args, **kwargs)


def _sized(expression: nodes.Expr) -> nodes.Expr:
    """``expression`` with its size checked, if it joins anything."""
    joins = (nodes.Add, nodes.Concat)
    if not isinstance(expression, joins) and all(expression.find(kind) is None for kind in joins):
        return expression
    return nodes.Filter(expression, _SIZED, [], [], None, None, lineno=expression.lineno)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that cannot make a text without measure of small ones."""

    @functools.wraps(function)  # carries over whether Jinja passes it the context
    def checked(*args: Any, **kwargs: Any) -> Any:
        if name in _WIDENING:
            _check_numbers([*args, *kwargs.values()])
        elif name == "format":
            _check_format(str(args[0]))
        elif name == "replace" and len(args) >= 4:
            _check_replaced(args[1], args[2], args[3])
        return _checked(function(*args, **kwargs))

    return checked


def _refuse_forbidden(template: nodes.Template) -> None:
    for statement in template.find_all(_OF_OTHER_FILES):
        tag = {"FromImport": "from"}.get(type(statement).__name__, type(statement).__name__.lower())
        raise ForbiddenNode(f"{{% {tag} %}} needs another file, and a chat template is one file", statement.lineno)
    for node in template.find_all((nodes.Getattr, nodes.Getitem, nodes.NSRef, nodes.Name)):
        argument = getattr(node, "arg", None)
        name = argument.value if isinstance(argument, nodes.Const) else getattr(node, "attr", getattr(node, "name", ""))
        if isinstance(name, str) and name.startswith("__"):
            raise ForbiddenNode(f"{name} is of Python's inside, which a chat template may not reach", node.lineno)


def _constant_characters(body: Iterable[nodes.Node]) -> int:
    """Characters that a body writes as they stand in the template, without the bodies inside it."""
    return sum(_constants(node) for node in body if not isinstance(node, _BODIES))


def _constants(node: nodes.Node) -> int:
    if isinstance(node, nodes.TemplateData):
        return len(node.data)
    if isinstance(node, nodes.Const):
        return len(node.value) if isinstance(node.value, str) else 0
    children: Iterator[nodes.Node] = node.iter_child_nodes()
    return sum(_constants(child) for child in children if not isinstance(child, (*_BODIES, nodes.CondExpr)))


def _is_sized(value: object) -> TypeGuard[str | list[Any] | tuple[Any, ...]]:
    return isinstance(value, str | list | tuple)


def _checked(value: Any) -> Any:
    if _is_sized(value):
        _check_length(len(value))
    return value


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise LimitReached(f"it makes a text or list longer than {MAX_CHARACTERS:,}")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise LimitReached(f"it computes a number of more than {MAX_BITS:,} bits")


def _check_numbers(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_CHARACTERS:
            raise LimitReached(f"it asks for a text with the number {value}, more than {MAX_CHARACTERS:,}")


def _check_format(text: str) -> None:
    if wide := _WIDE_FORMAT.search(text):
        raise LimitReached(f"it asks for a text {wide[0][:20]} characters wide")


def _check_replaced(text: object, old: object, new: object) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        _check_length(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _joinable(parts: Iterable[Any], separator: str) -> list[Any]:
    held = list(parts)
    _check_length(sum(len(part) + len(separator) for part in held if isinstance(part, str)))
    return held
