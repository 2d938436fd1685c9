"""Our LoRA forward and backward against PEFT's own: values, gradients, what is kept and what is computed."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sft_dist.model.int8 import Int8Linear
from sft_dist.model.lora import DoraLinear, LoraLinear, add_magnitudes, fuse_lora, lora_linear, readers
from sft_dist.model.nf4 import NF4Linear
from sft_dist.model.quantized import QuantizedLinear
from sft_dist.sharding.ddp import cast_while_running

IN, OUT, RANK = 64, 48, 4
Quantized = type[QuantizedLinear] | None
BASES = pytest.mark.parametrize("quantized", [None, NF4Linear, Int8Linear], ids=["dense", "nf4", "int8"])


class Layers(nn.Module):
    """Two layers that share an input, and one behind them."""

    def __init__(self, bias: bool, dtype: torch.dtype, quantized: Quantized) -> None:
        super().__init__()
        for name, size in (("first", (IN, OUT)), ("second", (IN, OUT)), ("last", (OUT, IN))):
            linear = nn.Linear(*size, bias=bias, dtype=dtype)
            setattr(self, name, linear if quantized is None else quantized.quantize(linear, dtype))

    def forward(self, x: Tensor) -> Tensor:
        u = x.tanh()
        return self.last(self.first(u) * self.second(u).tanh())


def pair(
    *, bias: bool = False, dtype: torch.dtype = torch.float32, quantized: Quantized = None, **lora: Any
) -> tuple[nn.Module, nn.Module]:
    """(PEFT's, ours) with the same values, B not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=10, target_modules=["first", "second", "last"], **lora)
    theirs = get_peft_model(Layers(bias, dtype, quantized), config, autocast_adapter_dtype=False)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.2).to(dtype)
    for module in theirs.modules():
        if isinstance(module, PeftLinear):
            module.cast_input_dtype_enabled = False
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    return theirs, ours


