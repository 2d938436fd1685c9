"""How a row spreads its states over GPUs and host memory."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.peers.unmapped import Unmapped
from benchmarks.peers.words import Row, absent, gpus, said, words

GPUS_PER_NODE = 8


def sharding(row: Row) -> dict[str, Any]:
    """Kind and degrees."""
    text, world = words(row, "sharding"), gpus(row)
    if re.search(r"\bpp[ =x]*[2-9]|pipeline", text):
        raise Unmapped("pipeline parallelism")
    kind = _kind(row, text, world)
    found: dict[str, Any] = {"world": world, "sharding": kind}
    for key, pattern in {
        "tensor_parallel": r"\btp[ =x_-]*(\d+)|tensor[- _]?(?:model[- _])?parallel[^|\d]*(\d+)",
        "context_parallel": r"\bcp[ =x_-]*(\d+)|context[- _]?parallel[^|\d]*(\d+)",
    }.items():
        if degree := re.search(pattern, text):
            found[key] = int(degree[1] or degree[2])
    shards = world // found.get("tensor_parallel", 1)
    if kind in ("none", "ddp"):
        shards = 1
    elif "hybrid" in text or "hsdp" in text:
        shards = min(shards, GPUS_PER_NODE)
    found["shard_grad_op"] = kind.startswith("fsdp") and bool(re.search(r"grad_op|shard_grad|reshard[^|]*false", text))
    return found | {"sharded_by": shards}


def _kind(row: Row, text: str, world: int) -> str:
    stage = re.search(r"zero[-_ ]*(?:stage)?[-_ ]*([0123])|stage[-_ ]*([0123])", text)
    if world == 1:
        return "none"
    if not text:
        raise Unmapped("sharding over several GPUs not given")
    if "fsdp2" in text or "fully_shard" in text or "fsdp 2" in text:
        return "fsdp2"
    if "no_shard" in text:
        return "ddp"
    if "fsdp" in text or re.search(r"full[-_ ]shard|shard_grad|hybrid[-_ ]shard|hsdp|fully sharded", text):
        return "fsdp1"
    if stage:
        return f"zero{stage[1] or stage[2]}".replace("zero0", "ddp")
    if re.search(r"\bddp\b|data[- ]parallel|\bdp\b|mirrored", text) or re.search(r"^\s*(none|no|single)\b", text):
        return "ddp"
    if re.search(r"\btp\b|\btp[ =x_-]*\d|tensor[- _]?(?:model[- _])?parallel", text):
        return "ddp"  # what is not split by layers' width is whole
    raise Unmapped(f"sharding {row.get('sharding')}")


def offload(row: Row) -> frozenset[str]:
    """What of parameters, optimizer and activations is in host memory."""
    text, beside = words(row, "offload"), words(row, "grad_ckpt", "sharding", "kernels")
    parts = set()
    if re.search(r"offload|unsloth", words(row, "grad_ckpt")) and not absent(said(row, "grad_ckpt")):
        parts.add("activations")
    if re.search(r"activations?[ _-]*(cpu[ _-]*)?offload|offload(ed|ing)?[ _-]*(of[ _-]*)?activations?", beside):
        parts.add("activations")
    if re.search(
        r"(?<!no )(?<!activation )cpu[ _-]?offload|offload(ing)?[ _-]*(to[ _-]*)?(cpu|param)", words(row, "sharding")
    ):
        parts |= {"parameters", "optimizer"}
    if not text or absent(text):
        return frozenset(parts)
    found = set()
    if "activation" in text:
        found.add("activations")
    if re.search(r"optim|states?\b", text):
        found.add("optimizer")
    of_parameters = r"param|weights|fsdp|^\s*(yes|true|cpu|full|all)\b(?![ _-]*activation)(?!.*optim(?!.*param))"
    of_nothing_else = r"cpu[ _-]?offload|offload[ _-]?cpu"
    if re.search(of_parameters, text) or (re.search(of_nothing_else, text) and not found):
        found |= {"parameters", "optimizer"}
    if not found:
        raise Unmapped(f"offload {row.get('offload')}")
    return frozenset(parts | found)
