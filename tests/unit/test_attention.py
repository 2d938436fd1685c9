"""Packed attention against two references, without a leak between segments, keeping only what CUDA keeps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from sft_dist.errors import ConfigError
from sft_dist.model import attention
from sft_dist.model.attention import next_token_attention, packed_attention_forward, per_segment_sdpa
from sft_dist.model.cpu_attention import packed_attention
from sft_dist.model.row_cache import RowCache

QKV = tuple[Tensor, Tensor, Tensor]

HEAD_DIM = 8
SCALE = 0.3  # not 1 / sqrt(d), so that a lost scale shows

SEGMENTS = pytest.mark.parametrize(
    "seq_lens", [(12,), (5, 7), (1, 6, 1, 1, 4), (1, 1, 1), (40, 3)], ids=lambda lens: "-".join(map(str, lens))
)
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
WINDOWS = pytest.mark.parametrize("window", [0, 1, 3])


def inputs(seq_lens: tuple[int, ...], heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> QKV:
    generator = torch.Generator().manual_seed(sum(seq_lens))

    def one(count: int) -> Tensor:
        drawn = torch.randn(sum(seq_lens), count, HEAD_DIM, generator=generator)
        return drawn.to(dtype).requires_grad_()

    return one(heads), one(kv_heads), one(kv_heads)


def dense(q: Tensor, k: Tensor, v: Tensor, seq_lens: tuple[int, ...], scale: float, window: int) -> Tensor:
    """Softmax over the whole [T, T] score matrix, with everything hidden that a token must not see."""
    groups = q.shape[1] // k.shape[1]
    tokens = q.shape[0]
    segment = [number for number, length in enumerate(seq_lens) for _ in range(length)]
    visible = torch.tensor(
        [
            [segment[i] == segment[j] and j <= i and (window == 0 or i - j < window) for j in range(tokens)]
            for i in range(tokens)
        ]
    )
    outputs = []
    for head in range(q.shape[1]):
        scores = scale * q[:, head] @ k[:, head // groups].T
        weights = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=1)
        outputs.append(weights @ v[:, head // groups])
    return torch.stack(outputs, dim=1)


def gradients(out: Tensor, tensors: QKV) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad(out, tensors, upstream)


@SEGMENTS
@HEADS
@WINDOWS
def test_output_and_gradients_equal_both_references(
    seq_lens: tuple[int, ...], heads: int, kv_heads: int, window: int
) -> None:
    qkv = inputs(seq_lens, heads, kv_heads)
    out, lse = packed_attention(*qkv, seq_lens, SCALE, window)
    got = gradients(out, qkv)
    assert lse.shape == (heads, sum(seq_lens))
    for reference in (dense, per_segment_sdpa):
        expected = reference(*qkv, seq_lens, SCALE, window)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(got, gradients(expected, qkv), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@WINDOWS
def test_the_log_sum_exp_is_that_of_the_visible_scores(window: int) -> None:
    seq_lens = (3, 5)
    q, k, v = inputs(seq_lens, 2, 2)
    _, lse = packed_attention(q, k, v, seq_lens, SCALE, window)
    for token, start in ((2, 0), (7, 3), (3, 3)):
        first = max(start, token - window + 1) if window else start
        scores = SCALE * torch.einsum("hd,jhd->hj", q[token], k[first : token + 1])
        torch.testing.assert_close(lse[:, token], scores.logsumexp(dim=1), rtol=1e-5, atol=1e-5)


def test_bf16_is_near_fp32() -> None:
    seq_lens = (9, 17)
    qkv = inputs(seq_lens, 4, 2, torch.bfloat16)
    q, k, v = (t.detach().double().requires_grad_() for t in qkv)
    exact = q, k, v
    out, lse = packed_attention(*qkv, seq_lens, SCALE, 0)
    expected = dense(*exact, seq_lens, SCALE, 0)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    pairs = [(out, expected), *zip(gradients(out, qkv), gradients(expected, exact), strict=True)]
    for mine, theirs in pairs:
        # Unit roundoff of bf16 is 2^-9 = 2e-3; a few of them meet.
        assert float((mine.double() - theirs).norm() / theirs.norm()) < 1e-2


@WINDOWS
def test_a_segment_does_not_feel_the_others(window: int) -> None:
    seq_lens = (4, 6, 3)
    qkv = inputs(seq_lens, 4, 2)
    q, k, v = (t.detach().clone() for t in qkv)
    for t in (q, k, v):
        t[4:10] += 1.0
    changed = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    before, _ = packed_attention(*qkv, seq_lens, SCALE, window)
    after, _ = packed_attention(*changed, seq_lens, SCALE, window)
    others = [*range(4), *range(10, 13)]
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[4:10], after[4:10])
    for mine, theirs in zip(gradients(before, qkv), gradients(after, changed), strict=True):
        assert torch.equal(mine[others], theirs[others])


def test_a_token_does_not_see_its_future() -> None:
    qkv = inputs((6,), 2, 2)
    out, _ = packed_attention(*qkv, (6,), SCALE, 0)
    for grad in torch.autograd.grad(out[2].sum(), qkv):
        assert float(grad[3:].abs().max()) == 0
        assert float(grad[:3].abs().max()) > 0


def test_gradients_by_finite_differences() -> None:
    """The kernel's backward has no fp64 form, so fp64 differences of the dense reference judge the fp32 gradients."""
    seq_lens = (3, 1, 4)
    qkv = inputs(seq_lens, 4, 2)
    got = gradients(packed_attention(*qkv, seq_lens, SCALE, 0)[0], qkv)
    exact = [t.detach().double() for t in qkv]
    upstream = torch.randn((8, 4, HEAD_DIM), generator=torch.Generator().manual_seed(1)).double()
    for number, gradient in enumerate(got):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2)).double()
        ends = []
        for sign in (1, -1):
            q, k, v = (t + sign * 1e-5 * direction if i == number else t for i, t in enumerate(exact))
            ends.append((dense(q, k, v, seq_lens, SCALE, 0) * upstream).sum())
        slope = float((ends[0] - ends[1]) / 2e-5)
        assert float((gradient.double() * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_operator_is_registered_soundly(kv_heads: int, window: int) -> None:
    args = (*inputs((3, 5), 4, kv_heads), (3, 5), SCALE, window)
    results: dict[str, str] = torch.library.opcheck(packed_attention, args)
    assert set(results.values()) == {"SUCCESS"}, results


def test_backward_keeps_the_five_tensors_that_flash_attention_keeps() -> None:
    seq_lens = (5, 7)
    qkv = inputs(seq_lens, 4, 2)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, lse = packed_attention(*qkv, seq_lens, SCALE, 0)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (*qkv, out, lse)]
    assert [t.numel() for t in saved] == [12 * 4 * 8, 12 * 2 * 8, 12 * 2 * 8, 12 * 4 * 8, 12 * 4]


# What Transformers calls


def call(qkv: QKV, seq_lens: tuple[int, ...], **options: Any) -> Tensor:
    """Through the registered function, in Transformers' layout [1, heads, T, d]."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv)
    bounds = torch.tensor([0, *torch.tensor(seq_lens).cumsum(0).tolist()], dtype=torch.int32)
    module: Any = SimpleNamespace()
    out, weights = packed_attention_forward(
        module, q, k, v, options.pop("attention_mask", None),
        seq_lens=seq_lens, max_seq_len=max(seq_lens), cu_seqlens=bounds, **options,
    )  # fmt: skip
    assert weights is None
    return out


def test_the_registered_function_has_transformers_layout_and_default_scale() -> None:
    seq_lens = (5, 7)
    qkv = inputs(seq_lens, 4, 2)
    expected = dense(*qkv, seq_lens, HEAD_DIM**-0.5, 0)
    out = call(qkv, seq_lens)
    assert out.shape == (1, 12, 4, HEAD_DIM)
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call(qkv, seq_lens, scaling=SCALE)[0], dense(*qkv, seq_lens, SCALE, 0))


@pytest.mark.parametrize("window", [1, 4, 6, 7, 8])
def test_a_window_that_nothing_exceeds_is_plain_causal_attention(window: int) -> None:
    seq_lens = (5, 7)
    qkv = inputs(seq_lens, 4, 2)
    out = call(qkv, seq_lens, scaling=SCALE, sliding_window=window)
    torch.testing.assert_close(out[0], dense(*qkv, seq_lens, SCALE, window), rtol=1e-5, atol=1e-5)
    if window >= 7:
        assert torch.equal(out[0], packed_attention(*qkv, seq_lens, SCALE, 0)[0])


@HEADS
@WINDOWS
def test_the_kernel_of_the_gpu_is_told_the_same(
    heads: int, kv_heads: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts the tokens before a query, not the query itself, and has to be told that heads are shared."""
    seq_lens = (5, 7)
    qkv = inputs(seq_lens, heads, kv_heads)

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert (cu_q.tolist(), cu_k.tolist(), max_q, max_k) == ([0, 5, 12], [0, 5, 12], 7, 7)
        before, behind = options["window_size"]
        assert behind == 0
        assert options["enable_gqa"] == (heads != kv_heads)
        return dense(q, k, v, seq_lens, options["scale"], 0 if before < 0 else before + 1)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    out = attention._varlen(*qkv, torch.tensor([0, 5, 12], dtype=torch.int32), 7, SCALE, window)
    torch.testing.assert_close(out, dense(*qkv, seq_lens, SCALE, window))


def cache_of(lens: tuple[int, ...], qkv: QKV, *, room: int) -> tuple[RowCache, Tensor, Tensor]:
    """Rows of these lengths, their last token appended after the others; and the layer's buffers."""
    layer, cache, (_, key, value) = torch.nn.Identity(), RowCache(), qkv
    last = torch.tensor(lens).cumsum(0) - 1
    before = torch.ones(sum(lens), dtype=torch.bool).index_fill(0, last, False)
    cache.begin_pass([n - 1 for n in lens])
    cache.fill(layer, key[before], value[before])
    cache.keep(range(len(lens)), room=room)
    cache.begin_pass([1] * len(lens))
    return cache, *cache.append(layer, key[last], value[last])


@HEADS
@WINDOWS
@torch.no_grad()
def test_the_newest_tokens_see_their_rows(heads: int, kv_heads: int, window: int) -> None:
    lens = (5, 2, 7)
    qkv = inputs(lens, heads, kv_heads)
    cache, keys, values = cache_of(lens, qkv, room=3)
    last = torch.tensor(lens).cumsum(0) - 1
    out = next_token_attention(qkv[0][last], keys, values, cache, SCALE, window or None)
    torch.testing.assert_close(out, dense(*qkv, lens, SCALE, window)[last], rtol=1e-5, atol=1e-5)


@HEADS
@WINDOWS
@torch.no_grad()
def test_the_kernel_of_the_gpu_is_told_of_the_newest_tokens(
    heads: int, kv_heads: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have room behind them: it reads the part of each that is in use."""
    lens = (5, 2, 7)
    qkv = inputs(lens, heads, kv_heads)
    last = torch.tensor(lens).cumsum(0) - 1
    cache, keys, values = cache_of(lens, qkv, room=3)

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert (cu_q.tolist(), cu_k.tolist(), max_q, max_k) == ([0, 1, 2, 3], [0, 7, 11, 20], 1, 7)
        assert options["seqused_k"].tolist() == [5, 2, 7]
        assert {t.dtype for t in (cu_q, cu_k, options["seqused_k"])} == {torch.int32}
        used = torch.cat([torch.arange(start, start + n) for start, n in zip(cu_k.tolist(), lens, strict=False)])
        before, behind = options["window_size"]
        assert behind == 0
        assert options["enable_gqa"] == (heads != kv_heads)
        queries = torch.zeros_like(qkv[0]).index_copy(0, last, q)
        return dense(queries, k[used], v[used], lens, options["scale"], 0 if before < 0 else before + 1)[last]

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    out = attention._varlen_next(qkv[0][last], keys, values, cache, SCALE, window)
    torch.testing.assert_close(out, dense(*qkv, lens, SCALE, window)[last])


@pytest.mark.parametrize("options", [{"attention_mask": torch.ones(1)}, {"dropout": 0.1}])
def test_a_mask_or_dropout_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="attention mask or dropout"):
        call(inputs((3,), 2, 2), (3,), **options)


def test_a_model_that_keeps_the_bounds_to_itself_is_refused() -> None:
    """Some models drop extra forward keywords; attention over the whole pack would be silently wrong."""
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="Identity does not pass the bounds"):
        packed_attention_forward(torch.nn.Identity(), q, q, q, None, max_seq_len=4)
