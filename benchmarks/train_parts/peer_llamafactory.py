"""A run of LLaMA-Factory over packs that are given; started by its own environment's Python, with a task's file.

Packs are as its ``neat_packing`` makes them: attention sees a row by the number that its tokens have in the mask. No
activation checkpointing, torch's fused AdamW, no evaluation, no save but the last, no log.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peer_report import Clock, write_report

# It imports what it reads sound with. Here are texts, and that package's kernels may be those of another torch.
sound = ModuleType("torchaudio")
sound.__spec__ = ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = sound

from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402


def as_neat_packs(packs: list[dict[str, Any]]) -> Dataset:
    """Without positions, which its collator does not fill up; rotary embedding sees differences only."""
    rows = []
    for pack in packs:
        lengths = pack["seq_lengths"]
        number = [row + 1 for row, length in enumerate(lengths) for _ in range(length)]
        rows.append({"input_ids": pack["input_ids"], "labels": pack["labels"], "attention_mask": number})
    return Dataset.from_list(rows)


def main(task: dict[str, Any]) -> None:
    if task["compute"] == "fp32" and task["method"] != "full":
        sys.exit("LLaMA-Factory leaves frozen weights in the dtype of their files, bf16, and has no setting for fp32")
    torch.set_num_threads(task["threads"])
    packs = [json.loads(line) for line in Path(task["packs"]).read_text().splitlines()]
    tokenized = Path(task["scratch"]) / "tokenized"
    DatasetDict({"train": as_neat_packs(packs)}).save_to_disk(str(tokenized))
    losses: list[float] = []
    training_step = CustomSeq2SeqTrainer.training_step

    def kept(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss: torch.Tensor = training_step(self, *arguments, **keywords)
        losses.append(float(loss))
        return loss

    CustomSeq2SeqTrainer.training_step = kept
    clock = Clock()
    settings: dict[str, Any] = {
        "stage": "sft", "do_train": True, "model_name_or_path": task["base"], "template": "empty",
        "finetuning_type": "full" if task["method"] == "full" else "lora", "dataset": "packs",
        "tokenized_path": str(tokenized), "cutoff_len": task["length"], "packing": True, "neat_packing": True,
        "disable_shuffling": True, "output_dir": str(Path(task["scratch"]) / "run"), "flash_attn": "sdpa",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": task["accumulation"],
        "max_steps": task["steps"], "learning_rate": task["lr"], "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": task["compute"] == "bf16", "report_to": "none",
        "disable_gradient_checkpointing": True, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(), "remove_unused_columns": False, "optim": "adamw_torch_fused",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    if task["adapter"]:
        settings["adapter_name_or_path"] = task["adapter"]
    if task["method"] == "qlora":
        settings |= {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}
    run_exp(settings, callbacks=[clock])
    write_report(task, "llamafactory", clock, losses)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
