"""Networks between nodes, by name or by the rented machine that has them (``networks.yaml``)."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.errors import UnknownHardware
from sft_dist.hardware.tables import did_you_mean, shipped_table


@dataclass(frozen=True)
class Network:
    """What joins nodes.

    Args:
        bytes_per_s: of a node in one direction, all its cards together.
        sources: keys of the table's ``sources``.
    """

    name: str
    bytes_per_s: float
    sources: tuple[str, ...]
    notes: str = ""


def find_network(name: str) -> Network:
    """A network of the table, or that of a machine, e.g. ``infiniband-ndr-x8`` or ``p5.48xlarge``.

    Raises:
        UnknownHardware: neither a network nor a machine is called so.
    """
    table = shipped_table("networks.yaml")
    names = {_normal(key): key for key in (*table["networks"], *table["machines"])}
    key = names.get(_normal(name))
    if key is None:
        raise UnknownHardware(f"network {name!r} is not in the table", fix=did_you_mean(name.lower(), names.values()))
    key = table["machines"].get(key, key)
    entry = table["networks"][key]
    return Network(key, entry["gb_per_s"] * 1e9, tuple(entry["sources"]), entry.get("notes", ""))


def _normal(name: str) -> str:
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


def network_names() -> tuple[str, ...]:
    """Every network of the table; machines are left out."""
    return tuple(shipped_table("networks.yaml")["networks"])
