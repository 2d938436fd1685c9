"""Which models can be trained here as their authors run them; the others are refused before anything loads."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sft_dist.errors import ConfigError
from sft_dist.model.prequantized import stored_quantization

# Settings of a model configuration that change its arithmetic where packed attention or the loss head leave it out.
UNSUPPORTED_SETTINGS = (
    "attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale", "num_experts",
    "num_local_experts", "n_routed_experts", "attention_dropout", "attn_pdrop",
)  # fmt: skip


def load_model_config(path: str, revision: str | None) -> PretrainedConfig:
    """The model's configuration, refused when training it here would differ from what its authors run.

    Raises:
        ConfigError: no configuration there, or a setting that is not supported.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path: {path} has no config.json", fix="give a folder in Hugging Face layout")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model.path: {path} is neither a model folder nor a reachable hub id ({first_line(e)})",
            fix="give an existing folder, or a hub id that is in the local cache or can be downloaded",
        ) from e
    if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
        raise ConfigError(
            f"model.path: {path} is a {config.model_type} model, not a causal language model",
            fix="choose a decoder-only text model",
        )
    if not _keeps_segments_apart(config):
        raise ConfigError(
            f"model.path: {path} is a {config.model_type} model, whose layers may mix the rows of a pack",
            fix="choose a model in which every layer attends through Transformers' attention interface",
        )
    for key in UNSUPPORTED_SETTINGS:
        value = getattr(config, key, None)
        if value not in (None, 0, 0.0, 1.0):
            raise ConfigError(
                f"model.path: {path} sets {key}={value}, which is not supported",
                fix="choose a dense model without logit scaling, soft-capping or attention dropout",
            )
    stored_quantization(config, path)  # refuses what is quantised in a way that cannot be trained on
    return config


def _keeps_segments_apart(config: PretrainedConfig) -> bool:
    """Whether tokens meet in packed attention alone: a recurrent or convolutional layer knows no segments."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    layer_types = set(getattr(config, "layer_types", None) or ())
    return (
        model_class._supports_attention_backend
        and not model_class._is_stateful
        and layer_types <= {"full_attention", "sliding_attention"}
    )


def first_line(error: BaseException) -> str:
    """What an exception says, without the rest of its essay."""
    return str(error).strip().split("\n", 1)[0]
