"""The NF4 linear layer: bitsandbytes' own bytes and values, in ordinary parameters and buffers."""

from __future__ import annotations

import weakref
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sft_dist.model.nf4 import NF4Linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# 300 blocks: more than one block of scales, the last one partial.
IN_FEATURES, OUT_FEATURES = 128, 150


def base(dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES, bias=bias, dtype=dtype)
    return linear.requires_grad_(False)


def bitsandbytes_layer(linear: nn.Linear) -> bnb.nn.Linear4bit:
    dtype = linear.weight.dtype
    layer = bnb.nn.Linear4bit(
        IN_FEATURES, OUT_FEATURES, bias=linear.bias is not None, compute_dtype=dtype,
        compress_statistics=True, quant_type="nf4", quant_storage=dtype,
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False  # it would repack its weight in place
    if linear.bias is not None:
        layer.bias.data = linear.bias.data.clone()
    return layer


def example_input(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 5, IN_FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def state_of(layer: NF4Linear) -> dict[str, Tensor]:
    return {"weight": layer.weight, **dict(layer.named_buffers())}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).flatten()


@DTYPES
def test_bytes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    linear = base(dtype)
    ours, theirs = NF4Linear.quantize(linear, dtype), bitsandbytes_layer(linear)
    state = theirs.weight.quant_state
    assert ours.weight.dtype == dtype
    assert torch.equal(bits(ours.weight), bits(theirs.weight.data))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(bits(ours.nested_absmax), bits(state.state2.absmax))
    assert torch.equal(bits(ours.offset), bits(state.offset.reshape(1)))


@DTYPES
def test_rows_that_end_within_a_block(dtype: torch.dtype) -> None:
    """Blocks do not begin anew with a row, as bitsandbytes on a CPU has it when it dequantises."""
    torch.manual_seed(0)
    linear = nn.Linear(160, 64, bias=False, dtype=dtype).requires_grad_(False)
    layer, same = NF4Linear.quantize(linear, dtype), nn.Linear(64, 160, bias=False)
    same.weight = nn.Parameter(linear.weight.view(160, 64), requires_grad=False)
    whole = NF4Linear.quantize(same, dtype)
    expected = whole.dequantize(whole.stored(), (160, 64), dtype).view(64, 160)
    assert torch.equal(layer.dequantize(layer.stored(), (64, 160), dtype), expected)
    assert (expected - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_input_gradients_are_those_of_bitsandbytes(dtype: torch.dtype, bias: bool) -> None:
    linear = base(dtype, bias=bias)
    ours, theirs = NF4Linear.quantize(linear, dtype), bitsandbytes_layer(linear)
    results = []
    for layer in (ours, theirs):
        x = example_input(dtype)
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    (y, grad), (expected_y, expected_grad) = results
    # The same weight in the same dtype; the order of a product's sums may differ.
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(y, expected_y, rtol=rtol, atol=atol)
    torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=atol)


def test_the_dequantised_weight_by_the_formula() -> None:
    """Each half byte is a level, each block of 64 has a scale, scales are themselves a table's value plus their mean."""
    linear = base(torch.float32)
    layer = NF4Linear.quantize(linear, torch.float32)
    packed = bits(layer.weight).long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    table = bnb.functional.create_dynamic_map()
    nested = layer.nested_absmax.view(torch.float32).repeat_interleave(256)[: layer.absmax.numel()]
    scales = table[layer.absmax.long()] * nested + layer.offset.view(torch.float32)
    expected = (levels[codes].view(-1, 64) * scales[:, None]).view(OUT_FEATURES, IN_FEATURES)
    got = layer.dequantize(layer.stored(), (OUT_FEATURES, IN_FEATURES), torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    # And it is near the weight: NF4's widest gap is 0.3 of a block's largest value, half of it the worst error.
    assert float((got - linear.weight).abs().max() / linear.weight.abs().max()) < 0.16


@DTYPES
def test_evaluation_leaves_the_bytes_alone(dtype: torch.dtype) -> None:
    layer = NF4Linear.quantize(base(dtype), dtype)
    before = {name: bits(t).clone() for name, t in state_of(layer).items()}
    trained = layer(example_input(dtype)).detach()
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(example_input(dtype)), trained)
    layer.train()
    assert torch.equal(layer(example_input(dtype)).detach(), trained)
    assert all(torch.equal(bits(t), before[name]) for name, t in state_of(layer).items())


@DTYPES
def test_buffers_survive_a_change_of_dtype(dtype: torch.dtype) -> None:
    """FSDP2 and DeepSpeed cast a whole module; scales cast to bf16 would be other scales."""
    layer = NF4Linear.quantize(base(dtype), dtype)
    before = {name: (b.dtype, bits(b).clone()) for name, b in layer.named_buffers()}
    assert set(before) == {"absmax", "nested_absmax", "scale_code", "offset"}
    layer.to(torch.bfloat16)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name][0]
        assert torch.equal(bits(buffer), before[name][1])


@DTYPES
def test_backward_keeps_the_packed_weight_and_its_state_only(dtype: torch.dtype) -> None:
    layer = NF4Linear.quantize(base(dtype), dtype)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(example_input(dtype))
    expected = state_of(layer).values()
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in expected}
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in expected)


def test_no_dequantised_weight_outlives_a_pass() -> None:
    layer = NF4Linear.quantize(base(torch.float32), torch.float32)
    made: list[weakref.ref[Tensor]] = []

    class Dequantised(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "dequantize_4bit":
                made.append(weakref.ref(result))
            return result

    with Dequantised():
        y = layer(example_input(torch.float32))
        assert [ref() for ref in made] == [None]
        y.sum().backward()
    assert [ref() for ref in made] == [None, None]


def test_the_parameter_is_read_again_in_backward() -> None:
    """A sharded strategy frees the gathered weight after forward and gathers it anew, into the same storage."""
    layer = NF4Linear.quantize(base(torch.float32), torch.float32)
    x = example_input(torch.float32)
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    content = layer.weight.data.clone()
    layer.weight.data.zero_()
    (freed,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert not torch.equal(freed, expected)
    layer.weight.data.copy_(content)
    (gathered,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gathered, expected)


@DTYPES
@pytest.mark.parametrize("shape", [(128, 150), (64, 1), (256, 512)])
def test_meta_and_real_have_the_same_shapes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    real = NF4Linear.quantize(nn.Linear(*shape, bias=False, dtype=dtype), dtype)
    meta = NF4Linear.quantize(nn.Linear(*shape, bias=False, dtype=dtype, device="meta"), dtype)
    assert {n: (t.shape, t.dtype) for n, t in state_of(meta).items()} == {
        n: (t.shape, t.dtype) for n, t in state_of(real).items()
    }
    assert all(t.is_meta for t in state_of(meta).values())
    assert not any(t.is_meta for t in state_of(real).values())


@DTYPES
def test_a_weight_costs_half_a_byte_and_its_share_of_scales(dtype: torch.dtype) -> None:
    layer = NF4Linear.quantize(base(dtype), dtype)
    numel = IN_FEATURES * OUT_FEATURES
    assert layer.weight.nbytes == numel // 2
    assert sum(b.nbytes for b in layer.buffers()) == numel // 64 + 4 * 2 + 4 * 256 + 4
    assert not layer.weight.requires_grad
    assert set(layer.state_dict()) == {"weight"}


def test_it_says_what_it_is() -> None:
    layer = NF4Linear.quantize(base(torch.float32), torch.float32)
    assert isinstance(layer, nn.Linear)
    assert "nf4, double_quantization=True" in repr(layer)
