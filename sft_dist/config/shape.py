"""Finds what is wrong with the shape of a configuration: unknown keys, wrong sections, keys of another branch.

Pydantic finds these too, but names union branches that the user never wrote and cannot say which name was meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sft_dist.config.describe import TaggedUnion, TypeHere, allowed, every_key, join_or, shown
from sft_dist.config.schema import Config


@dataclass(frozen=True)
class Problem:
    """One mistake. ``key`` is dotted; ``what`` starts after it; ``fix`` is one line.

    ``structural``: values below the key cannot be judged before it is corrected.
    """

    key: str
    what: str
    fix: str
    structural: bool = False


def shape_problems(value: Mapping[Any, Any]) -> list[Problem]:
    """Every mistake of shape in a whole configuration, in the order of the file."""
    return list(_in_section(value, model=Config, prefix=""))


def _in_section(value: Mapping[Any, Any], *, model: type[BaseModel], prefix: str) -> Iterator[Problem]:
    for name, inner in value.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        field = model.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            yield Problem(key, "is not a key", _fix_unknown(str(name), model=model, key=key))
        else:
            yield from _at(inner, here=TypeHere.of_field(field), key=key)


def _at(value: Any, *, here: TypeHere, key: str) -> Iterator[Problem]:
    union, model, item = here.tagged_union(), here.model(), here.item()
    if value is None and here.allows_null():
        return
    if union is not None or model is not None:
        if not isinstance(value, Mapping):
            yield Problem(key, f"is {shown(value)}", f"make {key} {allowed(here)}", structural=True)
        elif union is not None:
            yield from _in_union(value, union=union, key=key)
        elif model is not None:
            yield from _in_section(value, model=model, prefix=key)
    elif item is not None and isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _at(entry, here=item, key=f"{key}.{index}")


def _in_union(value: Mapping[Any, Any], *, union: TaggedUnion, key: str) -> Iterator[Problem]:
    tag_key = f"{key}.{union.tag_key}"
    tag = value.get(union.tag_key, union.default)
    choices = join_or(list(union.models))
    if tag is None:
        yield Problem(tag_key, "is missing", f"set {tag_key} to {choices}", structural=True)
        return
    if not isinstance(tag, str) or tag not in union.models:
        yield Problem(tag_key, f"is {shown(tag)}", f"set {tag_key} to {choices}", structural=True)
        return
    own: dict[Any, Any] = {}
    for name, inner in value.items():
        owners = [other for other, model in union.models.items() if name in model.model_fields]
        if owners and tag not in owners:
            yield Problem(
                f"{key}.{name}",
                f"belongs to {union.tag_key} {join_or(owners)}, but {tag_key} is {tag}",
                f"remove {key}.{name}, or replace the whole section: the override '{key}={{{union.tag_key}: {tag}}}'",
            )
        else:
            own[name] = inner
    yield from _in_section(own, model=union.models[tag], prefix=key)


# What other trainers call our keys.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "rank": "method.r",
    "lora_r": "method.r",
    "lora_rank": "method.r",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_target": "method.target_modules",
    "lora_target_modules": "method.target_modules",
    "per_device_train_batch_size": "train.micro_batch_size",
    "batch_size": "train.global_batch_size",
    "num_train_epochs": "train.num_epochs",
    "epochs": "train.num_epochs",
    "cutoff_len": "data.max_seq_len",
    "max_length": "data.max_seq_len",
    "max_seq_length": "data.max_seq_len",
    "sequence_len": "data.max_seq_len",
    "sample_packing": "data.packing",
    "eval_steps": "eval.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "base_model": "model.path",
    "load_in_4bit": "method.type",
    "load_in_8bit": "method.quantization",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "gradient_checkpointing": "activation_checkpointing.mode",
    "gradient_accumulation_steps": "train.global_batch_size",
    "model_name_or_path": "model.path",
    "neftune_noise_alpha": "train.neftune_alpha",
    "label_smoothing_factor": "train.label_smoothing",
    "torch_compile": "train.compile",
    "metric_for_best_model": "checkpoint.best_metric",
    "load_best_model_at_end": "checkpoint.final",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_threshold": "early_stopping.threshold",
}


def _fix_unknown(name: str, *, model: type[BaseModel], key: str) -> str:
    """Nearest names of this section; where else the very name exists; else all names of this section."""
    elsewhere = [dotted for other, dotted in every_key(TypeHere.of(Config)) if other == name and dotted != key]
    near = difflib.get_close_matches(name, list(model.model_fields), n=3)
    if name in OTHER_NAMES:
        return f"it is called {OTHER_NAMES[name]} here"
    if name.startswith("resume"):
        return "it is an option of the command: train CONFIG --resume auto"
    hints = []
    if elsewhere:
        hints.append(f"{name} is a key elsewhere: write {join_or(list(dict.fromkeys(elsewhere)))}")
    if near:
        section = key.removesuffix(name)
        hints.append(f"did you mean {join_or([section + other for other in near])}?")
    return "; ".join(hints) if hints else f"remove it; the keys here are {', '.join(model.model_fields)}"
