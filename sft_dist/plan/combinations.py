"""What goes together: every combination of a method, a strategy and the rest, put to the real checks.

    python -m sft_dist.plan.combinations > docs/combinations.md

A new axis is an entry of ``AXES``, a new value a line in one; the page and the tests follow.
"""

from __future__ import annotations

import itertools
import json
import operator
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from sft_dist.config.load import read_config
from sft_dist.errors import ConfigError
from sft_dist.plan.check import check
from sft_dist.resolve import described_once
from sft_dist.runtime.world import WorldShape

Settings = Mapping[str, Any]

OPTIMIZER_ON_HOST = {"offload_optimizer": {"device": "cpu"}}
PARAMETERS_ON_HOST = {"offload_param": {"device": "cpu"}}

# The first value of an axis is what the others are seen beside.
AXES: dict[str, dict[str, Settings]] = {
    "method": {
        "full": {"method": {"type": "full"}},
        "lora": {"method": {"type": "lora", "r": 4}},
        "qlora": {"method": {"type": "qlora", "r": 4}},
        "qlora, int8": {"method": {"type": "qlora", "r": 4, "quantization": {"type": "int8"}}},
        "qlora, dora": {"method": {"type": "qlora", "r": 4, "dora": True}},
        "prompt": {"method": {"type": "prompt", "num_virtual_tokens": 4}, "data": {"packing": "none"}},
        "p_tuning": {"method": {"type": "p_tuning", "num_virtual_tokens": 4}, "data": {"packing": "none"}},
        "prefix": {"method": {"type": "prefix", "num_virtual_tokens": 4}, "data": {"packing": "none"}},
    },
    "strategy": {
        "ddp": {"sharding": {"strategy": "ddp"}},
        "fsdp2": {"sharding": {"strategy": "fsdp2"}},
        "fsdp2, dp_replicate: 2": {"sharding": {"strategy": "fsdp2", "dp_replicate": 2}},
        "zero1": {"sharding": {"strategy": "zero1"}},
        "zero2": {"sharding": {"strategy": "zero2"}},
        "zero3": {"sharding": {"strategy": "zero3"}},
    },
    "optimizer": {
        "adamw": {"optim": {"type": "adamw"}},
        "adamw, bf16 states": {"optim": {"type": "adamw"}, "precision": {"optimizer_state": "bf16"}},
        "adamw, 8bit states": {"optim": {"type": "adamw"}, "precision": {"optimizer_state": "8bit"}},
        "adafactor": {"optim": {"type": "adafactor"}},
        "sgd": {"optim": {"type": "sgd", "momentum": 0.9}},
    },
    "activation checkpointing": {
        "none": {"activation_checkpointing": {"mode": "none"}},
        "full": {"activation_checkpointing": {"mode": "full"}},
        "selective": {"activation_checkpointing": {"mode": "selective"}},
        "every_k": {"activation_checkpointing": {"mode": "every_k", "k": 2}},
        "full, offload": {"activation_checkpointing": {"mode": "full", "offload": True}},
    },
    "offload": {
        "none": {},
        "cpu_offload": {"sharding": {"cpu_offload": True}},
        "offload_optimizer": {"sharding": {"deepspeed_config": {"zero_optimization": OPTIMIZER_ON_HOST}}},
        "offload_param": {"sharding": {"deepspeed_config": {"zero_optimization": PARAMETERS_ON_HOST}}},
        "both": {"sharding": {"deepspeed_config": {"zero_optimization": OPTIMIZER_ON_HOST | PARAMETERS_ON_HOST}}},
    },
    "precision": {
        "bf16": {"precision": {"compute": "bf16", "master": "fp32"}},
        "fp32": {"precision": {"compute": "fp32", "master": "fp32"}},
        "bf16, master: bf16": {"precision": {"compute": "bf16", "master": "bf16"}},
    },
    "sequence_parallel": {
        "1": {},
        "2": {"sharding": {"sequence_parallel": 2}},
    },
}

# Of a cell's values, that are not the first of their axis.
MOST_UNUSUAL = 3

