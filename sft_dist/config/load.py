"""From a YAML file and ``key.path=value`` overrides to a ``Config``; every mistake becomes one ``ConfigError``.

Paths inside a configuration are left as written: a relative one counts from the current working directory, not from
the file's folder, so that a file can be copied, rendered or read from a run directory without changing its meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft_dist.config.describe import allowed, locate, shown
from sft_dist.config.schema import Config
from sft_dist.config.shape import Problem, shape_problems
from sft_dist.config.text import describe_yaml_error, read_yaml, write_yaml
from sft_dist.errors import ConfigError

# What YAML says of "\." and its like.
BAD_ESCAPE = "unknown escape character"
ESCAPES = "put it into single quotes, or write each backslash twice"

SMALLEST_CONFIG = "model: {path}, data: {train: [{path}]}, train: {global_batch_size, max_steps}, output_dir"


@dataclass(frozen=True)
class Override:
    """``key.path=value`` from the command line; ``text`` is what was typed."""

    text: str
    key: str
    value: Any


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration; says nothing about whether its keys fit together (``validate`` does).

    Args:
        path: a YAML file (YAML 1.2 scalars: ``2e-4`` is a number, ``no`` is text; a repeated key is an error).
        overrides: ``key.path=value``, applied in order, so the last one for a key counts. The value is YAML. A part
            of the key that is a number is a place in a list; one past the end appends.

    Raises:
        ConfigError: for everything that is wrong with the file or an override, all of it at once.
    """
    return read_config(_read_mapping(Path(path)), source=path, overrides=overrides)


