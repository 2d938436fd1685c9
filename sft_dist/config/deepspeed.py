"""The knobs of DeepSpeed that a user may turn, read from a JSON file in DeepSpeed's own layout. Imports no torch.

Everything else in such a file is decided by the configuration: it must be absent or ``"auto"``. Names, defaults and
effects are those of ``deepspeed/runtime/zero/config.py`` in DeepSpeed 0.19.8; a key that this version reads nowhere, or
that has no effect here, is refused.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from sft_dist.config.describe import TypeHere, allowed, shown
from sft_dist.config.section import Section
from sft_dist.errors import ConfigError

SHIPPED = Path(__file__).parent / "shipped" / "deepspeed"

AUTO = "auto"
ZERO = "zero_optimization"


class OffloadKnobs(Section):
    device: Literal["cpu", "none"] = Field("none", description="Where it is kept: host memory, or the GPU (none).")
    pin_memory: bool = Field(True, description="Page-locked host memory: faster copies, cannot be swapped out.")


class _Knobs(Section):
    overlap_comm: bool | None = Field(None, description="Reduce gradients while backward runs; null: on CUDA.")
    contiguous_gradients: bool = Field(True, description="Copy gradients into one buffer as they come.")
    reduce_scatter: bool = Field(True, description="Reduce each gradient on its owner only, not on all ranks.")
    reduce_bucket_size: int = Field(500_000_000, gt=0, description="Elements reduced at a time.")
    offload_optimizer: OffloadKnobs = Field(OffloadKnobs(), description="Optimizer states, and its step, on the host.")


class Zero12Knobs(_Knobs):
    """Stages 1 and 2."""

    use_multi_rank_bucket_allreduce: bool = Field(True, description="Reduce the buckets of several owners at once.")
    # DeepSpeed aligns it to this rank's start of a partition: it must be even.
    allgather_bucket_size: int = Field(500_000_000, gt=0, multiple_of=2, description="Elements gathered at a time.")
    round_robin_gradients: bool = Field(False, description="Spread the parameters of a group over ranks in turn.")


class Zero3Knobs(_Knobs):
    """Stage 3."""

    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0, description="Elements gathered ahead of use.")
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0, description="Most elements kept gathered.")
    stage3_max_reuse_distance: int = Field(
        1_000_000_000, ge=0, description="Keep a weight that is needed again within as many elements."
    )
    stage3_use_all_reduce_for_fetch_params: bool = Field(False, description="Gather by an all-reduce over zeros.")
    stage3_allgather_sequential: bool = Field(False, description="Gather one parameter at a time, without a bucket.")
    sub_group_size: int = Field(1_000_000_000, gt=0, description="Elements that one optimizer call updates.")
    offload_param: OffloadKnobs = Field(OffloadKnobs(), description="Parameters between uses in host memory.")


DeepSpeedKnobs = Zero12Knobs | Zero3Knobs

# What the configuration decides, by the JSON's key; a group ends with a point.
DECIDED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "amp": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision",
    "communication_data_type": "precision.reduce",
    "seq_parallel_communication_data_type": "precision.reduce",
    "prescale_gradients": "train.global_batch_size",
    "gradient_predivide_factor": "train.global_batch_size",
    "activation_checkpointing": "activation_checkpointing",
    f"{ZERO}.stage": "sharding.strategy",
}

# What this project fixes, whatever the file says; the very value may stand there.
FIXED: dict[str, tuple[Any, str]] = {
    "zero_allow_untested_optimizer": (True, "the optimizer is torch's, whatever optim.type says"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is torch's, on the host too"),
    "wall_clock_breakdown": (False, "metrics.jsonl has the times"),
    "steps_per_print": (2**31, "metrics.jsonl has a line a step"),
    f"{ZERO}.stage3_param_persistence_threshold": (0, "every parameter is sharded, as described and verified"),
    f"{ZERO}.stage3_model_persistence_threshold": (0, "every parameter is sharded, as described and verified"),
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": (False, "final/ is written without DeepSpeed"),
    f"{ZERO}.parameter_alignment": (False, "it pads the optimizer's partitions beyond what is described"),
    f"{ZERO}.allgather_partitions": (True, "DeepSpeed 0.19 reads it nowhere"),
    f"{ZERO}.load_from_fp32_weights": (True, "checkpoints are not DeepSpeed's"),
    f"{ZERO}.zero_quantized_weights": (False, "it changes the numbers; method.type qlora quantises"),
    f"{ZERO}.zero_quantized_gradients": (False, "it changes the numbers"),
    f"{ZERO}.zero_hpz_partition_size": (1, "parameters are sharded over all ranks, as described"),
}

NVME_KEYS = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init")


def load_knobs(given: str | Mapping[str, Any] | None, stage: int) -> DeepSpeedKnobs:
    """The knobs of a ZeRO stage.

    Args:
        given: path of a JSON file, or what such a file would hold; None: the file of the stage that is shipped.

    Raises:
        ConfigError: for everything that is wrong with the file, all of it at once.
    """
    source, value = _read(given if given is not None else str(SHIPPED / f"zero{stage}.json"))
    model = Zero3Knobs if stage == 3 else Zero12Knobs
    findings = [*_outside(value, source, stage), *_inside(_zero_section(value, source), source, stage, model)]
    knobs = None
    if not findings:
        try:
            knobs = model.model_validate(_tuned(value), strict=True)
        except ValidationError as error:
            findings = [_wrong_value(entry, source, model) for entry in error.errors(include_url=False)]
    if knobs is None:
        raise one_error(list(dict.fromkeys(findings)))
    return knobs


def stage_in(given: str) -> int | None:
    """The ZeRO stage that a DeepSpeed file states, or None.

    Raises:
        ConfigError: the file cannot be read.
    """
    source, value = _read(given)
    stage = _zero_section(value, source).get("stage")
    return stage if isinstance(stage, int) and not isinstance(stage, bool) else None


def one_error(findings: list[tuple[str, str]]) -> ConfigError:
    """All findings, each (what, fix), as one error."""
    if len(findings) == 1:
        return ConfigError(findings[0][0], fix=findings[0][1])
    return ConfigError(
        "\n".join(f"{what}; {fix}" for what, fix in findings), fix=f"correct these {len(findings)} places"
    )


def _read(given: str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(given, str):
        return "sharding.deepspeed_config", given
    try:
        value = json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"the DeepSpeed file {given} cannot be read: {e.strerror}",
            fix="set sharding.deepspeed_config to a JSON file; configs/deepspeed has some to start from",
        ) from None
    except ValueError as e:
        raise ConfigError(f"{given}: not JSON: {e}", fix="correct the JSON there") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{given}: holds {shown(value)}, not keys and values", fix=f'write {{"{ZERO}": {{...}}}}')
    return given, value


def _zero_section(value: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    section = value.get(ZERO, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{source}: {ZERO} is {shown(section)}", fix=f"make {ZERO} a section of keys and values")
    return section


def _only_auto(value: Any) -> bool:
    """Whether nothing is stated: ``"auto"``, or a section in which everything is."""
    return all(_only_auto(inner) for inner in value.values()) if isinstance(value, Mapping) else value == AUTO


def _tuned(value: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that the file states."""
    tuned = {}
    for name, inner in value.get(ZERO, {}).items():
        if f"{ZERO}.{name}" in DECIDED or f"{ZERO}.{name}" in FIXED or _only_auto(inner):
            continue
        is_section = isinstance(inner, Mapping)
        tuned[name] = {k: v for k, v in inner.items() if v != AUTO} if is_section else inner
    return tuned


