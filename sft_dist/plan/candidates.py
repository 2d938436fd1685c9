"""What a search looks at: machines, ways to shard, micro-batches, recomputation and, where wanted, methods.

Every candidate is the configuration that was searched from with some keys changed. What is trained stays: data, global
batch, seed, precision and optimizer; the method too unless others are asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from sft_dist.config.schema import (
    ActivationCheckpointingConfig,
    ConcreteSharding,
    Config,
    DdpSharding,
    Fsdp2Sharding,
    FullMethod,
    LoraMethod,
    MethodConfig,
    QloraMethod,
    Zero2Sharding,
    Zero3Sharding,
)
from sft_dist.errors import ConfigError
from sft_dist.hardware.gpus import Gpu, all_gpus, find_gpu
from sft_dist.hardware.prices import all_prices
from sft_dist.plan.cost import rents_nodes
from sft_dist.plan.machines import Machines, machines_of
from sft_dist.plan.overrides import key_override, section_overrides

SEARCHED_METHODS = ("full", "lora", "qlora")

COUNTS = (1, 2, 4, 8)
FULL_NODE = 8

DEFAULT_MAX_GPUS = 16


@dataclass(frozen=True)
class Space:
    """How far a search goes.

    Args:
        methods: None: the configuration's own.
        max_gpus: of all nodes together.
        gpus_per_node, nodes: None: whatever ``max_gpus`` allows.
    """

    methods: tuple[str, ...] | None = None
    max_gpus: int = DEFAULT_MAX_GPUS
    gpus_per_node: int | None = None
    nodes: int | None = None

    def layouts(self) -> list[tuple[int, int]]:
        """(nodes, GPUs of each): one node with some of its GPUs, or whole nodes."""
        counts = COUNTS if self.gpus_per_node is None else (self.gpus_per_node,)
        found = [(1, count) for count in counts] if self.nodes in (None, 1) else []
        nodes = [1 << power for power in range(1, self.max_gpus.bit_length())] if self.nodes is None else [self.nodes]
        of_node = FULL_NODE if self.gpus_per_node is None else self.gpus_per_node
        found += [(number, of_node) for number in nodes if number > 1]
        return [(number, count) for number, count in found if number * count <= self.max_gpus]


@dataclass(frozen=True)
class Variant:
    """Everything but machines and the size of micro-batches.

    Args:
        label: what sets it apart, for people.
    """

    config: Config
    label: str
    overrides: tuple[str, ...]


def parse_methods(text: str | None) -> tuple[str, ...] | None:
    """``lora,qlora`` or ``all``; None: the configuration's own method.

    Raises:
        ConfigError: a method is none that is searched.
    """
    if text is None:
        return None
    if text == "all":
        return SEARCHED_METHODS
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in SEARCHED_METHODS:
            near = difflib.get_close_matches(name, SEARCHED_METHODS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use all, or some of {', '.join(SEARCHED_METHODS)}"
            raise ConfigError(f"--methods {text}: {name!r} is not searched", fix=hint)
    return names


def gpus_to_search(config: Config) -> list[Gpu]:
    """The configuration's GPU, or all that anybody may rent by the hour; those with most memory first.

    With ``hardware.provider`` whatever its terms are. With a price of the user's own, which is of one GPU, that of this
    machine where none is named.

    Raises:
        UnknownHardware: the GPU is not known.
        ConfigError: the file of prices cannot be read.
    """
    hardware = config.hardware
    own = (hardware.price_per_hour, hardware.price_per_hour_jpy, hardware.owned)
    if hardware.gpu is not None or any(price is not None for price in own):
        return [machines_of(hardware).gpu]
    any_terms = hardware.provider is not None
    priced = {price.gpu for price in all_prices(hardware.prices) if any_terms or price.terms is None}
    found = [gpu for name, gpu in all_gpus().items() if name in priced and rents_nodes(gpu, hardware, 1)]
    return sorted(found, key=lambda gpu: -gpu.usable_bytes)


def machines_for(config: Config, gpu: Gpu, nodes: int, gpus_per_node: int) -> tuple[Machines, tuple[str, ...]]:
    """The machines, and what has to be said for them."""
    was = config.hardware
    hardware = was.model_copy(update={"gpu": gpu.name, "nodes": nodes, "gpus_per_node": gpus_per_node})
    names_it = was.gpu is not None and find_gpu(was.gpu) == gpu
    said = () if names_it else key_override("hardware.gpu", was.gpu, gpu.name)
    said += key_override("hardware.gpus_per_node", was.gpus_per_node or 1, gpus_per_node)
    said += key_override("hardware.nodes", was.nodes or 1, nodes)
    return machines_of(hardware), said


def variants(config: Config, *, nodes: int, gpus_per_node: int, methods: Sequence[str] | None) -> Iterator[Variant]:
    """Every way to run on so many GPUs."""
    for method in methods_of(config, methods):
        for name, sharding in shardings(config, nodes=nodes, gpus_per_node=gpus_per_node):
            for recomputed, checkpointing in recomputations(config):
                changed = config.model_copy(
                    update={"method": method, "sharding": sharding, "activation_checkpointing": checkpointing}
                )
                overrides = (
                    *section_overrides("method", config.method, method),
                    *section_overrides("sharding", config.sharding, sharding),
                    *section_overrides(
                        "activation_checkpointing", config.activation_checkpointing, checkpointing
                    ),
                )  # fmt: skip
                named = [method.type] if methods is not None else []
                yield Variant(changed, ", ".join([*named, name, recomputed]), overrides)


def methods_of(config: Config, names: Sequence[str] | None) -> list[MethodConfig]:
    """The configuration's own, and those of the names, each with what the configuration says that it knows too."""
    others = [name for name in names or () if name != config.method.type]
    return [config.method, *(as_method(config.method, name) for name in others)]


