"""Cross-checks of ``method``, and of the tokens that it trains: part of ``validate``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sft_dist.config.schema import (
    Config,
    FullMethod,
    LoraMethod,
    PrefixMethod,
    PromptMethod,
    PTuningMethod,
    QloraMethod,
    VirtualTokensMethod,
)

REGULAR_EXPRESSION = "re:"  # in front of a name that is one

Finding = tuple[str, str]  # as in ``validate``


def method_findings(config: Config) -> Iterator[Finding]:
    """Every contradiction."""
    yield from _names(config)
    yield from _tokens(config)
    yield from _adapter(config)
    yield from _virtual_tokens(config)


def _names(config: Config) -> Iterator[Finding]:
    method = config.method
    lists: dict[str, list[str]] = {}
    if isinstance(method, FullMethod):
        lists["freeze"] = method.freeze
    elif isinstance(method, LoraMethod):
        lists["modules_to_save"] = method.modules_to_save
    if isinstance(method, LoraMethod) and isinstance(method.target_modules, list):
        lists["target_modules"] = method.target_modules
        if not method.target_modules:
            yield (
                "method.target_modules is []: an adapter on nothing",
                "set method.target_modules to all-linear or to names of layers, e.g. [q_proj, v_proj]",
            )
    if isinstance(method, QloraMethod) and isinstance(method.quantization.skip, list):
        lists["quantization.skip"] = method.quantization.skip
        if method.quantization.skip_budget is not None:
            yield (
                f"method.quantization.skip_budget is {method.quantization.skip_budget}, which only "
                "method.quantization.skip auto looks at",
                "remove method.quantization.skip_budget, or set method.quantization.skip to auto",
            )
    for key, names in lists.items():
        yield from name_findings(f"method.{key}", names)


def name_findings(key: str, names: list[str]) -> Iterator[Finding]:
    """Of a list of names of parameters or layers.

    Args:
        key: of the list.
    """
    if not all(name.strip() for name in names):
        yield f"{key} is {names}: one name is empty", f"remove the empty name from {key}"
    for name in names:
        if name.startswith(REGULAR_EXPRESSION):
            try:
                re.compile(name.removeprefix(REGULAR_EXPRESSION))
            except re.error as e:
                yield f"{key}: {name} is no regular expression ({e})", f"correct it in {key}"


def _tokens(config: Config) -> Iterator[Finding]:
    lists = {"model.add_tokens": config.model.add_tokens}
    if isinstance(config.method, LoraMethod):
        lists["method.train_tokens"] = config.method.train_tokens or []
    for key, tokens in lists.items():
        if not all(token.strip() for token in tokens):
            yield f"{key} is {tokens}: one token is empty", f"remove the empty token from {key}"
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            yield f"{key} has {', '.join(twice)} twice", f"name each token of {key} once"


def _adapter(config: Config) -> Iterator[Finding]:
    method = config.method
    if not isinstance(method, LoraMethod) or method.init == "default":
        return
    if method.init_from is not None:
        yield (
            f"method.init is {method.init} and method.init_from is {method.init_from}: both say how the adapter starts",
            "remove one of them",
        )
    wanted = {"pissa": "lora", "loftq": "qlora"}[method.init]
    reason = {
        "pissa": "freezes what is left of the weight, and a quantised rest is no longer the base",
        "loftq": "starts from the error of quantisation, and nothing is quantised",
    }[method.init]
    if method.type != wanted:
        fix = f"set method.type to {wanted}, or method.init to " + ("loftq" if wanted == "lora" else "default or pissa")
        yield f"method.init {method.init} {reason} with method.type {method.type}", fix
    if method.init == "pissa" and method.dora:
        yield (
            "method.init pissa is saved as an adapter of twice the rank, which method.dora does not allow",
            "set method.dora to false, or method.init to default",
        )


def _virtual_tokens(config: Config) -> Iterator[Finding]:
    method = config.method
    if not isinstance(method, VirtualTokensMethod):
        return
    if config.data.packing != "none":
        yield (
            f"data.packing is {config.data.packing}, but method.type {method.type} puts {method.num_virtual_tokens} "
            "virtual tokens in front of every row: a pack would exceed data.max_seq_len by as many for each row in it",
            "set data.packing to none",
        )
    if isinstance(method, PromptMethod) and method.init_text is not None and not method.init_text.strip():
        yield "method.init_text is empty", "remove method.init_text, or give a text to start from"
    if isinstance(method, PTuningMethod) and method.encoder == "mlp" and method.encoder_num_layers is not None:
        yield (
            f"method.encoder_num_layers is {method.encoder_num_layers}, which has no effect with method.encoder mlp",
            "remove method.encoder_num_layers, or set method.encoder to lstm",
        )
    if isinstance(method, PrefixMethod) and not method.projection and method.encoder_hidden_size is not None:
        yield (
            f"method.encoder_hidden_size is {method.encoder_hidden_size}, which has no effect without projection",
            "remove method.encoder_hidden_size, or set method.projection to true",
        )
