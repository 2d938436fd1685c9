"""What is recomputed, what is kept and where: counted in operators and bytes, with the same numbers at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sft_dist.data.loader import collate
from sft_dist.model.cpu_shapes import filled
from sft_dist.plan.activations import trace
from sft_dist.sharding import activation_checkpointing as subject
from tests.helpers.cells import config, start, synthetic_data

ROWS = [0, 1, 2]

LOW_RANK = subject.LOW_RANK


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def tiny_layers_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but adapters of rank 4."""
    monkeypatch.setattr(subject, "LOW_RANK", 8)


class Operators(TorchDispatchMode):
    """How often each ran, matrix products by the right factor's size."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[(name, tuple(args[1].shape)) if name == "mm" else name] += 1
        return func(*args, **(kwargs or {}))


def step(base: Path, method: str, **checkpointing: Any) -> tuple[float, list[Tensor], Counter[Any]]:
    """Loss, gradients and what ran in one micro-batch."""
    _, strategy = start(config(str(base), method, "ddp", activation_checkpointing=checkpointing))
    batch = collate(synthetic_data(rows=len(ROWS)), ROWS)
    with Operators() as ran:
        loss = strategy.forward_backward(batch, supervised_in_step=10, is_last_micro_batch=True)
    return float(loss), [p.grad.clone() for p in strategy.model.parameters() if p.grad is not None], ran.counts


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_selective_repeats_half_of_the_products_and_no_attention(tiny_base: Path, method: str) -> None:
    none, full, selective = (step(tiny_base, method, mode=mode) for mode in ("none", "full", "selective"))
    for loss, gradients, _ in (full, selective):
        assert loss == none[0]
        assert all(torch.equal(a, b) for a, b in zip(gradients, none[1], strict=True))
    attentions = [ran["packed_attention"] for _, _, ran in (none, full, selective)]
    assert attentions == [2, 4, 2], "two blocks"
    repeated = full[2] - none[2]
    spared = full[2] - selective[2]
    # hidden 64, key and value 32, intermediate 256: [in, out] of k_proj, o_proj and up_proj in two blocks.
    products = {shape: count for (_, shape), count in _products(spared).items()}
    assert products == {(64, 32): 2, (64, 64): 2, (64, 256): 2}
    base = {s: n for (_, s), n in _products(repeated).items() if min(s) > 4}
    # k and v, q and o, gate and up: backward does not need down_proj's result.
    assert base == {(64, 32): 4, (64, 64): 4, (64, 256): 4}


def _products(counts: Counter[Any]) -> dict[Any, int]:
    return {key: count for key, count in counts.items() if isinstance(key, tuple)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LlamaConfig", [2, 4, 6]), ("Phi3Config", [1, 3])],
)
def test_the_last_product_is_not_kept(name: str, expected: list[int]) -> None:
    """Backward has no use for it, however many there are: seven, or four where some are fused."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, name)(vocab_size=11, num_key_value_heads=2, pad_token_id=0, **sizes)
    with torch.device("meta"):
        block = AutoModelForCausalLM.from_config(config).model.layers[0]
    policy = subject.KeepTheDearest(subject.wide_products(block))
    context = subject.SelectiveCheckpointContext(is_recompute=False)
    factor = torch.empty(32, 32, device="meta")
    decisions = [
        policy(context, torch.ops.aten.mm.default, factor, factor) for _ in range(subject.wide_products(block))
    ]
    kept = [i for i, decision in enumerate(decisions, start=1) if decision == subject.CheckpointPolicy.MUST_SAVE]
    assert kept == expected