def read_config(value: dict[Any, Any], *, source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """``load_config`` of what a file holds.

    Args:
        source: the file's name, for messages.
    """
    parsed = [_parse_override(text) for text in overrides]
    for override in parsed:
        _apply(override, to=value, file=source)
    problems = shape_problems(value)
    config = None
    if not any(problem.structural for problem in problems):
        try:
            # Strict: YAML has types of its own; "4" or true for a number is a mistake, not a number.
            config = Config.model_validate(value, strict=True)
        except ValidationError as error:
            problems += _value_problems(error)
    if config is None or problems:
        raise _one_error(problems, file=str(source), overrides=parsed)
    return config


def dump_config(config: Config) -> str:
    """The configuration with every default, as YAML that ``load_config`` turns into an equal ``Config``."""
    return write_yaml(config.model_dump(mode="json"))


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key, as YAML would hold it; a number is a place in a list.

    Raises:
        ConfigError: there is no such key in this configuration.
    """
    here: Any = config.model_dump(mode="json")
    names = key.split(".")
    for depth, name in enumerate(names):
        place: str | int = int(name) if isinstance(here, list) and name.isdecimal() else name
        if not isinstance(here, dict | list) or not (place in here if isinstance(here, dict) else _is_in(place, here)):
            known = f"; the keys here are {', '.join(here)}" if isinstance(here, dict) else ""
            raise ConfigError(
                f"{key}: {'.'.join(names[:depth]) or 'the configuration'} has no {name}{known}",
                fix="`sft-dist config show FILE` prints all keys with their values",
            )
        here = here[place]  # type: ignore[index]
    return here


def _is_in(place: str | int, values: list[Any]) -> bool:
    return isinstance(place, int) and place < len(values)


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", fix=_fix_missing_file(path)) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder", fix="give the YAML file of the run, e.g. its config.yaml") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})", fix="save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", fix="make the file readable") from None
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        problem, line = describe_yaml_error(error)
        where = f"{path}, line {line}" if line is not None else str(path)
        raise ConfigError(
            f"{where}: {problem}",
            fix=ESCAPES if BAD_ESCAPE in problem else "correct the YAML there (check indentation, quotes and brackets)",
        ) from None
    if value is None:
        raise ConfigError(f"{path}: the file is empty", fix=f"write at least {SMALLEST_CONFIG}")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else shown(value)
        raise ConfigError(f"{path}: holds {kind}, not keys and values", fix=f"write at least {SMALLEST_CONFIG}")
    return value


def _fix_missing_file(path: Path) -> str:
    # By what stands before the ending, which all of them share. Empty where the folder is missing too.
    siblings = {file.stem: file for file in path.parent.glob("*.y*ml")}
    near = difflib.get_close_matches(path.stem, list(siblings), n=1)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    return f"give an existing YAML file; the current directory is {Path.cwd()}"


def _parse_override(text: str) -> Override:
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(
            f"override {text!r} is not of the form key.path=value",
            fix="write e.g. train.max_steps=20 or 'data.eval=[{path: x.jsonl}]'",
        )
    try:
        return Override(text, key, read_yaml(value_text))
    except yaml.YAMLError as error:
        problem, _ = describe_yaml_error(error)
        raise ConfigError(
            f"override {text!r}: the value is not YAML: {problem}",
            fix=ESCAPES if BAD_ESCAPE in problem else "put the whole override in quotes and check its brackets",
        ) from None


def _apply(override: Override, *, to: dict[Any, Any], file: str | Path) -> None:
    """Sets one key in place, making the sections on the way that the file leaves out."""
    container: Any = to
    parts = override.key.split(".")
    for depth, part in enumerate(parts):
        place = _place(container, part, override=override, parent=".".join(parts[:depth]), file=file)
        if depth == len(parts) - 1:
            _put(container, place, override.value)
            return
        inner = container[place] if _holds(container, place) else None
        if inner is None:
            inner = [] if parts[depth + 1].isdecimal() else {}
            _put(container, place, inner)
        container = inner


def _place(container: Any, part: str, *, override: Override, parent: str, file: str | Path) -> str | int:
    if isinstance(container, dict):
        return part
    if isinstance(container, list):
        if part.isdecimal() and int(part) <= len(container):
            return int(part)
        raise ConfigError(
            f"override {override.text!r}: {parent} is a list of {len(container)} in {file}, {part!r} is no place in it",
            fix=f"use a number from 0 to {len(container)} ({len(container)} appends)",
        )
    raise ConfigError(
        f"override {override.text!r}: {parent} is {shown(container)} in {file}, not a section",
        fix=f"override {parent} as a whole: {parent}=...",
    )


def _holds(container: Any, place: str | int) -> bool:
    return place < len(container) if isinstance(place, int) else place in container


def _put(container: Any, place: str | int, value: Any) -> None:
    if isinstance(place, int) and place == len(container):
        container.append(value)
    else:
        container[place] = value


def _value_problems(error: ValidationError) -> list[Problem]:
    """What pydantic alone can see: missing keys and values out of range."""
    problems: dict[str, Problem] = {}  # by key: pydantic reports a plain union once for every branch
    for entry in error.errors(include_url=False):
        if entry["type"] in ("extra_forbidden", "invalid_key"):
            continue  # shape_problems names these better
        key, here, field = locate(Config, entry["loc"])
        if entry["type"] == "missing":
            about = f" ({field.description})" if field is not None and field.description else ""
            problem = Problem(key, "is missing", f"add {key}: {allowed(here)}{about}")
        elif entry["type"] in ("value_error", "assertion_error"):
            problem = Problem(key, f"is {shown(entry['input'])}", entry["msg"])
        else:
            problem = Problem(key, f"is {shown(entry['input'])}", f"set {key} to {allowed(here)}")
        problems.setdefault(key, problem)
    return list(problems.values())


def _one_error(problems: Sequence[Problem], *, file: str, overrides: Sequence[Override]) -> ConfigError:
    def source(problem: Problem) -> str:
        # The override may have set the section around the key, the key, or (an unknown section) a key below it.
        key = f"{problem.key}."
        setters = [o.text for o in overrides if key.startswith(f"{o.key}.") or f"{o.key}.".startswith(key)]
        return f"{file} with {setters[-1]!r}" if setters else file

    lines = [f"{source(problem)}: {problem.key} {problem.what}" for problem in problems]
    if len(problems) == 1:
        return ConfigError(lines[0], fix=problems[0].fix)
    return ConfigError(
        "\n".join(f"{line}; {problem.fix}" for line, problem in zip(lines, problems, strict=True)),
        fix=f"correct these {len(problems)} places; `sft-dist config schema` describes every key",
    )
