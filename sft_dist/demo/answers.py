"""What a model answers to the held-out prompts, asked through plain transformers as any user of the artefact would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.demo.dataset import data_file
from sft_dist.demo.house_format import Row, answer_of, house_format_ok, kind_of
from sft_dist.demo.phrasebook import Family, Language

MAX_NEW_TOKENS = 96  # the longest reference has 70

# One prompt of each task is shown.
SHOWN: tuple[tuple[Family, Language], ...] = (("reply", "ja"), ("extraction", "en"), ("rewriting", "ja"))


@dataclass(frozen=True)
class Scores:
    """How many of ``num_answers`` keep the house format, and how many equal the reference word for word."""

    num_answers: int
    num_in_format: int
    num_exact: int


def held_out_rows() -> list[Row]:
    """The rows that no training saw."""
    return [json.loads(line) for line in data_file("eval.jsonl").read_text(encoding="utf-8").splitlines()]


def shown_indices(rows: Sequence[Row]) -> list[int]:
    """The first row of each kind in ``SHOWN``."""
    kinds = [kind_of(row) for row in rows]
    return [kinds.index(kind) for kind in SHOWN]


def answer(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Greedy answers of the model in ``folder`` to the prompts of ``rows``, all in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    prompts = [
        tokenizer.apply_chat_template([dict(row["messages"][0])], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    with torch.inference_mode():
        tokens = model.generate(**batch.to(device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answers: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def score(rows: Sequence[Row], answers: Sequence[str]) -> Scores:
    """Rates ``answers`` to ``rows``."""
    pairs = list(zip(rows, answers, strict=True))
    return Scores(
        num_answers=len(pairs),
        num_in_format=sum(house_format_ok(row, given) for row, given in pairs),
        num_exact=sum(given == answer_of(row) for row, given in pairs),
    )