def _decided(key: str, value: Any, source: str, stage: int) -> Iterator[tuple[str, str]]:
    """A key that is not the file's to set, if it is one: nothing where it agrees."""
    if _only_auto(value):
        return
    if key == f"{ZERO}.stage":
        if value != stage or isinstance(value, bool):
            yield (
                f"{source}: {key} is {shown(value)}, but sharding.strategy is zero{stage}",
                f"set sharding.strategy to the stage you want, or write {stage} or remove {key}",
            )
    elif key in DECIDED:
        yield (
            f"{source}: {key} is {shown(value)}, but {DECIDED[key]} decides it",
            f'write "{AUTO}" or remove {key}',
        )
    elif value != FIXED[key][0]:
        yield f"{source}: {key} is {shown(value)}, which is not taken: {FIXED[key][1]}", f"remove {key}"


def _outside(value: Mapping[str, Any], source: str, stage: int) -> Iterator[tuple[str, str]]:
    """Keys beside ``zero_optimization``: none of them is a knob."""
    for key, inner in value.items():
        if key in DECIDED or key in FIXED:
            yield from _decided(key, inner, source, stage)
        elif key != ZERO:
            yield f"{source}: {key} is not a key that is taken here", _nearest(key, [ZERO, *DECIDED, *FIXED])


def _inside(section: Mapping[str, Any], source: str, stage: int, model: type[Section]) -> Iterator[tuple[str, str]]:
    other = Zero12Knobs if stage == 3 else Zero3Knobs
    for name, inner in section.items():
        key = f"{ZERO}.{name}"
        if key in DECIDED or key in FIXED:
            yield from _decided(key, inner, source, stage)
        elif name not in model.model_fields:
            if name in other.model_fields:
                yield f"{source}: {key} has no effect in stage {stage}", f"remove {key}"
            else:
                yield f"{source}: {key} is not a knob that is taken here", _nearest(name, list(model.model_fields))
        elif name.startswith("offload_") and isinstance(inner, Mapping):
            yield from _offload(inner, key, source)


def _offload(section: Mapping[str, Any], key: str, source: str) -> Iterator[tuple[str, str]]:
    if section.get("device") == "nvme":
        yield (
            f"{source}: {key}.device is nvme, which is not supported: it needs DeepSpeed's compiled I/O operator and "
            "its own optimizer, and checkpoints could not read the states",
            f"set {key}.device to cpu",
        )
        return
    for name in section:
        if name in NVME_KEYS:
            yield f"{source}: {key}.{name} has an effect with nvme only, which is not supported", f"remove {key}.{name}"
        elif name not in OffloadKnobs.model_fields:
            fix = _nearest(name, list(OffloadKnobs.model_fields))
            yield f"{source}: {key}.{name} is not a knob that is taken here", fix


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else "remove it; configs/deepspeed/README.md lists what is taken"


def _wrong_value(entry: Any, source: str, model: type[Section]) -> tuple[str, str]:
    here = TypeHere.of(model)
    for part in entry["loc"]:
        section = here.model()
        if section is None or part not in section.model_fields:
            break
        here = TypeHere.of_field(section.model_fields[part])
    key = ".".join([ZERO, *map(str, entry["loc"])])
    return f"{source}: {key} is {shown(entry['input'])}", f"set {key} to {allowed(here).removesuffix(' or null')}"
