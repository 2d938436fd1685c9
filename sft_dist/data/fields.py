"""Typed access to one row's keys, so that a reader states what it expects and every fault names file, row and key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from sft_dist.data.messages import Origin, ToolCall
from sft_dist.data.strict_json import JsonFault, parse
from sft_dist.errors import RowError

_Name = TypeVar("_Name", bound=str)

_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}

# Characters and names of the user's own that a message shows at most.
LONGEST_SHOWN, MOST_SHOWN = 60, 12

# Levels of a tool or of a call's arguments; what follows walks them by recursion.
MAX_DEPTH = 100


def kind(value: object) -> str:
    """What JSON calls ``value``, with its article."""
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")


def shown(value: object, *, longest: int = LONGEST_SHOWN) -> str:
    """A user's text, number or boolean as a message shows it: one line, printable, of bounded length."""
    if value is None or isinstance(value, list | dict):
        return kind(value)
    text = str(value)
    cut = text[:longest] + ("..." if len(text) > longest else "")
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in cut)


def listed(names: Iterable[str]) -> str:
    """The names of keys, the first of them where they are many."""
    every = list(names)
    more = ["..."] if len(every) > MOST_SHOWN else []
    return ", ".join([shown(name) for name in every[:MOST_SHOWN]] + more) or "none"


def said(error: BaseException) -> str:
    """The first line of what another library says."""
    return shown(str(error).strip().partition("\n")[0], longest=200)


@dataclass(frozen=True)
class Fields:
    """The keys of one object of a row. ``where`` is the way to it, such as ``messages[2]``; "" is the row itself."""

    values: Mapping[str, Any]
    origin: Origin
    where: str = ""

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def error(self, what: str, *, fix: str) -> RowError:
        return RowError(f"{self.origin}: {what}", fix=fix)

    def text(self, key: str) -> str:
        """The string under ``key``, which must be there."""
        if key not in self.values:
            seen = listed(self.values)
            fix = f"add the key {key}, or set `format` of the source"
            raise self.error(f"{self.path(key)} is missing (keys: {seen})", fix=fix)
        value = self.values[key]
        if not isinstance(value, str):
            raise self.error(f"{self.path(key)} is {kind(value)}, not a string", fix=f"write {key} as a string")
        return self.whole(value, key)

    def optional_text(self, key: str) -> str | None:
        """The string under ``key``; None where the key is missing or null."""
        return None if self.values.get(key) is None else self.text(key)

    def whole(self, text: str, key: str) -> str:
        """``text``, if UTF-8 can hold it: JSON may escape half an emoji, which no tokenizer accepts."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                f"{self.path(key)} holds half a surrogate pair at character {error.start + 1}",
                fix="remove the broken character; it is usually an emoji that was cut in two",
            ) from error
        return text

    def items(self, key: str) -> list[Any]:
        """The list under ``key``; empty where the key is missing or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(f"{self.path(key)} is {kind(value)}, not a list", fix=f"write {key} as a list")
        return value

    def objects(self, key: str) -> list[Fields]:
        """The objects in the list under ``key``, each knowing its own place."""
        found = []
        for index, value in enumerate(self.items(key)):
            where = f"{self.path(key)}[{index}]"
            if not isinstance(value, dict):
                raise self.error(
                    f"{where} is {kind(value)}, not an object", fix=f"write every element of {key} as an object"
                )
            found.append(Fields(value, self.origin, where))
        return found

    def optional_object(self, key: str) -> list[Fields]:
        """The object under ``key``, alone in a list; an empty list where the key is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{self.path(key)} is {kind(value)}, not an object", fix=f"write {key} as an object")
        return [] if value is None else [Fields(value, self.origin, self.path(key))]

    def choice(self, key: str, names: Mapping[str, _Name]) -> _Name:
        """What the name under ``key`` stands for in ``names``."""
        given = self.text(key)
        if given in names:
            return names[given]
        near = get_close_matches(given[:LONGEST_SHOWN].lower(), names, n=2)
        raise self.error(
            f"{self.path(key)}: unknown role '{shown(given)}'",
            fix=f"use {' or '.join(near)}" if near else f"use one of {', '.join(names)}",
        )

    def json_value(self, key: str) -> Any:
        """The value under ``key``, parsed when it is JSON text; None for a missing key, null and blank text."""
        value = self.values.get(key)
        if not isinstance(value, str):
            return value
        if not value.strip():
            return None
        try:
            return parse(value)
        except JsonFault as fault:
            raise self.error(
                f"{self.path(key)} is text, but not JSON that can be read: {fault.what}",
                fix=fault.fix or f"write {key} as JSON, with double quotes",
            ) from fault

    def flag(self, key: str) -> bool | None:
        """The boolean under ``key``; None where the key is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{self.path(key)} is {kind(value)}, not a boolean", fix="write true or false")
        return value

    def as_json(self, value: object, key: str) -> str:
        """``value``, which came from ``key``, as the JSON text that a template can write into a row."""
        try:
            if not _is_within(value, MAX_DEPTH):
                raise RecursionError
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except RecursionError as error:
            raise self.error(
                f"{self.path(key)} is nested more than {MAX_DEPTH} levels deep", fix="write it with less nesting"
            ) from error
        except ValueError as error:
            raise self.error(
                f"{self.path(key)} holds NaN or Infinity, which JSON does not have", fix="write null or a string"
            ) from error
        except TypeError as error:
            raise self.error(
                f"{self.path(key)} holds a value that JSON does not have ({error})", fix="write it as a string"
            ) from error
        return self.whole(text, key)


def _is_within(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        containers = [outer for outer in level if isinstance(outer, dict | list)]
        if not containers:
            return True
        level = [inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return False


def tool_call(fields: Fields, *, id: str | None = None) -> ToolCall:
    """Read ``{"name": ..., "arguments": ...}``, the arguments as an object or as its JSON text."""
    name = fields.text("name")
    arguments = fields.json_value("arguments")
    if arguments is None:
        arguments = {}
    if not name:
        raise fields.error(f"{fields.path('name')} is empty", fix="name the function that is called")
    if not isinstance(arguments, dict):
        raise fields.error(
            f"{fields.path('arguments')} is {kind(arguments)}, not an object",
            fix='write the arguments as an object, such as {"city": "Kyoto"}',
        )
    fields.as_json(arguments, "arguments")
    return ToolCall(name, arguments, id)


def tools(row: Fields) -> tuple[Mapping[str, Any], ...]:
    """The row's tools in OpenAI form. Bare functions (Glaive: ``{"name": ..., "parameters": ...}``) are wrapped."""
    value = row.json_value("tools")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise row.error(f"{row.path('tools')} is {kind(value)}, not a list", fix="write tools as a list of functions")
    return tuple(_tool(entry) for entry in Fields({"tools": value}, row.origin, row.where).objects("tools"))


def _tool(entry: Fields) -> Mapping[str, Any]:
    entry.as_json(dict(entry.values), "description")
    function = entry.values.get("function")
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return {"type": "function", **entry.values}
    if isinstance(entry.values.get("name"), str):
        return {"type": "function", "function": {k: v for k, v in entry.values.items() if k != "type"}}
    raise entry.error(
        f"{entry.where} names no function",
        fix='write a tool as {"name": ..., "description": ..., "parameters": {...}}',
    )
