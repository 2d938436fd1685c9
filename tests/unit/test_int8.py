"""The 8-bit linear layer: bitsandbytes' own bytes and values, in an ordinary parameter and a plain buffer."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from sft_dist.model.int8 import Int8Linear
from sft_dist.model.lora import lora_linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IN_FEATURES, OUT_FEATURES = 24, 10


def base(dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN_FEATURES, OUT_FEATURES, bias=bias, dtype=dtype).requires_grad_(False)


def bitsandbytes_layer(linear: nn.Linear) -> bnb.nn.Linear8bitLt:
    """In training mode, where it multiplies by the dequantised weight."""
    layer = bnb.nn.Linear8bitLt(IN_FEATURES, OUT_FEATURES, bias=linear.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").train()


def example_input(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 5, IN_FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).flatten()


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_outputs_and_gradients_are_those_of_bitsandbytes(dtype: torch.dtype, bias: bool) -> None:
    linear = base(dtype, bias=bias)
    ours, theirs = Int8Linear.quantize(linear, dtype), bitsandbytes_layer(linear)
    assert (ours.weight.dtype, ours.weight.shape) == (dtype, (OUT_FEATURES, IN_FEATURES // dtype.itemsize))
    assert torch.equal(bits(ours.weight), bits(theirs.weight.data))
    assert torch.equal(bits(ours.row_absmax), bits(theirs.weight.SCB))
    results = []
    for layer in (ours, theirs):
        x = example_input(dtype)
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    (y, grad), (expected_y, expected_grad) = results
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(y, expected_y, rtol=rtol, atol=atol)
    torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=atol)


@DTYPES
def test_the_dequantised_weight_by_the_formula(dtype: torch.dtype) -> None:
    linear = base(dtype)
    layer = Int8Linear.quantize(linear, dtype)
    scales = linear.weight.half().abs().amax(1, keepdim=True).float()
    assert torch.equal(layer.row_absmax.view(torch.float32), scales.flatten())
    expected = layer.weight.view(torch.int8).float() * scales / 127
    got = layer.dequantize(layer.stored(), (OUT_FEATURES, IN_FEATURES), torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    # Half a step of 127, and the rounding to fp16.
    assert bool(((got - linear.weight.float()).abs() <= scales * (0.5 / 127 + 2**-11)).all())


def test_it_costs_a_byte_a_weight_and_survives_a_change_of_dtype() -> None:
    layer = Int8Linear.quantize(base(torch.bfloat16), torch.bfloat16)
    assert layer.weight.nbytes == IN_FEATURES * OUT_FEATURES
    assert [b.nbytes for b in layer.buffers()] == [4 * OUT_FEATURES]
    before = bits(layer.row_absmax)
    assert torch.equal(bits(layer.to(torch.float32).row_absmax), before)
    assert not layer.weight.requires_grad
    assert set(layer.state_dict()) == {"weight"}
    meta = Int8Linear.in_place_of(base(torch.bfloat16), torch.bfloat16)
    assert {n: (t.shape, t.dtype) for n, t in meta.named_buffers()} == {
        n: (t.shape, t.dtype) for n, t in layer.named_buffers()
    }
    assert meta.weight.is_meta
    assert "int8" in repr(layer)


@DTYPES
def test_backward_keeps_the_packed_weight_and_its_scales_only(dtype: torch.dtype) -> None:
    layer = Int8Linear.quantize(base(dtype), dtype)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(example_input(dtype))
    assert {t.data_ptr() for t in saved} == {layer.weight.data_ptr(), layer.row_absmax.data_ptr()}


def test_lora_on_it_is_the_formula() -> None:
    layer = Int8Linear.quantize(base(torch.float32, bias=True), torch.float32)
    weight = layer.dequantize(layer.stored(), (OUT_FEATURES, IN_FEATURES), torch.float32)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((3, IN_FEATURES), (OUT_FEATURES, 3)))
    results = []
    for fused in (True, False):
        x = example_input(torch.float32)
        y = lora_linear(x, layer, a, b, scaling=2.0) if fused else x @ weight.T + layer.bias + 2.0 * x @ a.T @ b.T
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, a, b))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
