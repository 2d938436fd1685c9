"""GPUs by name: memory, rates and links, each with its source.

The figures are in ``gpus.yaml``; this module gives them units (bytes, bytes/s, FLOP/s, W) and finds a GPU by whatever
people and drivers call it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from sft_dist.errors import UnknownHardware
from sft_dist.hardware.tables import shipped_table

ComputeDtype = Literal["bf16", "fp16", "tf32", "fp32"]

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Link:
    """What joins a GPU with others of its node, or with the host.

    Args:
        bytes_per_s: of one GPU, in one direction, when all GPUs of the link talk.
        max_gpus: how many GPUs it joins; None: all of a node.
        per_peer_bytes_per_s: where each pair has a link of its own, the rate of one; else None.
        peer_to_peer: whether GPUs write into each other's memory; if not, copies pass through host memory twice.
    """

    name: str
    kind: Literal["nvlink", "pcie", "xgmi"]
    bytes_per_s: float
    max_gpus: int | None = None
    per_peer_bytes_per_s: float | None = None
    peer_to_peer: bool = True
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Args:
        memory_bytes: in total, as the driver shows it; sold_gb is what the maker calls it.
        usable_bytes: of them, what a process can take, its CUDA context included.
        memory_bandwidth: bytes/s.
        flops: peak FLOP/s of dense matrix products by compute dtype; a dtype that the GPU lacks is not in it.
        achievable_flops: of them, what a product of the best shape reaches, by the same dtypes.
        achievable_basis: what that rests on; achievable_measured: whether it was measured on this chip.
        usable_measured: whether usable_bytes is a published figure and not the common share.
        link: between GPUs of a node; host_link: to host memory.
        tdp_w: the power limit that it is sold with.
        sources: keys of ``sources()``; of single figures in ``figure_sources``.
    """

    name: str
    sold_gb: int
    memory_bytes: int
    usable_bytes: int
    memory_bandwidth: float
    flops: Mapping[ComputeDtype, float]
    achievable_flops: Mapping[ComputeDtype, float]
    achievable_basis: str
    achievable_measured: bool
    usable_measured: bool
    link: Link
    host_link: Link
    tdp_w: float
    sources: tuple[str, ...]
    figure_sources: Mapping[str, str] = field(repr=False)
    device_names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    notes: str = ""

    def link_among(self, gpus: int) -> Link:
        """What joins that many GPUs of one node: the link, or PCIe where it joins fewer."""
        return self.link if self.link.max_gpus is None or gpus <= self.link.max_gpus else self.host_link

    def link_bytes_per_s(self, gpus: int) -> float:
        """Bytes/s that one of so many GPUs sends to the others of its node."""
        link = self.link_among(gpus)
        if link.per_peer_bytes_per_s is None:
            return link.bytes_per_s
        return min(link.bytes_per_s, link.per_peer_bytes_per_s * max(1, gpus - 1))


def sources() -> dict[str, str]:
    """What the short keys of sources mean."""
    return dict(shipped_table("gpus.yaml")["sources"])


@cache
def all_gpus() -> Mapping[str, Gpu]:
    """Every GPU of the table, by its name there."""
    table = shipped_table("gpus.yaml")
    return MappingProxyType({name: _gpu(name, entry, table) for name, entry in table["gpus"].items()})


def find_gpu(name: str) -> Gpu:
    """The GPU that a person, a catalogue or ``torch.cuda.get_device_name`` calls by this name.

    Case, spaces, punctuation and the maker's name do not matter.

    Raises:
        UnknownHardware: no GPU is called so, with the nearest names; or more than one is, with all of them.
    """
    by_name = _by_normal_name()
    found = by_name.get(normal_name(name), ())
    if len(found) == 1:
        return all_gpus()[found[0]]
    if found:
        raise UnknownHardware(f"GPU {name!r} may be {' or '.join(found)}", fix=f"say which: {' or '.join(found)}")
    near = [owner for key in difflib.get_close_matches(normal_name(name), by_name, n=6) for owner in by_name[key]]
    hint = f"did you mean {' or '.join(list(dict.fromkeys(near))[:3])}? " if near else ""
    raise UnknownHardware(f"GPU {name!r} is not in the table of GPUs", fix=f"{hint}Known are: {', '.join(all_gpus())}")


def normal_name(name: str) -> str:
    """A name without case, punctuation and silent words: ``NVIDIA A100-SXM4-80GB`` is ``a100sxm480gb``."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "".join(word for word in words if word not in _SILENT_WORDS)


_SILENT_WORDS = frozenset(("nvidia", "amd", "geforce", "tesla", "instinct", "quadro", "generation", "gpu"))


@cache
def _by_normal_name() -> dict[str, tuple[str, ...]]:
    """Every name that a GPU goes by, with the GPUs that go by it."""
    found: dict[str, list[str]] = {}
    for gpu in all_gpus().values():
        for key in {normal_name(name) for name in (gpu.name, *gpu.device_names, *gpu.aliases)}:
            found.setdefault(key, []).append(gpu.name)
    return {key: tuple(names) for key, names in found.items()}


def _gpu(name: str, entry: dict[str, Any], table: dict[str, Any]) -> Gpu:
    links = table["links"]
    # Where no driver's total is known, what the maker calls GB are 1e9 bytes: the smaller reading.
    memory_bytes = entry["total_mib"] * MIB if "total_mib" in entry else entry["sold_gb"] * 10**9
    usable_gib = entry.get("usable_gib")
    usable_bytes = int(usable_gib * GIB if usable_gib else memory_bytes * table["usable_share"]["value"])
    flops = {dtype: rate * 1e12 for dtype, rate in entry["tflops"].items()}
    mamf, assumed = entry.get("mamf_tflops"), table["achievable_share"]["value"]
    share = mamf / entry["tflops"]["bf16"] if mamf else assumed
    return Gpu(
        name=name,
        sold_gb=entry["sold_gb"],
        memory_bytes=memory_bytes,
        usable_bytes=usable_bytes,
        memory_bandwidth=entry["memory_gb_per_s"] * 1e9,
        flops=MappingProxyType(flops),
        achievable_flops=MappingProxyType({dtype: rate * share for dtype, rate in flops.items()}),
        achievable_basis=(
            f"{mamf:g} of {entry['tflops']['bf16']:g} TFLOP/s measured in bf16 matrix products (MAMF), the same share "
            "of other dtypes"
            if mamf
            else f"{assumed:.0%} of the peak assumed: about the mean of the NVIDIA GPUs that were measured"
        ),
        achievable_measured=mamf is not None,
        usable_measured=usable_gib is not None,
        link=_link(entry["link"], links[entry["link"]]),
        host_link=_link(entry["host_link"], links[entry["host_link"]]),
        tdp_w=entry["tdp_w"],
        sources=tuple(entry["sources"]),
        figure_sources=MappingProxyType(dict(entry.get("figures", {}))),
        device_names=tuple(entry["device_names"]),
        aliases=tuple(entry["aliases"]),
        notes=entry.get("notes", ""),
    )


def _link(name: str, entry: dict[str, Any]) -> Link:
    per_peer = entry.get("per_peer_gb_per_s")
    return Link(
        name=name,
        kind=entry["kind"],
        bytes_per_s=entry["gb_per_s"] * 1e9,
        max_gpus=entry.get("max_gpus"),
        per_peer_bytes_per_s=None if per_peer is None else per_peer * 1e9,
        peer_to_peer=entry.get("peer_to_peer", True),
        sources=tuple(entry["sources"]),
    )
