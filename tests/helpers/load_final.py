"""A fresh process that knows nothing of this project: loads artefacts with plain transformers and peft.

usage: python load_final.py IDS.json FOLDER...     writes FOLDER/logits.npz, the logits of each list of token ids

Each FOLDER holds ``final/`` and is named after its method (full, qlora, or another of peft), then anything.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def load(folder: str, method: str) -> torch.nn.Module:
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with open(f"{folder}/adapter_config.json") as file:
        base_path = json.load(file)["base_model_name_or_path"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        base_path, dtype=torch.float32, quantization_config=quantization if method == "qlora" else None
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(base, folder)


def main(ids_file: str, *folders: str) -> None:
    with open(ids_file) as file:
        rows = json.load(file)
    for folder in folders:
        # In eval mode bitsandbytes computes in bf16 on some CPUs; without dropout train mode is the same model.
        model = load(f"{folder}/final", folder.rsplit("/", 1)[-1].split("-")[0]).train()
        with torch.no_grad():
            # Of prompt and P-tuning the first are at virtual tokens.
            logits = [model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].float().numpy() for ids in rows]
        np.savez(f"{folder}/logits.npz", *logits)
    assert not any(name.startswith("sft_dist") for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
