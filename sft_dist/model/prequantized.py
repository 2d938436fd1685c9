"""Base models whose files hold quantised weights already: which of them can be trained, and what is in their files.

``config.json`` alone decides which layers are quantised and how, so that a run is described without its weights; the
files are compared with it before anything is read. Layout and names are those of Transformers with bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from sft_dist.config.schema import MethodConfig, QloraMethod
from sft_dist.errors import ConfigError
from sft_dist.model.int8 import Int8Linear
from sft_dist.model.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Linear
from sft_dist.model.quantized import QuantizedLinear

DENSE_FIX = "give the 16-bit model that it was made from; method.type qlora quantises it while it is loaded"


@dataclass(frozen=True)
class StoredQuantization:
    """What ``config.json`` says of the weights in the files.

    Args:
        kind: as ``method.quantization`` names it.
        double_quantization: the scales of NF4 are quantised in turn.
        skip_modules: patterns of layers that were left as they were; None for Transformers' own choice.
    """

    kind: Literal["nf4", "int8"]
    double_quantization: bool
    skip_modules: tuple[str, ...] | None

    def covers(self, model: PreTrainedModel) -> Callable[[str], bool]:
        """Whether the layer of a name is quantised in the files, by Transformers' own rules."""
        patterns = HfQuantizer.get_modules_to_not_convert(
            model, None if self.skip_modules is None else list(self.skip_modules), model._keep_in_fp32_modules
        )
        return lambda name: should_convert_module(name, patterns)

    def in_place_of(self, linear: nn.Linear, storage: torch.dtype) -> QuantizedLinear:
        """The layer that holds the files' values."""
        if self.kind == "nf4":
            return NF4Linear.in_place_of(linear, storage, double_quantization=self.double_quantization)
        return Int8Linear.in_place_of(linear, storage)


def stored_quantization(config: PretrainedConfig, path: str) -> StoredQuantization | None:
    """How the weights of a model are quantised in its files; None where they are not.

    Raises:
        ConfigError: in a way that cannot be trained on.
    """
    for key in ("quantization_config", "compression_config"):
        settings = getattr(config, key, None)
        if settings is not None:
            break
    else:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    in_4_bits, in_8_bits = bool(settings.get("load_in_4bit")), bool(settings.get("load_in_8bit"))
    if not (in_4_bits or in_8_bits):
        raise ConfigError(
            f"model.path: {path} is quantised with {settings.get('quant_method', 'an unnamed method')}, whose weights "
            "are not read; those of bitsandbytes are (nf4 and int8)",
            fix=DENSE_FIX,
        )
    skip: list[str] | None = settings.get("llm_int8_skip_modules")
    skip_modules = None if skip is None else tuple(skip)
    if in_8_bits:
        if settings.get("llm_int8_has_fp16_weight"):
            raise ConfigError(
                f"model.path: {path} sets llm_int8_has_fp16_weight: 16-bit weights that are quantised at each use",
                fix=DENSE_FIX,
            )
        return StoredQuantization("int8", False, skip_modules)
    data_type = settings.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
    if data_type != "nf4":
        raise ConfigError(
            f"model.path: {path} is quantised to {data_type}, and 4-bit weights are read in nf4 only", fix=DENSE_FIX
        )
    return StoredQuantization("nf4", bool(settings.get("bnb_4bit_use_double_quant")), skip_modules)


def check_method(stored: StoredQuantization | None, method: MethodConfig, path: str) -> None:
    """Refuses what needs weights that a quantised base has not.

    Raises:
        ConfigError: the method trains another base than the one in the files.
    """
    if stored is None:
        return
    if not isinstance(method, QloraMethod):
        raise ConfigError(
            f"method.type is {method.type}, but {path} is quantised to {stored.kind}: it has no 16-bit weights",
            fix="set method.type to qlora, or give the 16-bit model that it was made from",
        )
    if method.quantization.type != stored.kind:
        raise ConfigError(
            f"method.quantization.type is {method.quantization.type}, but {path} is quantised to {stored.kind} already",
            fix=f"set method.quantization.type to {stored.kind}, or give the 16-bit model that it was made from",
        )
    if method.quantization.skip:
        raise ConfigError(
            f"method.quantization.skip chooses what is quantised, but {path} is quantised already",
            fix="remove method.quantization.skip, or give the 16-bit model that it was made from",
        )
    if method.init == "loftq":
        raise ConfigError(
            f"method.init loftq starts from the error of quantisation, which nothing tells of {path}: it is quantised",
            fix="set method.init to default, or give the 16-bit model that it was made from",
        )


