"""The peak of a row: its model recorded, its states counted, its sharding played."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import torchtune
from benchmarks.peers.hf import PeerModel, hf_model, rope_in_place
from benchmarks.peers.inventory import WIDTHS, Inventory, inventory
from benchmarks.peers.linear import LoraLinear
from benchmarks.peers.setup import Setup
from benchmarks.peers.sharding import timeline_of, zero_update_bytes
from benchmarks.peers.unmapped import Unmapped
from sft_dist.data.batch import MicroBatch
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.record import record
from sft_dist.plan.result import Phase
from sft_dist.plan.tape import Tape

GIB = 2**30


@dataclass(frozen=True)
class Recorded:
    """A tape of a whole model, what its parameters are, and the bytes between two of its layers."""

    tape: Tape
    counted: Inventory
    hidden_bytes: int


@dataclass(frozen=True)
class Prediction:
    """Bytes that torch's allocator has handed out at the highest moment of each phase."""

    phases: tuple[Phase, ...]
    recorded: Recorded

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.allocated_bytes)

    @property
    def allocated_bytes(self) -> int:
        return self.peak.allocated_bytes


def predict(setup: Setup) -> Prediction:
    """The peaks of a training step of a row, on rank 0."""
    setup = _as_seen(setup)
    try:
        recorded = _recorded(_what_is_recorded(setup))
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        # The modules of whatever architecture a row names: what stops them is the row's reason.
        kind = setup.config["model_type"]
        raise Unmapped(f"architecture {kind} is not recorded: {str(error).splitlines()[0][:120]}") from error
    counted = recorded.counted
    held = _resident(setup, counted)
    ledger = Ledger(now=Counter(held))
    steps = timeline_of(setup, counted, recorded.tape, recorded.hidden_bytes)
    ledger.begin("forward_backward")
    before = Counter(ledger.now)
    steps.micro_batch(ledger, first=True, last=not setup.accumulates)
    gradients = ledger.now["gradients"]
    if setup.accumulates:
        ledger.now = before + Counter({"gradients": gradients})
        steps.micro_batch(ledger, first=False, last=False)
        gradients = steps.reduced_bytes(gradients)
    ledger.now = before + Counter({"gradients": gradients})
    ledger.begin("optimizer_step")
    ledger.touch("temporaries", _update(setup, counted), "update")
    prediction = Prediction(tuple(ledger.highest.values()), recorded)
    if setup.at_most and prediction.peak.name == "forward_backward":
        raise Unmapped("lengths vary and decide the peak")
    return prediction


def tape_of_work(setup: Setup) -> Tape:
    """What a step computes. Between its passes an adapter of FSDP1 is its sharded, fp32 self, and PEFT casts its input
    to that before the unit gathers it in a narrower dtype (``use_orig_params``, accelerate's default)."""
    return _recorded(_what_is_recorded(setup)).tape


def _as_seen(setup: Setup) -> Setup:
    """Under FSDP's mixed precision a module sees its adapters in that dtype."""
    if setup.sharding.startswith("fsdp") and setup.autocast and not setup.adapters_ignored:
        return replace(setup, adapters=setup.autocast)
    return setup


def _what_is_recorded(setup: Setup) -> Setup:
    """Rows that differ in what a tape does not see share one."""
    keep = setup.sharding if setup.sharding.startswith(("fsdp", "zero")) else "none"
    return replace(
        setup, world=1, sharded_by=1, sharding=keep, offload=frozenset(), accumulates=False, optimizer="",
        foreach=False, state_bytes=None, moments=0, paged=False, at_most=False, adapters_ignored=False,
        in_backward=False, shard_grad_op=False, fsdp_outside=False,
    )  # fmt: skip