@pytest.mark.parametrize("is_recompute", [False, True])
def test_whatever_kernel_attends_is_not_run_again(is_recompute: bool) -> None:
    """On a GPU it is another one than on the CPU, and which one depends on dtype and version."""
    aten = torch.ops.aten
    kernels = [
        torch.ops.torch_attn._varlen_attn.default, torch.ops.sft_dist.packed_attention.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]  # fmt: skip
    policy, context = subject.KeepTheDearest(7), subject.SelectiveCheckpointContext(is_recompute=is_recompute)
    query = torch.empty(5, 2, 8, device="meta")
    assert {policy(context, kernel, query, query, query) for kernel in kernels} == {subject.CheckpointPolicy.MUST_SAVE}
    assert policy(context, aten.add.Tensor, query, query) == subject.CheckpointPolicy.PREFER_RECOMPUTE


def test_the_least_of_real_layers_are_wide_and_real_adapters_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key and value layers with a few shared heads have 512 or 1024 outputs; ranks seldom exceed 256."""
    monkeypatch.setattr(subject, "LOW_RANK", LOW_RANK)
    assert subject.is_wide(4096, 1024)
    assert subject.is_wide(896, 512)
    assert not subject.is_wide(4096, 256)
    assert not subject.is_wide(64, 8192)


def test_a_layer_with_a_bias_is_a_product_like_any_other() -> None:
    """Torch adds it in the same operator, which is another one."""
    wide, bias = torch.empty(32, 32, device="meta"), torch.empty(32, device="meta")
    context = subject.SelectiveCheckpointContext(is_recompute=False)
    plain, biased = subject.KeepTheDearest(4), subject.KeepTheDearest(4)
    for _ in range(4):
        expected = plain(context, torch.ops.aten.mm.default, wide, wide)
        assert biased(context, torch.ops.aten.addmm.default, bias, wide, wide) == expected
    low = torch.empty(32, 4, device="meta")
    assert biased(context, torch.ops.aten.mm.default, wide, low) == subject.CheckpointPolicy.PREFER_RECOMPUTE
    assert biased.products[False] == 4


@pytest.mark.parametrize(
    ("checkpointing", "compute"),
    [({"mode": "full"}, "bf16"), ({"mode": "selective"}, "fp32"), ({"mode": "every_k", "k": 2}, "fp32")],
)
def test_offload_moves_the_inputs_of_recomputed_blocks_and_nothing_else(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: dict[str, Any], compute: str
) -> None:
    moved: list[Tensor] = []

    class Watched(saved_tensors_hooks):
        def __init__(self, pack: Any, unpack: Any) -> None:
            def seen(tensor: Tensor) -> Any:
                packed = pack(tensor)
                if packed is not tensor:
                    assert packed[1].data_ptr() != tensor.data_ptr(), "a copy, not the tensor itself"
                    moved.append(packed[1])
                return packed

            super().__init__(seen, unpack)

    monkeypatch.setattr(subject, "saved_tensors_hooks", Watched)
    precision = {"compute": compute}
    run, strategy = start(
        config(
            str(tiny_base),
            "lora",
            "ddp",
            activation_checkpointing={**checkpointing, "offload": True},
            precision=precision,
        )
    )
    moved.clear()  # of the empty batch with which DDP settles its buckets
    batch = filled(collate(synthetic_data(rows=len(ROWS)), ROWS), strategy.model.token_multiple)
    loss = strategy.forward_backward(batch, supervised_in_step=10, is_last_micro_batch=True)
    monkeypatch.setattr(subject, "saved_tensors_hooks", saved_tensors_hooks)
    here = replace(run, activation_checkpointing=run.activation_checkpointing.model_copy(update={"offload": False}))
    kept, kept_here = (trace(each, seq_lens=batch.seq_lens, supervised=len(batch.labels)) for each in (run, here))
    assert sum(t.numel() * t.element_size() for t in moved) == kept_here.kept_bytes - kept.kept_bytes
    assert len(moved) == (1 if "k" in checkpointing else 2)
    _, plain = start(config(str(tiny_base), "lora", "ddp", activation_checkpointing=checkpointing, precision=precision))
    assert float(plain.forward_backward(batch, supervised_in_step=10, is_last_micro_batch=True)) == float(loss)
    for a, b in zip(strategy.model.parameters(), plain.model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
