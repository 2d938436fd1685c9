"""``--sweep KEY=V1,V2``: one run for each combination of values, each in a folder of its own below ``output_dir``.

Everything of a point is decided here, before anything is submitted: its name, its folder, its configuration. All of
them read one cache of prepared data, so what their keys do not change is prepared once. Imports no torch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.config.text import describe_yaml_error, read_yaml
from sft_dist.config.validate import validate
from sft_dist.data.cache import cache_path
from sft_dist.errors import ConfigError

# Of a value in the name of a folder; longer ones end in a digest.
LONGEST_VALUE = 32

# What cannot differ between the elements of one array job, or is a point's own.
OF_THE_JOB = ("cluster", "hardware", "output_dir")

EXAMPLE = "write e.g. --sweep optim.lr=1e-5,2e-5"


@dataclass(frozen=True)
class Value:
    """One value of a key: as it was typed, and what YAML makes of it."""

    text: str
    value: Any


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes."""

    key: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        name: of its folder, e.g. ``lr-1e-05_r-8``.
        overrides: ``KEY=VALUE`` of the sweep alone, as typed.
        config: with everything that is this point's own.
    """

    name: str
    overrides: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Sweep:
    """Runs that are submitted together.

    Args:
        folder: of the sweep, which holds those of its points: what ``output_dir`` says without it.
        keys: that are swept.
    """

    folder: Path
    keys: tuple[str, ...]
    points: tuple[Point, ...]


def plan_sweep(path: Path, overrides: Sequence[str], sweep: Sequence[str]) -> Sweep:
    """Every point of a sweep, each as valid as a run of its own.

    Args:
        path: of the configuration; ``overrides``: for all points.
        sweep: ``KEY=V1,V2,...``, each of another key; their product is taken, the last one varying fastest.

    Raises:
        ConfigError: ``sweep`` cannot be read; or what the override of a point would be told.
    """
    axes = parse_axes(sweep)
    keys = tuple(axis.key for axis in axes)
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    points, folder = [], ""
    for name, values in zip(name_points(axes, combinations), combinations, strict=True):
        own = tuple(f"{key}={value.text}" for key, value in zip(keys, values, strict=True))
        without_places = _checked(path, [*overrides, *own])
        folder = without_places.output_dir
        places = _places(without_places, name, swept=keys)
        points.append(Point(name, own, _checked(path, [*overrides, *own, *places])))
    return Sweep(Path(folder), keys, tuple(points))


def _checked(path: Path, overrides: Sequence[str]) -> Config:
    config = load_config(path, overrides)
    validate(config, source=str(path))
    return config


def _places(config: Config, name: str, *, swept: Sequence[str]) -> list[str]:
    """Overrides that keep a point's files apart from those of the others, and their prepared data together."""
    folder, mirror, wandb = Path(config.output_dir), config.checkpoint.mirror, config.logging.wandb.name
    places = {"output_dir": str(folder / name)}
    if config.data.cache_dir is None:
        places["data.cache_dir"] = str(cache_path(config.data, config.output_dir))
    if mirror is not None and "checkpoint.mirror" not in swept:
        places["checkpoint.mirror"] = f"{mirror.rstrip('/')}/{name}"
    if "logging.wandb.name" not in swept:
        places["logging.wandb.name"] = f"{wandb or folder.name}-{name}"
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in places.items()]


def parse_axes(sweep: Sequence[str]) -> list[Axis]:
    """Keys and values of ``KEY=V1,V2,...``; values are YAML, and commas inside brackets or quotes belong to a value.

    Raises:
        ConfigError: a key or values are missing, stand twice or cannot be swept, or are no YAML.
    """
    axes = [_parse_axis(text) for text in sweep]
    twice = [key for key, count in Counter(axis.key for axis in axes).items() if count > 1]
    if twice:
        raise ConfigError(f"--sweep {twice[0]} is given twice", fix=f"give all values at once: {twice[0]}=V1,V2")
    return axes


def _parse_axis(text: str) -> Axis:
    key, equals, listed = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"--sweep {text!r} is not of the form KEY.PATH=V1,V2", fix=EXAMPLE)
    if key.partition(".")[0] in OF_THE_JOB:
        raise ConfigError(
            f"--sweep {text!r}: all points are elements of one job, below one output_dir, and share {key}",
            fix="sweep another key, or submit a job for each value",
        )
    # A flow sequence is what YAML itself calls such a list; its nodes know where each value stands.
    whole = f"[{listed}]"
    try:
        read_yaml(whole)
        node = yaml.compose(whole, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem, _ = describe_yaml_error(error)
        raise ConfigError(
            f"--sweep {text!r}: the values are not YAML: {problem}",
            fix="put the whole of it in quotes and check commas and brackets",
        ) from None
    # More than one sequence, or none: the text closes the bracket itself.
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(whole):
        raise ConfigError(f"--sweep {text!r}: the values are no list", fix="check the brackets")
    texts = [whole[each.start_mark.index : each.end_mark.index].strip() for each in node.value]
    if not texts:
        raise ConfigError(f"--sweep {text!r} has no values", fix=EXAMPLE)
    values = tuple(Value(each, read_yaml(each)) for each in texts)
    for one, other in itertools.combinations(values, 2):
        if one.value == other.value and isinstance(one.value, bool) == isinstance(other.value, bool):
            raise ConfigError(
                f"--sweep {text!r} has the value {other.text} twice", fix="give each value once, for a run each"
            )
    return Axis(key, values)


def name_points(axes: Sequence[Axis], combinations: Sequence[Sequence[Value]]) -> list[str]:
    """A name for each point that is a safe name of a folder, readable and no other's: ``lr-1e-05_seed-2``."""
    keys = short_keys([axis.key for axis in axes])
    names = [
        "_".join(f"{key}-{value_name(value)}" for key, value in zip(keys, values, strict=True))
        for values in combinations
    ]
    times = Counter(name.lower() for name in names)  # some file systems take a-B for a-b
    return [
        name if times[name.lower()] == 1 else f"{name}-{_digest([value.value for value in values])}"
        for name, values in zip(names, combinations, strict=True)
    ]


def short_keys(keys: Sequence[str]) -> list[str]:
    """The last parts of each key that tell it from the others, joined by dashes: ``lr``, ``0-weight``, ``1-weight``."""
    parts = [key.split(".") for key in keys]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["-".join(each[-count:]) for each in parts]
        if len(set(short)) == len(short):
            break
    return [_safe(key) for key in short]


def value_name(value: Value) -> str:
    """A value as a part of a name: numbers as Python writes them, of other values the letters that are safe."""
    plain = value.value
    if plain is None or isinstance(plain, bool):
        return json.dumps(plain)
    if isinstance(plain, int | float):
        return repr(plain)
    if isinstance(plain, list) and all(isinstance(each, str | int | float) for each in plain):
        text = "-".join(map(str, plain))
    else:
        text = plain if isinstance(plain, str) else value.text
    name = _safe(text)
    return name if 0 < len(name) <= LONGEST_VALUE else f"{name[:LONGEST_VALUE]}-{_digest(plain)}".lstrip("-")


def _safe(text: str) -> str:
    """Of a text what is safe in the name of a folder and in a shell."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.")


def _digest(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())[:6]
