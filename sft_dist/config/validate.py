"""Cross-checks between keys that need neither the number of processes nor the data. Reads, never changes.

Checks that need the world (does the batch divide, is there a GPU) belong to ``resolve``; checks of files to ``data``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from sft_dist.config.control_schema import EVAL_LOSS, known_mode
from sft_dist.config.schema import (
    AdamWConfig,
    Config,
    Fsdp2Sharding,
    FullMethod,
    LoraMethod,
    PrefixMethod,
    PromptMethod,
    PTuningMethod,
    QloraMethod,
    VirtualTokensMethod,
)
from sft_dist.config.validate_cluster import cluster_findings
from sft_dist.config.validate_eval import eval_findings, has_eval_data
from sft_dist.errors import ConfigError

REGULAR_EXPRESSION = "re:"  # in front of a name that is one

Finding = tuple[str, str]  # (what is wrong, how to fix it), each one line


def validate(config: Config, *, source: str | None = None) -> None:
    """Checks that the keys of a configuration fit together.

    Args:
        source: the file to name in messages, where there is one.

    Raises:
        ConfigError: naming every pair of keys that contradict each other, each with its fix.
    """
    prefix = f"{source}: " if source is not None else ""
    findings = [(prefix + what, fix) for check in CHECKS for what, fix in check(config)]
    if len(findings) == 1:
        raise ConfigError(findings[0][0], fix=findings[0][1])
    if findings:
        raise ConfigError(
            "\n".join(f"{what}; {fix}" for what, fix in findings), fix=f"correct these {len(findings)} places"
        )


def _length(config: Config) -> Iterator[Finding]:
    epochs, steps = config.train.num_epochs, config.train.max_steps
    if epochs is None and steps is None:
        yield "the length of the run is missing", "set train.num_epochs or train.max_steps"
    if epochs is not None and steps is not None:
        yield (
            f"train.num_epochs is {epochs} and train.max_steps is {steps}: both set the length of the run",
            "remove one of them (as an override: train.num_epochs=null or train.max_steps=null)",
        )


def _batch(config: Config) -> Iterator[Finding]:
    micro, whole = config.train.micro_batch_size, config.train.global_batch_size
    if micro != "auto" and micro > whole:
        yield (
            f"train.micro_batch_size is {micro}, more than train.global_batch_size, which is {whole}",
            f"set train.micro_batch_size to at most {whole}",
        )


def _warmup(config: Config) -> Iterator[Finding]:
    ratio, steps = config.optim.warmup_ratio, config.train.max_steps
    if steps is not None and steps > 1 and math.ceil(ratio * steps) >= steps:
        yield (
            f"optim.warmup_ratio {ratio} of train.max_steps {steps} is all of them: lr would never leave the warm-up",
            f"set optim.warmup_ratio to at most {math.floor(100 * (steps - 1) / steps) / 100}, or train longer",
        )


def _precision(config: Config) -> Iterator[Finding]:
    precision, strategy = config.precision, config.sharding.strategy
    if precision.master == "bf16" and precision.compute == "fp32":
        yield (
            "precision.master bf16 stores the weights more coarsely than precision.compute fp32 multiplies them",
            "set precision.master to fp32, or precision.compute to bf16",
        )
    elif precision.master == "bf16" and strategy.startswith("zero"):
        yield (
            f"precision.master is bf16, but sharding.strategy {strategy} (DeepSpeed) always keeps fp32 master weights",
            "set precision.master to fp32, or sharding.strategy to fsdp2 or ddp",
        )


def _optimizer(config: Config) -> Iterator[Finding]:
    optim, stored = config.optim, config.precision.optimizer_state
    if not isinstance(optim, AdamWConfig):
        if stored is not None:
            yield (
                f"precision.optimizer_state {stored} has no effect with optim.type {optim.type}: only AdamW reads it",
                "remove precision.optimizer_state, or set optim.type to adamw",
            )
    elif optim.paged and (stored or config.precision.master) == "bf16":
        yield (
            "optim.paged is true, but bitsandbytes, which pages the moments, has no bf16 ones",
            "set precision.optimizer_state to 8bit or fp32, or optim.paged to false",
        )
    elif optim.paged and isinstance(config.sharding, Fsdp2Sharding) and config.sharding.cpu_offload:
        yield (
            "optim.paged is true, but sharding.cpu_offload keeps the moments in host memory already",
            "set optim.paged or sharding.cpu_offload to false",
        )


def _no_decay(config: Config) -> Iterator[Finding]:
    names = config.optim.no_decay
    if names and config.optim.weight_decay == 0:
        yield (
            f"optim.no_decay is {names}, which has no effect with optim.weight_decay 0",
            "remove optim.no_decay, or set optim.weight_decay",
        )
    yield from _patterns("optim.no_decay", names)


def _lora_plus(config: Config) -> Iterator[Finding]:
    if config.optim.lora_plus_ratio != 1 and not isinstance(config.method, LoraMethod):
        yield (
            f"optim.lora_plus_ratio is {config.optim.lora_plus_ratio}, but method.type {config.method.type} has no B",
            "remove optim.lora_plus_ratio, or set method.type to lora or qlora",
        )


def _activation_checkpointing(config: Config) -> Iterator[Finding]:
    mode, k = config.activation_checkpointing.mode, config.activation_checkpointing.k
    if mode == "every_k" and k is None:
        yield (
            "activation_checkpointing.mode is every_k, but activation_checkpointing.k is missing",
            ("set activation_checkpointing.k, e.g. to 2"),
        )
    if mode != "every_k" and k is not None:
        yield (
            f"activation_checkpointing.k is {k}, which has no effect with activation_checkpointing.mode {mode}",
            "remove activation_checkpointing.k, or set activation_checkpointing.mode to every_k",
        )
    if config.activation_checkpointing.offload and mode in ("auto", "none"):
        yield (
            f"activation_checkpointing.offload is true, but with activation_checkpointing.mode {mode} "
            + ("no layer is recomputed" if mode == "none" else "there may be no layer that is recomputed"),
            "set activation_checkpointing.mode to full, selective or every_k, or offload to false",
        )


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
        yield from _patterns(f"method.{key}", names)


def _patterns(key: str, names: list[str]) -> Iterator[Finding]:
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


def _mixing(config: Config) -> Iterator[Finding]:
    train, held_out = config.data.train, config.data.eval
    shares = [source.share for source in train if source.share is not None]
    if shares and len(shares) < len(train):
        yield (
            f"data.train: {len(shares)} of {len(train)} sources have a share",
            "give every training source a share, or all of them weights",
        )
    elif shares and not math.isclose(sum(shares), 1, abs_tol=1e-6):
        yield f"data.train: the shares add up to {sum(shares):g}", "make them add up to 1"
    for i, source in enumerate(train):
        if source.share is not None and source.weight != 1:
            yield f"data.train.{i} has a weight and a share", "remove one of them"
    for i, source in enumerate(held_out):
        if source.weight != 1 or source.share is not None:
            yield (
                f"data.eval.{i} has a weight or a share, which has no effect: held-out rows are seen once",
                "remove it",
            )
    if config.data.mix_by != "tokens" and not shares and all(source.weight % 1 == 0 for source in train):
        yield (
            f"data.mix_by is {config.data.mix_by}, which has no effect: no training source has a share or a fraction "
            "in its weight",
            "remove data.mix_by",
        )
    if config.data.eval_split is not None and held_out:
        yield "data.eval_split and data.eval both say what is held out", "remove one of them"


def _supervision(config: Config) -> Iterator[Finding]:
    data = config.data
    if data.train_on == "all" and not data.train_reasoning:
        yield "data.train_reasoning is false, but data.train_on all trains all text", "remove one of them"
    sources = {"train": data.train, "eval": data.eval}
    for place, template in (
        (f"data.{kind}.{i}.templates", template)
        for kind, listed in sources.items()
        for i, source in enumerate(listed)
        for template in source.templates
    ):
        if template.count("{prompt}") != 1:
            yield f"{place}: {template!r} has {{prompt}} {template.count('{prompt}')} times", "write it once"


def _packing(config: Config) -> Iterator[Finding]:
    if config.data.packing_window is not None and config.data.packing == "none":
        yield (
            f"data.packing_window is {config.data.packing_window}, which has no effect with data.packing none",
            "remove data.packing_window, or set data.packing to best_fit",
        )


def _mirror(config: Config) -> Iterator[Finding]:
    mirror = config.checkpoint.mirror
    if mirror is not None and "://" not in mirror:
        yield (
            f"checkpoint.mirror {mirror} is no URL",
            "write s3://bucket/runs/x, gs://, az:// or file:///mnt/runs/x, or remove it",
        )


def _hardware(config: Config) -> Iterator[Finding]:
    hardware = config.hardware
    prices = {
        "price_per_hour": hardware.price_per_hour,
        "price_per_hour_jpy": hardware.price_per_hour_jpy,
        "owned": hardware.owned,
    }
    own = [f"hardware.{key}" for key, value in prices.items() if value is not None]
    if len(own) > 1:
        yield f"{' and '.join(own)} are set: each says what a GPU costs", "keep one of them"
    if own and hardware.price_kind != "on_demand":
        yield (
            f"hardware.price_kind is {hardware.price_kind}, which has no effect with {own[0]}",
            f"remove hardware.price_kind, or {own[0]}",
        )
    if hardware.owned is not None:
        electricity = (hardware.owned.price_per_kwh, hardware.owned.price_per_kwh_jpy)
        if electricity == (None, None):
            yield "hardware.owned has no price of a kWh", "set hardware.owned.price_per_kwh or price_per_kwh_jpy"
        elif None not in electricity:
            yield "hardware.owned has the price of a kWh in USD and in JPY", "remove one of them"
    if hardware.network is not None and hardware.nodes == 1:
        yield (
            f"hardware.network is {hardware.network}, which has no effect with hardware.nodes 1",
            "remove hardware.network, or set hardware.nodes",
        )
    names = {"gpu": hardware.gpu, "network": hardware.network, "provider": hardware.provider, "prices": hardware.prices}
    for key, name in names.items():
        if name is not None and not name.strip():
            yield f"hardware.{key} is empty", f"set hardware.{key} to a name, or remove it"


def _paths(config: Config) -> Iterator[Finding]:
    paths: dict[str, str | None] = {"model.path": config.model.path, "data.chat_template": config.data.chat_template}
    paths |= {f"data.train.{i}.path": source.path for i, source in enumerate(config.data.train)}
    paths |= {f"data.eval.{i}.path": source.path for i, source in enumerate(config.data.eval)}
    paths["output_dir"] = config.output_dir
    for key, path in paths.items():
        if path is not None and not path.strip():
            yield f"{key} is empty", f"set {key} to a path"


def _best(config: Config) -> Iterator[Finding]:
    checkpoint = config.checkpoint
    wanted = {
        "checkpoint.keep_best is true": (checkpoint.keep_best, "set checkpoint.keep_best to false"),
        "checkpoint.final is best": (checkpoint.final == "best", "set checkpoint.final to last"),
    }
    for what, (is_wanted, fix) in wanted.items():
        if is_wanted and not has_eval_data(config):
            yield f"{what}, but there is nothing to evaluate: data.eval is empty", f"add data.eval, or {fix}"
    keeps_best = checkpoint.keep_best or config.final_state == "best"
    for key, default in {"best_metric": EVAL_LOSS, "best_mode": None}.items():
        if getattr(checkpoint, key) != default and not keeps_best:
            yield (
                f"checkpoint.{key} is {getattr(checkpoint, key)}, which has no effect: no best checkpoint is kept",
                f"set checkpoint.keep_best to true, or checkpoint.final to best, or remove checkpoint.{key}",
            )
    yield from _mode("checkpoint.best_", checkpoint.best_metric, checkpoint.best_mode)


def _mode(prefix: str, metric: str, mode: str | None) -> Iterator[Finding]:
    known = known_mode(metric)
    if known is None and mode is None:
        yield (
            f"{prefix}metric is {metric}, whose name does not say whether lower or higher is better",
            f"set {prefix}mode to min or max",
        )
    elif known is not None and mode is not None and known != mode:
        yield f"{prefix}mode is {mode}, but {metric} is better the other way", f"remove {prefix}mode"


def _stopping(config: Config) -> Iterator[Finding]:
    stopping = config.early_stopping
    if stopping is None:
        return
    if config.eval.every_steps is None:
        yield (
            "early_stopping is set, but eval.every_steps is not: the only evaluation of training is at its end",
            "set eval.every_steps, or remove early_stopping",
        )
    yield from _mode("early_stopping.", stopping.metric, stopping.mode)


CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    _paths,
    _best,
    _stopping,
    _length,
    _batch,
    _warmup,
    _precision,
    _optimizer,
    _no_decay,
    _lora_plus,
    _activation_checkpointing,
    _names,
    _tokens,
    _adapter,
    _virtual_tokens,
    _mixing,
    _supervision,
    _packing,
    _mirror,
    _hardware,
    cluster_findings,
    eval_findings,
)
