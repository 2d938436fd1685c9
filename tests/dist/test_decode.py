"""Generation with the model that is being trained: what transformers generates, on any number of processes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.evaluation.decode import Generated
from tests.helpers import cells, generation, load_final
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

# Not all rows of a group are of one length, groups leave a rank without work, and stretches are not whole.
HOW: dict[str, Any] = {"max_new_tokens": 21, "stop_ids": [*range(2, 259, 9)], "rows_at_once": 3}
PROMPTS = generation.prompts()


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made = {"llama": tiny_base}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = generation.build_base(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


def by_transformers(folder: Path, method: str) -> list[list[int]]:
    """What transformers and PEFT generate with an exported model, one prompt after the other."""
    model: Any = load_final.load(str(folder), method)
    # As in ``load_final``: in eval mode bitsandbytes computes in bf16 on some CPUs.
    model.train(method == "qlora")
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=HOW["max_new_tokens"],
            eos_token_id=HOW["stop_ids"], pad_token_id=0,
        )  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def assert_finish_reasons(answers: list[Generated], how: dict[str, Any] = HOW) -> None:
    for answer in answers:
        stops = [token for token in answer.tokens if token in how["stop_ids"]]
        assert answer.finish_reason == ("stop" if stops else "length")
        assert stops == list(answer.tokens[-1:]) or not stops
        assert stops or len(answer.tokens) == how["max_new_tokens"]


@pytest.mark.parametrize(
    ("kind", "method", "strategy", "ranks"),
    [
        ("llama", "lora", "ddp", 1),
        *(
            pytest.param(*cell, marks=pytest.mark.ci)
            for cell in [
                ("llama", "full", "zero3", 2), ("llama", "qlora", "ddp", 1), ("llama", "qlora", "fsdp2", 2),
                ("llama", "prefix", "ddp", 1), ("llama", "prefix projection", "zero3", 2), ("llama", "prompt", "fsdp2", 2),
                ("llama", "p_tuning lstm", "zero2", 2), ("mistral", "full", "ddp", 1), ("mistral", "prefix", "ddp", 1),
                ("mistral", "lora", "zero1", 2), ("qwen2", "full", "fsdp2", 2), ("qwen3", "qlora", "ddp", 1),
                ("gemma3", "full", "ddp", 1), ("gemma3", "prompt", "ddp", 1), ("phi3", "lora", "ddp", 1),
            ]
        ),
    ],
)  # fmt: skip
def test_it_says_what_transformers_says(
    world: World, base: Callable[[str], Path], tmp_path: Path, kind: str, method: str, strategy: str, ranks: int
) -> None:
    final = tmp_path / "final"
    cfg = cells.config(str(base(kind)), method, strategy)
    scale = 0.5 if "num_virtual_tokens" in cells.METHODS[method] else 0.05
    answers = world(ranks).run(generation.answer, cells.dump(cfg), PROMPTS, HOW, scale, str(final))[0].answers
    assert [list(answer.tokens) for answer in answers] == by_transformers(final, method)
    assert_finish_reasons(answers)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
