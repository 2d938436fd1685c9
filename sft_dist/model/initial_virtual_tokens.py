"""What trained virtual tokens and their encoders start from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoTokenizer

from sft_dist.config.schema import PromptMethod
from sft_dist.errors import ConfigError
from sft_dist.model.spec import ModelSpec
from sft_dist.model.virtual_tokens import Lstm, VirtualTokens


class InitialVirtualTokens:
    """What each parameter of the encoder starts from: the embeddings of a text, or what torch draws and PEFT leaves.

    A draw is a function of the seed and the parameter's name, so that every rank draws the same whatever else it draws.

    Args:
        virtual: ``SftModel.prompt``.
        read_embedding: the flat elements from one number to another of the base model's embedding.

    Raises:
        ConfigError: as ``init_token_ids``.
    """

    def __init__(
        self, virtual: VirtualTokens, spec: ModelSpec, *, seed: int, read_embedding: Callable[[int, int], Tensor]
    ) -> None:
        modules = virtual.named_modules(prefix="prompt")
        self._owners = {f"{path}.{name}": module for path, module in modules for name in module._parameters}
        self._shapes = {p.name: p.shape for p in spec.trainable}
        self._ids = init_token_ids(spec)
        self._seed, self._read_embedding = seed, read_embedding

    def values(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start] flat elements of a parameter's first value."""
        return self._of_text(name, start, stop) if self._ids else self._drawn(name)[start:stop]

    def _of_text(self, name: str, start: int, stop: int) -> Tensor:
        width = self._shapes[name][1]
        parts = [torch.empty(0)]
        for number in range(start // width, -(-stop // width)):
            low, high = max(start, number * width), min(stop, (number + 1) * width)
            offset = (self._ids[number] - number) * width
            parts.append(self._read_embedding(offset + low, offset + high))
        return torch.cat(parts)

    def _drawn(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{self._seed} {name}".encode()) >> 1)
        value = torch.empty(math.prod(self._shapes[name]))
        match self._owners[name]:
            case nn.Embedding():
                return value.normal_(generator=generator)
            case nn.Linear(in_features=width) | Lstm(hidden_size=width):
                return value.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
            case owner:
                raise TypeError(f"{name} is in a {type(owner).__name__}")


def init_token_ids(spec: ModelSpec) -> list[int]:
    """The tokens whose embeddings the virtual ones start from: those of ``init_text``, repeated or cut as PEFT does.

    Returns:
        one id for each virtual token; none where nothing is to be started from.

    Raises:
        ConfigError: the text has no tokens, or the model no embedding of one.
    """
    method = spec.method
    if not isinstance(method, PromptMethod) or method.init_text is None:
        return []
    ids: list[int] = AutoTokenizer.from_pretrained(spec.path, revision=spec.revision)(method.init_text)["input_ids"]
    if not ids or max(ids) >= spec.vocab_size:
        raise ConfigError(
            f"method.init_text {method.init_text!r} has " + ("a token without embedding" if ids else "no tokens"),
            fix="give another text to start from, or remove method.init_text",
        )
    return [ids[number % len(ids)] for number in range(method.num_virtual_tokens)]
