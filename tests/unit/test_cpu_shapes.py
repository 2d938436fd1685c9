"""Few shapes for products of bf16 on a CPU: what is filled in changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sft_dist.data.loader import Part, collate
from sft_dist.model import cpu_shapes
from sft_dist.model.attention import per_segment_sdpa
from sft_dist.model.cpu_attention import BLOCK, MAX_BY_PRODUCTS, packed_attention
from sft_dist.model.cpu_shapes import MULTIPLE, SplitLinear, add_mm, filled, filled_up, mm, product, split_products
from sft_dist.model.loss import linear_cross_entropy_sum
from tests.helpers.cells import config, start, synthetic_data

BF16 = torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_batch_is_filled_with_a_segment_that_predicts_nothing() -> None:
    data = synthetic_data(rows=6)
    batch = collate(data, [0, 1, 2])
    more = filled(batch, MULTIPLE)
    assert more.num_tokens == filled_up(batch.num_tokens) == more.input_ids.shape[1] == more.position_ids.shape[1]
    lacking = more.num_tokens - batch.num_tokens
    assert lacking > 0
    assert more.seq_lens == (*batch.seq_lens, lacking)
    assert more.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), more.num_tokens]
    assert more.cu_seqlens.dtype == batch.cu_seqlens.dtype
    assert more.position_ids[0, -lacking:].tolist() == list(range(lacking))
    assert torch.equal(more.supervised_index, batch.supervised_index)
    assert torch.equal(more.labels, batch.labels)
    assert filled(more, MULTIPLE) is more
    assert filled(batch, 1) is batch


def test_a_part_of_a_batch_stays_as_it_is() -> None:
    batch = collate(synthetic_data(rows=6), [0, 1, 2], Part(0, 2))
    assert filled(batch, MULTIPLE) is batch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_rows", [7, 16, None])
def test_the_loss_of_filled_rows_is_that_of_the_rows(smoothing: float, chunk_rows: int | None) -> None:
    torch.manual_seed(0)
    results = []
    for multiple in (1, 16):
        torch.manual_seed(0)
        hidden, weight = torch.randn(37, 12).requires_grad_(), torch.randn(50, 12).requires_grad_()
        labels = torch.randint(50, (37,))
        loss = linear_cross_entropy_sum(
            hidden, weight, labels, chunk_rows=chunk_rows, row_multiple=multiple, smoothing=smoothing
        )
        (loss * 0.3).backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for plain, of_filled in zip(*results, strict=True):
        torch.testing.assert_close(of_filled, plain, rtol=1e-5, atol=1e-6)


class Products(TorchDispatchMode):
    """The sizes and dtypes of all matrix products, without the one of the batch that is an adapter's rank."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten.mm:
            self.rows |= {args[0].shape[0], args[0].shape[1]}
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_steps_of_different_batches_make_products_of_the_same_sizes(tiny_base: Path, compute: str) -> None:
    _, strategy = start(
        config(str(tiny_base), "full", "ddp", precision={"compute": compute}, activation_checkpointing={"mode": "none"})
    )
    data = synthetic_data(rows=8)
    # The model's own sizes and those of the batch.
    own = {64, 256, 32, 259}
    of_batches = []
    for rows in ([0, 1], [2], [3, 4, 5]):
        batch = collate(data, rows)
        with Products() as products:
            strategy.forward_backward(batch, supervised_in_step=10, is_last_micro_batch=True)
        of_batches.append(products.rows - own)
    if compute == "bf16":
        assert all(not sizes for sizes in of_batches), of_batches
    else:
        assert all(size % MULTIPLE for sizes in of_batches for size in sizes)
    strategy.close()