@cache
def _recorded(setup: Setup) -> Recorded:
    if setup.stack == "litgpt":
        from benchmarks.peers.litgpt import litgpt_model

        model, alike = litgpt_model(setup)
    elif setup.stack == "torchtune" and setup.config["model_type"] in torchtune.MODEL_TYPES:
        model, alike = torchtune.torchtune_model(setup)
    else:
        model, alike = hf_model(setup)
    blocks = list(model.blocks().values())
    counted = inventory(model, blocks, len(alike))
    seen: list[int] = []
    blocks[1].register_forward_hook(
        lambda _m, _a, out: seen.append((out if isinstance(out, Tensor) else out[0]).nbytes)
    )
    # Tensor parallelism with sharded sequences and vocabulary splits what is kept as evenly as context parallelism.
    parts = setup.context_parallel * setup.tensor_parallel
    with _mask_of_one_byte(), rope_in_place(model, setup):
        units = [leaf for m in model.modules() if isinstance(m, LoraLinear) for leaf in (m.lora_A, m.lora_B)]
        tape = record(model, lambda: _batch(setup.seq_lens, parts), kinds=range(len(blocks)), units=units)
    return Recorded(replace(tape, recorded=alike), counted, seen[0])


def _batch(seq_lens: tuple[int, ...], parts: int) -> MicroBatch:
    lens = tuple(-(-length // parts) for length in seq_lens)
    tokens = sum(lens)
    return MicroBatch(
        input_ids=torch.empty(1, tokens, dtype=torch.int64),
        position_ids=torch.empty(1, tokens, dtype=torch.int64),
        cu_seqlens=torch.empty(len(lens) + 1, dtype=torch.int32),
        supervised_index=torch.empty(tokens, dtype=torch.int64),
        labels=torch.empty(tokens, dtype=torch.int64),
        seq_lens=lens,
    )


@contextmanager
def _mask_of_one_byte() -> Iterator[None]:
    """CUDA's dropout keeps a mask of one byte an element; the CPU's keeps one as wide as its input."""
    before = F.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    F.dropout = nn.functional.dropout = dropout
    try:
        yield
    finally:
        F.dropout = nn.functional.dropout = before


def _resident(setup: Setup, counted: Inventory) -> dict[str, int]:
    """Between two steps, gradients aside: they are dropped with the update."""
    shards, parts = setup.sharded_by, setup.tensor_parallel
    of_weights = shards if setup.sharding.startswith("fsdp") or setup.sharding == "zero3" else 1
    of_states = shards if setup.sharding.startswith(("fsdp", "zero")) else 1
    frozen = (counted.total("frozen_bytes") + counted.total("packed_bytes")) // of_weights // parts
    trained, adapters = counted.total("trained") // parts, counted.total("adapters")
    of_adapters = 1 if setup.adapters_ignored else of_weights
    adapter_width = 4 if setup.sharding.startswith("fsdp") and setup.autocast else WIDTHS[setup.adapters]
    stored = trained * (2 if setup.sharding.startswith("zero") else WIDTHS[setup.stored]) // of_weights
    states = 0
    if "optimizer" not in setup.offload:
        width = _state_width(setup, WIDTHS[setup.stored] if trained else adapter_width)
        master = 4 if setup.sharding.startswith("zero") else 0
        states = int((trained + adapters) * (width + master) / (1 if setup.adapters_ignored else of_states))
    if "parameters" in setup.offload:
        frozen = stored = adapters = 0
    return {
        "weights": frozen + stored,
        "quantization_state": counted.total("scale_bytes"),
        "adapters": adapters * adapter_width // of_adapters,
        "optimizer": 0 if setup.paged else states,
    }


def _state_width(setup: Setup, width: int) -> float:
    """Moments have the dtype of their parameter, DeepSpeed's that of its fp32 copy, unless a row says otherwise."""
    if setup.state_bytes is not None:
        return setup.state_bytes
    return float(setup.moments * (4 if setup.sharding.startswith("zero") else width))


def _update(setup: Setup, counted: Inventory) -> int:
    """The foreach AdamW takes the root of all second moments at once."""
    if "optimizer" in setup.offload or setup.in_backward:
        return 0
    if setup.sharding.startswith("zero"):
        return zero_update_bytes(setup, counted)
    if not setup.foreach:
        return 0
    shards = setup.sharded_by if setup.sharding.startswith("fsdp") and not setup.adapters_ignored else 1
    width = 4 if setup.sharding.startswith("fsdp") and setup.autocast else WIDTHS[setup.adapters]
    return (counted.total("trained") * WIDTHS[setup.stored] + counted.total("adapters") * width) // shards


__all__ = ["PeerModel", "Prediction", "predict"]
