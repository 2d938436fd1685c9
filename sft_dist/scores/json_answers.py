"""Whether an answer is JSON, and whether it is what a JSON Schema describes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from sft_dist.errors import ConfigError

_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


class NotJson(ValueError):
    """The answer is no JSON."""


def json_of(answer: str) -> Any:
    """The value of an answer that is JSON and nothing else, blanks and a ```json fence around all of it aside.

    Strict: NaN and Infinity, which JSON lacks, are refused, and so is an object with a key twice.

    Raises:
        NotJson: it is something else.
    """
    text = answer.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(
            text if fenced is None else fenced[1], parse_constant=_no_constant, object_pairs_hook=_each_key_once
        )
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from error


def is_json(answer: str) -> bool:
    try:
        json_of(answer)
    except NotJson:
        return False
    return True


class SchemaCheck:
    """A JSON Schema of a file, in the version that its ``$schema`` names, else 2020-12. ``format`` is not checked.

    Raises:
        ConfigError: the file cannot be read or is no JSON Schema.
    """

    def __init__(self, path: str) -> None:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for
        from jsonschema_specifications import REGISTRY

        self._path = path
        try:
            content = Path(path).read_bytes()
            schema = json.loads(content, parse_constant=_no_constant)
        except OSError as error:
            raise ConfigError(
                f"eval.scores.json_schema: {path} cannot be read: {error.strerror}", fix="correct the path"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"eval.scores.json_schema: {path} is no JSON: {error}", fix="correct the file, in UTF-8"
            ) from error
        if not isinstance(schema, dict | bool):
            raise ConfigError(
                f"eval.scores.json_schema: {path} holds no JSON Schema", fix="write an object with the schema"
            )
        validator = validator_for(schema, default=Draft202012Validator)
        try:
            validator.check_schema(schema)
        except SchemaError as error:
            raise ConfigError(
                f"eval.scores.json_schema: {path} is no JSON Schema: {error.json_path}: {error.message}",
                fix="correct the schema",
            ) from error
        # This registry holds the published schemas; the default one would fetch others from the network.
        self._validator = validator(schema, registry=REGISTRY)
        self.signature = (
            f"sha256:{hashlib.sha256(content).hexdigest()[:16]}|{validator.__name__}|"
            f"jsonschema:{importlib.metadata.version('jsonschema')}"
        )

    def accepts(self, answer: str) -> bool:
        """Whether an answer is JSON that the schema describes.

        Raises:
            ConfigError: the schema refers to one that is not in its file.
        """
        from referencing.exceptions import Unresolvable

        try:
            return bool(self._validator.is_valid(json_of(answer)))
        except (NotJson, RecursionError):
            return False
        except Unresolvable as error:
            raise ConfigError(
                f"eval.scores.json_schema: {self._path} refers to {error.ref!r}, which it does not hold",
                fix="write what it refers to into the file, under $defs",
            ) from error


def _no_constant(name: str) -> NoReturn:
    raise NotJson(f"{name} is no JSON")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotJson("an object has a key twice")
    return found
