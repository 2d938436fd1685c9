"""lit-gpt's own model, adapters and LoRA: Lightning-AI/lit-gpt 8641822 of 2023-10, ``lit_gpt/{model,lora,adapter}.py``.

One module serves several architectures: query, key and value are one product, and rotated heads are put together again
with ``torch.cat``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.linear import Linear4bit
from benchmarks.peers.losses import head_loss
from benchmarks.peers.setup import Setup
from benchmarks.peers.unmapped import Unmapped
from sft_dist.data.batch import MicroBatch
from sft_dist.model.cpu_attention import packed_attention

RECORDED_LAYERS = 3
ADAPTER_PROMPT, ADAPTER_START = 10, 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape:
    """A Transformers configuration in lit-gpt's words."""

    def __init__(self, config: dict[str, Any]) -> None:
        kind = config["model_type"]
        if kind not in ("llama", "gpt_neox", "phi", "falcon"):
            raise Unmapped(f"lit-gpt model of type {kind}")
        self.width, self.layers = config["hidden_size"], config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.groups = config.get("num_kv_heads") or config.get("num_key_value_heads") or self.heads
        self.head_size = self.width // self.heads
        self.llama = kind == "llama"
        self.inner = config.get("intermediate_size") or 4 * self.width
        self.parallel = kind in ("phi", "falcon") or bool(config.get("use_parallel_residual"))
        self.shared_norm = kind == "phi"
        self.bias = kind in ("gpt_neox", "phi")
        rotary = config.get("rotary_pct") or config.get("partial_rotary_factor") or 1.0
        self.rotary = int(rotary * self.head_size)
        multiple = 64 if self.llama else 512 if kind == "falcon" else 256 if kind == "gpt_neox" else 512
        self.vocabulary = -(-config["vocab_size"] // multiple) * multiple if not self.llama else config["vocab_size"]
        self.context = config.get("max_position_embeddings") or 2048


class RmsNorm(nn.Module):
    """In fp32 throughout, and cast at the end."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        norm = torch.mean(x * x, dim=-1, keepdim=True)
        x = x * torch.rsqrt(norm + 1e-5)
        return (self.weight * x).to(dtype)


class AdapterLinear(nn.Module):
    """adapter_v2: ``scale * (linear(x) + bias)``, both of which train."""

    def __init__(self, linear: nn.Module, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.adapter_bias = nn.Parameter(torch.empty(out_features, dtype=dtype))
        self.adapter_scale = nn.Parameter(torch.empty(out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter_scale * (self.linear(x) + self.adapter_bias)


class QkvLora(nn.Module):
    """``MergedLinear`` with query and value enabled: one A for both, B as a grouped convolution, zeros for the key."""

    def __init__(self, linear: nn.Module, shape: Shape, setup: Setup, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.dropout = linear, setup.dropout
        self.kv = shape.groups * shape.head_size
        self.out = shape.width + 2 * self.kv
        self.r = setup.r
        self.lora_A = nn.Parameter(torch.empty(2 * setup.r, shape.width, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(shape.width + self.kv, setup.r, dtype=dtype))
        self.query = shape.width
        self.register_buffer("index", torch.empty(shape.width + self.kv, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        plain = self.linear(x)
        dropped = torch.native_dropout(x, self.dropout, True)[0] if self.dropout else x
        after_a = F.linear(dropped, self.lora_A).transpose(-2, -1)
        first, second = after_a.split(self.r, dim=1)
        weights = self.lora_B.split((self.query, self.kv))
        if self.query == self.kv:
            after_b = F.conv1d(after_a, self.lora_B.unsqueeze(-1), groups=2)
        else:
            parts = [F.conv1d(a, b.unsqueeze(-1)) for a, b in zip((first, second), weights, strict=True)]
            after_b = torch.cat(parts, dim=1)
        flat = after_b.transpose(-2, -1)
        padded = x.new_zeros(*flat.shape[:-1], self.out).view(-1, self.out)
        padded = padded.index_copy(1, self.index, flat.reshape(-1, self.query + self.kv))
        return plain + padded.view(*flat.shape[:-1], self.out) * 2.0


class Attention(nn.Module):
    def __init__(self, shape: Shape, make: Any, setup: Setup, *, prompt: bool) -> None:
        super().__init__()
        self.shape = shape
        dtype = DTYPES[setup.weights]
        out = (shape.heads + 2 * shape.groups) * shape.head_size
        attn = make(shape.width, out)
        self.attn = QkvLora(attn, shape, setup, dtype) if setup.method == "lora" else attn
        self.proj = make(shape.width, shape.width)
        self.prompt = prompt
        if prompt:
            self.adapter_wte = nn.Parameter(torch.empty(ADAPTER_PROMPT, shape.width, dtype=dtype))
            self.gating_factor = nn.Parameter(torch.empty(1, 1, shape.heads, 1, dtype=dtype))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seq_lens: tuple[int, ...]) -> Tensor:
        shape = self.shape
        tokens = x.shape[1]
        per_group = shape.heads // shape.groups
        qkv = self.attn(x).view(1, tokens, shape.groups, per_group + 2, shape.head_size).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((per_group, 1, 1), dim=2)
        if shape.groups != shape.heads:
            k = k.expand(1, shape.groups, per_group, tokens, shape.head_size)
            v = v.expand(1, shape.groups, per_group, tokens, shape.head_size)
        q, k, v = (t.reshape(1, -1, tokens, shape.head_size) for t in (q, k, v))
        rotated = [_rope(t[..., : shape.rotary], cos, sin) for t in (q, k)]
        q, k = (torch.cat((r, t[..., shape.rotary :]), dim=-1) for r, t in zip(rotated, (q, k), strict=True))
        heads = [t[0].transpose(0, 1) for t in (q, k, v)]
        y, _ = packed_attention(*heads, seq_lens, shape.head_size**-0.5, 0)
        y = y.unsqueeze(0)
        if self.prompt:
            y = y + self._prompted(q).transpose(1, 2) * self.gating_factor
        return self.proj(y.reshape(1, tokens, shape.width))

    def _prompted(self, q: Tensor) -> Tensor:
        """Attention to the adapter's prompt: unmasked, with an all-true mask, so that scores are tensors."""
        shape = self.shape
        keys = self.attn(self.adapter_wte.reshape(1, ADAPTER_PROMPT, shape.width))
        keys = keys.view(1, ADAPTER_PROMPT, shape.groups, -1, shape.head_size).permute(0, 2, 3, 1, 4)
        per_group = shape.heads // shape.groups
        _, ak, av = keys.split((per_group, 1, 1), dim=2)
        ak, av = (t.expand(1, shape.groups, per_group, ADAPTER_PROMPT, shape.head_size) for t in (ak, av))
        ak, av = (t.reshape(-1, ADAPTER_PROMPT, shape.head_size).transpose(0, 1) for t in (ak, av))
        out, _ = _short_attention(q[0].transpose(0, 1), ak, av)
        return out.transpose(0, 1).unsqueeze(0)


def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    out = PromptAttention.apply(q, k, v)
    return out, None


class PromptAttention(torch.autograd.Function):
    """The memory-efficient kernel, which an explicit mask selects: keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (rotated * sin)).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, shape: Shape, make: Any) -> None:
        super().__init__()
        self.fc_1 = make(shape.width, shape.inner)
        self.fc_2 = make(shape.width, shape.inner) if shape.llama else None
        self.proj = make(shape.inner, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.fc_2 is None:
            return self.proj(F.gelu(self.fc_1(x)))
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class LitBlock(nn.Module):
    def __init__(self, shape: Shape, make: Any, norm: Any, setup: Setup, *, prompt: bool) -> None:
        super().__init__()
        self.shape = shape
        self.norm_1 = norm()
        self.norm_2 = None if shape.shared_norm else norm()
        self.attn = Attention(shape, make, setup, prompt=prompt)
        self.mlp = Mlp(shape, make)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seq_lens: tuple[int, ...]) -> Tensor:
        first = self.norm_1(x)
        h = self.attn(first, cos, sin, seq_lens)
        if self.shape.parallel:
            second = first if self.norm_2 is None else self.norm_2(x)
            return self.mlp(second) + h + x
        x = h + x
        return self.mlp(self.norm_2(x)) + x


class LitModel(nn.Module):
    """Forward returns the loss that backward starts from."""

    def __init__(self, setup: Setup, shape: Shape) -> None:
        super().__init__()
        self.setup = setup
        dtype = DTYPES[setup.weights]

        def make(inside: int, out: int, *, quantise: bool = True) -> nn.Module:
            bias = shape.bias
            layer: nn.Module = nn.Linear(inside, out, bias=bias, dtype=dtype)
            if setup.quant and quantise:
                layer = Linear4bit(
                    inside, out, nested=setup.quant == "nf4-dq", compute_dtype=dtype, bias=bias,
                    keeps_input=setup.keeps_inputs,
                )  # fmt: skip
            return AdapterLinear(layer, out, dtype) if setup.method == "adapter_v2" else layer

        def norm() -> nn.Module:
            return RmsNorm(shape.width, dtype) if shape.llama else nn.LayerNorm(shape.width, dtype=dtype)

        prompts = setup.method.startswith("adapter")
        self.wte = nn.Embedding(shape.vocabulary, shape.width, dtype=dtype)
        self.h = nn.ModuleList(
            LitBlock(shape, make, norm, setup, prompt=prompts and i > 0) for i in range(RECORDED_LAYERS + prompts)
        )
        self.ln_f = norm()
        self.lm_head = make(shape.width, shape.vocabulary)
        self.register_buffer("cos", torch.empty(shape.context, shape.rotary, dtype=dtype), persistent=False)
        self.register_buffer("sin", torch.empty(shape.context, shape.rotary, dtype=dtype), persistent=False)

    def blocks(self) -> dict[str, nn.Module]:
        return {f"h.{i}": block for i, block in enumerate(self.h)}

    def forward(self, batch: MicroBatch) -> Tensor:
        tokens = batch.num_tokens
        repeats = len(batch.seq_lens)
        cos, sin = (t[: batch.seq_lens[0]].repeat(repeats, 1) for t in (self.cos, self.sin))
        x = self.wte(batch.input_ids)
        for block in self.h:
            x = block(x, cos, sin, batch.seq_lens)
        assert tokens == x.shape[1]
        converted = not self.setup.sharding.startswith("fsdp")
        return head_loss("litgpt", self.lm_head, self.ln_f(x), batch.labels, outputs_to_fp32=converted, rows=repeats)


def litgpt_model(setup: Setup) -> tuple[LitModel, tuple[int, ...]]:
    """The model with a few of its layers on the meta device, and for each real one the index of its like.

    Adapters begin at the third layer: before it nothing has a gradient, so that the first one there is of its own kind.
    """
    shape = Shape(setup.config)
    with torch.device("meta"):
        model = LitModel(setup, shape)
    trained = {"lora": ("lora_",), "adapter": ("adapter_wte", "gating_factor"), "full": ("",)}.get(
        setup.method, ("adapter_", "gating_factor", "norm_1", "norm_2", "ln_f")
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    if setup.checkpointing != "none":
        for block in model.h:
            run = block.forward
            block.forward = lambda *args, run=run: checkpoint(run, *args, use_reentrant=False)
    if setup.method.startswith("adapter"):
        return model, (0, 0, 1, *[2] * (shape.layers - 4), 3)
    return model, (0, *[1] * (shape.layers - 2), 2)
