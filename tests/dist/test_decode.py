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
    # Phi's rotary frequencies allow training no longer rows here; generation passes the limit.
    cfg = cells.config(str(base(kind)), method, strategy, data={"max_seq_len": 32 if kind == "phi3" else 48})
    scale = 0.5 if "num_virtual_tokens" in cells.METHODS[method] else 0.05
    answers = world(ranks).run(generation.answer, cells.dump(cfg), PROMPTS, HOW, scale, str(final))[0].answers
    assert [list(answer.tokens) for answer in answers] == by_transformers(final, method)
    assert_finish_reasons(answers)
    if method == "lora":
        assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def answers_of(ranks: list[Answered]) -> list[Generated]:
    assert all(other.answers is None for other in ranks[1:])
    assert ranks[0].answers is not None
    return ranks[0].answers


@pytest.mark.parametrize(
    ("kind", "method", "strategy"),
    [
        ("llama", "lora", "zero3"),
        *(
            pytest.param(*cell, marks=pytest.mark.ci)
            for cell in [
                ("llama", "full", "ddp"), ("llama", "full", "fsdp2"), ("llama", "full", "zero1"),
                ("llama", "full", "zero3"), ("llama", "lora", "ddp"), ("llama", "lora", "zero2"),
                ("llama", "qlora", "fsdp2"), ("llama", "qlora", "zero3"), ("llama", "prefix projection", "fsdp2"),
                ("llama", "prefix", "zero3"), ("llama", "p_tuning lstm", "zero3"), ("mistral", "full", "fsdp2"),
                ("gemma3", "lora", "zero3"), ("phi3", "lora", "fsdp2"), ("gpt2", "full", "zero3"),
            ]
        ),
    ],
)  # fmt: skip
def test_three_processes_say_what_one_says(
    world: World, base: Callable[[str], Path], kind: str, method: str, strategy: str
) -> None:
    """Every token, drawn ones too, under the same strategy and under ddp."""
    data = {"max_seq_len": 32 if kind == "phi3" else 40}
    texts = [cells.dump(cells.config(str(base(kind)), method, s, data=data)) for s in (strategy, "ddp")]
    for how in (HOW, HOW | {"temperature": 0.8, "seed": 5}):
        three = world(3).run(generation.answer, texts[0], PROMPTS, how, 0.05)
        answers = answers_of(three)
        assert answers == answers_of(world(1).run(generation.answer, texts[0], PROMPTS, how, 0.05))
        assert answers == answers_of(world(1).run(generation.answer, texts[1], PROMPTS, how, 0.05))
        assert len(answers) == len(PROMPTS)
        assert all(rank.told == three[0].told for rank in three)
        assert three[0].told == sorted(three[0].told)
        assert three[0].told[-1] == len(PROMPTS)


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("fsdp2", "lora"),
        *(
            pytest.param(*cell, marks=pytest.mark.ci)
            for cell in [
                ("ddp", "full"), ("ddp", "prompt"), ("fsdp2", "full"), ("fsdp2", "qlora"), ("zero1", "full"),
                ("zero2", "lora"), ("zero3", "full"), ("zero3", "qlora"), ("zero3", "prefix projection"),
            ]
        ),
    ],
)  # fmt: skip
def test_a_training_goes_on_as_if_nothing_was_said(world: World, tiny_base: Path, strategy: str, method: str) -> None:
    cfg = cells.dump(cells.config(str(tiny_base), method, strategy))
    spoken = world(2).run(generation.losses_around, cfg, PROMPTS, HOW | {"temperature": 1.0})
    silent = world(2).run(generation.losses_around, cfg, PROMPTS, None)
    assert spoken == silent


def test_fewer_prompts_than_ranks(world: World, tiny_base: Path) -> None:
    """Two ranks go on with a row that nobody reads."""
    cfg = cells.dump(cells.config(str(tiny_base), "lora", "fsdp2"))
    three = world(3).run(generation.answer, cfg, PROMPTS[:2], HOW, 0.05)
    assert answers_of(three) == answers_of(world(1).run(generation.answer, cfg, PROMPTS, HOW, 0.05))[:2]
    assert answers_of(world(3).run(generation.answer, cfg, [], HOW)) == []


@pytest.mark.ci
def test_drawn_tokens_follow_from_the_seed_and_the_number(world: World, tiny_base: Path) -> None:
    """The same prompt at another place is another draw; the same place the same one, whatever stands before."""
    cfg = cells.dump(cells.config(str(tiny_base), "lora", "ddp"))
    same = [PROMPTS[0]] * 7

    def drawn(asked: list[list[int]], seed: int, temperature: float) -> list[tuple[int, ...]]:
        how = HOW | {"temperature": temperature, "seed": seed, "rows_at_once": 1}
        return [a.tokens for a in answers_of(world(1).run(generation.answer, cfg, asked, how))]

    answers = drawn(same, 0, 1.0)
    assert len(set(answers)) > 4
    assert drawn(same, 0, 1.0) == answers
    assert drawn(PROMPTS[1:4] + same[3:], 0, 1.0)[3:] == answers[3:]
    assert drawn(same, 1, 1.0) != answers
    assert len(set(drawn(same, 0, 1e-4))) == 1


@pytest.mark.ci
def test_a_row_ends_where_positions_do(world: World, base: Callable[[str], Path]) -> None:
    """GPT-2 here has 40 learned positions: its longest prompts are answered by fewer tokens."""
    cfg = cells.dump(cells.config(str(base("gpt2")), "full", "ddp", data={"max_seq_len": 40}))
    how = HOW | {"stop_ids": []}
    answers = answers_of(world(1).run(generation.answer, cfg, PROMPTS, how))
    assert [len(a.tokens) for a in answers] == [min(21, 40 - len(prompt)) for prompt in PROMPTS]
    with pytest.raises(AssertionError, match="prompt 1 has 40 tokens, and the model has 40 positions"):
        world(1).run(generation.answer, cfg, [[5], [7] * 40], how)


@pytest.mark.ci
def test_other_rotary_frequencies_are_told(world: World, base: Callable[[str], Path]) -> None:
    cfg = cells.dump(cells.config(str(base("phi3")), "lora", "ddp", data={"max_seq_len": 32}))
    assert world(1).run(generation.answer, cfg, [[5] * 11], HOW)[0].notes == []
    (note,) = world(1).run(generation.answer, cfg, [[5] * 12], HOW)[0].notes
    assert "33 tokens: in rows of more than 32" in note
