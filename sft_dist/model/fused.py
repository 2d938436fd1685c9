"""RMSNorm, the gated product of an MLP and rotary embedding as one node of the graph each.

Forward does what Transformers' modules do, operator by operator; what they leave to autograd is written out: backward
has fewer operators, and less is kept for it. Per token of a Llama block with hidden size h and MLP size m, in bf16:

    RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)   its input, 2 h bytes, instead of 8 h; twice a block
    SwiGLU (Shazeer 2020, arXiv 2002.05202)               4 m bytes instead of 6 m: silu(gate) is computed again
    rotary embedding (Su et al. 2021, arXiv 2104.09864)   the same; a third of the operators

Modules are known by what their forward does, its bytecode, whatever their class is called: most families of
Transformers have Llama's three under names of their own, and one that differs keeps what it has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama


class Arithmetic(NamedTuple):
    """What the three compute. Each gradient takes the output's gradient first.

    Args:
        norm: x, weight, eps -> weight * x / rms(x) over the last dimension, and 1 / rms(x) [..., 1] in fp32.
        norm_input_grad: grad, x, weight, 1 / rms -> the gradient of x.
        norm_weight_grad: the same -> the gradient of weight.
        norm_grads: the same -> both.
        gated: gate, up -> silu(gate) * up.
        gated_grads: grad, gate, up -> the gradients of gate and up.
        rotated: x, cos, sin -> x cos + rotate_half(x) sin, where rotate_half([a, b]) = [-b, a].
        rotated_grad: grad, cos, sin -> the gradient of x.
    """

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_input_grad: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    norm_weight_grad: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    norm_grads: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gated: Callable[[Tensor, Tensor], Tensor]
    gated_grads: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rotated: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotated_grad: Callable[[Tensor, Tensor, Tensor], Tensor]


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def _norm_input_grad(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    normal = _normal(x, scale)
    return _through_norm((grad * weight).float(), normal, scale, x.dtype)


def _norm_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (grad.float() * _normal(x, scale)).flatten(0, -2).sum(0).to(weight.dtype)


def _norm_grads(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    normal = _normal(x, scale)
    product = grad.float() * normal
    grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
    wide = weight.float()
    share = product.mul_(wide).mean(-1, keepdim=True)
    return _through_norm(grad.float() * wide, normal, scale, x.dtype, share), grad_weight


def _normal(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale if x.dtype == torch.float32 else x.float().mul_(scale)


def _through_norm(g: Tensor, normal: Tensor, scale: Tensor, dtype: torch.dtype, share: Tensor | None = None) -> Tensor:
    """Of g, the gradient of the normalised input, that of the input; g is overwritten."""
    if share is None:
        share = (g * normal).mean(-1, keepdim=True)
    return g.addcmul_(normal, share, value=-1).mul_(scale).to(dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_grads(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_up = F.silu(gate) * grad
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), (sin1, sin2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    return _cos_and(x, cos, -1, x2, sin1, x1, sin2)


def _rotated_grad(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (g1, g2), (sin1, sin2) = grad.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    return _cos_and(grad, cos, 1, g2, sin2, g1, sin1)


def _cos_and(x: Tensor, cos: Tensor, sign: int, a: Tensor, sin_a: Tensor, b: Tensor, sin_b: Tensor) -> Tensor:
    """x cos + sign [a sin_a, -b sin_b]"""
    out = x * cos
    first, second = out.chunk(2, dim=-1)
    first.addcmul_(a, sin_a, value=sign)
    second.addcmul_(b, sin_b, value=-sign)
    return out


# Torch's operators one by one, those of Transformers' modules in forward.
EAGER = Arithmetic(
    _norm, _norm_input_grad, _norm_weight_grad, _norm_grads, _gated, _gated_grads, _rotated, _rotated_grad
)


class RmsNorm(torch.autograd.Function):
    """weight * x / rms(x) over the last dimension; the division is in fp32. Keeps x and 1 / rms(x) [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, arithmetic: Arithmetic) -> Tensor:
        y, scale = arithmetic.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.arithmetic = arithmetic
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        arithmetic: Arithmetic = ctx.arithmetic
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x and needs_weight:
            grad_x, grad_weight = arithmetic.norm_grads(grad, *ctx.saved_tensors)
        elif needs_weight:
            grad_weight = arithmetic.norm_weight_grad(grad, *ctx.saved_tensors)
        elif needs_x:
            grad_x = arithmetic.norm_input_grad(grad, *ctx.saved_tensors)
        return grad_x, grad_weight, None, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up; keeps both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.arithmetic = arithmetic
        return arithmetic.gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *ctx.arithmetic.gated_grads(grad, *ctx.saved_tensors), None


