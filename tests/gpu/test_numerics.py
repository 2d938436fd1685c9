"""What replaces Transformers' operators, in bf16 on a GPU against fp32: norm, gate, rotary, attention and loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from sft_dist.model.attention import _varlen, per_segment_sdpa
from sft_dist.model.compiled import COMPILED
from sft_dist.model.fused import EAGER, Arithmetic, apply_rotary, fuse
from sft_dist.model.loss import linear_cross_entropy_sum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

HIDDEN, TOKENS = 256, 300


def near(
    low: Callable[..., Tensor], wide: Callable[..., Tensor], shapes: list[tuple[int, ...]], limit: float = 1e-2
) -> None:
    """Value and gradients of ``low`` in bf16 are those of ``wide`` in fp32."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    exact = [each.detach().float().requires_grad_() for each in inputs]
    out, expected = low(*inputs), wide(*exact)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), exact)
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < limit


@pytest.mark.parametrize("arithmetic", [EAGER, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_fused_modules(kind: str, arithmetic: Arithmetic) -> None:
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_attention_heads=4)
    torch.manual_seed(1)
    exact = (llama.LlamaRMSNorm(HIDDEN) if kind == "norm" else llama.LlamaMLP(config)).cuda()
    low = (llama.LlamaRMSNorm(HIDDEN) if kind == "norm" else llama.LlamaMLP(config)).cuda()
    low.load_state_dict(exact.state_dict())
    fuse(low.bfloat16(), arithmetic)
    near(low, exact, [(1, TOKENS, HIDDEN)])


@pytest.mark.parametrize("arithmetic", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_rotary(arithmetic: Arithmetic) -> None:
    angles = torch.randn(1, TOKENS, 32, device="cuda").repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    near(
        lambda q: apply_rotary(q, q, cos.bfloat16(), sin.bfloat16(), arithmetic=arithmetic)[0],
        lambda q: llama.apply_rotary_pos_emb(q, q, cos, sin)[0],
        [(1, 4, TOKENS, 64)],
    )


@pytest.mark.parametrize("window", [0, 40])
def test_attention(window: int) -> None:
    lengths = (5, 64, 231)
    bounds = torch.tensor([0, 5, 69, 300], dtype=torch.int32, device="cuda")
    near(
        lambda q, k, v: _varlen(q, k, v, bounds, max(lengths), 0.125, window),
        lambda q, k, v: per_segment_sdpa(q, k, v, lengths, 0.125, window),
        [(TOKENS, 8, 64), (TOKENS, 4, 64), (TOKENS, 4, 64)],
    )


@pytest.mark.parametrize("chunk_rows", [64, None])
def test_loss(chunk_rows: int | None) -> None:
    labels = torch.randint(1000, (TOKENS,), device="cuda")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=chunk_rows)

    near(loss, loss, [(TOKENS, HIDDEN), (1000, HIDDEN)])
