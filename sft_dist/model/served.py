"""What stands beside the weights of a whole model, so that transformers, vLLM and TGI run it from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sft_dist.model.build import SftModel
from sft_dist.model.hub import model_folder

# What says that weights are quantised; those that are written here are not.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def write_settings(
    folder: Path,
    model: SftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str,
    revision: str | None,
    dtype: torch.dtype,
    vocab_size: int,
) -> None:
    """Writes ``config.json``, ``generation_config.json``, the tokenizer and its chat template.

    Args:
        vocab_size: rows of the embedding; of a model whose parameters are elsewhere they cannot be counted.

    Raises:
        OSError: a file cannot be written.
    """
    config_file = model_folder(base, revision, "config") / "config.json"
    settings = served_config(json.loads(config_file.read_text(encoding="utf-8")), model, dtype, vocab_size)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    generation = model.causal_lm.generation_config
    if generation is not None:
        stop_at_end_of_turn(generation, tokenizer)
        # Not save_pretrained: it refuses settings that many published models have.
        generation.to_json_file(folder / "generation_config.json", use_diff=True)
    tokenizer.save_pretrained(folder)


def served_config(base: dict[str, Any], model: SftModel, dtype: torch.dtype, vocab_size: int) -> dict[str, Any]:
    """The base's ``config.json`` with what is different of the merged model.

    From the file and not from what Transformers made of it: programs that read the base's read this one.
    """
    causal_lm = model.causal_lm
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    assert head is not None
    name = str(dtype).removeprefix("torch.")
    settings = {key: value for key, value in base.items() if key not in QUANTIZATION_KEYS}
    # Versions of Transformers before 4.56 know the older name only.
    keys = [key for key in ("dtype", "torch_dtype") if key in settings] or ["torch_dtype"]
    settings |= dict.fromkeys(keys, name)
    settings["tie_word_embeddings"] = embedding.weight is head.weight
    inner = settings["text_config"] if "vocab_size" not in settings and "text_config" in settings else settings
    inner["vocab_size"] = vocab_size
    if inner is not settings:
        inner |= {key: name for key in ("dtype", "torch_dtype") if key in inner}
        inner["tie_word_embeddings"] = settings["tie_word_embeddings"]
    return settings


def stop_at_end_of_turn(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Generation must stop where training taught the model to; a base model often knows only its document's end."""
    eos = config.eos_token_id
    known = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        config.eos_token_id = [*known, tokenizer.eos_token_id]
