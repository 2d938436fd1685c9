"""Puts an adapter into the weights of its base, tensor by tensor and a stretch of rows at a time.

    W + scaling * B A                                   LoRA (Hu et al. 2021, arXiv 2106.09685)
    m / |W + scaling * B A| * (W + scaling * B A)       DoRA (Liu et al. 2024, arXiv 2402.09353), lengths of rows

Both are functions of the rows of W, so that no more of a dense weight is in memory than a stretch of it, in fp32,
whatever the size of the model. Of a weight that is dequantised there is one, of what is trained whole one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import xxhash
from torch import Tensor

from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model.adapter_values import MERGE_ELSEWHERE, Adapter
from sft_dist.model.build import BaseTensor, SftModel
from sft_dist.model.safetensors_writer import SafetensorsWriter, TensorPlan
from sft_dist.model.weights import Weights
from sft_dist.runtime.memory import release_freed_memory

# That are merged at a time: 16 MiB in fp32, few enough for freed memory to be used again at once.
ELEMENTS_AT_ONCE = 1 << 22

# After so many bytes what was freed on the way is handed back.
RELEASE_EVERY_BYTES = 1 << 28


class Merge:
    """A base model with an adapter in it, as tensors to be written.

    Args:
        model: on the meta device, as ``weights`` reads it; where it has adapters, their parameters are not looked at.
        dtype: of the weights that are written; buffers keep theirs.

    Raises:
        ConfigError: the adapter changes what the base has not, or parts what it ties.
    """

    def __init__(self, model: SftModel, weights: Weights, adapter: Adapter, dtype: torch.dtype) -> None:
        self._weights, self._adapter, self._dtype = weights, adapter, dtype
        self._base = model.base
        everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._shapes = {
            name: tensor.shape if weights.is_quantized(name) else tuple(everything[name].shape)
            for name, tensor in model.base.items()
        }
        self._buffer_dtypes = {n: everything[n].dtype for n, tensor in model.base.items() if tensor.is_buffer}
        self._check()

    @property
    def plans(self) -> list[TensorPlan]:
        """What is written, in the order of the model, by the names in the base's files.

        So programs that know the base's files know these: Transformers has other names for some models.
        """
        return [
            TensorPlan(self._weights.key(name), self._buffer_dtypes.get(name, self._dtype), self._shapes[name])
            for name in self._base
        ]

    def write(self, writer: SafetensorsWriter, *, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, str]:
        """Writes every tensor of ``plans``.

        Returns:
            XXH3-128 of the values in fp32, by the names that Transformers gives to the parameters.

        Raises:
            ConfigError: ``dtype`` cannot hold a value.
            CheckpointError: a weight is not finite, or the adapter's is of another shape.
        """
        digests, since_release = {}, 0
        for name, tensor in self._base.items():
            key, digest = self._weights.key(name), xxhash.xxh3_128()
            for part in self._parts(name, tensor):
                written = part if tensor.is_buffer else part.to(self._dtype)
                exact = written.float()
                self._require_finite(exact, part, tensor.names[0])
                writer.write(key, written)
                digest.update(exact.numpy().data)
                on_bytes(written.nbytes)
                since_release += written.nbytes
                if since_release > RELEASE_EVERY_BYTES:
                    release_freed_memory()
                    since_release = 0
            if not tensor.is_buffer:
                digests[tensor.names[0]] = digest.hexdigest()
        return digests

    def _parts(self, name: str, tensor: BaseTensor) -> Iterator[Tensor]:
        """Stretches of a tensor, one after the other, each [rows, ...] or [elements]."""
        if tensor.is_buffer:
            value = self._weights.buffer(name)
            assert value is not None, "a buffer of the base is in its files"
            yield value.contiguous()
            return
        parameter = next((each for each in tensor.names if each in self._adapter.parameters), tensor.names[0])
        shape = self._shapes[name]
        width = math.prod(shape[1:])
        low_rank = self._low_rank(parameter, name)
        rows = self._rows(parameter, shape)
        source = self._source(name, parameter, shape)
        for first, last in stretches(shape, tensor.shape):
            values = source(first, last).view(last - first, width)
            if low_rank is not None:
                values = low_rank(values.float(), first, last)
            if rows is not None:
                values = rows(values, first, last)
            yield values

    def _source(self, name: str, parameter: str, shape: tuple[int, ...]) -> Callable[[int, int], Tensor]:
        """(first, last row) -> what the base has there, or what takes its place whole."""
        if parameter in self._adapter.whole:
            whole = self._adapter.read(self._adapter.whole[parameter])
            self._require(parameter, tuple(whole.shape), shape)
            return lambda first, last: whole[first:last]
        if self._weights.is_quantized(name):
            dense = self._weights.dequantized(name)
            return lambda first, last: dense[first:last]
        width = math.prod(shape[1:])
        return lambda first, last: self._weights.base_values(name, first * width, last * width)

    def _low_rank(self, parameter: str, name: str) -> Callable[[Tensor, int, int], Tensor] | None:
        """Rows of W in fp32, and which they are -> the same of the merged weight."""
        if parameter not in self._adapter.low_rank:
            return None
        a, b = self._adapter.factors(parameter, name)
        self._require(parameter, (b.shape[0], a.shape[1]), self._shapes[name])
        key, scaling = self._adapter.low_rank[parameter].magnitude, self._adapter.scaling
        magnitude = None if key is None else self._adapter.read(key).float()

        def merged(values: Tensor, first: int, last: int) -> Tensor:
            values = torch.addmm(values, b[first:last], a, alpha=scaling)
            if magnitude is not None:
                values *= (magnitude[first:last] / torch.linalg.vector_norm(values, dim=1)).unsqueeze(1)
            return values

        return merged

    def _rows(self, parameter: str, shape: tuple[int, ...]) -> Callable[[Tensor, int, int], Tensor] | None:
        """Rows of a matrix, and which they are -> the same with those of the trained tokens."""
        if parameter not in self._adapter.rows:
            return None
        trained = self._adapter.read(self._adapter.rows[parameter]).float()
        ids = torch.tensor(self._adapter.token_ids)
        self._require(parameter, tuple(trained.shape), (len(ids), *shape[1:]))

        def replaced(values: Tensor, first: int, last: int) -> Tensor:
            here = (ids >= first) & (ids < last)
            return values.float().index_copy(0, ids[here] - first, trained[here]) if here.any() else values

        return replaced

    def _require_finite(self, written: Tensor, values: Tensor, parameter: str) -> None:
        """
        Args:
            written: in fp32; values: before they were cast.
        """
        # One pass, and NaN comes through it.
        if not written.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(written))).all()):
            return
        if torch.isfinite(values).all():
            raise ConfigError(
                f"{parameter} has values that {self._dtype} cannot hold (up to {float(values.abs().max()):.3g})",
                fix="choose --dtype bf16 or fp32",
            )
        raise CheckpointError(
            f"{parameter} has values that are not finite", fix="export an earlier checkpoint, or see where it broke"
        )

    def _check(self) -> None:
        known = {each for tensor in self._base.values() for each in tensor.names}
        unknown = sorted(self._adapter.parameters - known)
        if unknown:
            raise ConfigError(
                f"the adapter changes {len(unknown)} parameters that the base has not, such as {unknown[0]}",
                fix="give the base that the adapter was trained on",
            )
        for tensor in self._base.values():
            changed = [each for each in tensor.names if each in {*self._adapter.whole, *self._adapter.low_rank}]
            # What a full run trained has all names of a tied weight.
            if changed and len(tensor.names) > 1 and len(changed) < len(tensor.names):
                raise ConfigError(
                    f"the adapter changes {changed[0]} alone, which the base ties to "
                    f"{next(each for each in tensor.names if each not in changed)}",
                    fix=MERGE_ELSEWHERE,
                )

    def _require(self, parameter: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise CheckpointError(
                f"the adapter's change of {parameter} is of shape {list(found)}, and {list(wanted)} is wanted",
                fix="give the base that the adapter was trained on",
            )


def stretches(shape: tuple[int, ...], stored: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, last row) of stretches that fit ``ELEMENTS_AT_ONCE``; none has both rows that are stored and new ones.

    Args:
        shape: of the tensor; of one without dimensions there is one row.
        stored: of what the files hold of it.
    """
    if not shape:
        yield 0, 1
        return
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, math.prod(shape[1:])))
    for begin, end in ((0, min(shape[0], stored[0])), (stored[0], shape[0])):
        for first in range(begin, end, at_once):
            yield first, min(end, first + at_once)
