"""DeepSpeed ZeRO: stage 1 splits optimizer states, stage 2 gradients too, stage 3 parameters too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sft_dist.config.deepspeed import Zero3Knobs
from sft_dist.config.schema import AdamWConfig, SgdConfig
from sft_dist.data.batch import MicroBatch
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.lora import readers
from sft_dist.model.row_cache import RowCache
from sft_dist.model.weights import Part, Weights, fill
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.runtime.spans import span
from sft_dist.sharding.optim import (
    Group,
    build_optimizer,
    group_of,
    set_completed_steps,
    set_lr,
    state_kinds,
    states_of,
)
from sft_dist.sharding.optimizer_states import flat_moment_bytes
from sft_dist.sharding.spec import HostPart, ParameterShard, ShardingSpec
from sft_dist.sharding.state import StateShard
from sft_dist.sharding.strategy import StepResult, Strategy, eval_mode, whole_parameter
from sft_dist.sharding.zero_engine import deepspeed_config, import_deepspeed

# DeepSpeed pads a flattened group so that each rank's partition starts at a multiple of this many elements.
PARTITION_ALIGNMENT = 2


def describe(run: Run, rank: int) -> ShardingSpec:
    """Stages 1 and 2: every parameter whole, the optimizer's flat group split. Stage 3: every parameter split flat."""
    world, stage = run.world.size, ZERO_STAGES[run.strategy]
    split = world if stage == 3 else 1
    parameters = tuple(
        ParameterShard(
            p.name,
            -(-p.numel // split),
            run.precision.stored(trainable=p.trainable, strategy=run.strategy),
            p.trainable,
        )
        for p in run.model.parameters
    )
    if stage == 3:
        optimizer_numel = sum(p.local_numel for p in parameters if p.requires_grad)
    else:
        sizes: Counter[Group] = Counter()
        for p in run.model.trainable:
            sizes[group_of(p.name, len(p.shape), run.optim)] += p.numel
        unit = PARTITION_ALIGNMENT * world
        optimizer_numel = sum(-(-size // unit) * PARTITION_ALIGNMENT for size in sizes.values())
    kinds = (
        2 if isinstance(run.optim, AdamWConfig) else int(isinstance(run.optim, SgdConfig) and run.optim.momentum > 0)
    )
    states = kinds * flat_moment_bytes(run, optimizer_numel)
    return ShardingSpec(run.strategy, rank, parameters, optimizer_numel, "fp32", states, _on_host(run))


def _on_host(run: Run) -> frozenset[HostPart]:
    assert run.deepspeed is not None
    parts: set[HostPart] = set()
    if run.deepspeed.offload_optimizer.device == "cpu":
        parts.add("optimizer")
    if isinstance(run.deepspeed, Zero3Knobs) and run.deepspeed.offload_param.device == "cpu":
        parts.add("parameters")
    return frozenset(parts)


class Zero(Strategy):
    def __init__(self, run: Run, model: SftModel, device: torch.device, weights: Weights) -> None:
        deepspeed = import_deepspeed()
        self.model = model
        self.device = device
        self.world_size = run.world.size
        self.stage = ZERO_STAGES[run.strategy]
        assert run.precision.optimizer_state != "8bit", "refused: see unsupported"
        self.state_dtype = TORCH_DTYPES[run.precision.optimizer_state]
        deepspeed.init_distributed(dist_init_required=False)
        if self.stage == 3:
            partitioning = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(run))
            fill(model, weights, partial(_partition, partitioning), device, group=dist.group.WORLD)
        else:
            fill(model, weights, partial(whole_parameter, device=device), device, group=None)
        optimizer = build_optimizer(run.optim, run.precision, model.named_parameters())
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(run), dist_init_required=False
        )
        if self.stage == 3:
            gather_for_readers(model)

    def forward_backward(self, batch: MicroBatch, *, supervised_in_step: int, is_last_micro_batch: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(is_last_micro_batch)
        with span("forward"):
            loss_sum = self.engine(batch)
        # The engine averages over ranks, as DDP does; dividing by its accumulation steps is left to us.
        with span("backward"):
            self.engine.backward(loss_sum * (self.world_size / supervised_in_step), scale_wrt_gas=False)
        result: Tensor = loss_sum.detach()
        return result

    def infer(self, batch: MicroBatch, *, logits: bool, cache: RowCache | None = None) -> Tensor:
        with torch.no_grad(), eval_mode(self.model):
            result: Tensor = self.engine(batch, logits=logits, cache=cache)
            return result

    def step(self, lr: float, *, only_finite: bool = False) -> StepResult:
        set_lr(self.optimizer, lr)
        # Every stage looks at the norm before it updates, in fp32 and bf16 too, and drops a step without a finite one.
        self.engine.step()
        self._forget_what_was_dropped()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64)
        return StepResult(norm, is_applied=self.engine.was_step_applied())

    def discard(self) -> None:
        # Each stage keeps gradients in buffers of its own. All of them are cleared when the norm is not finite, so the
        # stage is told such a one.
        infinite = torch.tensor(math.inf, device=self.device)
        with told_norm(self.optimizer, infinite):
            self.engine.step()
        assert not self.engine.was_step_applied()
        self._forget_what_was_dropped()

    def _forget_what_was_dropped(self) -> None:
        """Of a step that DeepSpeed has dropped, stages 1 and 2 keep the gradients in bf16 where the optimizer is
        offloaded, and would add those of the next step to them."""
        if not self.engine.was_step_applied() and self.stage < 3 and hasattr(self.optimizer, "averaged_gradients"):
            for group in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[group] = None

    def local_parameters(self) -> Iterator[tuple[str, Tensor, bool]]:
        for name, parameter in self.model.named_parameters():
            # Under stage 3 a parameter is empty while only its partition is here; one that is not stays whole.
            is_partitioned = self.stage == 3 and parameter.numel() == 0
            local: Tensor = parameter.ds_tensor if is_partitioned else parameter  # type: ignore[attr-defined]
            yield name, local, parameter.requires_grad

    def master_weights(self) -> list[Tensor]:
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(self.optimizer, attribute):
                return list(getattr(self.optimizer, attribute))
        raise RuntimeError(f"{type(self.optimizer).__name__} keeps its master weights where we do not know them")

    def base_optimizer(self) -> Optimizer:
        """What DeepSpeed was handed; it holds flat partitions by now."""
        base: Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]
        return base

    def parts_on_host(self) -> frozenset[HostPart]:
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        optimizer: Any = self.optimizer
        if isinstance(optimizer, BF16_Optimizer):  # stage 1 in bf16; it cannot offload
            return frozenset()
        parts: set[HostPart] = set()
        if optimizer.offload_optimizer if self.stage == 3 else optimizer.cpu_offload:
            parts.add("optimizer")
        if self.stage == 3 and optimizer.offload_param:
            parts.add("parameters")
        return frozenset(parts)

    def state(self) -> dict[str, StateShard]:
        base, state = self.base_optimizer(), {}
        for master in self.master_weights():
            states_of(base, master)
        self._link_optimizer_states()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                state[f"model.{name}"] = self._part(parameter, None)
                for kind in state_kinds(base):
                    state[f"optim.{kind}.{name}"] = self._part(parameter, kind)
        return state

    def release(self) -> None:
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def restored(self, *, completed_steps: int) -> None:
        # What is still gathered would be read as it was.
        self.release()
        base = self.base_optimizer()
        for master in self.master_weights():
            set_completed_steps(base, master, completed_steps)
        # The weights that forward reads are other tensors than the masters.
        if self.stage < 3:
            self.optimizer.update_lp_params()  # type: ignore[attr-defined]
            return
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.ds_tensor.data.copy_(self._partition(parameter, None))  # type: ignore[attr-defined]

    def _part(self, parameter: nn.Parameter, kind: str | None) -> StateShard:
        """This rank's part of a master weight, or of its state named ``kind``."""
        if self.stage == 3:
            padded = self._partition(parameter, kind)
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            first = min(math.prod(shape), padded.numel() * dist.get_rank())
            return StateShard(padded[: math.prod(shape) - first], shape, first)
        shape, fragment = tuple(parameter.shape), parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:  # all of it is another rank's
            dtype = torch.float32 if kind is None else self.state_dtype
            return StateShard(torch.empty(0, dtype=dtype), shape, 0)
        return StateShard(fragment.get_hp_fragment(kind), shape, fragment.lp_fragment_address.start)

    def _partition(self, parameter: nn.Parameter, kind: str | None) -> Tensor:
        """Under stage 3: this rank's range of a master weight or of a state; the last ranks' are padded."""
        flat: Tensor
        flat, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(  # type: ignore[attr-defined]
            parameter, release_swap_buffers=True, optim_state_key=kind
        )
        return flat

    def _link_optimizer_states(self) -> None:
        """Lets stages 1 and 2 find each parameter's part of the optimizer's flat states.

        DeepSpeed links them once, after the first parameter group has stepped: the states of a second group do not
        exist yet then, and its parameters would never be found.
        """
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False  # type: ignore[attr-defined]
            self.optimizer._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]

    def full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif not trainable_only:
                with GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.detach()

    def close(self) -> None:
        self.engine.destroy()
        super().close()


