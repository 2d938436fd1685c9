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

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama


class RmsNorm(torch.autograd.Function):
    """weight * x / rms(x) over the last dimension; the division is in fp32. Keeps x and 1 / rms(x) [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normal = x * scale if x.dtype == torch.float32 else x.float().mul_(scale)
        if not ctx.needs_input_grad[1]:
            g = (grad * weight).float()
            share = (g * normal).mean(-1, keepdim=True)
            return g.addcmul_(normal, share, value=-1).mul_(scale).to(x.dtype), None, None
        product = grad.float() * normal
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        wide = weight.float()
        share = product.mul_(wide).mean(-1, keepdim=True)
        g = grad.float() * wide
        return g.addcmul_(normal, share, value=-1).mul_(scale).to(x.dtype), grad_weight, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up; keeps both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate) * grad
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class Rotated(torch.autograd.Function):
    """x cos + rotate_half(x) sin, where rotate_half([a, b]) = [-b, a].

    Args:
        x: [batch, heads, t, d].
        cos, sin: [batch, 1, t, d] of the angles.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (x1, x2), (sin1, sin2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        return _cos_and(x, cos, -1, x2, sin1, x1, sin2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        (g1, g2), (sin1, sin2) = grad.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        return _cos_and(grad, cos, 1, g2, sin2, g1, sin1), None, None


def _cos_and(x: Tensor, cos: Tensor, sign: int, a: Tensor, sin_a: Tensor, b: Tensor, sin_b: Tensor) -> Tensor:
    """x cos + sign [a sin_a, -b sin_b]"""
    out = x * cos
    first, second = out.chunk(2, dim=-1)
    first.addcmul_(a, sin_a, value=sign)
    second.addcmul_(b, sin_b, value=-sign)
    return out


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """In place of Transformers' ``apply_rotary_pos_emb``."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotated.apply(q, cos, sin), Rotated.apply(k, cos, sin)


def fuse(model: nn.Module) -> None:
    """Gives modules that do what Llama's do the forward above.

    An object keeps its identity, parameters and hooks and changes its class, as ``fully_shard`` does it.
    """
    for module in model.modules():
        forward = _forward_of(module)
        if forward is not None:
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _forward_of(module: nn.Module) -> Any:
    forward = type(module).forward
    if _same(forward, llama.LlamaRMSNorm.forward):
        return _norm
    if _same(forward, llama.LlamaMLP.forward) and isinstance(getattr(module, "act_fn", None), type(_silu())):
        return _mlp
    if not isinstance(forward, FunctionType) or "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return None
    rotary = forward.__globals__["apply_rotary_pos_emb"]
    if not _same(rotary, llama.apply_rotary_pos_emb):
        return None
    if not _same(rotary.__globals__["rotate_half"], llama.rotate_half):
        return None
    # The same code, with one global name of its own: others who use the module in this process keep theirs.
    scope = {**forward.__globals__, "apply_rotary_pos_emb": apply_rotary}
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


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    result: Tensor = RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
    return result


def _mlp(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))
    return result
