"""A run of Axolotl over packs that are given; started by its own environment's Python, with a task's file.

Each pack is one of its samples, whose positions begin anew at every row: so its sample packing sees the rows that it
would have packed itself, in the order of the others. No activation checkpointing, torch's fused AdamW, no evaluation,
no save but the last, no log.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# It tells its makers of every run otherwise; here there is no network.
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

import axolotl.core.builders.causal as builder
import torch
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.core.trainers import AxolotlTrainer
from axolotl.train import train
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from peer_report import Clock, write_report


def as_samples(packs: list[dict[str, Any]]) -> Dataset:
    rows = []
    for pack in packs:
        positions = [position for length in pack["seq_lengths"] for position in range(length)]
        size = len(positions)
        rows.append(
            {"input_ids": pack["input_ids"], "labels": pack["labels"], "position_ids": positions,
             "attention_mask": [1] * size, "length": size}
        )  # fmt: skip
    return Dataset.from_list(rows)


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    packs = [json.loads(line) for line in Path(task["packs"]).read_text().splitlines()]
    losses: list[float] = []
    clock = Clock()

    class Trainer(AxolotlTrainer):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.add_callback(clock)

        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **keywords)
            losses.append(float(loss))
            return loss

    builder.AxolotlTrainer = Trainer
    # A setting that its configuration lacks.
    builder.HFCausalTrainerBuilder.hook_pre_create_training_args = lambda _, arguments: (
        arguments | {"use_cpu": not torch.cuda.is_available()}
    )
    bf16 = task["compute"] == "bf16"
    settings: dict[str, Any] = {
        "base_model": task["base"], "sequence_len": task["length"], "sample_packing": True,
        "sample_packing_sequentially": True, "curriculum_sampling": True, "pad_to_sequence_len": False,
        "attn_implementation": "sdpa", "datasets": [{"path": task["packs"], "ds_type": "json", "type": "alpaca"}],
        "micro_batch_size": 1, "gradient_accumulation_steps": task["accumulation"], "max_steps": task["steps"],
        "learning_rate": task["lr"], "lr_scheduler": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "optimizer": "adamw_torch_fused", "bf16": bf16, "fp16": False,
        "gradient_checkpointing": False, "output_dir": task["scratch"], "save_strategy": "no",
        "logging_steps": task["steps"] + 1, "val_set_size": 0, "seed": 1,
    }  # fmt: skip
    if task["adapter"]:
        settings |= {"adapter": task["method"], "lora_model_dir": task["adapter"]}
        settings |= {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True, "lora_dropout": 0.0}
    if task["method"] == "qlora":
        settings["load_in_4bit"] = True
    if not torch.cuda.is_available():
        settings |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    cfg = load_cfg(DictDefault(settings))
    if task["method"] == "full":
        # As here: what is trained is kept in fp32 and multiplied in bf16.
        cfg.torch_dtype = torch.float32
    train(cfg=cfg, dataset_meta=TrainDatasetMeta(as_samples(packs), total_num_steps=task["steps"]))
    write_report(task, "axolotl", clock, losses)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
