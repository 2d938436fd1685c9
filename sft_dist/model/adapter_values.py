"""What an adapter changes of its base model, by the names that Transformers gives to the base's parameters.

The values come from an adapter in PEFT's format, or from the master weights of a checkpoint; both have PEFT's names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft_dist.config.schema import LoraMethod
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model.initial import peft_key, scaling_of
from sft_dist.model.safetensors_folder import UnmappedFolder
from sft_dist.model.weights import UNDER_ADAPTER

ADAPTED = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

# Settings of PEFT under which W + scaling * B A is not what it computes, with the values under which it is.
NOT_MERGED: dict[str, tuple[Any, ...]] = {
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "fan_in_fan_out": (False, None), "bias": ("none", None),
    "lora_bias": (False, None), "layer_replication": (None,), "use_qalora": (False, None),
    "target_parameters": (None, []), "megatron_config": (None,),
}  # fmt: skip

MERGE_ELSEWHERE = "merge it with merge_and_unload() of peft"


@dataclass(frozen=True)
class LowRank:
    """Names of the factors of a weight's change, and of DoRA's lengths of its rows."""

    a: str
    b: str
    magnitude: str | None


@dataclass(frozen=True)
class Adapter:
    """Changes by parameter of the base.

    Args:
        scaling: of B A.
        low_rank: weights that get a product added.
        whole: parameters that are replaced, with the name of what replaces them.
        rows: matrices of which the rows of ``token_ids`` are replaced, likewise.
        read: the values of a name, on the CPU, in any dtype.
        started_from: path of a layer -> (A, B) that an adapter started from, where it counts from a base without them
            (PiSSA).
    """

    scaling: float
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, str]
    rows: Mapping[str, str]
    token_ids: tuple[int, ...]
    read: Callable[[str], Tensor]
    started_from: Callable[[str], tuple[Tensor, Tensor]] | None = None

    @property
    def parameters(self) -> set[str]:
        """All that it changes."""
        return {*self.low_rank, *self.whole, *self.rows}

    def factors(self, parameter: str, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] in fp32, on the base as it is in its files.

        Args:
            name: that the weight has in the model of this project.
        """
        names = self.low_rank[parameter]
        a, b = self.read(names.a).float(), self.read(names.b).float()
        if self.started_from is None:
            return a, b
        first_a, first_b = self.started_from(name.removesuffix(f"{UNDER_ADAPTER}.weight"))
        # W - s B0 A0 + s B A, as ``export`` saves it.
        return torch.cat([a, -first_a]), torch.cat([b, first_b], dim=1)


NOTHING = Adapter(scaling=1.0, low_rank={}, whole={}, rows={}, token_ids=(), read=lambda name: torch.empty(0))


@dataclass
class _Names:
    """Names sorted by what they are, from the parameter that they change to themselves."""

    low_rank: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    def pairs(self) -> dict[str, LowRank]:
        """
        Raises:
            KeyError: a factor is missing.
        """
        return {
            parameter: LowRank(names[LORA_A], names[LORA_B], names.get(MAGNITUDE))
            for parameter, names in self.low_rank.items()
        }


def _sorted(names: Iterable[tuple[str, str]]) -> _Names:
    """
    Args:
        names: (PEFT's key, name to read by).
    """
    found = _Names()
    for key, name in names:
        path = key.removeprefix(ADAPTED)
        kind = next((kind for kind in (LORA_A, LORA_B, MAGNITUDE) if path.endswith(kind)), None)
        if kind is not None:
            found.low_rank.setdefault(f"{path.removesuffix(kind)}.weight", {})[kind] = name
        elif path.endswith(TOKEN_ROWS):
            found.rows[f"{path.removesuffix(TOKEN_ROWS)}.weight"] = name
        else:
            # Trained whole, or the base's own under an adapter of the output layer, which PEFT saves too.
            for part in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
                path = path.replace(part, ".")
            found.whole[path] = name
    return found


def adapter_settings(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / "adapter_config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no description of an adapter ({type(error).__name__}: {error})",
            fix="give the folder of an adapter in PEFT's format, e.g. the final/ of a run",
        ) from error
    return settings


def saved_adapter(folder: Path) -> Adapter:
    """An adapter in PEFT's format, of a run here or of any other LoRA training.

    Raises:
        ConfigError: it is of a kind that cannot be merged, or not by this project.
        CheckpointError: its files are damaged.
    """
    settings = adapter_settings(folder)
    kind = settings["peft_type"]
    if kind in VIRTUAL_TOKENS:
        raise cannot_merge_tokens(str(folder), VIRTUAL_TOKENS[kind])
    others = [key for key, plain in NOT_MERGED.items() if key in settings and settings[key] not in plain]
    if kind != "LORA" or others:
        what = f"is of the type {kind}" if kind != "LORA" else f"sets {others[0]}"
        raise ConfigError(f"{folder}: the adapter {what}, which is not merged here", fix=MERGE_ELSEWHERE)
    values = UnmappedFolder(folder, "adapter_model", key="the adapter")
    names = _sorted((key, key) for key in values.tensors)
    owners = settings.get("trainable_token_indices") or {}
    if isinstance(owners, list):
        owners = {"embed_tokens": owners}
    ids = {tuple(each) for each in owners.values()}
    try:
        low_rank = names.pairs()
    except KeyError as error:
        raise CheckpointError(f"{folder}: the adapter has a layer without {error}", fix="export it again") from None
    odd = [name for name in names.whole if "lora_" in name]
    if odd or len(ids) > 1:
        what = odd[0] if odd else "rows of other tokens in each matrix"
        raise ConfigError(f"{folder}: the adapter has {what}, which is not merged here", fix=MERGE_ELSEWHERE)

    def read(name: str) -> Tensor:
        stored = values.tensors[name]
        return values.read(name, 0, math.prod(stored.shape)).view(stored.shape)

    rank = settings["r"]
    return Adapter(
        scaling=settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank),
        low_rank=low_rank,
        whole=names.whole,
        rows=names.rows,
        token_ids=next(iter(ids), ()),
        read=read,
    )


def trained_adapter(
    method: LoraMethod,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    *,
    token_ids: tuple[int, ...],
    started_from: Callable[[str], tuple[Tensor, Tensor]],
) -> Adapter:
    """The adapter that a run has in memory or in a checkpoint.

    Args:
        names: of its trained parameters, as in ``SftModel.named_parameters()``.
        read: the master weight of a name.
        token_ids: whose rows are trained.
        started_from: as ``Weights.factors``.
    """
    found = _sorted((peft_key(name), name) for name in names)
    return Adapter(
        scaling=scaling_of(method),
        low_rank=found.pairs(),
        whole=found.whole,
        rows=found.rows,
        token_ids=token_ids,
        read=read,
        started_from=started_from if method.init == "pissa" else None,
    )


def trained_whole(names: Mapping[str, str], read: Callable[[str], Tensor]) -> Adapter:
    """A full run as an adapter that replaces what it trained.

    Args:
        names: parameter of the base -> name to read it by.
    """
    return Adapter(scaling=1.0, low_rank={}, whole=dict(names), rows={}, token_ids=(), read=read)


# PEFT's names for methods of virtual tokens, and those of the configuration.
VIRTUAL_TOKENS = {"PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix"}


def cannot_merge_tokens(what: str, method: str) -> ConfigError:
    """Why an adapter of virtual tokens is not merged."""
    return ConfigError(
        f"{what}: method.type {method} trains virtual tokens in front of every row and changes no weight of the base, "
        "so that there is nothing to merge them into",
        fix="export without --merge, and load the folder with peft on its base",
    )