def split_key(key: str) -> tuple[str, str]:
    """("X.weight", part of its quantisation state) of a key in the files; ("X.weight", "") for the weight itself."""
    for part in ("SCB", "weight_format"):
        if key.endswith(f".{part}"):
            return f"{key.removesuffix(part)}weight", part
    layer, found, part = key.partition(".weight.")
    return (f"{layer}.weight", part) if found else (key, "")


# What bitsandbytes notes beside the tensors of a layer: JSON, as bytes.
NF4_SETTINGS = "quant_state.bitsandbytes__nf4"

# Reads a part of a layer's quantisation state, flat; None where the files lack it.
StoredState = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class StatePart:
    """A tensor beside a quantised weight in the files: its shape and its dtype there, None for any."""

    shape: tuple[int, ...] | None
    dtypes: frozenset[str] | None
    is_required: bool = True


def state_parts(layer: QuantizedLinear) -> dict[str, StatePart]:
    """What the files hold beside the weight of ``layer``, and what they may hold."""
    units = (layer.num_units,)
    if isinstance(layer, Int8Linear):
        return {"SCB": StatePart(units, FP32), "weight_format": StatePart(None, None, is_required=False)}
    assert isinstance(layer, NF4Linear)
    # bitsandbytes, too, takes the levels of NF4 from a constant and not from the files.
    parts = {NF4_SETTINGS: StatePart(None, UINT8), "quant_map": StatePart((16,), FP32, is_required=False)}
    if not layer.double_quantization:
        return parts | {"absmax": StatePart(units, FP32)}
    nested = (-(-layer.num_units // NESTED_BLOCK_SIZE),)
    return parts | {
        "absmax": StatePart(units, UINT8),
        "nested_absmax": StatePart(nested, FP32),
        "nested_quant_map": StatePart((256,), FP32),
    }


FP32, UINT8 = frozenset({"F32"}), frozenset({"U8"})


def read_buffer(layer: QuantizedLinear, buffer: str, read: StoredState) -> Tensor:
    """The bits of a buffer of a quantised layer."""
    if buffer == "offset":
        offset = _settings(read)["nested_offset"]
        return torch.tensor([offset], dtype=torch.float32).view(torch.int32)
    value = read({"scale_code": "nested_quant_map", "row_absmax": "SCB"}.get(buffer, buffer))
    assert value is not None, f"{type(layer).__name__}: what the files lack was found out before"
    return value if value.dtype == torch.uint8 else value.view(torch.int32)


def unreadable_state(layer: QuantizedLinear, read: StoredState) -> str | None:
    """Why the files' values are not what ``layer`` computes with, as far as they tell; None where they are.

    Raises:
        ValueError: what they tell is damaged.
    """
    if isinstance(layer, Int8Linear):
        layout = read("weight_format")
        # 0: row after row. The others are orders that older bitsandbytes made for one kind of GPU.
        return None if layout is None or not layout.any() else "is laid out for the GPU that it was saved on"
    assert isinstance(layer, NF4Linear)
    settings, wanted = _settings(read), {"quant_type": "nf4", "blocksize": BLOCK_SIZE}
    if layer.double_quantization:
        wanted["nested_blocksize"] = NESTED_BLOCK_SIZE
    if settings.get("shape") != [layer.out_features, layer.in_features]:
        return f"was quantised as {settings.get('shape')} instead of {[layer.out_features, layer.in_features]}"
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            return f"was quantised with {key} {settings[key]} instead of {value}"
    return None


def _settings(read: StoredState) -> dict[str, Any]:
    noted = read(NF4_SETTINGS)
    settings: dict[str, Any] = {} if noted is None else json.loads(bytes(noted.tolist()))
    return settings
