"""Describes the model a run trains: every parameter's name, shape and fate."""

from __future__ import annotations

from collections.abc import Sequence

from sft_dist.config.schema import FullMethod, MethodConfig, QloraMethod
from sft_dist.model.build import SftModel, build_meta_model, quantizable, skipped_layers
from sft_dist.model.prequantized import check_method, stored_quantization
from sft_dist.model.quantized import QuantizedLinear
from sft_dist.model.skip import DEFAULT_BUDGET, skip_by_error
from sft_dist.model.spec import NO_TOKENS, Dtype, ModelSpec, ParameterSpec, Tokens
from sft_dist.model.support import dynamic_rope, heads_of, load_model_config
from sft_dist.model.tokens import plan_tokens


def describe_model(
    path: str, revision: str | None, method: MethodConfig, compute: Dtype, add_tokens: Sequence[str] = ()
) -> ModelSpec:
    """The description of the model that ``build_meta_model`` builds, from its configuration alone.

    Where tokens are added or trained by themselves, from its tokenizer too; with ``quantization.skip: auto`` from a
    sample of its weights. In the description ``skip`` lists the paths of the layers.

    Raises:
        ConfigError: the path is no model, one with settings that are not supported, or not for this method;
            ``plan_tokens``.
        CheckpointError: ``skip_by_error``.
    """
    return describe_built(path, revision, method, compute, add_tokens)[0]


def describe_built(
    path: str, revision: str | None, method: MethodConfig, compute: Dtype, add_tokens: Sequence[str] = ()
) -> tuple[ModelSpec, SftModel]:
    """``describe_model``, and the model that was built for it: that of ``build_model``."""
    config = load_model_config(path, revision)
    check_method(stored_quantization(config, path), method, path)
    if isinstance(method, QloraMethod) and method.quantization.skip:
        method = _with_skipped_layers(path, revision, method, compute)
    tokens = plan_tokens(path, revision, method, add_tokens, config.vocab_size)
    return _describe(path, revision, method, compute, tokens)


def describe_dense(path: str, revision: str | None, compute: Dtype) -> ModelSpec:
    """The base with every weight in ``compute`` and its own shape, also where the files hold it quantised."""
    return _describe(path, revision, FullMethod(), compute, NO_TOKENS)[0]


def _with_skipped_layers(path: str, revision: str | None, method: QloraMethod, compute: Dtype) -> QloraMethod:
    config = method.quantization
    if config.skip == "auto":
        budget = DEFAULT_BUDGET if config.skip_budget is None else config.skip_budget
        skip = skip_by_error(path, revision, config.type, budget, compute)
    else:
        dense = build_meta_model(path, revision, FullMethod(), compute)
        skip = skipped_layers(config.skip, quantizable(dense.causal_lm))
    return method.model_copy(update={"quantization": config.model_copy(update={"skip": skip, "skip_budget": None})})


def _describe(
    path: str, revision: str | None, method: MethodConfig, compute: Dtype, tokens: Tokens
) -> tuple[ModelSpec, SftModel]:
    config = load_model_config(path, revision)
    meta = build_meta_model(path, revision, method, compute, tokens)
    heads, kv_heads, head_dim = heads_of(config)
    owner = {id(parameter): name for name, block in meta.blocks().items() for parameter in block.parameters()}
    parameters = tuple(
        ParameterSpec(name, tuple(p.shape), p.requires_grad, owner.get(id(p))) for name, p in meta.named_parameters()
    )
    spec = ModelSpec(
        path=path,
        revision=revision,
        method=method,
        compute=compute,
        parameters=parameters,
        vocab_size=config.vocab_size + tokens.new_rows,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dynamic_rope=dynamic_rope(config),
        num_parameters=sum(p.numel for p in parameters) + _packed_away(meta),
        max_positions=getattr(config, "max_position_embeddings", None),
        buffer_bytes=sum(b.nbytes for b in meta.buffers()),
        quantization_bytes=sum(b.nbytes for m in meta.modules() if isinstance(m, QuantizedLinear) for b in m.buffers()),
        tokens=tokens,
    )
    return spec, meta


def _packed_away(model: SftModel) -> int:
    """By how many elements the weights are more than what stores them."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in layers)
