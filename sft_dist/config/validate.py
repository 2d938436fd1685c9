"""Cross-checks between keys that need neither the number of processes nor the data. Reads, never changes.

Checks that need the world (does the batch divide, is there a GPU) belong to ``resolve``; checks of files to ``data``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from sft_dist.config.control_schema import EVAL_LOSS, best_of, known_mode
from sft_dist.config.measured import may_measure
from sft_dist.config.schema import (
    AdamWConfig,
    Config,
    Fsdp2Sharding,
    LoraMethod,
)
from sft_dist.config.validate_cluster import cluster_findings
from sft_dist.config.validate_data import data_findings
from sft_dist.config.validate_eval import eval_findings, has_eval_data
from sft_dist.config.validate_method import method_findings, name_findings
from sft_dist.errors import ConfigError

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
    if isinstance(config.sharding, Fsdp2Sharding) and config.sharding.reduce_once_a_step and precision.reduce == "bf16":
        yield (
            "sharding.reduce_once_a_step adds up micro-batches in the dtype of precision.reduce, which is bf16",
            "set precision.reduce to fp32, or sharding.reduce_once_a_step to false",
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
    yield from name_findings("optim.no_decay", names)


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
    for key, value in {"best_metric": checkpoint.best_metric, "best_mode": checkpoint.best_mode}.items():
        # Of runs made when eval_loss was written down for all of them.
        if value not in (None, EVAL_LOSS) and not keeps_best:
            yield (
                f"checkpoint.{key} is {value}, which has no effect: no best checkpoint is kept",
                f"set checkpoint.keep_best to true, or checkpoint.final to best, or remove checkpoint.{key}",
            )
    stopping = config.early_stopping
    metric, mode = best_of(checkpoint.best_metric, checkpoint.best_mode, stopping)
    if stopping is None or metric != stopping.metric:
        yield from _mode(config, "checkpoint.best_", metric, mode)
    elif checkpoint.best_mode is not None and checkpoint.best_mode != (stopping.mode or known_mode(metric)):
        yield (
            f"checkpoint.best_mode is {checkpoint.best_mode}, but early_stopping waits for {metric} the other way",
            "remove checkpoint.best_mode, or set checkpoint.best_metric",
        )


def _mode(config: Config, prefix: str, metric: str, mode: str | None) -> Iterator[Finding]:
    if not may_measure(config.eval, metric):  # which is told in its own line
        return
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
    yield from _mode(config, "early_stopping.", stopping.metric, stopping.mode)


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
    method_findings,
    data_findings,
    _mirror,
    _hardware,
    cluster_findings,
    eval_findings,
)
