"""Compares what every rank holds with what was described: equal losses prove nothing, replicas have them too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.errors import ShardingMismatch
from sft_dist.model.build import TORCH_DTYPES
from sft_dist.sharding.spec import HostPart, ShardingSpec
from sft_dist.sharding.strategy import Strategy


def verify_sharding(strategy: Strategy, spec: ShardingSpec) -> None:
    """Checks local numel, dtype and requires_grad of every parameter, the optimizer's share and what is offloaded.

    The optimizer's states count once there are any, which is after the first step.

    Raises:
        ShardingMismatch: on every rank, with the first differences found on any of them.
    """
    differences = [f"rank {spec.rank}: {line}" for line in differences_of(strategy, spec)]
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, differences[:5])
    found = [line for lines in gathered for line in lines]
    if found:
        raise ShardingMismatch(
            f"{spec.strategy} did not shard as described: " + "; ".join(found[:5]),
            fix="this is a defect of sft_dist or an untested version of torch or DeepSpeed; please report it",
        )


def differences_of(strategy: Strategy, spec: ShardingSpec) -> list[str]:
    """One line for each difference on this rank."""
    lines = []
    actual = list(strategy.local_parameters())
    if [name for name, _, _ in actual] != [p.name for p in spec.parameters]:
        return [f"{len(actual)} parameters with other names than the {len(spec.parameters)} described"]
    for (name, tensor, requires_grad), expected in zip(actual, spec.parameters, strict=True):
        have = (tensor.numel(), tensor.dtype, requires_grad)
        want = (expected.local_numel, TORCH_DTYPES[expected.dtype], expected.requires_grad)
        if have != want:
            lines.append(f"{name} has (numel, dtype, requires_grad) {have}, described {want}")
    masters = strategy.master_weights()
    have_numel, want_numel = sum(m.numel() for m in masters), spec.optimizer_numel
    if have_numel != want_numel:
        lines.append(f"the optimizer holds {have_numel} elements, described {want_numel}")
    wrong = {m.dtype for m in masters} - {TORCH_DTYPES[spec.optimizer_dtype]}
    if wrong:
        lines.append(f"the optimizer holds {wrong}, described {spec.optimizer_dtype}")
    have_bytes = strategy.optimizer_state_bytes()
    if have_bytes is not None and have_bytes != spec.optimizer_state_bytes:
        lines.append(f"the optimizer's states take {have_bytes} bytes, described {spec.optimizer_state_bytes}")
    if strategy.parts_on_host() != spec.on_host:
        have_host, want_host = (sorted(parts) or "nothing" for parts in (strategy.parts_on_host(), spec.on_host))
        lines.append(f"{have_host} is kept in host memory, described {want_host}")
    tensors: dict[HostPart, list[Tensor]] = {"parameters": [t for _, t, _ in actual], "optimizer": masters}
    for part in sorted(spec.on_host):
        devices = {t.device.type for t in tensors[part]} - {"cpu"}
        if devices:
            lines.append(f"{part} described in host memory are on {sorted(devices)}")
    return lines


class MovementCheck:
    """Proves that the first step moves parameters: an optimizer over stale ones raises nothing by itself."""

    def __init__(self, strategy: Strategy) -> None:
        """Takes a fingerprint of this rank's master weights before the step."""
        self.strategy = strategy
        self.before = _fingerprints(strategy.master_weights())

    def verify(self, rank: int) -> None:
        """Call after the first step, on all ranks.

        Raises:
            ShardingMismatch: some rank's optimizer holds weights and none of them moved.
        """
        after = _fingerprints(self.strategy.master_weights())
        stuck = bool(self.before) and any(m.numel() for m in self.strategy.master_weights()) and after == self.before
        ranks: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(ranks, stuck)
        if any(ranks):
            raise ShardingMismatch(
                f"no parameter moved in the first optimizer step on rank {ranks.index(True)}",
                fix="raise optim.lr if it is below what the master dtype resolves; otherwise please report this",
            )


def _fingerprints(tensors: list[Tensor]) -> list[int]:
    """A sum over the bits of each tensor: any change of a value changes it, but for a chance of 2^-64."""
    words = {2: torch.int16, 4: torch.int32}
    return [int(t.detach().contiguous().view(words[t.element_size()]).sum(dtype=torch.int64)) for t in tensors]
