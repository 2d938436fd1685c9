"""torchtune's own model: ``torchtune/modules/{transformer,attention,position_embeddings,rms_norm,feed_forward}.py`` and
``modules/peft/lora.py`` of 0.4 to 0.6, eager and as torch.compile makes of each layer.

Norms and rotary angles are computed in fp32; shared key and value heads are copied out; 4-bit weights are torchao's,
whose codes are looked up with int64 indices where nothing is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.kernels import FusedRope
from benchmarks.peers.linear import Linear4bit
from benchmarks.peers.losses import head_loss
from benchmarks.peers.setup import Setup
from sft_dist.data.batch import MicroBatch
from sft_dist.model.cpu_attention import packed_attention

RECORDED_LAYERS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Model types that this module is; others are recorded from Transformers' modules.
MODEL_TYPES = ("llama", "mistral", "qwen2")


class CompiledRmsNorm(Function):
    """Inductor keeps the input as it came and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class CompiledSwiglu(Function):
    """Inductor keeps both products and computes the activation again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.empty_like(gate), torch.empty_like(up)


class RmsNorm(nn.Module):
    def __init__(self, width: int, setup: Setup) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width, dtype=DTYPES[setup.weights]))
        self.compiled = setup.compiled

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled:
            return CompiledRmsNorm.apply(x, self.scale)
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
        return normed * self.scale


class Nf4Linear(Linear4bit):
    """torchao's ``NF4Tensor``: eager dequantisation holds the int64 index of each weight."""

    compiled = False

    def dequantize(self, like: Tensor) -> Tensor:
        if self.compiled:
            return super().dequantize(like)
        half = self.out_features * self.in_features // 2
        first, second = (like.new_empty(half, dtype=torch.int64) for _ in range(2))
        looked_up = [like.new_empty(half) for _ in (first, second)]
        scales = like.new_empty(half)
        scaled = [x * scales for x in looked_up]
        return torch.stack(scaled, dim=-1).view(self.out_features, self.in_features)


