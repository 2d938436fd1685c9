"""First values of adapters, the same on every rank: functions of the seed, the name and the weights under them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from sft_dist.config.describe import shown
from sft_dist.config.schema import LoraMethod
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model.safetensors_folder import SafetensorsFolder
from sft_dist.model.token_rows import TOKEN_ROWS

# Power iterations of the randomised decomposition (Halko et al. 2011, arXiv 0909.4061), and how many directions more
# than those wanted it looks for.
ITERATIONS, OVERSAMPLING = 8, 8


def scaling_of(method: LoraMethod) -> float:
    """The factor of the adapter's product."""
    return method.alpha / (math.sqrt(method.r) if method.rslora else method.r)


class InitialAdapters:
    """What each parameter of a LoRA adapter starts from.

    Args:
        dense: path of a layer -> its weight [out, in] in fp32 as the base's files have it, rounded to ``compute``.
        stored: the same as the model holds it, which differs where it is quantised.
    """

    def __init__(
        self,
        method: LoraMethod,
        *,
        seed: int,
        compute: torch.dtype,
        dense: Callable[[str], Tensor],
        stored: Callable[[str], Tensor],
    ) -> None:
        self._method, self._seed, self._dense, self._stored = method, seed, dense, stored
        self._compute = compute
        self._scaling = scaling_of(method)
        self._saved = None if method.init_from is None else _open(Path(method.init_from), method)
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None

    def check(self, shapes: dict[str, tuple[int, ...]], token_ids: tuple[int, ...]) -> None:
        """Whether ``method.init_from`` has every parameter of ``shapes`` and no other, and rows of the same tokens.

        Raises:
            CheckpointError: it has not.
        """
        if self._saved is None:
            return
        wanted = {peft_key(name): shape for name, shape in shapes.items()}
        have = {key: stored.shape for key, stored in self._saved.tensors.items()}
        different = sorted(key for key in wanted.keys() | have.keys() if wanted.get(key) != have.get(key))
        if different:
            key = different[0]
            raise CheckpointError(
                f"method.init_from: {self._saved.folder} differs in {len(different)} tensors from the adapter that "
                f"method describes, such as {key}: {have.get(key, 'absent')} there, {wanted.get(key, 'absent')} here",
                fix="give method.target_modules, modules_to_save, train_tokens and r as the adapter was trained with",
            )
        saved = json.loads((self._saved.folder / "adapter_config.json").read_text(encoding="utf-8"))
        for layer, ids in (saved.get("trainable_token_indices") or {}).items():
            if tuple(ids) != token_ids:
                raise CheckpointError(
                    f"method.init_from: {self._saved.folder} has rows of the tokens {ids} of {layer}, and method "
                    f"describes those of {list(token_ids)}",
                    fix="give model.add_tokens and method.train_tokens as the adapter was trained with",
                )

    def has(self, name: str) -> bool:
        """Whether a part of the base model comes from ``method.init_from``."""
        return self._saved is not None and peft_key(name) in self._saved.tensors

    def saved(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start] flat elements of a parameter that is in ``method.init_from``."""
        assert self._saved is not None
        return self._saved.read(peft_key(name), start, stop)

    def value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The first value of an adapter's parameter, fp32.

        ``default``: A as PEFT draws it, B zero; ``pissa``, ``loftq``: see ``factors``; DoRA's lengths: those of the
        rows as they start.
        """
        layer, _, kind = name.partition(".lora_")
        if kind.startswith("magnitude"):
            a, b = self._pair(layer, shape)
            return torch.linalg.vector_norm(self._stored(layer) + self._scaling * (b @ a), dim=1)
        if self._method.init != "default":
            a, b = self.factors(layer)
            return a if kind.startswith("A") else b
        return self._drawn(name, shape) if kind.startswith("A") else torch.zeros(shape)

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(_seed_of(self._seed, name))
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], fp32 values rounded to ``compute``, whose scaled product comes closest to a matrix.

        ``pissa`` (Meng et al. 2024, arXiv 2404.02948): the weight. ``loftq`` (Li et al. 2023, arXiv 2310.08659, one
        iteration): what quantising took from it. Unlike PEFT's, the factors of LoftQ allow for the scaling; where
        quantising took nothing they are drawn as by default, since two zeros would never move.
        """
        if self._last is None or self._last[0] != layer:
            weight = self._dense(layer)
            matrix = weight if self._method.init == "pissa" else weight - self._stored(layer)
            if not matrix.any():
                a = self._drawn(f"{layer}.lora_A.default.weight", (self._method.r, matrix.shape[1]))
                return a, torch.zeros(matrix.shape[0], self._method.r)
            rank = min(self._method.r, *matrix.shape)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed_of(self._seed, layer))
                q = min(rank + OVERSAMPLING, *matrix.shape)
                u, s, v = torch.svd_lowrank(matrix, q=q, niter=ITERATIONS)
            roots = (s[:rank] / self._scaling).sqrt()
            a, b = torch.zeros(self._method.r, matrix.shape[1]), torch.zeros(matrix.shape[0], self._method.r)
            a[:rank], b[:, :rank] = (v[:, :rank] * roots).T, u[:, :rank] * roots
            # As the adapter starts, so that what PiSSA freezes is the rest of that.
            self._last = layer, (a.to(self._compute).float(), b.to(self._compute).float())
        return self._last[1]

    def frozen_rest(self, layer: str) -> Tensor:
        """[out, in] fp32, what PiSSA freezes: the weight without its largest directions."""
        a, b = self.factors(layer)
        return self._dense(layer) - self._scaling * (b @ a)

    def _pair(self, layer: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if self._method.init != "default":
            return self.factors(layer)
        return torch.zeros(1, 1), torch.zeros(shape[0], 1)


def _open(folder: Path, method: LoraMethod) -> SafetensorsFolder:
    """The saved adapter, refused where it would compute something else than ``method`` says.

    Raises:
        ConfigError, CheckpointError: another kind of adapter; no adapter there.
    """
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        there = {
            "type": saved["peft_type"].lower(), "r": saved["r"], "alpha": saved["lora_alpha"],
            "rslora": saved.get("use_rslora", False), "dora": saved.get("use_dora", False),
        }  # fmt: skip
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise CheckpointError(
            f"method.init_from: {folder} holds no adapter in PEFT's format ({type(e).__name__}: {e})",
            fix="give the folder of adapter_config.json, e.g. the final/ of an earlier run",
        ) from e
    here = {"type": "lora", "r": method.r, "alpha": method.alpha, "rslora": method.rslora, "dora": method.dora}
    for key, value in there.items():
        if value != here[key]:
            ours, theirs = shown(here[key]), shown(value)
            raise ConfigError(
                f"method.{key} is {ours}, and the adapter in method.init_from ({folder}) has {theirs}",
                fix=f"set method.{key} to {theirs}, or start another adapter without method.init_from",
            )
    return SafetensorsFolder(folder, "adapter_model", key="method.init_from")


def peft_key(name: str) -> str:
    """What PEFT's files call a parameter of an adapter of ours."""
    name = name.removeprefix("hf.").replace(".default.weight", ".weight")
    if name.endswith(TOKEN_ROWS):
        return name.removesuffix(".default")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _seed_of(seed: int, name: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1
