"""The configuration of a row's model."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.peers.unmapped import Unmapped
from sft_dist.model.known import known_config, known_models

# Names that people write which are no hub ids.
SPOKEN = {
    "stablelmalpha3b": "stabilityai/stablelm-base-alpha-3b",
    "phi1513b": "microsoft/phi-1_5",
    "llama27b": "meta-llama/Llama-2-7b-hf",
    "llama213b": "meta-llama/Llama-2-13b-hf",
    "llama270b": "meta-llama/Llama-2-70b-hf",
    "llama38b": "meta-llama/Meta-Llama-3-8B",
    "llama370b": "meta-llama/Meta-Llama-3-70B",
    "llama318b": "meta-llama/Llama-3.1-8B",
    "llama3170b": "meta-llama/Llama-3.1-70B",
    "llama321b": "meta-llama/Llama-3.2-1B",
    "llama323b": "meta-llama/Llama-3.2-3B",
    "llama3370b": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral7b": "mistralai/Mistral-7B-v0.1",
    # Of the same shapes.
    "llama7b": "meta-llama/Llama-2-7b-hf",
    "llama17b": "meta-llama/Llama-2-7b-hf",
    "llama13b": "meta-llama/Llama-2-13b-hf",
    "llama113b": "meta-llama/Llama-2-13b-hf",
    "vicuna7bv15": "meta-llama/Llama-2-7b-hf",
    "codellama7b": "meta-llama/Llama-2-7b-hf",
    "codellama13b": "meta-llama/Llama-2-13b-hf",
    "zephyr7bbeta": "mistralai/Mistral-7B-v0.1",
    "mistral7bv02": "mistralai/Mistral-7B-v0.1",
    "qwen205b": "Qwen/Qwen2.5-0.5B",
    "qwen215b": "Qwen/Qwen2.5-1.5B",
    "qwen27b": "Qwen/Qwen2.5-7B",
    "qwen272b": "Qwen/Qwen2.5-72B",
    "phi3mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi3mini128k": "microsoft/Phi-3-mini-4k-instruct",
    "phi35mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi3medium": "microsoft/Phi-3-medium-4k-instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "tinyllama11b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
DECORATION = re.compile(r"(instruct|base|chat|hf|it|bnb4bit|bnb|4bit|metallama(?=.*llama)|meta(?=llama))")


def model_config(name: str) -> dict[str, Any]:
    """Keys of ``config.json``, by hub id, bare name, or what a table calls the model.

    Raises:
        Unmapped: nobody knows the architecture.
    """
    found = known_config(name) or known_config(name.rpartition("/")[2])
    if found is None:
        plain = _plain(name)
        spoken = SPOKEN.get(plain) or SPOKEN.get(DECORATION.sub("", plain))
        same = [known for known in known_models() if _bare(known) == _bare(name)]
        found = known_config(spoken) if spoken else known_config(same[0]) if same else None
    if found is None:
        raise Unmapped(f"architecture not known: {name}")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())


def _bare(name: str) -> str:
    return DECORATION.sub("", _plain(name))