class LoraLinear(nn.Module):
    """``LoRALinear``: adapters in the dtype of the base."""

    def __init__(self, base: nn.Module, inside: int, out: int, setup: Setup) -> None:
        super().__init__()
        self.base, self.dropout = base, setup.dropout
        dtype = DTYPES[setup.adapters]
        self.lora_a = nn.Linear(inside, setup.r, bias=False, dtype=dtype)
        self.lora_b = nn.Linear(setup.r, out, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        plain = self.base(x)
        seen = torch.native_dropout(x, self.dropout, True)[0] if self.dropout else x
        return plain + 2.0 * self.lora_b(self.lora_a(seen))


def linear(name: str, inside: int, out: int, setup: Setup, *, bias: bool = False) -> nn.Module:
    """A layer with whatever the method puts into it; of a quantised model every one inside a layer is 4-bit."""
    dtype = DTYPES[setup.weights]
    base: nn.Module
    if setup.quant:
        base = Nf4Linear(inside, out, nested=True, compute_dtype=dtype, bias=bias)
        base.compiled = setup.compiled
    else:
        base = nn.Linear(inside, out, bias=bias, dtype=dtype)
    return LoraLinear(base, inside, out, setup) if name in setup.targets else base


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any], setup: Setup) -> None:
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_size = config.get("head_dim") or width // self.heads
        self.compiled = setup.compiled
        q, kv, bias = self.heads * self.head_size, self.kv_heads * self.head_size, config["model_type"] == "qwen2"
        self.q_proj = linear("q_proj", width, q, setup, bias=bias)
        self.k_proj = linear("k_proj", width, kv, setup, bias=bias)
        self.v_proj = linear("v_proj", width, kv, setup, bias=bias)
        self.output_proj = linear("o_proj", q, width, setup)

    def forward(self, x: Tensor, batch: MicroBatch, cache: Tensor) -> Tensor:
        tokens = x.shape[1]
        q = self._rotated(self.q_proj(x).view(1, tokens, self.heads, self.head_size), batch, cache)
        k, v = (p(x).view(1, tokens, self.kv_heads, self.head_size) for p in (self.k_proj, self.v_proj))
        k = self._rotated(k, batch, cache)
        if self.heads != self.kv_heads:
            per_head = self.heads // self.kv_heads
            k, v = (
                t.unsqueeze(3).expand(-1, -1, -1, per_head, -1).reshape(1, tokens, self.heads, self.head_size)
                for t in (k, v)
            )
        out, _ = packed_attention(q[0], k[0], v[0], batch.seq_lens, self.head_size**-0.5, 0)
        return self.output_proj(out.view(1, tokens, -1))

    def _rotated(self, x: Tensor, batch: MicroBatch, cache: Tensor) -> Tensor:
        if self.compiled:
            return FusedRope.apply(x, cache, cache)
        angles = cache[batch.position_ids].view(-1, x.shape[1], 1, self.head_size // 2, 2)
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        turned = torch.stack(
            [
                pairs[..., 0] * angles[..., 0] - pairs[..., 1] * angles[..., 1],
                pairs[..., 1] * angles[..., 0] + pairs[..., 0] * angles[..., 1],
            ],
            -1,
        )
        return turned.flatten(3).type_as(x)


class FeedForward(nn.Module):
    def __init__(self, config: dict[str, Any], setup: Setup) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.w1 = linear("gate_proj", width, inner, setup)
        self.w2 = linear("down_proj", inner, width, setup)
        self.w3 = linear("up_proj", width, inner, setup)
        self.compiled = setup.compiled

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled:
            return self.w2(CompiledSwiglu.apply(self.w1(x), self.w3(x)))
        h = F.silu(self.w1(x))
        h = h * self.w3(x)
        return self.w2(h)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], setup: Setup) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, setup), FeedForward(config, setup)
        self.sa_norm, self.mlp_norm = (RmsNorm(config["hidden_size"], setup) for _ in range(2))

    def forward(self, x: Tensor, batch: MicroBatch, cache: Tensor) -> Tensor:
        h = self.attn(self.sa_norm(x), batch, cache) + x
        return h + self.mlp(self.mlp_norm(h))


class TuneModel(nn.Module):
    """Forward returns the loss that backward starts from."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        config, dtype = setup.config, DTYPES[setup.weights]
        self.setup = setup
        width, vocabulary = config["hidden_size"], config["vocab_size"]
        self.tok_embeddings = nn.Embedding(vocabulary, width, dtype=dtype)
        self.layers = nn.ModuleList(Layer(config, setup) for _ in range(RECORDED_LAYERS))
        self.norm = RmsNorm(width, setup)
        self.norm.compiled = False  # only the layers are compiled
        self.output = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        if config.get("tie_word_embeddings"):
            self.output.weight = self.tok_embeddings.weight
        head = config.get("head_dim") or width // config["num_attention_heads"]
        context = config.get("max_position_embeddings") or 4096
        self.register_buffer("cache", torch.empty(context, head // 2, 2, dtype=torch.float32), persistent=False)

    def blocks(self) -> dict[str, nn.Module]:
        return {f"layers.{i}": block for i, block in enumerate(self.layers)}

    def forward(self, batch: MicroBatch) -> Tensor:
        h = self.tok_embeddings(batch.input_ids)
        for layer in self.layers:
            h = layer(h, batch, self.cache)
        h = self.norm(h)
        return head_loss(self.setup.loss, self.output, h, batch.labels, outputs_to_fp32=False, rows=len(batch.seq_lens))


def torchtune_model(setup: Setup) -> tuple[TuneModel, tuple[int, ...]]:
    """The model with a few of its layers on the meta device, and for each real one the index of its like."""
    with torch.device("meta"):
        model = TuneModel(setup)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(setup.method == "full" or "lora_" in name)
    if setup.checkpointing != "none":
        for block in model.layers:
            block.forward = _checkpointed(block.forward)
    return model, (0, *[1] * (setup.config["num_hidden_layers"] - 2), 2)


def _checkpointed(forward: Any) -> Any:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)
