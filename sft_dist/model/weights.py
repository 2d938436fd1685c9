"""The first values of a model's parameters, read in parts, so that no rank reads or holds more than it keeps.

A model is built on the meta device, sharded there, and filled by :func:`fill`, one parameter after the other: base
weights from safetensors, each rank its own elements; weights that the run wants quantised are quantised on the way in,
unless they are in the files already; adapters from a generator of their own, so that they are the same on any number of
ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sft_dist.config.schema import LoraMethod
from sft_dist.errors import CheckpointError
from sft_dist.model.build import TORCH_DTYPES, SftModel, build_model
from sft_dist.model.hub import model_folder
from sft_dist.model.initial import InitialAdapters
from sft_dist.model.initial_virtual_tokens import InitialVirtualTokens, init_token_ids
from sft_dist.model.matching import match_keys, quantized_layers, stored_state
from sft_dist.model.prequantized import read_buffer
from sft_dist.model.safetensors_folder import SafetensorsFolder, UnmappedFolder
from sft_dist.model.spec import ModelSpec
from sft_dist.model.token_rows import TOKEN_ROWS
from sft_dist.runtime.memory import release_freed_memory

# A rank's own, after which the host memory that filling it took on the way is handed back.
RELEASE_EVERY_BYTES = 1 << 26

# What PEFT calls the layer that an adapter is on.
UNDER_ADAPTER = ".base_layer"

# Weights; bitsandbytes on a CPU needs 64 bytes for each of them while it quantises to NF4.
QUANTIZED_AT_ONCE = 1 << 19

# Elements of a tied pair that are compared at a time.
COMPARED_AT_ONCE = 1 << 24

# Elements that are added up at a time to the mean of a matrix's rows; the same everywhere, so that the sum is.
SUMMED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a parameter.

    Args:
        parameter: takes the place of the meta parameter in the model.
        local: [n] flat, a view of the rank's own elements.
        start: of those elements in the flattened whole.
    """

    parameter: nn.Parameter
    local: Tensor
    start: int


Place = Callable[[nn.Parameter], AbstractContextManager[Part]]