def test_bf16_losses_do_not_feel_what_is_filled_in(tiny_base: Path) -> None:
    _, strategy = start(config(str(tiny_base), "full", "ddp", precision={"compute": "bf16"}))
    batch = collate(synthetic_data(rows=8), [0, 1, 2])
    model = strategy.model
    assert model.token_multiple == model.head.row_multiple == MULTIPLE
    here = float(strategy.evaluate(batch))
    model.token_multiple = model.head.row_multiple = 1
    assert float(strategy.evaluate(batch)) == pytest.approx(here, rel=2e-3)
    strategy.close()


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_bf16_is_that_of_fp32_for_short_and_long_segments(kv_heads: int, window: int) -> None:
    lengths = (5, 64, 70, BLOCK + 64, MAX_BY_PRODUCTS, MAX_BY_PRODUCTS + 9)
    torch.manual_seed(0)
    shapes = ((sum(lengths), 4, 16), (sum(lengths), kv_heads, 16), (sum(lengths), kv_heads, 16))
    low: list[Tensor] = [torch.randn(shape).to(BF16).requires_grad_() for shape in shapes]
    wide = [each.detach().float().requires_grad_() for each in low]
    weight = torch.randn(shapes[0]).to(BF16)
    out, _ = packed_attention(*low, lengths, 0.25, window)
    expected = per_segment_sdpa(*wide, lengths, 0.25, window)
    grads = torch.autograd.grad((out * weight).sum(), low)
    expected_grads = torch.autograd.grad((expected * weight.float()).sum(), wide)
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == BF16
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.parametrize(("m", "k", "n"), [(96, 1024, 512), (96, 1024, 511), (96, 1023, 512), (2048, 1024, 512)])
@pytest.mark.parametrize("with_out", [True, False])
def test_a_split_product_is_the_product(
    monkeypatch: pytest.MonkeyPatch, m: int, k: int, n: int, with_out: bool
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_shapes, "multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(BF16), torch.randn(k, n).to(BF16)
    out = torch.empty(m, n, dtype=BF16) if with_out else None
    calls: list[int] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, y, **more: (calls.append(y.shape[1]), mm(x, y, **more))[1])
    result = product(a, b, out)
    assert calls == ([n // 2, n // 2] if (m, k, n) == (96, 1024, 512) else [n])
    assert out is None or result is out
    torch.testing.assert_close(result.float(), a.float() @ b.float(), rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("wanted", ["mm", "product", "out", "add", "add to a copy"])
def test_a_cpu_without_bf16_multiplies_fp32(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """The sum is rounded once; what is added to is not lost."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_shapes, "multiplies_bf16", lambda: False)
    torch.manual_seed(0)
    a, b, total = torch.randn(96, 1024).to(BF16), torch.randn(1024, 512).to(BF16), torch.randn(96, 512).to(BF16)
    exact, before = a.float() @ b.float(), total.clone()
    seen: list[torch.dtype] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, y: (seen.append(x.dtype), real(x, y))[1])
    match wanted:
        case "mm":
            result, expected = mm(a, b), exact
        case "product":
            result, expected = product(a, b), exact
        case "out":
            result, expected = product(a, b, total), exact
            assert result is total
        case _:
            in_place = wanted == "add"
            result, expected = add_mm(total, a, b, alpha=0.5, in_place=in_place), before.float() + 0.5 * exact
            assert (result is total) is in_place
            assert in_place or torch.equal(total, before)
    assert seen == [torch.float32]
    assert result.dtype == BF16
    assert torch.equal(result, expected.to(BF16))


def test_only_bf16_that_is_here_goes_by_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the fake tensors of a plan, whose operators are a GPU's."""
    monkeypatch.setattr(cpu_shapes, "multiplies_bf16", lambda: False)
    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    wide = torch.ones(4, 4)
    with Operators():
        mm(wide, wide)
    with FakeTensorMode(), Operators():
        low = torch.ones(4, 4, dtype=BF16)
        seen.clear()
        mm(low, low)
        add_mm(low, low, low)
    assert seen == [torch.ops.aten.mm.default, torch.ops.aten.addmm_.default][-len(seen) :]
    assert len(seen) == 2


@pytest.mark.parametrize(
    "method", ["full", "lora", "qlora", {"type": "qlora", "r": 4, "target_modules": ["q_proj"]}], ids=str
)
def test_a_step_without_bf16_instructions(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    """All of its large products are fp32, and its loss and gradients are those of bf16."""
    cfg = config(str(tiny_base), method, "ddp", precision={"compute": "bf16"})
    batch = collate(synthetic_data(rows=8), [0, 1, 2])
    found = []
    for with_bf16 in (True, False):
        monkeypatch.setattr(cpu_shapes, "multiplies_bf16", lambda here=with_bf16: here)
        _, strategy = start(cfg)
        with Products() as products:
            loss = strategy.forward_backward(batch, supervised_in_step=10, is_last_micro_batch=True)
        norm = strategy.step(0.0).grad_norm
        found.append((float(loss), float(norm)))
        strategy.close()
        assert products.dtypes == {BF16 if with_bf16 else torch.float32}
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_a_filled_batch_keeps_the_seeds_of_its_rows() -> None:
    batch = replace(collate(synthetic_data(rows=6), [0, 1]), row_seeds=(1, 2))
    assert filled(batch, MULTIPLE).row_seeds == (1, 2)


@pytest.mark.parametrize("with_bf16", [True, False])
def test_a_split_linear_layer_is_the_linear_layer(monkeypatch: pytest.MonkeyPatch, with_bf16: bool) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_shapes, "multiplies_bf16", lambda: with_bf16)
    torch.manual_seed(0)
    # Halved: the product of the one, and of the other the gradient of its input.
    for size_in, size_out, bias in ((1024, 512, False), (512, 1024, False), (1024, 512, True)):
        plain, split = (nn.Linear(size_in, size_out, bias=bias, dtype=BF16) for _ in range(2))
        split.load_state_dict(plain.state_dict())
        split_products(split)
        assert type(split) is (nn.Linear if bias and with_bf16 else SplitLinear)
        x, weight = torch.randn(2, 48, size_in).to(BF16), torch.randn(2, 48, size_out).to(BF16)
        results = []
        for layer in (plain, split):
            read = x.clone().requires_grad_()
            y = layer(read)
            results.append((y, *torch.autograd.grad((y * weight).sum(), (read, *layer.parameters()))))
        for theirs, ours in zip(*results, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=0.05)


def test_only_bf16_on_a_cpu_is_split(tiny_base: Path) -> None:
    for compute, kind in (("bf16", SplitLinear), ("fp32", nn.Linear)):
        _, strategy = start(config(str(tiny_base), "full", "ddp", precision={"compute": compute}))
        layers = [m for m in strategy.model.modules() if isinstance(m, nn.Linear) and m is not strategy.model.head]
        assert layers
        assert all(type(layer) is kind for layer in layers)
        strategy.close()
