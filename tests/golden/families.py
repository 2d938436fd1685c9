"""Families of chat templates: the template of each in a tokenizer with its special tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.named_templates import BUILT_IN
from tests.golden.vocabularies import byte_level, sentencepiece, unigram

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        tokenizer: makes its tokenizer.
        template: ``data.chat_template`` of the run: a built-in name, the text of a file in ``templates``, or None: one is
            built.
    """

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    template: str | None

    def renderer(self, template: str | None = None) -> ChatRenderer:
        return ChatRenderer(self.tokenizer(), template or self.template)


def _text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


_QWEN = partial(
    byte_level, ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"],
    bos=None, eos="<|im_end|>",
)  # fmt: skip
_DEEPSEEK = partial(
    byte_level, [*BUILT_IN["deepseek"], "<think>", "</think>"],
    bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", adds_bos=True,
)  # fmt: skip
_COMMAND_R = [
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_ACTION|>",
    "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>",
]  # fmt: skip
_HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"]

FAMILIES = {
    "chatml": Family(partial(byte_level, BUILT_IN["chatml"], bos=None, eos="<|endoftext|>"), "chatml"),
    "llama3": Family(
        partial(byte_level, BUILT_IN["llama3"], bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True),
        "llama3",
    ),
    "mistral": Family(partial(byte_level, BUILT_IN["mistral"], bos="<s>", eos="</s>", adds_bos=True), "mistral"),
    "gemma": Family(
        partial(sentencepiece, BUILT_IN["gemma"], bos="<bos>", eos="<eos>", first_space=False, adds_bos=True), "gemma"
    ),
    "qwen3": Family(_QWEN, "qwen3"),
    "qwen2_5": Family(_QWEN, _text("qwen2_5")),
    "deepseek": Family(_DEEPSEEK, "deepseek"),
    "deepseek_r1": Family(_DEEPSEEK, _text("deepseek_r1")),
    "phi3": Family(
        partial(sentencepiece, BUILT_IN["phi3"], bos="<s>", eos="<|endoftext|>", first_space=True, rstrip=True),
        "phi3",
    ),
    "phi3_eos": Family(
        partial(sentencepiece, BUILT_IN["phi3"], bos="<s>", eos="<|endoftext|>", first_space=True, rstrip=True),
        _text("phi3_eos"),
    ),
    "phi4": Family(
        partial(byte_level, ["<|im_start|>", "<|im_end|>", "<|im_sep|>"], bos=None, eos="<|im_end|>"), _text("phi4")
    ),
    "harmony": Family(partial(byte_level, _HARMONY, bos=None, eos="<|return|>"), _text("harmony")),
    "command_r": Family(
        partial(byte_level, _COMMAND_R, bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", adds_bos=True),
        _text("command_r"),
    ),
    "zephyr": Family(
        partial(sentencepiece, [], bos="<s>", eos="</s>", first_space=True, adds_bos=True), _text("zephyr")
    ),
    "base_chatml": Family(partial(byte_level, BUILT_IN["chatml"], bos="<s>", eos="</s>", adds_bos=True), None),
    "base_plain": Family(partial(sentencepiece, [], bos="<s>", eos="</s>", first_space=True, adds_bos=True), None),
    "base_alpaca_ja": Family(partial(unigram, [], bos="<s>", eos="</s>"), "alpaca_ja"),
}

TAGGED = {name: _text(f"{name}_tagged") for name in ("chatml", "llama3", "qwen2_5")}
"""The same templates with ``{% generation %}`` around what the assistant says."""