class Weights:
    """Reads any part of any parameter of a model.

    Args:
        model: on the meta device.
        seed: of the first values of adapters and virtual tokens.
        on_bytes: is told how many bytes were read.
        mapped: map the files; else read them (``UnmappedFolder``).

    Raises:
        CheckpointError: weights are missing, too many, of another shape, or damaged; before any of them is read.
        ConfigError: virtual tokens cannot start from ``method.init_text``.
    """

    def __init__(
        self,
        model: SftModel,
        spec: ModelSpec,
        *,
        seed: int,
        on_bytes: Callable[[int], None] = lambda _: None,
        mapped: bool = True,
    ) -> None:
        self._folder = (SafetensorsFolder if mapped else UnmappedFolder)(model_folder(spec.path, spec.revision))
        self._base = model.base
        self._keys = match_keys(self._folder, model)
        self._compute, self._on_bytes = TORCH_DTYPES[spec.compute], on_bytes
        self._quantized = quantized_layers(model)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._adapters: InitialAdapters | None = None
        if isinstance(spec.method, LoraMethod):
            self._adapters = InitialAdapters(
                spec.method, seed=seed, compute=self._compute, dense=self._dense, stored=self._stored
            )
            self._adapters.check({p.name: p.shape for p in spec.trainable}, spec.tokens.trained_ids)
        self._token_ids = spec.tokens.trained_ids
        self._means: dict[str, Tensor] = {}
        self._splits_weights = isinstance(spec.method, LoraMethod) and spec.method.init == "pissa"
        self._virtual: InitialVirtualTokens | None = None
        if model.prompt is not None:
            embedding = model.causal_lm.get_input_embeddings().weight
            name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
            read_embedding = partial(self._read, name)
            self._virtual = InitialVirtualTokens(model.prompt, spec, seed=seed, read_embedding=read_embedding)

    @property
    def num_bytes(self) -> int:
        """Of all weights in the files."""
        return sum(self._folder.num_bytes(key) for key in self._keys.values())

    def read_into(self, name: str, part: Part) -> _Scales | None:
        """Fills a rank's part of a parameter.

        Returns:
            for a weight that was quantised here, the scales of the units that begin in the part; the layer needs
            those of all parts.
        """
        if name in self._quantized:
            if not self._base[name].is_packed:
                return self._quantize_into(name, part)
            size = part.local.element_size()
            stop = part.start + part.local.numel()
            packed = self._folder.read_bytes(self._keys[name], part.start * size, stop * size)
            self._on_bytes(packed.nbytes)
            part.local.view(torch.uint8).copy_(packed)
            return None
        values = self._values(name, part.start, part.start + part.local.numel())
        if self._compute not in (values.dtype, part.local.dtype):
            # All strategies start from the same values, those that keep the master weight in a finer dtype too.
            values = values.to(self._compute)
        part.local.copy_(values)
        return None

    def set_scales(self, name: str, scales: _Scales, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Gives a layer that was quantised here the scales of all its units.

        Args:
            group: the ranks whose parts make up the whole; None where each rank has all of it. Each of them must call.
        """
        layer = self._quantized[name]
        absmax = torch.zeros(layer.num_units, dtype=torch.float32, device=device)
        absmax[scales.first : scales.first + scales.absmax.numel()] = scales.absmax
        if group is not None:
            # Every unit begins in one part, so this sum only adds zeros to it.
            dist.all_reduce(absmax, group=group)
        layer.set_scales(absmax)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A and B that an adapter of PiSSA or LoftQ started from."""
        assert self._adapters is not None
        return self._adapters.factors(layer)

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """[n, h] rows of a matrix of the base model as a run starts from them; only they are read."""
        width = self._base[name].shape[1]
        return torch.stack([self._read(name, id * width, (id + 1) * width).to(self._compute) for id in ids])

    def buffer(self, name: str) -> Tensor | None:
        """A buffer by its name in the model; None where it is not in the files."""
        if name in self._base:
            return self._read(name, 0, self._base[name].numel).view(self._base[name].shape)
        layer, _, buffer = name.rpartition(".")
        weight = f"{layer}.weight"
        if weight in self._quantized and self._base[weight].is_packed:
            bits = read_buffer(self._quantized[weight], buffer, stored_state(self._folder, self._keys, weight))
            self._on_bytes(bits.nbytes)
            return bits
        return None

    def _values(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start] what a parameter starts from."""
        if self._virtual is not None and name not in self._base:
            return self._virtual.values(name, start, stop)
        if self._adapters is None:
            return self._read(name, start, stop)
        if self._adapters.has(name):
            return self._adapters.saved(name, start, stop)
        if name.endswith(TOKEN_ROWS):
            return self.rows(f"{name.removesuffix(TOKEN_ROWS)}.weight", self._token_ids).flatten()[start:stop]
        if name not in self._base:
            return self._adapters.value(name, self._shapes[name]).flatten()[start:stop]
        layer = name.removesuffix(f"{UNDER_ADAPTER}.weight")
        if self._splits_weights and layer != name:
            return self._adapters.frozen_rest(layer).flatten()[start:stop]
        return self._read(name, start, stop)

    def _dense(self, layer: str) -> Tensor:
        """[out, in] fp32 the weight under an adapter as the files have it, rounded to the compute dtype."""
        tensor = self._base[f"{layer}{UNDER_ADAPTER}.weight"]
        whole = self._folder.read(self._keys[f"{layer}{UNDER_ADAPTER}.weight"], 0, tensor.numel)
        return whole.to(self._compute).float().view(tensor.shape)

    def _stored(self, layer: str) -> Tensor:
        """[out, in] fp32 the weight under an adapter as the model holds it."""
        name = f"{layer}{UNDER_ADAPTER}.weight"
        return self.dequantized(name).float() if name in self._quantized else self._dense(layer)

    def is_quantized(self, name: str) -> bool:
        """Whether the model holds a weight in fewer bits."""
        return name in self._quantized

    def dequantized(self, name: str) -> Tensor:
        """[out, in] of a quantised weight, in the compute dtype: what the model multiplies with."""
        place = self._quantized[name]
        packed = nn.Parameter(torch.empty(self._shapes[name], dtype=self._compute), requires_grad=False)
        whole = copy(place)
        whole._parameters, whole._buffers = {**place._parameters, "weight": packed}, dict(place._buffers)
        scales = self.read_into(name, Part(packed, packed.view(-1), 0))
        if scales is not None:
            whole.set_scales(scales.absmax)
        else:
            layer = name.removesuffix(".weight")
            whole._buffers = {kind: self.buffer(f"{layer}.{kind}") for kind in whole._buffers}
        return whole.dequantize(whole.stored(), (place.out_features, place.in_features), self._compute)

    def key(self, name: str) -> str:
        """What the files call a tensor of the base model."""
        return self._keys[name]

    def base_values(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start] flat elements of a tensor of the base model that is not quantised, as ``_read``."""
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start] flat elements of a tensor of the base model, in the files' dtype if all are in the files."""
        stored = min(stop, self._base[name].numel)
        values = self._folder.read(self._keys[name], min(start, stored), stored)
        self._on_bytes(values.numel() * values.element_size())
        if stored == stop:
            return values
        mean = self._mean_row(name)
        first = max(start, stored) - stored
        rows = mean.repeat(-(-(stop - stored) // mean.numel()))[first : stop - stored]
        return torch.cat([values.to(self._compute), rows])

    def _mean_row(self, name: str) -> Tensor:
        """[h] of the rows in the files, added up in fp64 in one order, so that every rank gets the same bytes.

        A token that starts there is as likely as the others on average (Hewitt 2021, "Initializing new word embeddings
        for pretrained language models"). Transformers samples around it; the mean itself needs no random numbers.
        """
        if name not in self._means:
            num_rows, width = self._base[name].shape
            total = torch.zeros(width, dtype=torch.float64)
            rows_at_once = max(1, SUMMED_AT_ONCE // width)
            for first in range(0, num_rows, rows_at_once):
                last = min(num_rows, first + rows_at_once)
                part = self._folder.read(self._keys[name], first * width, last * width)
                total += part.view(-1, width).sum(dim=0, dtype=torch.float64)
                self._on_bytes(part.nbytes)
            self._means[name] = (total / num_rows).to(self._compute)
        return self._means[name]

    def _quantize_into(self, name: str, part: Part) -> _Scales:
        """Quantises whole units: those at the part's ends also where they reach over them."""
        layer = self._quantized[name]
        unit = math.prod(self._shapes[name]) // layer.num_units  # in packed elements
        at_once = max(1, QUANTIZED_AT_ONCE // layer.unit)
        start, stop = part.start, part.start + part.local.numel()
        begin = -(-start // unit)
        if start == stop:
            return _Scales(begin, torch.empty(0, device=part.local.device))
        first, last = start // unit, -(-stop // unit)
        absmax = []
        for chunk in range(first, last, at_once):
            end = min(last, chunk + at_once)
            values = self._read(name, chunk * layer.unit, end * layer.unit)
            packed, scales = layer.quantize_units(values.to(part.local.device, self._compute))
            low, high = max(start, chunk * unit), min(stop, end * unit)
            part.local[low - start : high - start] = packed[low - chunk * unit : high - chunk * unit]
            absmax.append(scales)
        return _Scales(begin, torch.cat(absmax)[begin - first :])


@dataclass(frozen=True)
class _Scales:
    """[n] fp32 scales of units ``first``, ``first`` + 1, ..."""

    first: int
    absmax: Tensor


def fill(
    model: SftModel, weights: Weights, place: Place, device: torch.device, *, group: dist.ProcessGroup | None
) -> None:
    """Gives every parameter its storage and first values, one at a time; a tied one once.

    Args:
        place: makes a rank's part of a meta parameter; what it does when its context ends comes after the values.
        device: of the buffers, which every rank holds whole.
        group: the ranks whose parts make up a whole parameter; None where each rank has all of it.
    """
    owners = defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((module, attribute))
    since_release = 0
    for name, meta in list(model.named_parameters()):
        with place(meta) as part:
            scales = weights.read_into(name, part)
        for module, attribute in owners[id(meta)]:
            module._parameters[attribute] = part.parameter
        if scales is not None:
            weights.set_scales(name, scales, device, group)
        since_release += part.local.nbytes
        if since_release > RELEASE_EVERY_BYTES:
            release_freed_memory()
            since_release = 0
    release_freed_memory()
    for prefix, module in model.named_modules():
        for attribute, buffer in module.named_buffers(recurse=False):
            stored = weights.buffer(f"{prefix}.{attribute}")
            module._buffers[attribute] = (buffer if stored is None else stored.to(buffer.dtype)).to(device)


def check_weights(spec: ModelSpec) -> None:
    """What ``Weights`` refuses, and the values of tied weights that are stored twice.

    Raises:
        CheckpointError: the weights are not those of the model.
        ConfigError: as ``Weights``.
    """
    init_token_ids(spec)
    model = build_model(spec)
    folder = Weights(model, spec, seed=0)._folder
    for tensor in model.base.values():
        stored = [name for name in tensor.names if name in folder.tensors]
        for other in stored[1:]:
            for start in range(0, tensor.numel, COMPARED_AT_ONCE):
                stop = min(tensor.numel, start + COMPARED_AT_ONCE)
                if not torch.equal(folder.read(stored[0], start, stop), folder.read(other, start, stop)):
                    raise CheckpointError(
                        f"model.path: config.json of {spec.path} ties {other} to {stored[0]}, and the weights differ",
                        fix="set tie_word_embeddings to false there",
                    )