def as_method(was: MethodConfig, name: str) -> MethodConfig:
    """The method of that name: LoRA and QLoRA share their adapters."""
    if was.type == name:
        return was
    if name == "full":
        return FullMethod()
    fields = set(LoraMethod.model_fields) - {"type"}
    kept = {key: vars(was)[key] for key in was.model_fields_set & fields} if isinstance(was, LoraMethod) else {}
    if name == "qlora":
        return QloraMethod(type="qlora", **kept)
    if kept.get("init") == "loftq":  # it is for a quantised base
        del kept["init"]
    return LoraMethod(type="lora", **kept)


def shardings(config: Config, *, nodes: int, gpus_per_node: int) -> list[tuple[str, ConcreteSharding]]:
    """Ways to shard over so many GPUs, by their name; the configuration's own among them."""
    own, shared = config.sharding, {"sequence_parallel": config.sharding.sequence_parallel}
    offloaded = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    found: list[tuple[str, ConcreteSharding]] = [("ddp", DdpSharding(strategy="ddp", **shared))]
    if nodes * gpus_per_node > 1:
        found += [
            ("fsdp2", Fsdp2Sharding(strategy="fsdp2", **shared)),
            ("zero2", Zero2Sharding(strategy="zero2", **shared)),
            ("zero3", Zero3Sharding(strategy="zero3", **shared)),
        ]
    if nodes > 1:
        found.append(("hsdp", Fsdp2Sharding(strategy="fsdp2", dp_replicate=nodes, **shared)))
    found += [
        ("fsdp2 offload", Fsdp2Sharding(strategy="fsdp2", cpu_offload=True, **shared)),
        ("zero3 offload", Zero3Sharding(strategy="zero3", deepspeed_config=offloaded, **shared)),
    ]
    if isinstance(own, get_args(ConcreteSharding)) and own not in [sharding for _, sharding in found]:
        found.append((f"{own.strategy} as written", own))
    return found


def recomputations(config: Config) -> list[tuple[str, ActivationCheckpointingConfig]]:
    """Ways to recompute, the least first; the configuration's own among them."""
    own = config.activation_checkpointing
    found = [
        ("none", ActivationCheckpointingConfig(mode="none")),
        ("selective", ActivationCheckpointingConfig(mode="selective")),
        ("full", ActivationCheckpointingConfig(mode="full")),
        ("full, inputs on host", ActivationCheckpointingConfig(mode="full", offload=True)),
    ]
    if own.mode != "auto" and own not in [checkpointing for _, checkpointing in found]:
        found.append((f"{own.mode} as written", own))
    return found
