"""What a run is about to do, in a few lines: every derived number is shown before the first step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import AdamWConfig, Fsdp2Sharding, LoraMethod, QloraMethod, VirtualTokensMethod
from sft_dist.data.batch import BatchPlan
from sft_dist.data.prepared import PreparedData
from sft_dist.model.spec import ModelSpec
from sft_dist.run import Run
from sft_dist.sharding.optim import decayed_numel
from sft_dist.sharding.spec import ShardingSpec

# Of those that stay unquantised; README.md in final/ names all.
MAX_LAYERS_SHOWN = 6


def summary(
    run: Run, spec: ShardingSpec, train_data: PreparedData, eval_data: PreparedData | None, *, num_steps: int
) -> str:
    """Model, sharding, precision, data, schedule and what is special about it, one line each."""
    batch, precision = run.batch, run.precision
    kind = "pack" if run.data.packing == "best_fit" else "row"
    tokens, supervised = int(train_data.num_tokens.sum()), int(train_data.num_supervised.sum())
    held_out = f"; eval: {_count(eval_data.num_rows, 'row')}" if eval_data is not None else ""
    passes = batch.micro_batches(min(batch.global_batch_size, train_data.num_sequences))
    stored = precision.stored(trainable=True, strategy=run.strategy)
    more = [_decay(run)] if run.optim.weight_decay else []
    if run.neftune_alpha is not None or run.label_smoothing:
        more.append(f"noise     {_noise(run)}")
    if run.compile:
        more.append("compiled  norms, gated products and rotary embeddings, by torch.compile")
    more += _best(run)
    return "\n".join(
        [
            f"model     {run.model.path}: {run.model.method.type}, {run.model.num_trainable:,} of "
            f"{run.model.num_parameters:,} parameters trained{_quantized(run.model)}{_tokens(run.model)}",
            f"sharding  {run.strategy} on {_count(run.world.size, 'rank')}{_replicas(run)}, verified: rank 0 holds "
            f"{spec.parameter_bytes / 2**20:,.1f} MiB of parameters and {spec.optimizer_numel:,} optimizer elements"
            f"{_on_host(spec)}; "
            f"activation checkpointing {run.activation_checkpointing.mode}",
            f"precision compute {precision.compute}, trainable stored in {stored}, master {spec.optimizer_dtype}, "
            f"gradients reduced in {precision.reduce}{_once(run)}, {_optimizer(run)}",
            f"data      {_count(train_data.num_rows, 'row')} in {_count(train_data.num_sequences, kind)}, "
            f"{tokens:,} tokens, {supervised:,} supervised ({supervised / tokens:.0%}){held_out}",
            f"schedule  {_count(num_steps, 'step')} of {_sequences(batch, train_data, kind)}: {_sharers(batch)} x "
            f"{_count(passes, 'micro-batch', 'es')} of up to {batch.micro_batch_size}",
            *more,
        ]
    )


def _best(run: Run) -> list[str]:
    """What is best, where early stopping waits for something else."""
    stopping, best = run.early_stopping, run.checkpoint.goal
    if stopping is None or not run.checkpoint.keep_best or best.metric == stopping.metric:
        return []
    of = "final/ and the checkpoint that is kept are" if run.checkpoint.final == "best" else "the checkpoint kept is"
    return [f"best      {of} by checkpoint.best_metric {best.metric}; early stopping waits for {stopping.metric}"]


def _sequences(batch: BatchPlan, data: PreparedData, kind: str) -> str:
    """Of a step."""
    if data.num_sequences >= batch.global_batch_size:
        return _count(batch.global_batch_size, kind)
    few = _count(data.num_sequences, kind)
    return f"{few} (all there are: fewer than train.global_batch_size {batch.global_batch_size})"


def _sharers(batch: BatchPlan) -> str:
    """Those among whom the sequences of a step are dealt."""
    if batch.sequence_parallel == 1:
        return _count(batch.world_size, "rank")
    return f"{_count(batch.world_size, 'group')} of {batch.sequence_parallel} ranks that share sequences"


def _optimizer(run: Run) -> str:
    if not isinstance(run.optim, AdamWConfig):
        return run.optim.type
    return f"adamw with {'paged ' if run.optim.paged else ''}moments in {run.precision.optimizer_state}"


def _decay(run: Run) -> str:
    kept = f", nor on {', '.join(run.optim.no_decay)}" if run.optim.no_decay else ""
    return (
        f"decay     {run.optim.weight_decay:g} on {decayed_numel(run):,} of {run.model.num_trainable:,} trained "
        f"parameters: not on norms and biases{kept}"
    )


def _noise(run: Run) -> str:
    """What training has and evaluation has not."""
    parts = []
    if run.neftune_alpha is not None:
        parts.append(f"noise on the embeddings (NEFTune, alpha {run.neftune_alpha:g})")
    if run.label_smoothing:
        parts.append(f"labels smoothed by {run.label_smoothing:g}")
    return f"only in training: {' and '.join(parts)}; its loss is not comparable with that of evaluation"


def _once(run: Run) -> str:
    return " once a step" if isinstance(run.sharding, Fsdp2Sharding) and run.sharding.reduce_once_a_step else ""


def _replicas(run: Run) -> str:
    replicas = run.sharding.dp_replicate if isinstance(run.sharding, Fsdp2Sharding) else 1
    return f" in {replicas} replicas" if replicas > 1 else ""


def _tokens(model: ModelSpec) -> str:
    tokens = model.tokens
    added = (
        f"; {_count(len(tokens.added), 'token')} added, {_count(tokens.new_rows, 'row')} more in a vocabulary of now "
        f"{model.vocab_size:,}"
    )
    trained = f"; rows of {_count(len(tokens.trained_ids), 'token')} trained"
    return (added if tokens.added else "") + (trained if tokens.trained_ids else "")


def _quantized(model: ModelSpec) -> str:
    if not isinstance(model.method, QloraMethod):
        return ""
    skip = model.method.quantization.skip
    names = ", ".join(skip[:MAX_LAYERS_SHOWN]) + (", ..." if len(skip) > MAX_LAYERS_SHOWN else "")
    kept = f" but for {len(skip)} in {model.compute}: {names}" if skip else ""
    return f"; linear layers in {model.method.quantization.type}{kept}"


def _on_host(spec: ShardingSpec) -> str:
    return f", {' and '.join(sorted(spec.on_host))} in host memory" if spec.on_host else ""


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}" + ("" if number == 1 else plural)


def untrained_notice(tokens: Sequence[str], model: ModelSpec) -> str:
    """Tokens of the training data that nothing has trained and nothing will, and what to do about it."""
    method = model.method
    if isinstance(method, LoraMethod):
        named = model.tokens.added if method.train_tokens is None else method.train_tokens
        fix = f"set method.train_tokens to {json.dumps([*named, *tokens], ensure_ascii=False)}"
    elif method.type == "full":
        fix = "take the embedding and the output layer out of method.freeze"
    else:
        fix = "use a method that trains them: full, or lora or qlora with method.train_tokens"
    return (
        f"{', '.join(tokens)}: in the training data, with rows of the base model that were never trained (zero, equal "
        f"to those of other special tokens, or new), and this run does not train them; {fix}"
    )


def long_rows_notice(lengths: NDArray[np.int64], model: ModelSpec) -> str | None:
    """Rows beyond the positions that the base was made for; None without any.

    Args:
        lengths: [rows] tokens.
    """
    method = model.method
    virtual = method.num_virtual_tokens if isinstance(method, VirtualTokensMethod) else 0
    if model.max_positions is None or not len(lengths) or lengths.max() + virtual <= model.max_positions:
        return None
    number, most = int((lengths + virtual > model.max_positions).sum()), model.max_positions
    return (
        f"{_count(number, 'row')} longer than the {most:,} positions that {model.path} was made for "
        f"({int(lengths.max()) + virtual:,} tokens at most); set data.max_seq_len to {most - virtual}, or scale its "
        "rotary frequencies in config.json"
    )


def notices(counts: Mapping[str, int], max_seq_len: int) -> list[str]:
    """What preparing the data changed about it, a line each."""
    lines = []
    if counts["dropped_rows"]:
        lines.append(f"{_count(counts['dropped_rows'], 'row')} longer than {max_seq_len} tokens dropped")
    if counts["unanswered_rows"]:
        lines.append(
            f"{_count(counts['unanswered_rows'], 'row')} dropped: the answer begins after {max_seq_len} tokens"
        )
    if counts["truncated_rows"]:
        lines.append(
            f"{_count(counts['truncated_rows'], 'row')} truncated, {counts['truncated_tokens']:,} tokens cut off"
        )
    if counts["split_rows"]:
        cut = f"; {_count(counts['cut_parts'], 'part')} cut inside a turn" if counts["cut_parts"] else ""
        lost = f"; {_count(counts['untrained_parts'], 'part')} without an answer left out"
        lines.append(
            f"{_count(counts['split_rows'], 'row')} longer than {max_seq_len} tokens split{cut}"
            + (lost if counts["untrained_parts"] else "")
        )
    if counts["rewritten_rows"]:
        lines.append(
            f"{_count(counts['rewritten_rows'], 'row')} with tools, calls or results that the chat template does not "
            "print: they are written into the messages as JSON (docs/data.md); ask the model in the same way"
        )
    return lines
