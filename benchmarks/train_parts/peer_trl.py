"""A run of TRL's SFTTrainer over packs that are given; started by its own environment's Python, with a task's file.

It gets what it needs to be as fast as it can without code of ours: no activation checkpointing, packs as they are, each
row's positions from 0 (``padding_free`` and ``seq_lengths``), torch's fused AdamW, no evaluation, no save, no log.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peer_report import Clock, write_report
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


class Trainer(SFTTrainer):
    """Keeps the loss of every micro-batch, which is divided by the step's supervised tokens already."""

    losses: list[float]

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*arguments, **keywords)
        self.losses.append(float(loss))
        return loss


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packs = [json.loads(line) for line in Path(task["packs"]).read_text().splitlines()]
    bf16 = task["compute"] == "bf16"
    quantised = {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )} if task["method"] == "qlora" else {}  # fmt: skip
    # A frozen base needs no fp32 copy; what is trained is kept in fp32 and multiplied in bf16, as here.
    dtype = torch.bfloat16 if bf16 and task["method"] != "full" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(task["base"], dtype=dtype, device_map=device, **quantised)
    if task["adapter"]:
        model = PeftModel.from_pretrained(model, task["adapter"], is_trainable=True)
    config = SFTConfig(
        output_dir=task["scratch"], per_device_train_batch_size=1, gradient_accumulation_steps=task["accumulation"],
        max_steps=task["steps"], learning_rate=task["lr"], lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, bf16=bf16, fp16=False, gradient_checkpointing=False, packing=False,
        padding_free=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, report_to=[],
        save_strategy="no", logging_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True,
        use_cpu=device == "cpu", dataloader_pin_memory=device == "cuda", completion_only_loss=False,
        shuffle_dataset=False,
    )  # fmt: skip
    clock = Clock()
    trained = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    trainer = Trainer(
        model=model, args=config, train_dataset=Dataset.from_list(packs), callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(task["base"]),
    )  # fmt: skip
    # It rounds the adapters of a quantised base to bf16; here all sides keep what is trained in fp32.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = trained[name]
    trainer.losses = []
    trainer.train()
    write_report(task, "trl", clock, trainer.losses)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
