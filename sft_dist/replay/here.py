"""What is not as it was when a run was trained, found before it is repeated. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.config.deepspeed import load_knobs
from sft_dist.config.flat import flat
from sft_dist.config.schema import Config, Zero1Sharding, Zero2Sharding, Zero3Sharding
from sft_dist.config.secrets import without_secrets
from sft_dist.errors import CheckpointError, ConfigError, DataError, SftError
from sft_dist.replay.receipt import NO_MATTER, Recorded
from sft_dist.runtime.machine import gpu_names
from sft_dist.runtime.world import World
from sft_dist.train.run_inputs import inputs_of
from sft_dist.train.surroundings import code, environment, launcher, machine, versions

# What decides a part of the identity that is no setting itself, by the settings' keys.
DECIDED_BY = {
    "data.train": ("data", "model", "train.seed"),
    "the chat template": ("data.chat_template", "model"),
    "model.weights": ("model.path", "model.revision"),
    "model.path": ("model.path",),
}

# Of versions, what only torch tells.
ASKED_OF_TORCH = ("cuda", "cudnn", "nccl")

NUMBERS = "changes the numbers"
DIGITS = "may change last digits"
BY_USER = "changed by you"


@dataclass(frozen=True)
class Difference:
    """``then`` and ``now``: None: not there."""

    name: str
    then: str | None
    now: str | None

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.then)} -> {_shown(self.now)}"


@dataclass(frozen=True)
class Found:
    """What differs, by what that means."""

    numbers: tuple[Difference, ...] = ()
    digits: tuple[Difference, ...] = ()
    by_user: tuple[Difference, ...] = ()

    def lines(self) -> list[str]:
        groups = ((NUMBERS, self.numbers), (DIGITS, self.digits), (BY_USER, self.by_user))
        lines = [line for name, each in groups if each for line in (f"{name}:", *(f"  {one}" for one in each))]
        return lines or ["all is as it was"]


def find_differences(recorded: Recorded, config: Config, overrides: Sequence[str]) -> Found:
    """Compares what is here with a receipt.

    Args:
        config: of the repetition.
        overrides: that the user gave for it.

    Raises:
        SftError: what the run reads is not there.
    """
    then, keys = recorded.content, override_keys(overrides)
    reads = differences(then["inputs"], inputs_of(config))
    settings = differences(then["settings"], without_secrets(config.model_dump(mode="json")))
    settings = [each for each in settings if not each.name.startswith(NO_MATTER)]
    places = {
        "processes": World.from_environment().size,
        "launcher": launcher(),
        **({} if "device" not in then["topology"] else {"device": _device(then["topology"]["device"])}),
    }
    around = [
        *differences(_but(then["versions"], ASKED_OF_TORCH), versions()),
        *_of("this project's code", then["code"], code()),
        *differences({name: then["topology"].get(name) for name in places}, places),
        *differences(then["machine"], machine()),
        *differences(then["environment"], environment()),
        *_of("DeepSpeed", then.get("deepspeed") or {}, _knobs(config)),
    ]
    return Found(
        numbers=tuple(each for each in reads if not is_by_user(each.name, keys)),
        digits=(*(each for each in settings if not is_by_user(each.name, keys)), *around),
        by_user=tuple(each for each in (*settings, *reads) if is_by_user(each.name, keys)),
    )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Dotted keys whose values are not the same."""
    before, after = (dict(flat(json.loads(json.dumps(each, default=str)))) for each in (then, now))
    keys = dict.fromkeys((*before, *after))
    return [
        Difference(key, _text(before.get(key)), _text(after.get(key)))
        for key in keys
        if before.get(key) != after.get(key)
    ]


def override_keys(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.partition("=")[0].strip() for text in overrides)


def is_by_user(name: str, keys: Sequence[str]) -> bool:
    """Whether one of the overridden keys decides what is called ``name``, a setting or a part of the identity."""
    key = name.partition(" ")[0]
    wanted = DECIDED_BY.get(name, (key,))
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in keys for b in wanted)


def refusal(found: Sequence[Difference], recorded: Recorded) -> SftError:
    """The error of what changes the numbers, with the exit code of the first of it."""
    name = found[0].name
    kind: type[SftError] = ConfigError
    if name.startswith(("data.", "eval.", "the chat template")):
        kind = DataError
    elif name.startswith("model"):
        kind = CheckpointError
    return kind(
        "\n".join([f"this is not what {recorded.path} is of:", *(f"  {each}" for each in found)]),
        fix="put it back as it was, or say --anyway, and see what comes of it",
    ).everywhere()


def _device(recorded: str) -> str:
    """The device that training would find here."""
    names = gpu_names()
    return "cpu" if not names else recorded if recorded in names else ", ".join(names)


def _knobs(config: Config) -> dict[str, Any]:
    if not isinstance(config.sharding, Zero1Sharding | Zero2Sharding | Zero3Sharding):
        return {}
    stage = int(config.sharding.strategy.removeprefix("zero"))
    return load_knobs(config.sharding.deepspeed_config, stage).model_dump(mode="json")


def _of(whose: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    return [Difference(f"{whose}: {each.name}", each.then, each.now) for each in differences(then, now)]


def _but(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(value: str | None) -> str:
    return "-" if value is None else value