def example(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    x = torch.randn(*(shape or (1, 10)), IN, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def passes(model: nn.Module, x: Tensor, *, recompute: bool = False, trained: int = 6) -> dict[str, Tensor]:
    """y and all gradients."""
    torch.manual_seed(2)
    y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
    (y * torch.linspace(-1, 1, IN, dtype=y.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == trained
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """To ``tolerance`` of the largest element of each tensor."""
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert float(expected.abs().max()) > 0, name
        error = float((ours[name] - expected).abs().max() / expected.abs().max())
        assert error <= tolerance, f"{name}: {error:.1e}"


@BASES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_peft(quantized: Quantized, dropout: float, rslora: bool, bias: bool) -> None:
    theirs, ours = pair(bias=bias, quantized=quantized, lora_dropout=dropout, use_rslora=rslora)
    assert sum(type(m) is LoraLinear for m in ours.modules()) == 3
    assert_equal(passes(ours, example()), passes(theirs, example()), 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_equals_peft(dropout: float, bias: bool) -> None:
    """In training, where dropout decides which input each part reads, and backward what counts as constant."""
    theirs, _ = pair(bias=bias, lora_dropout=dropout, use_dora=True)
    _, ours = pair(bias=bias, lora_dropout=dropout)
    add_magnitudes(ours)
    assert sum(type(m) is DoraLinear for m in ours.modules()) == 3
    ours.load_state_dict(theirs.state_dict())
    expected = passes(theirs, example(), trained=9)
    actual = passes(ours, example(), trained=9)
    assert_equal({name: actual[name] for name in expected}, expected, 1e-5)


@BASES
def test_equals_peft_in_bf16(quantized: Quantized) -> None:
    """Each result rounds to 8 bits, 2^-9 of its size; PEFT rounds four times on the way to y, we twice; 3 layers."""
    theirs, ours = pair(dtype=torch.bfloat16, quantized=quantized)
    assert_equal(passes(ours, example(torch.bfloat16)), passes(theirs, example(torch.bfloat16)), 4 * 2**-8)


def test_bf16_is_nearer_to_fp32_than_peft() -> None:
    theirs, ours = pair(dtype=torch.bfloat16)
    exact, x = copy.deepcopy(theirs).float(), example(torch.bfloat16, 1, 500)
    with torch.no_grad():
        expected = exact(x.float())
    errors = [float((model(x.detach()).detach().float() - expected).square().mean()) for model in (ours, theirs)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("shape", [(10,), (2, 5), (1, 0), (0,)])
def test_any_leading_shape_and_none(shape: tuple[int, ...]) -> None:
    theirs, ours = pair(bias=True)
    results = [passes(model, example(torch.float32, *shape)) for model in (ours, theirs)]
    assert results[0]["y"].shape == (*shape, IN)
    if results[0]["y"].numel():
        assert_equal(*results, 1e-5)
    else:
        for gradient in results[0].values():
            assert not gradient.any()


def test_an_input_that_is_not_contiguous() -> None:
    """And the gradient neither: the layers before and after may transpose."""
    theirs, ours = pair(lora_dropout=0.3, bias=True)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        x = example(torch.float32, 6, 5)
        y = model(x.transpose(0, 1))
        y.transpose(0, 1).square().sum().backward()
        results.append(
            {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if "lora_" in n}}
        )
    assert_equal(*results, 1e-5)


@BASES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit(quantized: Quantized, dropout: float) -> None:
    _, ours = pair(quantized=quantized, lora_dropout=dropout)
    plain = passes(copy.deepcopy(ours), example())
    recomputed = passes(ours, example(), recompute=True)
    assert all(torch.equal(recomputed[name], value) for name, value in plain.items())


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, dtype=torch.float64)
    base.weight.requires_grad_(False)  # a trainable bias gets its gradient
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (2, 6), (5, 2)))

    def function(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(1)
        shadow = nn.Linear(6, 5, device="meta")
        shadow.weight, shadow.__dict__["bias"] = base.weight, bias
        del shadow._parameters["bias"]
        return lora_linear(x, shadow, a, b, scaling=1.7, dropout=0.25)

    assert torch.autograd.gradcheck(function, (x, a, b, base.bias))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "expected"), [(False, 6), (True, 8)])
def test_dequantised_once_a_pass(recompute: bool, expected: int) -> None:
    """Three layers, forward and backward; recomputation leaves out the last layer, whose output backward does not need."""
    _, ours = pair(quantized=NF4Linear)
    with Calls() as calls:
        passes(ours, example(), recompute=recompute)
    assert calls.counts["dequantize_4bit"] == expected


def test_a_frozen_first_layer_is_not_dequantised_for_backward() -> None:
    """The first block's inputs need no gradient under frozen embeddings."""
    _, ours = pair(quantized=NF4Linear)
    with Calls() as calls:
        ours(example().detach()).sum().backward()
    assert calls.counts["dequantize_4bit"] == 3 + 1


def kept(model: nn.Module, x: Tensor) -> dict[int, tuple[int, torch.dtype]]:
    """Storage -> (bytes, dtype) of what forward keeps, without parameters and buffers."""
    found: dict[int, Tensor] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.shape[-1] == IN
    return {ptr: (t.untyped_storage().nbytes(), t.dtype) for ptr, t in found.items()}


@BASES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_kept(quantized: Quantized, dropout: float) -> None:
    """The shared input once, A's output a layer, and with dropout a byte an element; nothing of the base weight."""
    theirs, ours = pair(quantized=quantized, lora_dropout=dropout)
    tokens = 100
    sizes = [
        sum(size for size, _ in kept(model, example(torch.float32, 1, tokens)).values()) for model in (ours, theirs)
    ]
    # tanh keeps its result, which is the shared input; so does the second tanh; the product keeps both sides.
    between = 4 * tokens * (IN + OUT + OUT)
    layers = 4 * tokens * (OUT + 3 * RANK)  # the last layer's input
    masks = tokens * (IN + IN + OUT) if dropout else 0
    assert sizes[0] == between + layers + masks
    if dropout:
        assert sizes[0] < 0.6 * sizes[1]
    else:
        assert sizes[0] == sizes[1]


def test_without_gradients_nothing_is_kept_and_the_value_is_the_same() -> None:
    _, ours = pair()
    trained = ours(example()).detach()
    with torch.no_grad():
        assert not kept(ours, example())
        assert torch.equal(ours(example()), trained)


def test_evaluation_drops_nothing() -> None:
    theirs, ours = pair(lora_dropout=0.3)
    torch.testing.assert_close(ours.eval()(example()), theirs.eval()(example()), rtol=1e-5, atol=1e-6)


@BASES
def test_fake_tensors_go_through(quantized: Quantized) -> None:
    _, ours = pair(quantized=quantized, lora_dropout=0.3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 7, IN, requires_grad=True)
        y = ours(x)
        y.sum().backward()
    assert (y.shape, x.grad.shape) == ((1, 7, IN), (1, 7, IN))


def test_switched_off_adapters_are_peft_s_affair() -> None:
    theirs, ours = pair()
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(example()), theirs(example()))
    ours.merge_adapter()
    torch.testing.assert_close(ours(example()), theirs(example()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}])
def test_other_layers_stay_peft_s(variant: dict[str, Any]) -> None:
    _, model = pair(bias=True, **variant)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())


def test_names_and_order_stay_peft_s() -> None:
    theirs, ours = pair(bias=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_every_parameter_has_one_reader() -> None:
    _, ours = pair(bias=True)
    read = [id(p) for _, owners in readers(ours) for owner in owners for p in owner.parameters(recurse=False)]
    assert sorted(read) == sorted(id(p) for p in ours.parameters())
    assert sum(len(owners) > 1 for _, owners in readers(ours)) == 3


def test_the_cast_of_ddp_reaches_the_adapters() -> None:
    """fp32 masters, bf16 products: read where the layer runs, not where its parts would."""
    _, ours = pair(dtype=torch.bfloat16)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with pytest.raises(RuntimeError):
        ours(example(torch.bfloat16))
    cast_while_running(ours, torch.bfloat16)
    ours(example(torch.bfloat16)).sum().backward()
    gradients = {name: p.grad.dtype for name, p in ours.named_parameters() if p.grad is not None}
    assert set(gradients.values()) == {torch.float32}
    assert len(gradients) == 6
    assert all("weight" not in m.__dict__ for m in ours.modules()), "the cast is gone when the layer has run"