class Rotated(torch.autograd.Function):
    """x cos + rotate_half(x) sin, where rotate_half([a, b]) = [-b, a].

    Args:
        x: [batch, heads, t, d].
        cos, sin: [batch, 1, t, d] of the angles.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.arithmetic = arithmetic
        return arithmetic.rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.arithmetic.rotated_grad(grad, *ctx.saved_tensors), None, None, None


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, arithmetic: Arithmetic = EAGER
) -> tuple[Tensor, Tensor]:
    """In place of Transformers' ``apply_rotary_pos_emb``."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotated.apply(q, cos, sin, arithmetic), Rotated.apply(k, cos, sin, arithmetic)


def fuse(model: nn.Module, arithmetic: Arithmetic = EAGER) -> int:
    """Gives modules that do what Llama's do the forward above, and says how many there are.

    An object keeps its identity, parameters and hooks and changes its class, as ``fully_shard`` does it. A model that
    has been fused may be fused again, with another arithmetic.
    """
    number = 0
    for module in model.modules():
        kind = getattr(type(module), "unfused", type(module))
        forward = _forward_of(module, kind.forward, arithmetic)
        if forward is not None:
            own = {"forward": forward, "unfused": kind, "arithmetic": arithmetic, "__module__": kind.__module__}
            module.__class__ = type(kind.__name__, (kind,), own)
            number += 1
    return number


def _forward_of(module: nn.Module, forward: Any, arithmetic: Arithmetic) -> Any:
    if _same(forward, llama.LlamaRMSNorm.forward):
        return _norm_forward
    if _same(forward, llama.LlamaMLP.forward) and isinstance(getattr(module, "act_fn", None), type(_silu())):
        return _mlp_forward
    if not isinstance(forward, FunctionType) or "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return None
    rotary = forward.__globals__["apply_rotary_pos_emb"]
    if not _same(rotary, llama.apply_rotary_pos_emb):
        return None
    if not _same(rotary.__globals__["rotate_half"], llama.rotate_half):
        return None
    # The same code, with one global name of its own: others who use the module in this process keep theirs.
    scope = {**forward.__globals__, "apply_rotary_pos_emb": partial(apply_rotary, arithmetic=arithmetic)}
    own = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _silu() -> nn.Module:
    from transformers.activations import ACT2FN

    activation: nn.Module = ACT2FN["silu"]
    return activation


def _same(function: Any, other: Any) -> bool:
    """Whether both do the same: their code but for names of the file, docstrings and annotations."""
    ours, theirs = getattr(function, "__code__", None), other.__code__
    if ours is None:
        return False
    return all(getattr(ours, part) == getattr(theirs, part) for part in ("co_code", "co_names", "co_varnames")) and (
        _constants(ours) == _constants(theirs)
    )


def _constants(code: Any) -> list[Any]:
    return [constant for constant in code.co_consts if not isinstance(constant, str)]


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    result: Tensor = RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.arithmetic)
    return result


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(SwiGlu.apply(self.gate_proj(x), self.up_proj(x), self.arithmetic))
    return result
