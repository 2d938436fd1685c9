"""What decides the memory of a published row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.words import Counter, Row, counter, words

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION_LINEARS, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a row.

    Args:
        stack: whose modules run: ``hf``, ``litgpt``, ``torchtune`` or ``titan``.
        method: ``full``, ``lora``, ``adapter`` or ``adapter_v2``.
        quant: ``nf4``, ``nf4-dq`` or empty.
        stored: dtype of the parameters that train, between steps.
        weights: dtype of everything else of the base.
        autocast: dtype of mixed precision, empty without.
        adapters: dtype of adapter weights.
        keeps_inputs: 4-bit layers keep theirs (bitsandbytes before 0.42).
        adapters_ignored: FSDP has nothing to do with the adapters.
        upcast_rest: what of a quantised model is fp32: ``all`` that is not packed (PEFT
            ``prepare_model_for_kbit_training``), ``norms`` where TRL's SFTTrainer makes the embeddings bf16 again.
        seq_lens: tokens of each sequence of a micro-batch.
        at_most: that is only how many there may be.
        fsdp_outside: FSDP's units are around the checkpoints, not inside them.
        shard_grad_op: FSDP leaves what it gathered in forward gathered until backward.
        in_backward: each weight is updated as soon as its gradient is there, which then goes.
        moments: tensors of optimizer state for each parameter, in its dtype.
        state_bytes: of both together for each number, where that is not so.
        loss, norm, rope, mlp, lora_kernel: which kernels run.
    """

    model: str
    config: dict[str, Any] = field(hash=False, compare=False)
    stack: str = "hf"
    method: str = "full"
    quant: str = ""
    world: int = 1
    sharding: str = "none"
    sharded_by: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    shard_grad_op: bool = False
    fsdp_outside: bool = False
    offload: frozenset[str] = frozenset()
    seq_lens: tuple[int, ...] = ()
    at_most: bool = False
    accumulates: bool = False
    checkpointing: str = "none"
    reentrant: bool = True
    stored: str = "bf16"
    weights: str = "bf16"
    autocast: str = ""
    adapters: str = "fp32"
    upcast_rest: str = ""
    r: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    loss: str = "hf"
    norm: str = "eager"
    rope: str = "eager"
    mlp: str = "eager"
    lora_kernel: str = "peft"
    attention: str = "flash"
    optimizer: str = "adamw"
    foreach: bool = True
    moments: int = 2
    state_bytes: float | None = None
    in_backward: bool = False
    paged: bool = False
    adapters_ignored: bool = False
    keeps_inputs: bool = False
    compiled: bool = False
    float8: bool = False


__all__ = ["ALL_LINEARS", "ATTENTION_LINEARS", "Counter", "Row", "Setup", "counter", "words"]
