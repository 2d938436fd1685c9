"""An adapter in PEFT's format whose run is not here, as the configuration of a model that starts from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sft_dist.config.schema import LoraMethod
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import ConfigError
from sft_dist.model.adapter_values import adapter_settings
from sft_dist.model.card import TrainedWith
from sft_dist.model.hub import ModelNotHere, model_folder

# Settings of PEFT's LoRA that are not there here, and what they are where they change nothing.
NOT_HERE: dict[str, Any] = {
    "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "bias": "none", "lora_bias": False,
    "fan_in_fan_out": False, "exclude_modules": None, "target_parameters": None, "layer_replication": None,
}  # fmt: skip


def settings_of_adapter(folder: Path, base: str | None) -> dict[str, Any]:
    """Sections ``model``, ``method`` and, where they are known, ``precision`` and ``data``.

    The card of an artefact of ours knows how its base was quantised; of others the base is taken as it is.

    Args:
        base: model that the adapter is for; None: the one that it names.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is no LoRA adapter, has what cannot be built here, or its base is not here.
    """
    saved, card = adapter_settings(folder), TrainedWith.in_card(folder)
    if saved["peft_type"] != "LORA":
        kind = str(saved["peft_type"]).replace("_", " ").lower()
        raise ConfigError(
            f"{folder} is a {kind} adapter without its run: only LoRA adapters stand alone here",
            fix="give the run directory",
        )
    for key, neutral in NOT_HERE.items():
        if saved.get(key) and saved[key] != neutral:
            raise ConfigError(
                f"{folder} has {key}: {saved[key]} in adapter_config.json, which is not built here",
                fix="merge it with PEFT (merge_and_unload), and give the whole model",
            )
    if saved.get("trainable_token_indices") and card is None:
        raise ConfigError(
            f"{folder} has rows of single tokens, and no card says which tokens", fix="give the run directory"
        )
    path, revision = base or saved["base_model_name_or_path"], None if base else saved.get("revision")
    try:
        model_folder(path, revision, "config")
    except (ModelNotHere, ConfigError) as error:
        raise ConfigError(
            f"the base of the adapter {folder}, {path}, is not on this machine",
            fix="say where it is: --base-model PATH; a hub model: sft-dist model fetch CONFIG",
        ) from error
    model: dict[str, Any] = {"path": path}
    if revision is not None:
        model["revision"] = revision
    method: dict[str, Any] = {"type": "lora", "target_modules": _targets(saved["target_modules"])}
    sections: dict[str, Any] = {}
    if card is not None and isinstance(card.method, LoraMethod):
        method = card.method.model_dump(mode="json")
        model["add_tokens"] = card.add_tokens
        sections["precision"] = {"compute": card.compute}
    # As it is in the files: an adapter that began by PiSSA has twice the rank of its run.
    method |= {
        "r": saved["r"], "alpha": saved["lora_alpha"], "rslora": saved.get("use_rslora") or False,
        "dora": saved.get("use_dora") or False, "modules_to_save": saved.get("modules_to_save") or [],
        "init": "default", "init_from": str(folder), "dropout": 0.0,
    }  # fmt: skip
    template = _own_template(folder)
    if template is not None:
        sections["data"] = {"chat_template": template}
    return {"model": model, "method": method, **sections}


def _targets(targets: str | list[str]) -> str | list[str]:
    """PEFT takes a text for a regular expression of a layer's whole path, and a list for ends of paths."""
    if isinstance(targets, str):
        return targets if targets == "all-linear" else [f"re:{targets}"]
    return [rf"re:(.*\.)?{re.escape(name)}" for name in sorted(targets)]


def _own_template(folder: Path) -> str | None:
    """The chat template beside the adapter; None: there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = load_tokenizer(str(folder)).chat_template
    return template if isinstance(template, str) else None
