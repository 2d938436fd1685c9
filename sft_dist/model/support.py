"""Which models can be trained here as their authors run them; the others are refused before anything loads."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sft_dist.errors import ConfigError
from sft_dist.model.hub import model_folder
from sft_dist.model.prequantized import stored_quantization
from sft_dist.model.spec import DynamicRope

# Settings of a model configuration that change its arithmetic where packed attention or the loss head leave it out.
UNSUPPORTED_SETTINGS = (
    "attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale", "attention_dropout",
    "attn_pdrop",
)  # fmt: skip

# What configurations call the number of experts of a layer.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def load_model_config(path: str, revision: str | None) -> PretrainedConfig:
    """The model's configuration, refused when training it here would differ from what its authors run.

    Raises:
        ModelNotHere: the folder is not there, or the hub model was not fetched.
        ModelNotKnown: as ``model_folder``.
        ConfigError: no configuration in the folder, or a setting that is not supported.
    """
    folder = model_folder(path, revision, "config")
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model.path: {path} is an adapter, not a model",
            fix="set model.path to the adapter's base model, and method.init_from to this folder to go on from it",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {path} has no config.json", fix="give a folder in Hugging Face layout")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model.path: the config.json of {path} cannot be read ({first_line(e)})",
            fix="give a folder in Hugging Face layout, of a model that Transformers knows",
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
    for key in EXPERTS:
        experts = getattr(config, key, None)
        if experts:
            raise ConfigError(
                f"model.path: {path} is a {config.model_type} model with a mixture of {experts} experts: its router's "
                "balancing loss would be left out, and its experts are neither quantised nor given adapters",
                fix="choose a dense model",
            )
    for key in UNSUPPORTED_SETTINGS:
        value = getattr(config, key, None)
        if value not in (None, 0, 0.0, 1.0):
            raise ConfigError(
                f"model.path: {path} sets {key}={value}, which is not supported",
                fix="choose a model without logit scaling, soft-capping or attention dropout",
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


def heads_of(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the dimension of a head."""
    heads: int = config.num_attention_heads
    # Models without grouped-query attention state one number only, and most leave the dimension to be divided.
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, head_dim


def dynamic_rope(config: PretrainedConfig) -> DynamicRope | None:
    """Whether and where the model computes its rotary frequencies from the longest row of each forward pass.

    Transformers' ``modeling_rope_utils.dynamic_rope_update``: "longrope" has two sets of frequencies, "dynamic" one for
    each length and keeps that of the longest row until a short one comes.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    # Either of all layers, or by the kind of layer.
    sections = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [s["original_max_position_embeddings"] for s in sections if s.get("rope_type") == "longrope"]
    has_memory = any("dynamic" in s.get("rope_type", "") for s in sections)
    if has_memory:
        limits.append(config.max_position_embeddings)
    return DynamicRope(min(limits), has_memory) if limits else None


def first_line(error: BaseException) -> str:
    """What an exception says, without the rest of its essay."""
    return str(error).strip().split("\n", 1)[0]
