"""Which layers quantising would change most: ``method.quantization.skip: auto``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from sft_dist.config.schema import FullMethod
from sft_dist.model.build import QUANTIZED, TORCH_DTYPES, build_meta_model, quantizable
from sft_dist.model.hub import model_folder
from sft_dist.model.matching import match_keys
from sft_dist.model.quantized import QuantizedLinear
from sft_dist.model.safetensors_folder import SafetensorsFolder
from sft_dist.model.spec import Dtype

Quantization = Literal["nf4", "int8"]

DEFAULT_BUDGET = 0.1

# Weights of a layer that are looked at, spread over it: 8,192 blocks of NF4, or 64 rows of 8,192.
SAMPLED = 1 << 19
MIN_RUNS = 64


@dataclass(frozen=True)
class Layer:
    """A linear layer, quantised or not.

    Args:
        error: |W - Q(W)|^2 / |W|^2 of the sample; infinite where the layer cannot be packed.
        num_bytes: quantised, with its state.
        more_bytes: that it takes if it is not; none where there is no choice.
    """

    name: str
    error: float
    num_bytes: int
    more_bytes: int


def skip_by_error(
    path: str, revision: str | None, quantization: Quantization, budget: float, compute: Dtype
) -> list[str]:
    """Paths of the layers that stay in ``compute``, in the model's own order.

    The layer with the largest relative error comes first, then the next whose bytes the budget still allows.

    Args:
        budget: ``skip_budget``.

    Raises:
        ConfigError, CheckpointError: ``measure``.
    """
    layers = measure(path, revision, quantization, compute)
    left = int(budget * sum(layer.num_bytes for layer in layers))
    chosen = set()
    for layer in sorted(layers, key=lambda layer: -layer.error):
        if layer.more_bytes <= left:
            chosen.add(layer.name)
            left -= layer.more_bytes
    return [layer.name for layer in layers if layer.name in chosen]


@lru_cache(maxsize=8)  # a run is described several times while `auto` is decided, and 70B take 15 s
def measure(path: str, revision: str | None, quantization: Quantization, compute: Dtype) -> tuple[Layer, ...]:
    """Every linear layer, in the model's own order.

    Errors are computed on the CPU from a sample that is the same everywhere, so that every rank and every machine
    finds the same.

    Raises:
        ConfigError: the weights are not on this machine.
        CheckpointError: they are damaged, or not the model's.
    """
    dense = build_meta_model(path, revision, FullMethod(), compute)
    folder = SafetensorsFolder(model_folder(path, revision))
    keys = match_keys(folder, dense)
    kind, storage = QUANTIZED[quantization], TORCH_DTYPES[compute]
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    layers = []
    for name, linear in quantizable(dense.causal_lm).items():
        if kind.indivisible(linear, storage) is None:
            sample = _sample(folder, keys[names[id(linear.weight)]], kind.in_place_of(linear, storage))
            layers.append(_measured(name, linear, sample.to(storage), kind))
        else:
            layers.append(Layer(name, error=math.inf, num_bytes=0, more_bytes=0))
    return tuple(layers)


def _measured(name: str, linear: nn.Linear, sample: Tensor, kind: type[QuantizedLinear]) -> Layer:
    """
    Args:
        sample: [units, weights of a unit] of the layer.
    """
    part = nn.Linear(sample.shape[1], sample.shape[0], bias=False, device="meta")
    part.weight = nn.Parameter(sample, requires_grad=False)
    quantized = kind.quantize(part, sample.dtype)
    values = quantized.dequantize(quantized.stored(), (sample.shape[0], sample.shape[1]), sample.dtype).double()
    size = sample.double().square().sum()
    error = (sample.double() - values).square().sum() / size if size > 0 else torch.zeros(())
    whole = kind.in_place_of(linear, sample.dtype)
    num_bytes = whole.weight.nbytes + sum(buffer.nbytes for buffer in whole.buffers())
    return Layer(name, float(error), num_bytes, linear.weight.numel() * sample.itemsize - num_bytes)


def _sample(folder: SafetensorsFolder, key: str, layer: QuantizedLinear) -> Tensor:
    """[units, weights of a unit] of a stored weight: runs of at most a row, evenly spread, or all of a small one."""
    unit, total = layer.unit, layer.num_units
    run = max(1, min(layer.in_features, SAMPLED // MIN_RUNS) // unit)
    num_runs = SAMPLED // (run * unit)
    if run * num_runs >= total or num_runs < 2:
        return folder.read(key, 0, min(total, max(1, SAMPLED // unit)) * unit).view(-1, unit)
    firsts = [number * (total - run) // (num_runs - 1) for number in range(num_runs)]
    return torch.cat([folder.read(key, first * unit, (first + run) * unit) for first in firsts]).view(-1, unit)
