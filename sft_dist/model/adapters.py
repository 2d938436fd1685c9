"""Low-rank adapters: PEFT's layers and formats, computing in the run's own precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from sft_dist.config.schema import LoraMethod
from sft_dist.errors import ConfigError
from sft_dist.model.lora import add_magnitudes, fuse_lora
from sft_dist.model.names import covered

# What classes of Transformers that hold the layers of a preset are called.
PRESETS = {"attention": ("Attention",), "mlp": ("MLP", "FeedForward")}


def lora_config(method: LoraMethod, base_model: str | None = None, revision: str | None = None) -> LoraConfig:
    """PEFT's description of the adapter, as it is saved beside the adapter's weights; without its target layers."""
    return LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is as good
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
    )


def add_lora(model: PreTrainedModel, method: LoraMethod, dtype: torch.dtype) -> PeftModel:
    """Puts adapters on the target layers, in ``dtype``, and freezes everything but them and ``modules_to_save``.

    Raises:
        ConfigError: a name in ``target_modules`` or ``modules_to_save`` is no part of the model, or both name it.
    """
    config = lora_config(method)
    config.target_modules = _for_peft(model, method)
    trained = trained_parts(model, method)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        # PEFT warns of tied embeddings, which are no target here.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            # PEFT would cast the input to the stored dtype of lora_A: an fp32 side path wherever the master is fp32.
            module.cast_input_dtype_enabled = False
    fuse_lora(adapted)
    if method.dora:
        add_magnitudes(adapted)
        config.use_dora = True
    for name, parameter in adapted.named_parameters():
        is_adapter = ".lora_" in name
        parameter.requires_grad_(is_adapter or any(name.endswith(f".{part}") for part in trained))
        if is_adapter:
            parameter.data = parameter.data.to(dtype)
    assert isinstance(adapted, PeftModel)
    return adapted


def trained_parts(model: PreTrainedModel, method: LoraMethod) -> list[str]:
    """Names of the base's parameters that ``modules_to_save`` covers."""
    if not method.modules_to_save:
        return []
    names = covered(
        method.modules_to_save,
        (name for name, _ in model.named_parameters()),
        key="method.modules_to_save",
        kind="part with parameters",
        fix=f"choose from {_choice(_leaf_modules(model))}",
    )
    targets = {f"{name}.weight" for name in target_layers(model, method)}
    both = [name for name in names if name in targets]
    if both:
        raise ConfigError(
            f"method.modules_to_save covers {both[0].removesuffix('.weight')}, which gets an adapter",
            fix="name in method.modules_to_save what gets no adapter, e.g. embed_tokens or lm_head",
        )
    if model.config.tie_word_embeddings and any("embed" in name or "lm_head" in name for name in names):
        raise ConfigError(
            "method.modules_to_save covers the embeddings, which this model ties to its output layer: in PEFT's format "
            "they would part",
            fix="leave the embeddings out, or use method.type full",
        )
    return names


def target_layers(model: PreTrainedModel, method: LoraMethod) -> list[str]:
    """The linear layers that get an adapter, by their paths."""
    targets, linears = method.target_modules, _linears(model)
    if targets == "all-linear":
        return linears
    if isinstance(targets, list):
        fix = f"choose from {_choice(linears)}, or say all-linear"
        return covered(targets, linears, key="method.target_modules", kind="linear layer", fix=fix)
    chosen = [name for name in linears if _is_part_of(model, name, PRESETS[targets])]
    if not chosen:
        raise ConfigError(
            f"method.target_modules {targets}: {type(model).__name__} has no linear layer in what it calls so",
            fix=f"name the layers, from {_choice(linears)}",
        )
    return chosen


def _for_peft(model: PreTrainedModel, method: LoraMethod) -> str | list[str]:
    """Names of layers where they say all that is meant, else whole paths."""
    if method.target_modules == "all-linear":
        return "all-linear"
    chosen = set(target_layers(model, method))
    leaves = {_leaf(name) for name in chosen}
    return sorted(leaves if {name for name in _linears(model) if _leaf(name) in leaves} == chosen else chosen)


def _is_part_of(model: PreTrainedModel, name: str, kinds: tuple[str, ...]) -> bool:
    """Whether the class of a module around ``name`` is called like one of ``kinds``."""
    parts = name.split(".")
    around = [type(model.get_submodule(".".join(parts[:n]))).__name__ for n in range(1, len(parts))]
    return any(kind in owner for owner in around for kind in kinds)


def _linears(model: PreTrainedModel) -> list[str]:
    """Every linear layer but the output layer."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _leaf_modules(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _choice(names: Iterable[str]) -> str:
    return ", ".join(sorted({_leaf(name) for name in names}))
