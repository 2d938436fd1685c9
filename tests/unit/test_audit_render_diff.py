"""Prompts in training against those at inference, for every style of template."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sft_dist.config.audit_schema import AuditConfig, AuditLimits
from sft_dist.data.audit.audit import audit, enforce
from sft_dist.data.audit.render_diff import compare_prompts
from sft_dist.data.audit.settings import AuditSettings
from sft_dist.data.messages import Message
from sft_dist.errors import DataError
from tests.helpers import templates as t
from tests.helpers.templates import conversation, renderer_of
from tests.unit.test_masking import CHAT, STYLES, TOOLS

SAME = [style for style in STYLES if style != "r1"]


@pytest.mark.parametrize("style", SAME)
def test_templates_that_ask_as_they_train(style: str) -> None:
    diffs = compare_prompts(renderer_of(*STYLES[style]), CHAT)
    assert [(diff.answer, diff.differs_at) for diff in diffs] == [(1, None), (2, None)]
    assert all(diff.trained_text == diff.inference_text for diff in diffs)
    assert "天気は？" in diffs[1].trained_text
    assert diffs[0].origin == "rows.jsonl:1"


def test_a_generation_prompt_that_opens_a_block_no_finished_turn_has() -> None:
    first, second = compare_prompts(renderer_of(*STYLES["r1"]), CHAT)
    assert first.trained_text == "<|begin|><|User|>Hi<|Assistant|>"
    assert first.inference_text == "<|begin|><|User|>Hi<|Assistant|><think>\n"
    assert first.differs_at == len(
        renderer_of(*STYLES["r1"]).tokenizer(first.trained_text, add_special_tokens=False)["input_ids"]
    )
    assert second.inference_text.removeprefix(second.trained_text) == "<think>\n"


def test_tools_that_stand_elsewhere_while_the_model_is_asked() -> None:
    # Mistral's template prints tools before the last question: before the first while its answer is asked for.
    diffs = compare_prompts(renderer_of(*STYLES["mistral"]), TOOLS)
    assert [diff.differs_at for diff in diffs] == [1, 1, None]
    assert diffs[0].inference_text.startswith("<s>[AVAILABLE_TOOLS]")


def test_only_answers_that_are_trained_are_compared() -> None:
    first, answer = Message("user", "Hi"), Message("assistant", "Hello there.", trained=False)
    row = conversation(first, answer, ("user", "What is it?"), ("assistant", "The answer."))
    (diff,) = compare_prompts(renderer_of(*STYLES["chatml"]), row)
    assert diff.differs_at is None
    assert diff.trained_text.endswith("What is it?<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_refuses_the_prompt_is_shown_in_its_words() -> None:
    refusing = (
        "{% if add_generation_prompt and messages[-1]['content'] == 'Hi' %}{{ raise_exception('never ask') }}{% endif %}"
        + t.CHATML
    )
    row = conversation(("user", "Hi"), ("assistant", "Hello."))
    diffs = compare_prompts(renderer_of("chatml", refusing), row)
    assert [(diff.differs_at, "never ask" in diff.inference_text) for diff in diffs] == [(0, True)]


def test_long_prompts_are_shown_around_the_difference() -> None:
    row = conversation(("user", "Hello world. " * 200), ("assistant", "Hello."))
    (diff,) = compare_prompts(renderer_of(*STYLES["r1"]), row)
    assert diff.differs_at is not None
    assert diff.differs_at > 500
    assert diff.trained_text.startswith("…")
    assert len(diff.trained_text) < 400
    assert diff.inference_text.endswith("<think>\n")


def test_the_finding_counts_answers_and_can_be_refused() -> None:
    diffs = compare_prompts(renderer_of(*STYLES["r1"]), CHAT) + compare_prompts(renderer_of(*STYLES["chatml"]), CHAT)
    limits = AuditLimits(render_diff=0.1)
    settings = AuditSettings(config=AuditConfig(max_share=limits))
    result = audit([], None, settings=settings, render_diffs=diffs)
    (finding,) = result.findings
    assert (finding.check, finding.count, finding.total, finding.severity) == ("render_diff", 2, 4, "error")
    with pytest.raises(DataError, match="render_diff: 2 of 4 answers compared"):
        enforce(result, limits)
    same = [replace(diff, differs_at=None) for diff in diffs]
    assert not audit([], None, settings=settings, render_diffs=same).findings