@contextmanager
def _partition(partitioning: Any, meta: nn.Parameter) -> Iterator[Part]:
    """The place of this rank's partition of a parameter under stage 3.

    DeepSpeed copies the partition out of a whole tensor, which is never written to but there: no memory stands behind
    the rest of it. Its own function would broadcast rank 0's whole tensor first.

    Args:
        partitioning: a ``deepspeed.zero.Init``.
    """
    whole = torch.empty(meta.shape, dtype=meta.dtype, device=partitioning.local_device)
    size = -(-meta.numel() // dist.get_world_size())
    start = min(meta.numel(), size * dist.get_rank())
    parameter = nn.Parameter(whole, meta.requires_grad)
    yield Part(parameter, whole.view(-1)[start : start + size], start)
    partitioning._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]


@contextmanager
def told_norm(optimizer: Any, norm: Tensor) -> Iterator[None]:
    """Lets an optimizer of DeepSpeed find ``norm`` where it asks for that of the gradients."""
    answers: dict[str, Callable[..., Any]] = {
        "scaled_global_norm": lambda *_, **__: norm,  # stages 1 and 2
        "get_grads_for_norm": lambda *_, **__: ([norm], {}),  # BF16_Optimizer
        "_get_norm_groups": lambda *_, **__: [norm],  # stage 3
    }
    name = next(name for name in answers if hasattr(optimizer, name))
    setattr(optimizer, name, answers[name])
    try:
        yield
    finally:
        delattr(optimizer, name)


def gather_for_readers(model: nn.Module) -> None:
    """Lets stage 3 gather what a module reads of the modules inside it while that module runs, in both passes.

    Not DeepSpeed's leaf modules: it reduces their gradients when the gradient of their input is there, and the first
    block's inputs have none under frozen embeddings.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for reader, owners in readers(model):
        for owner in owners:
            if owner is not reader:
                for parameter in owner.parameters(recurse=False):
                    register_external_parameter(reader, parameter)
