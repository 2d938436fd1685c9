"""Tiny models that know some answers by heart: what they say can be compared word for word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = [("東京は？", "日本の首都です。"), ("大阪は？", "西の都です。"), ("空は？", "青い😀です。")]
STEPS = 80


def conversation(asked: str, answered: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def teach(base: Path, folder: Path, *, lora: bool = False) -> Path:
    """Trains ``base`` on ``PAIRS`` with plain transformers and peft, and saves the model, or an adapter, in ``folder``."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    rows = [
        tokenizer.apply_chat_template(conversation(*pair)["messages"], tokenize=True, return_dict=False)
        for pair in PAIRS
    ]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2 if lora else 4e-3)
    for _ in range(STEPS):
        loss = sum(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
