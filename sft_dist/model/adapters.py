"""Low-rank adapters: PEFT's layers and formats, computing in the run's own precision."""

from __future__ import annotations

import math
import warnings

import torch
import xxhash
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_dist.config.schema import LoraMethod
from sft_dist.errors import ConfigError
from sft_dist.model.lora import fuse_lora


def lora_config(method: LoraMethod, base_model: str | None = None, revision: str | None = None) -> LoraConfig:
    """PEFT's description of the adapter, as it is saved beside the adapter's weights."""
    targets = method.target_modules
    return LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is as good
        lora_dropout=method.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
    )


def add_lora(model: PreTrainedModel, method: LoraMethod, dtype: torch.dtype) -> PeftModel:
    """Puts adapters on the target layers, in ``dtype``.

    Raises:
        ConfigError: a name in ``target_modules`` matches no linear layer.
    """
    if not isinstance(method.target_modules, str):
        leaves = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        unknown = [t for t in method.target_modules if t.rsplit(".", 1)[-1] not in leaves]
        if unknown:
            raise ConfigError(
                f"method.target_modules: the model has no linear layer named {', '.join(unknown)}",
                fix=f"choose from {', '.join(sorted(leaves))}, or say all-linear",
            )
    with warnings.catch_warnings():
        # PEFT warns of tied embeddings, which are no target here.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, lora_config(method), autocast_adapter_dtype=False)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            # PEFT would cast the input to the stored dtype of lora_A: an fp32 side path wherever the master is fp32.
            module.cast_input_dtype_enabled = False
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    fuse_lora(adapted)
    assert isinstance(adapted, PeftModel)
    return adapted


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The first value of an adapter's parameter: what PEFT draws for LoRA's A, and 0 for B.

    A function of the seed and the name, so that every rank draws the same whatever else it draws.
    """
    value = torch.zeros(shape)
    if ".lora_A." in name:
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value
