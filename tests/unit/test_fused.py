"""RMSNorm, SwiGLU and rotary embedding as one node each: Transformers' values, autograd's gradients, less kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from sft_dist.model.fused import apply_rotary, fuse

TOKENS, HIDDEN, WIDE = 7, 24, 40


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    out = function(*inputs)
    (weight,) = tensors(tuple(out.shape), dtype=out.dtype, seed=seed)
    return out.detach(), list(torch.autograd.grad((out * weight.detach()).sum(), inputs))


def kept_bytes(function: Callable[..., Tensor], inputs: list[Tensor], others: list[Tensor]) -> int:
    known = {t.untyped_storage().data_ptr() for t in others}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*inputs)
    total = sum(storages.values())
    del out
    return total


def norm() -> llama.LlamaRMSNorm:
    torch.manual_seed(2)
    module = llama.LlamaRMSNorm(HIDDEN, eps=1e-6)
    nn.init.normal_(module.weight)
    return module


def mlp() -> llama.LlamaMLP:
    torch.manual_seed(3)
    return llama.LlamaMLP(
        LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDE, hidden_act="silu", num_attention_heads=4)
    )


@pytest.mark.parametrize("make", [norm, mlp])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_are_those_of_transformers_and_gradients_those_of_autograd(
    make: Callable[[], nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    theirs, ours = make().to(dtype), make().to(dtype)
    fuse(ours)
    assert type(ours) is not type(theirs)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    results = []
    for module in (theirs, ours):
        (x,) = tensors((1, TOKENS, HIDDEN), dtype=dtype)
        results.append(gradients(lambda x, *_, module=module: module(x), [x, *module.parameters()]))
    (value, grads), (own_value, own_grads) = results
    assert torch.equal(value, own_value), "the forward is theirs, to the bit"
    for theirs_, ours_ in zip(grads, own_grads, strict=True):
        assert ours_.dtype == dtype
        torch.testing.assert_close(ours_, theirs_, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_the_norm_are_numerically_right(frozen: bool) -> None:
    module = norm()
    module.weight.requires_grad_(not frozen)
    fuse(module)
    (x,) = tensors((2, 3, HIDDEN), dtype=torch.float32)
    inputs = [x] if frozen else [x, module.weight]
    value, found = gradients(lambda x, *_: module(x), inputs)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    wide = [t.detach().double().requires_grad_() for t in (x, module.weight)]
    expected, grads = gradients(exact, wide)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(found, grads[: len(inputs)], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_rotary_is_that_of_transformers() -> None:
    """Angles whose halves differ too, which Llama's never do."""
    q, k, cos, sin = tensors((1, 4, TOKENS, 8), (1, 2, TOKENS, 8), (1, TOKENS, 8), (1, TOKENS, 8))
    cos, sin = cos.detach(), sin.detach()
    for which, x in enumerate((q, k)):

        def turned(x: Tensor, apply: Callable[..., Any], which: int = which) -> Tensor:
            result: Tensor = apply(x, x, cos, sin)[which]
            return result

        value, (grad,) = gradients(lambda x, turned=turned: turned(x, llama.apply_rotary_pos_emb), [x])
        own_value, (own_grad,) = gradients(lambda x, turned=turned: turned(x, apply_rotary), [x])
        torch.testing.assert_close(own_value, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_grad, grad, rtol=1e-12, atol=1e-12)


def test_less_is_kept_for_backward() -> None:
    """In bf16 and bytes a token: the norm its input and a number, the gated product its two inputs."""
    for make, outside, at_most in (
        (norm, [], 2 * HIDDEN + 4),
        (mlp, [], 2 * HIDDEN + 3 * 2 * WIDE),  # x, gate and up, and their product, which down_proj keeps
    ):
        theirs, ours = make().to(torch.bfloat16), make().to(torch.bfloat16)
        fuse(ours)
        sizes = []
        for module in (theirs, ours):
            (x,) = tensors((1, TOKENS, HIDDEN), dtype=torch.bfloat16)
            sizes.append(kept_bytes(module, [x], [*module.parameters(), *outside]))
        assert sizes[1] == TOKENS * at_most
        assert sizes[1] < sizes[0]


def test_a_module_that_computes_something_else_keeps_its_forward() -> None:
    different = GemmaRMSNorm(HIDDEN)  # 1 + weight
    gelu = llama.LlamaMLP(
        LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDE, hidden_act="gelu", num_attention_heads=4)
    )
    for module in (different, gelu, nn.Linear(2, 2)):
        kind = type(module)
        fuse(module)
        assert type(module) is kind


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    config: Any = CONFIG_MAPPING[family](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def test_a_rotation_of_another_kind_stays() -> None:
    """Nanochat's has Llama's code around a rotate_half of its own, the other way round."""
    model = model_of("nanochat")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(12)[None] % 64
    before = model(input_ids=ids).logits.detach()
    fuse(model)
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), before)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_whole_models_are_fused_and_compute_the_same(family: str) -> None:
    model = model_of(family)
    ids = torch.arange(12)[None] % 64
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        results.append((out.logits.detach(), [p.grad.clone() for p in model.parameters()]))
        fuse(model)
    fused = {
        type(m).__name__
        for m in model.modules()
        if "forward" in vars(type(m)) and type(m).__bases__[0] is not nn.Module
    }
    assert {name[len(family.capitalize()):] for name in fused if name.endswith(("RMSNorm", "MLP", "Attention"))} == {
        "RMSNorm", "MLP", "Attention",
    }  # fmt: skip
    (logits, grads), (own_logits, own_grads) = results
    torch.testing.assert_close(own_logits, logits, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(own_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # The functions that others call in this process are Transformers' own.
    module = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    assert module.apply_rotary_pos_emb is not apply_rotary
