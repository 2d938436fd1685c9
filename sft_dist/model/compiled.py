"""The arithmetic of ``fused`` compiled by Inductor (``train.compile``): each of its operators is one sweep over memory.

An operator one by one reads its inputs from memory and writes its result back; a norm is some ten of them. Compiled,
values stay in registers from the first operator to the last, and in fp32: less is rounded than by torch's own.

Each is an operator of ``torch.library``, so that what looks at operators (a plan's trace, selective checkpointing, a
profile) sees one, and does not look into the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sft_dist.errors import ConfigError, MachineError
from sft_dist.model.fused import EAGER, Arithmetic, fuse

# Inductor chooses kernels by the sizes that it sees first. They are these in every run, whatever its first batch is: a
# resumed run must compute as the one that was not interrupted. For the same reason nothing is summed over tokens here.
FIRST_TOKENS = 1024

# Inductor makes another kernel of a dimension of 1; the few that have it (generation, a row at a time) go without.
LEAST_TOKENS = 2

# Shapes and strides for which one function is compiled, at most: those of norms of another width, of queries and of
# keys. Torch's own limit of 8 ends a run.
MOST_FORMS = 64


def compile_fused(model: nn.Module, device: torch.device, compute: torch.dtype) -> None:
    """Gives the model's fused modules the compiled arithmetic, and compiles it.

    Raises:
        ConfigError: as :func:`use_compiled`.
        MachineError: there is no compiler, or it fails.
    """
    use_compiled(model)
    try:
        for run in _first_calls(model, device, compute):
            run()
    except Exception as error:  # the compiler's, of many kinds
        what = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MachineError(
            f"train.compile: norms and gates cannot be compiled here: {what}",
            fix="install a C++ compiler (apt-get install g++), or set train.compile: false",
        ).everywhere() from error


def use_compiled(model: nn.Module) -> None:
    """Gives the model's fused modules the compiled arithmetic; each function is compiled at its first call.

    Raises:
        ConfigError: the model has no such modules.
    """
    if not fuse(model, COMPILED):
        raise ConfigError(
            "train.compile: true, but the model has no norm, gated product or rotary embedding of a known kind",
            fix="set train.compile: false",
        )


def _first_calls(model: nn.Module, device: torch.device, compute: torch.dtype) -> Iterator[Callable[[], object]]:
    """Calls that compile what the model needs of norms and gates, for any number of tokens."""
    norms, gates = set[tuple[int, float]](), set[int]()
    module: Any
    for module in model.modules():
        if getattr(type(module), "arithmetic", None) is not COMPILED:
            continue
        if hasattr(module, "variance_epsilon"):
            norms.add((module.weight.shape[0], module.variance_epsilon))
        elif hasattr(module, "gate_proj"):
            gates.add(module.gate_proj.out_features)

    def tokens(width: int) -> Tensor:
        return torch.zeros(FIRST_TOKENS, width, dtype=compute, device=device)

    for width, eps in sorted(norms):
        x, weight = tokens(width), torch.ones(width, dtype=compute, device=device)
        scale = torch.ones(FIRST_TOKENS, 1, device=device)
        yield partial(rms_norm, x, weight, eps)
        yield partial(rms_norm_input_grad, x, x, weight, scale)
    for width in sorted(gates):
        x = tokens(width)
        yield partial(swiglu, x, x)
        yield partial(swiglu_grads, x, x, x)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_FORMS)
    # One thread compiles: the functions are few and small, and workers would be processes beside each rank.
    return torch.compile(function, fullgraph=True, options={"compile_threads": 1, "deterministic": True})


def _run(function: Callable[..., Any], tokens_dim: int, *inputs: Any) -> Any:
    """The compiled function, which is compiled once for any number of tokens."""
    # It would be compiled anew for the other grad mode and for what requires a gradient: both are autograd's affair.
    detached = [each.detach() if isinstance(each, Tensor) else each for each in inputs]
    for each in detached:
        if isinstance(each, Tensor) and each.dim() > 1:
            torch._dynamo.maybe_mark_dynamic(each, tokens_dim)
    with torch.no_grad():
        return _compiled(function)(*detached)


def _of_tokens(name: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """The function of tensors [..., width] as [tokens, width].

    Args:
        name: of what computes the same one by one.
    """
    flat = [t.reshape(-1, t.shape[-1]) if isinstance(t, Tensor) and t.dim() > 1 else t for t in inputs]
    if flat[0].shape[0] < LEAST_TOKENS:
        return getattr(EAGER, name)(*flat)
    return _run(function, 0, *flat)


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def _input_grad(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    normal, g = x.float() * scale, grad.float() * weight.float()
    return ((g - normal * (g * normal).mean(-1, keepdim=True)) * scale).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


def _gated_grads(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, wide = grad.float(), gate.float()
    s = torch.sigmoid(wide)
    return (g * up.float() * s * (1 + wide * (1 - s))).to(gate.dtype), (g * wide * s).to(gate.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Forward: x cos + [-x2, x1] sin; back: x cos + [x2 sin2, -x1 sin1]."""
    (x1, x2), (sin1, sin2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    turned = torch.cat([x2 * sin2, -x1 * sin1] if back else [-x2 * sin1, x1 * sin2], dim=-1)
    return x * cos + turned


@torch.library.custom_op("sft_dist::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, scale = _of_tokens("norm", _norm, x, weight, eps)
    return y.view(x.shape), scale.view(*x.shape[:-1], 1)


@torch.library.custom_op("sft_dist::rms_norm_input_grad", mutates_args=())
def rms_norm_input_grad(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    result: Tensor = _of_tokens("norm_input_grad", _input_grad, grad, x, weight, scale).view(x.shape)
    return result


@torch.library.custom_op("sft_dist::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    result: Tensor = _of_tokens("gated", _gated, gate, up).view(gate.shape)
    return result


@torch.library.custom_op("sft_dist::swiglu_grads", mutates_args=())
def swiglu_grads(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = _of_tokens("gated_grads", _gated_grads, grad, gate, up)
    return grad_gate.view(gate.shape), grad_up.view(up.shape)


@torch.library.custom_op("sft_dist::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if x.shape[2] < LEAST_TOKENS:
        return EAGER.rotated_grad(x, cos, sin) if back else EAGER.rotated(x, cos, sin)
    result: Tensor = _run(_rotated, 2, x, cos, sin, back)
    return result


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@rms_norm_input_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@swiglu_grads.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x)


def _grads(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm_input_grad(grad, x, weight, scale), EAGER.norm_weight_grad(grad, x, weight, scale)


COMPILED = Arithmetic(
    norm=rms_norm,
    norm_input_grad=rms_norm_input_grad,
    norm_weight_grad=EAGER.norm_weight_grad,
    norm_grads=_grads,
    gated=swiglu,
    gated_grads=swiglu_grads,
    rotated=partial(rotary, back=False),
    rotated_grad=partial(rotary, back=True),
)