BASE: Settings = {
    "data": {"train": [{"path": "unused"}], "max_seq_len": 48},
    "train": {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": 3, "seed": 3},
    "output_dir": "unused",
}

# A model without anything special; the page is about settings, not about models.
MODEL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip

WORLD = WorldShape(1, 2)
SOURCE = "the run"  # in place of a file's name in messages

Cell = tuple[tuple[str, str], ...]
"""One value of every axis, as (axis, value)."""


def cells() -> list[Cell]:
    """Every combination of up to ``MOST_UNUSUAL`` values, the others being the first of their axes."""
    first = {axis: next(iter(values)) for axis, values in AXES.items()}
    found = []
    for size in range(MOST_UNUSUAL + 1):
        for axes in itertools.combinations(AXES, size):
            for values in itertools.product(*(list(AXES[axis])[1:] for axis in axes)):
                found.append(tuple({**first, **dict(zip(axes, values, strict=True))}.items()))
    return found


def settings_of(cell: Cell, model: str) -> dict[str, Any]:
    """What a user's file would hold. Sections are merged, so that two axes may speak of one section."""
    merged: dict[str, Any] = {"model": {"path": model}}
    for settings in (BASE, *(AXES[axis][value] for axis, value in cell)):
        for section, keys in settings.items():
            merged[section] = {**merged.get(section, {}), **keys} if isinstance(keys, Mapping) else keys
    return merged


def refusals() -> dict[Cell, str | None]:
    """Why each cell is refused, as ``sft-dist config check`` says it; None where it is not."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        describe = described_once()

        def refusal(cell: Cell) -> str | None:
            try:
                check(read_config(settings_of(cell, folder), source=SOURCE), WORLD, describe=describe)
            except ConfigError as e:
                return e.what.splitlines()[0].removeprefix(f"{SOURCE}: ")
            return None

        return {cell: refusal(cell) for cell in cells()}


@dataclass(frozen=True)
class Rule:
    """Values that are refused together whatever the other axes say, and with none of them left out they are not."""

    values: Cell
    reason: str


def rules(table: Mapping[Cell, str | None]) -> list[Rule]:
    """The smallest sets of values that explain every refusal."""
    every = list(table)
    # Sets of cells as bits of a number.
    refused = sum(1 << i for i, cell in enumerate(every) if table[cell] is not None)
    having: dict[tuple[str, str], int] = {}
    for i, cell in enumerate(every):
        for value in cell:
            having[value] = having.get(value, 0) | 1 << i
    found: dict[Cell, int] = {}
    explained = 0
    for size in range(1, len(AXES) + 1):
        if explained == refused:
            break
        for axes in itertools.combinations(AXES, size):
            for values in itertools.product(*(tuple((axis, value) for value in AXES[axis]) for axis in axes)):
                common = _common(having[value] for value in values)
                is_new = not any(set(smaller) <= set(values) for smaller in found)
                if is_new and common and common & refused == common:
                    found[values] = common
                    explained |= common
    # What follows from others: with bf16 masters only ddp and fsdp2 are left, and neither offloads.
    for values in sorted(found, key=lambda values: -found[values].bit_count()):
        others = 0
        for other, common in found.items():
            others |= common if other != values else 0
        if found[values] & ~others == 0:
            del found[values]
    return [Rule(values, _reason(table, values)) for values in found]


def _common(masks: Iterator[int]) -> int:
    return reduce(operator.and_, masks)


def _reason(table: Mapping[Cell, str | None], values: Cell) -> str:
    """Where several mistakes meet another may be named: the most frequent reason is about these values."""
    reasons = Counter(reason for cell, reason in table.items() if reason is not None and set(values) <= set(cell))
    return reasons.most_common(1)[0][0]


def page() -> str:
    """``docs/combinations.md``."""
    table = refusals()
    refused = rules(table)
    supported = sum(reason is None for reason in table.values())
    lines = [
        "# What goes together",
        "",
        "Made by `python -m sft_dist.plan.combinations`: combinations of the values below were put to the checks of",
        "`sft-dist config check`, which run before anything loads and end with exit code 2: all those in which up to",
        f"{MOST_UNUSUAL} values are not the first of their axis. A test compares this page with them, and others train",
        "what it does not refuse.",
        "",
        "| axis | values |",
        "|---|---|",
        *(f"| {axis} | {', '.join(f'`{value}`' for value in values)} |" for axis, values in AXES.items()),
        "",
        f"{supported:,} of {len(table):,} combinations are supported: all but those with one of these.",
        "",
        "| refused together | because |",
        "|---|---|",
        *_rows(refused),
        "",
        "In other words, with the other axes chosen to suit:",
        "",
        *_matrix(table),
        "",
        "Refused with every setting: mixture-of-experts models, models that scale or soft-cap their logits or drop",
        "attention weights, models with layers that may mix the rows of a pack, and a data.max_seq_len from which a",
        "model changes its rotary frequencies (dynamic; longrope with several rows a micro-batch). The message names",
        "the model.",
        "",
    ]
    return "\n".join(lines)


def _rows(refused: list[Rule]) -> Iterator[str]:
    """One row for what differs in the last axis alone."""
    for (others, axis, reason), together in itertools.groupby(refused, key=_but_the_last_value):
        shown = [f"{other} `{value}`" for other, value in others]
        shown.append(f"{axis} " + " or ".join(f"`{rule.values[-1][1]}`" for rule in together))
        yield f"| {' + '.join(shown)} | {reason.replace('|', '')} |"


def _matrix(table: Mapping[Cell, str | None], columns: str = "strategy") -> Iterator[str]:
    """Which values of every axis go with which strategy."""
    pairs = {
        frozenset(pair) for cell, reason in table.items() if reason is None for pair in itertools.combinations(cell, 2)
    }
    yield f"| | {' | '.join(f'`{name}`' for name in AXES[columns])} |"
    yield "|---" * (1 + len(AXES[columns])) + "|"
    for axis, values in AXES.items():
        for value in values if axis != columns else ():
            answers = ["yes" if frozenset({(columns, name), (axis, value)}) in pairs else "-" for name in AXES[columns]]
            yield f"| {axis} `{value}` | {' | '.join(answers)} |"


def _but_the_last_value(rule: Rule) -> tuple[Cell, str, str]:
    return rule.values[:-1], rule.values[-1][0], rule.reason


if __name__ == "__main__":
    print(page(), end="")
