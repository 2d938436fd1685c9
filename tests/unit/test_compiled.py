"""Norm, gated product and rotary embedding as Inductor compiles them: the same numbers, once for any number of tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from sft_dist.errors import ConfigError
from sft_dist.model.compiled import COMPILED, compile_fused, use_compiled
from sft_dist.model.fused import EAGER, fuse
from sft_dist.plan.cache import cached_trace
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells

CPU = torch.device("cpu")
HIDDEN, WIDE, HEADS, SIZE = 24, 40, 3, 8


def inputs(name: str, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(tokens)

    def of(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight = of(1, tokens, HIDDEN), of(HIDDEN)
    if name == "norm":
        return x, weight, 1e-6
    if name.startswith("norm"):
        return of(1, tokens, HIDDEN), x, weight, EAGER.norm(x, weight, 1e-6)[1]
    if name.startswith("gated"):
        return tuple(of(1, tokens, WIDE) for _ in range(3 if name == "gated_grads" else 2))
    return of(1, tokens, HEADS, SIZE).transpose(1, 2), of(1, 1, tokens, SIZE), of(1, 1, tokens, SIZE)


def tuples(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", EAGER._fields)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_each_computes_what_the_operators_one_by_one_do(name: str, dtype: torch.dtype, limit: float) -> None:
    for tokens in (7, 33, 1):
        given = inputs(name, tokens, dtype)
        expected, found = (tuples(getattr(kind, name)(*given)) for kind in (EAGER, COMPILED))
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
            assert float((ours.float() - theirs.float()).norm()) <= limit * float(theirs.float().norm())


@pytest.mark.parametrize("name", ["norm", "norm_input_grad", "gated", "gated_grads", "rotated", "rotated_grad"])
def test_a_trace_is_told_the_shapes_that_come(name: str) -> None:
    operator = getattr(COMPILED, name)
    keywords = getattr(operator, "keywords", {})
    torch.library.opcheck(
        getattr(operator, "func", operator), inputs(name, 7, torch.float32), keywords,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def llama_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config: Any = CONFIG_MAPPING["llama"](
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=1, head_dim=SIZE, max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def test_a_model_is_compiled_before_its_first_step_and_never_again() -> None:
    """Whatever its first batch was: a kernel made for one number of tokens may add up otherwise than one for another."""
    model, plain = llama_of(), llama_of()
    fuse(plain)
    compile_fused(model, CPU, torch.float32)
    kinds = [kind for kind in (type(module) for module in model.modules()) if "arithmetic" in vars(kind)]
    assert len(kinds) == 2 * 4 + 1, "two norms, an MLP and an attention a layer, and the last norm"
    assert all(vars(kind)["arithmetic"] is COMPILED for kind in kinds)
    first = torch.arange(12)[None] % 64
    model(input_ids=first, labels=first).loss.backward()  # rotary embedding: elementwise alone
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 200, 5000):
            ids = torch.arange(tokens)[None] % 64
            model.zero_grad()
            plain.zero_grad()
            losses = [each(input_ids=ids, labels=ids).loss for each in (model, plain)]
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_norms_and_gates_need_no_compilation_in_the_first_step() -> None:
    config = LlamaConfig(hidden_size=WIDE, intermediate_size=56, num_attention_heads=4)
    model = nn.Sequential(llama.LlamaRMSNorm(WIDE, eps=1e-5), llama.LlamaMLP(config))
    compile_fused(model, CPU, torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(torch.randn(1, 9, WIDE, requires_grad=True)).sum().backward()


def test_a_model_without_such_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: true, but the model has no norm"):
        use_compiled(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_without_a_compiler(tmp_path: Path) -> None:
    code = (
        "import torch; from torch import nn; from transformers.models.llama.modeling_llama import LlamaRMSNorm; "
        "from sft_dist.model.compiled import compile_fused; from sft_dist.errors import MachineError\n"
        "try: compile_fused(nn.Sequential(LlamaRMSNorm(8)), torch.device('cpu'), torch.float32)\n"
        "except MachineError as error: print(error.on_all_ranks, error)"
    )
    env = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    what, fix = out.splitlines()
    assert what.startswith("True train.compile: norms and gates cannot be compiled here: InvalidCxxCompiler")
    assert fix == "  fix: install a C++ compiler (apt-get install g++), or set train.compile: false"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_plan_sees_one_operator_for_each(tiny_base: Path, method: str) -> None:
    """What is kept for backward is the same; what is read and written is less."""
    eager, compiled = (
        cached_trace(resolve(cells.config(str(tiny_base), method, train={"compile": value}), WorldShape(1, 1)))
        for value in (False, True)
    )
    assert compiled.kept_bytes == eager.kept_bytes
    moved, kernels = (
        [sum(getattr(s.work, what) for s in tape.segments()) for tape in (eager, compiled)]
        for what in ("moved_bytes", "kernels")
    )
    assert moved[1] < 0.8 * moved[0]
    assert kernels[1] < 0.8 * kernels[0]
