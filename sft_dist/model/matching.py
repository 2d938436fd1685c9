"""Which tensor in a model's files is which parameter of the model that a run trains.

The files use the names that Transformers knows, or those of its earlier versions; what does not match is an error
before anything is read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from sft_dist.errors import CheckpointError
from sft_dist.model.build import SftModel
from sft_dist.model.prequantized import DENSE_FIX, StoredState, split_key, state_parts, unreadable_state
from sft_dist.model.quantized import QuantizedLinear
from sft_dist.model.safetensors_folder import TRAINABLE_DTYPES, SafetensorsFolder

SAME_MODEL_FIX = "config.json and the weights must come from the same model"

# Files of older versions of Transformers hold what a model computes when it is made.
COMPUTED_HERE = r"rotary_emb\.inv_freq"


@dataclass(frozen=True)
class _Wanted:
    """What the files must hold under a name.

    Args:
        names: that Transformers knows it by.
        dtypes: one of which it is stored in, as the files name them; None for any.
        shape, num_bytes: of it; None where they do not matter.
    """

    names: tuple[str, ...]
    dtypes: frozenset[str] | None
    shape: tuple[int, ...] | None
    num_bytes: int | None = None
    is_required: bool = True

    def mismatch(self, folder: SafetensorsFolder, key: str) -> str | None:
        """What is wrong with the tensor that the files hold."""
        stored = folder.tensors[key]
        if self.shape is not None and stored.shape != self.shape:
            return f"{key} {list(stored.shape)} instead of {list(self.shape)}"
        if self.num_bytes is not None and folder.num_bytes(key) != self.num_bytes:
            return f"{key} of {folder.num_bytes(key)} bytes instead of {self.num_bytes}"
        return f"{key} in {stored.dtype}" if self.dtypes is not None and stored.dtype not in self.dtypes else None


def _wanted(model: SftModel) -> dict[str, _Wanted]:
    """By name in ``model``; the quantisation state of "X.weight" is "X.weight.PART"."""
    wanted, layers = {}, quantized_layers(model)
    for name, tensor in model.base.items():
        if not tensor.is_packed:
            wanted[name] = _Wanted(tensor.names, TRAINABLE_DTYPES, tensor.shape)
            continue
        wanted[name] = _Wanted(tensor.names, None, None, layers[name].weight.nbytes)
        for part, state in state_parts(layers[name]).items():
            names = tuple(f"{hf_name}.{part}" for hf_name in tensor.names)
            wanted[f"{name}.{part}"] = _Wanted(names, state.dtypes, state.shape, None, state.is_required)
    return wanted


def match_keys(folder: SafetensorsFolder, model: SftModel) -> dict[str, str]:
    """Name in ``model`` -> key in the files, for every tensor of the base and for the state of quantised ones.

    The state of "X.weight" is "X.weight.PART"; see ``prequantized.state_parts``.

    Raises:
        CheckpointError: they are not the same model's, or hold quantised weights that are not read.
    """
    wanted = _wanted(model)
    by_hf_name = {name: sft_name for sft_name, tensor in model.base.items() for name in tensor.names}
    is_packed = any(tensor.is_packed for tensor in model.base.values())
    transforms = get_model_conversion_mapping(model.causal_lm)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    ignored = [re.compile(p) for p in (*(model.causal_lm._keys_to_ignore_on_load_unexpected or ()), COMPUTED_HERE)]
    keys: dict[str, str] = {}
    unexpected, mismatched = [], []
    for key in folder.tensors:
        weight, part = split_key(key) if is_packed else (key, "")
        hf_name, converter = rename_source_key(
            weight, renamings, converters, model.causal_lm.base_model_prefix, by_hf_name
        )
        name = f"{by_hf_name.get(hf_name)}.{part}" if part else by_hf_name.get(hf_name)
        if converter is not None or name not in wanted:
            if not any(pattern.search(key) for pattern in ignored):
                unexpected.append(key)
            continue
        keys.setdefault(name, key)
        mismatch = wanted[name].mismatch(folder, key)
        if mismatch is not None:
            mismatched.append(mismatch)
    missing = [each.names[0] for name, each in wanted.items() if each.is_required and name not in keys]
    _refuse(folder, "missing", missing)
    _refuse(folder, "unexpected", unexpected)
    _check_quantization(folder, model, keys)  # which may explain why shapes differ
    _refuse(folder, "mismatched", mismatched)
    return keys


def _refuse(folder: SafetensorsFolder, what: str, found: list[str]) -> None:
    if found:
        raise CheckpointError(
            f"model.path: the weights in {folder.folder} have {len(found)} {what} keys, such as {min(found)}",
            fix=SAME_MODEL_FIX,
        )


def _check_quantization(folder: SafetensorsFolder, model: SftModel, keys: dict[str, str]) -> None:
    """Looks into what is noted beside the tensors of weights that are quantised in the files.

    Raises:
        CheckpointError: they were quantised in a way that is not read.
    """
    for name, layer in quantized_layers(model).items():
        tensor = model.base[name]
        if tensor.is_packed:
            try:
                reason = unreadable_state(layer, stored_state(folder, keys, name))
            except ValueError:
                reason = "has a damaged quant_state"
            if reason is not None:
                raise CheckpointError(f"model.path: {tensor.names[0]} in {folder.folder} {reason}", fix=DENSE_FIX)


def stored_state(folder: SafetensorsFolder, keys: dict[str, str], name: str) -> StoredState:
    """Reads a part of the quantisation state of a weight, flat; None where the files lack it."""

    def read(part: str) -> Tensor | None:
        key = keys.get(f"{name}.{part}")
        return None if key is None else folder.read(key, 0, math.prod(folder.tensors[key].shape))

    return read


def quantized_layers(model: SftModel) -> dict[str, QuantizedLinear]:
    """By the names of their weights."""
    return {f"{n}.weight": module for n, module in model.named_modules() if isinstance(module, QuantizedLinear)}
