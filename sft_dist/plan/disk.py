"""What a run writes to the disk, and what host memory that takes.

Counted from the tensors that ``Strategy.state`` and ``export`` hand over, with the headers of their files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sft_dist.checkpoint.rotation import SECONDS_PER_HOUR
from sft_dist.config.schema import (
    AdafactorConfig,
    AdamWConfig,
    Fsdp2Sharding,
    LoraMethod,
    PrefixMethod,
    PTuningMethod,
    SgdConfig,
    VirtualTokensMethod,
)
from sft_dist.model.spec import DTYPE_BYTES, Dtype, ParameterSpec
from sft_dist.plan.result import DataPlan
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding.optimizer_states import BLOCK_SIZE, flat_moment_bytes, is_8bit, num_blocks
from sft_dist.sharding.remember import for_alike_runs

# Beside the name: of a tensor in the header of a safetensors file (type, shape, offsets), of its range in a file and of
# its whole in the manifest. Measured.
HEADER_BYTES, RANGE_BYTES, RECORD_BYTES = 75, 20, 50
# config.yaml and the rest of the manifest, or the configuration files of a model or adapter.
SETTINGS_BYTES = 6000
# Of the number of a sequence in the manifest.
SEQUENCE_BYTES = 10


def disk_bytes(run: Run, data: DataPlan | None, *, total_s: float | None = None) -> dict[str, int]:
    """Most bytes on disk at one time, by what takes them; without tokenizer, logs and W&B's own files.

    ``checkpoints`` are those that stay and the one that is being written; without ``data`` a run is taken for long
    enough to have as many. ``checkpoint.keep_every_hours`` adds one for each of its periods that the run comes to,
    floor(total_s / (3600 keep_every_hours)), some of which may be among the newest or the best.

    Args:
        total_s: wall time of the whole run, all its starts; None: not known, and no period is counted.
    """
    rules = run.checkpoint
    kept = rules.keep_last + rules.keep_best + 1
    if rules.keep_every_hours is not None and total_s is not None:
        kept += int(total_s / (rules.keep_every_hours * SECONDS_PER_HOUR))
    if data is not None:
        kept = int(min(kept, _most_written(run, data, total_s)))
    found = {"checkpoints": kept * saved_state_bytes(run), "final": final_bytes(run)}
    return found if data is None else {"cache": data.cache_bytes, **found}


def num_checkpoints(run: Run, data: DataPlan) -> int:
    """How many the run writes for certain: every ``checkpoint.every_steps``, after every epoch and at the end; and one
    before the first step, where ``spikes`` may have to go back to it."""
    every, per_epoch = run.checkpoint.every_steps, run.batch.steps_per_epoch(max(1, round(data.sequences)))
    start = "roll_back" in (run.spikes.policy, run.spikes.non_finite)
    if every is None:
        return start + math.ceil(data.steps / per_epoch)
    both = data.steps // math.lcm(every, per_epoch)
    ends = data.steps % every > 0 and data.steps % per_epoch > 0
    return start + data.steps // every + data.steps // per_epoch - both + ends


def _most_written(run: Run, data: DataPlan, total_s: float | None) -> float:
    """Those, and what evaluations and the clock may add."""
    most: float = num_checkpoints(run, data)
    if run.checkpoint.keep_best:
        most += data.evaluations
    if run.checkpoint.every_minutes is not None:
        most += math.inf if total_s is None else int(total_s / (60 * run.checkpoint.every_minutes))
    return most


def saved_state_bytes(run: Run) -> int:
    """Of one checkpoint, all files of it."""
    return _tensors_and_headers(run) + SETTINGS_BYTES + SEQUENCE_BYTES * run.batch.global_batch_size


@for_alike_runs
def _tensors_and_headers(run: Run) -> int:
    # Ranks that write a part of each tensor. ZeRO-1 and -2 cut a whole group of them where it falls.
    writers = 1 if run.strategy in ("zero1", "zero2") else run.world.size
    tensors = headers = 0
    for name, size in _state(run):
        tensors += size
        headers += writers * (2 * len(name) + HEADER_BYTES + RANGE_BYTES) + len(name) + RECORD_BYTES
    return tensors + headers


@for_alike_runs
def final_bytes(run: Run) -> int:
    """Of ``final/``: the whole model in the dtype it computes in, or an adapter in that of its master weights."""
    sizes = dict(_final(run))
    return sum(sizes.values()) + sum(len(name) + HEADER_BYTES for name in sizes) + SETTINGS_BYTES


def save_host_bytes(run: Run) -> int:
    """Most host memory that saving takes on the first node, beside what training keeps there.

    - A checkpoint: a copy of what each rank writes of it. An asynchronous save keeps it in pinned memory, of which
      torch makes a power of two for each tensor.
    - ``final/``: rank 0 gathers an adapter, or a whole model tensor by tensor: the largest, and what it is cast to.
    - Its proof: a fresh process loads the model on the CPU.
    """
    here = run.world.ranks_per_node
    checkpoint = here * _copied_bytes(run)
    if run.model.method.type == "full":
        largest = max(parameter.numel for parameter in run.model.parameters)
        export = largest * (DTYPE_BYTES[_exported_dtype(run)] + DTYPE_BYTES[run.model.compute])
    else:
        export = run.model.num_trainable * DTYPE_BYTES[_exported_dtype(run)]
    proof = run.model.num_parameters * DTYPE_BYTES[run.model.compute] if run.checkpoint.prove_final else 0
    return max(checkpoint, export, proof)


def _copied_bytes(run: Run) -> int:
    """Of a rank's part of the state."""
    parts = (-(-size // run.world.size) for _, size in _state(run))
    return sum(1 << (part - 1).bit_length() if run.checkpoint.asynchronous else part for part in parts)


def _shards(run: Run) -> int:
    """Ranks that hold a part of every tensor of the state."""
    if isinstance(run.sharding, Fsdp2Sharding):
        return run.world.size // run.sharding.dp_replicate
    return 1


def _state(run: Run) -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor of ``Strategy.state``, whole."""
    for parameter in run.model.trainable:
        yield f"model.{parameter.name}", parameter.numel * DTYPE_BYTES[_exported_dtype(run)]
        for kind, size in _optimizer_states(run, parameter):
            yield f"optim.{kind}.{parameter.name}", size


def _optimizer_states(run: Run, parameter: ParameterSpec) -> Iterator[tuple[str, int]]:
    numel, fp32 = parameter.numel, DTYPE_BYTES["fp32"]
    if isinstance(run.optim, AdafactorConfig):
        if len(parameter.shape) < 2:
            yield "exp_avg_sq", numel * fp32
        else:
            yield "exp_avg_sq_row", parameter.shape[0] * fp32
            yield "exp_avg_sq_col", numel // parameter.shape[0] * fp32
    elif isinstance(run.optim, SgdConfig):
        if run.optim.momentum > 0:
            in_zero = flat_moment_bytes(run, numel)
            yield (
                "momentum_buffer",
                in_zero if run.strategy in ZERO_STAGES else numel * DTYPE_BYTES[run.precision.master],
            )
    else:
        assert isinstance(run.optim, AdamWConfig)
        for kind in ("exp_avg", "exp_avg_sq"):
            yield kind, numel if is_8bit(run, numel) else flat_moment_bytes(run, numel)
            if is_8bit(run, numel):
                yield f"{kind}_scale", _num_scales(run, parameter) * fp32


def _num_scales(run: Run, parameter: ParameterSpec) -> int:
    """Of a whole 8-bit moment: see ``adamw.scale_shape``."""
    shards = _shards(run)
    chunk = -(-parameter.shape[0] // shards) * (parameter.numel // parameter.shape[0])
    if parameter.numel == shards * chunk and chunk % BLOCK_SIZE == 0:
        return parameter.numel // BLOCK_SIZE
    return shards * num_blocks(chunk)


def _final(run: Run) -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor in ``final/``."""
    model, method = run.model, run.model.method
    width = DTYPE_BYTES[_exported_dtype(run)]
    if isinstance(method, VirtualTokensMethod):
        numel = method.num_virtual_tokens * model.hidden_size
        if isinstance(method, PrefixMethod):
            numel = method.num_virtual_tokens * 2 * model.num_layers * model.num_kv_heads * model.head_dim
        # What an encoder makes is in the dtype that it computes in.
        has_encoder = isinstance(method, PTuningMethod) or (isinstance(method, PrefixMethod) and method.projection)
        yield "prompt_embeddings", numel * (DTYPE_BYTES[model.compute] if has_encoder else width)
    elif isinstance(method, LoraMethod):
        for parameter in model.trainable:
            # PiSSA's is saved with the factors that it started from, at twice the rank.
            is_factor = ".lora_A." in parameter.name or ".lora_B." in parameter.name
            times = 2 if method.init == "pissa" and is_factor else 1
            yield parameter.name, times * parameter.numel * width
    else:
        for parameter in model.parameters:
            yield parameter.name, parameter.numel * DTYPE_BYTES[model.compute]


def _exported_dtype(run: Run) -> Dtype:
    """Of a trainable parameter as it is saved: DeepSpeed's masters are fp32 always."""
    return "fp32" if run.strategy in ZERO_STAGES else run.precision.master
