"""Base folders as users have them whose model was saved by transformers after bitsandbytes had quantised it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BF16 = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.bfloat16}

# name -> (dtype that it was quantised in, settings)
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "double": (torch.float32, NF4),
    "double-bf16": (torch.bfloat16, NF4 | BF16),
    "single": (torch.float16, NF4 | {"bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": torch.float16}),
    "skip": (torch.float32, NF4 | {"llm_int8_skip_modules": ["lm_head", "o_proj", "model.layers.0.mlp"]}),
    "int8": (torch.float16, {"load_in_8bit": True}),
    "int8-skip": (torch.float16, {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]}),
}


def write_quantized(base: Path, folder: Path, kind: str) -> Path:
    """Quantises ``base`` and saves it in ``folder``, in several files."""
    dtype, settings = KINDS[kind]
    load_plain(base, dtype, BitsAndBytesConfig(**settings)).save_pretrained(folder, max_shard_size="60KB")
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(base / "chat_template.jinja", folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def load_plain(folder: Path, dtype: torch.dtype, quantization: BitsAndBytesConfig | None = None) -> Any:
    """By transformers alone, computing in ``dtype`` with dequantised weights, in eval mode.

    Weights beside those that are quantised in the files keep the files' dtype there, whatever is asked for.
    """
    options = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.support_avx512bf16_for_cpu = False  # it would repack the weight in bf16
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.train()  # else it quantises activations too
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model
