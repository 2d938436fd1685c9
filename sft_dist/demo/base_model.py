"""The base that the demo fine-tunes: a Llama of a few million parameters with random weights, and its tokenizer.

Nothing is downloaded and nothing is pre-trained: what the fine-tuned model can do it has learned during the demo. The
seed and the committed training rows decide every byte of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_dist.demo.dataset import data_file

VOCAB_SIZE = 3072
MAX_POSITIONS = 2048
EMBEDDING_STD = 0.1
ATTENTION_STD = 0.06
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# What a token may not cross. Japanese has no spaces, so that without this a name would melt into what follows it and
# could not be copied: scripts are parted, and 様 and units after digits stand alone. Digits are grouped from the right,
# so that 12,800 and 12800 share their tokens. JSON's punctuation is taken whole.
_PIECES = Regex(
    r"""\{"|": "|": |", "|, "|"\}"""
    r"|<\|\w+\|>"
    r"|(?<=\p{N})[年月日円時]|様"
    r"|[\p{Han}&&[^様]]+|\p{Hiragana}+|[\p{Katakana}ー]+"
    r"| ?[A-Za-z]+"
    r"|(?<!\p{N})202\p{N}(?!\p{N})|\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
    r"|\n+|[ ]?[^\s\p{L}\p{N}]|\s+"
)


def build_base_model(folder: Path, *, seed: int) -> LlamaForCausalLM:
    """Write tokenizer, chat template, config and safetensors weights into ``folder`` in Hugging Face layout."""
    tokenizer = build_tokenizer()
    model = _build_model(tokenizer, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al. 2016, arXiv 1508.07909) of the demo's training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    return fast


def _training_text() -> Iterator[str]:
    for line in data_file("train.jsonl").read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            yield f"{message['role']}\n"
            yield message["content"]


def _build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: LlamaForCausalLM) -> None:
    """Random weights from which copying is learned within a minute on a CPU.

    "Mimetic" attention (Trockman and Kolter 2023, arXiv 2305.09828): queries equal keys and the output projection is
    the values' transpose, so that a token starts by looking at tokens like itself and by passing on what it finds.
    Input embeddings are large enough to remain distinct under the optimizer's first steps, and the output layer starts
    as their scaled copy: what is passed on becomes more likely. Nothing of the data is in these weights.
    """
    model.model.embed_tokens.weight.normal_(std=EMBEDDING_STD)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight * (model.config.initializer_range / EMBEDDING_STD))
    size = model.config.head_dim
    queries_per_key = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight.normal_(std=ATTENTION_STD)
        for head in range(model.config.num_attention_heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // queries_per_key * size, (head // queries_per_key + 1) * size)
            attention.q_proj.weight[own] = attention.k_proj.weight[shared]
            attention.o_proj.weight[:, own] = attention.v_proj.weight[shared].T
