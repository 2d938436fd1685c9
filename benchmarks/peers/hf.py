"""A Transformers model with another stack's kernels, adapters and loss in it, ready to be recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from benchmarks.peers.kernels import FusedLora, FusedMlpLora, FusedRope, FusedSwiglu, RmsNorm
from benchmarks.peers.linear import Dense, Linear4bit, LoraLinear
from benchmarks.peers.losses import head_loss
from benchmarks.peers.setup import ALL_LINEARS, Setup
from benchmarks.peers.unmapped import Unmapped
from sft_dist.data.batch import MicroBatch
from sft_dist.model.cpu_attention import packed_attention
from sft_dist.sharding.activation_checkpointing import ATTENTION, PRODUCTS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RECORDED_LAYERS = 3


def _attention(name: str) -> Any:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
        scaling: float | None = None, seq_lens: tuple[int, ...] = (), compute: torch.dtype = torch.bfloat16, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if name == "eager":
            return _eager(query, key, value, scale, seq_lens), None
        if (
            name in ("sdpa", "flash repeated") and key.shape[1] != query.shape[1]
        ):  # heads that are shared are copied out
            key, value = (_repeated(t, query.shape[1] // t.shape[1]) for t in (key, value))
        if name.startswith("flash") and query.dtype == torch.float32:
            query, key, value = (t.to(compute) for t in (query, key, value))
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        out, _lse = packed_attention(q, k, v, seq_lens, scale, 0)
        return out.unsqueeze(0), None

    return attend


def _repeated(heads: Tensor, times: int) -> Tensor:
    return heads[:, :, None].expand(-1, -1, times, -1, -1).reshape(1, -1, *heads.shape[2:])


def _eager(query: Tensor, key: Tensor, value: Tensor, scale: float, seq_lens: tuple[int, ...]) -> Tensor:
    """Transformers' ``eager_attention_forward``: scores, mask, fp32 softmax and its cast are tensors."""
    rows, length = len(seq_lens), seq_lens[0]
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = _repeated(key, times), _repeated(value, times)
    q, k, v = (t[0].unflatten(1, (rows, length)).transpose(0, 1) for t in (query, key, value))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = scores + scores.new_empty(rows, 1, length, length)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = torch.matmul(probabilities, v).transpose(1, 2).contiguous()
    return out.flatten(0, 1).unsqueeze(0)


# Transformers takes a name that has "flash" or "sdpa" in it for one of its own.
REGISTERED = {"flash": "peer_kept", "flash repeated": "peer_copied", "sdpa": "peer_repeated", "eager": "peer_scores"}
for _kind, _name in REGISTERED.items():
    AttentionInterface.register(_name, _attention(_kind))


class PeerModel(nn.Module):
    """Forward returns the loss that backward starts from."""

    def __init__(self, causal_lm: Any, setup: Setup) -> None:
        super().__init__()
        self.hf, self.setup = causal_lm, setup

    def blocks(self) -> dict[str, nn.Module]:
        kinds = set(self.hf._no_split_modules or ())
        return {name: module for name, module in self.named_modules() if type(module).__name__ in kinds}

    def forward(self, batch: MicroBatch) -> Tensor:
        setup = self.setup
        mixed = torch.autocast("cpu", DTYPES[setup.autocast]) if setup.autocast else nullcontext()
        with mixed:
            output = self.hf.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, seq_lens=batch.seq_lens,
                compute=DTYPES[setup.autocast or ("bf16" if setup.weights == "fp32" else setup.weights)],
            )  # fmt: skip
            head = self.hf.get_output_embeddings()
            hidden = output.last_hidden_state
            if not setup.autocast and hidden.dtype != head.weight.dtype:
                hidden = hidden.to(head.weight.dtype)
            del output
            return head_loss(
                setup.loss, head, hidden, batch.labels, outputs_to_fp32=bool(setup.autocast), rows=len(batch.seq_lens)
            )


def hf_model(setup: Setup) -> tuple[PeerModel, tuple[int, ...]]:
    """The model with a few of its layers on the meta device, and for each real one the index of its like."""
    config = dict(setup.config)
    kind = config.pop("model_type")
    config.pop("layer_types", None)
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    count, config[layers] = config[layers], RECORDED_LAYERS
    built = AutoConfig.for_model(kind, **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            built, dtype=DTYPES[_compute(setup)], attn_implementation=REGISTERED[setup.attention]
        )
    model.requires_grad_(setup.method == "full")
    peer = PeerModel(model, setup)
    blocks = list(peer.blocks().values())
    if len(blocks) != RECORDED_LAYERS:
        raise Unmapped(f"architecture {kind}: its layers are not found")
    _linears(blocks, setup)
    if setup.method == "lora" and not any(isinstance(m, LoraLinear) for m in model.modules()):
        raise Unmapped(f"architecture {kind}: it has none of the LoRA targets")
    _kernels(model, setup)
    if setup.upcast_rest:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and (setup.upcast_rest == "all" or "norm" in name):
                parameter.data = parameter.data.to(torch.float32)
    if setup.method != "full" and setup.reentrant and setup.checkpointing == "full":
        # Transformers' enable_input_require_grads, which reentrant checkpoints need.
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    _checkpoint(blocks, setup)
    return peer, (0, *[1] * (count - 2), 2)


def _compute(setup: Setup) -> str:
    """In what a module sees its own parameters: sharded ones arrive cast, autocast casts for itself."""
    if setup.sharding.startswith(("fsdp", "zero")) and setup.stored == "fp32" and setup.weights == "fp32":
        return "bf16"
    return setup.weights


def _linears(blocks: list[nn.Module], setup: Setup) -> None:
    compute = DTYPES["bf16" if setup.weights == "fp32" else setup.weights]
    for block in blocks:
        for name, module in [*block.named_modules()]:
            if not isinstance(module, nn.Linear):
                continue
            base: nn.Module = module
            if setup.quant:
                base = Linear4bit(
                    module.in_features, module.out_features, nested=setup.quant == "nf4-dq", compute_dtype=compute,
                    bias=module.bias is not None, keeps_input=setup.keeps_inputs,
                )  # fmt: skip
            elif setup.lora_kernel == "fused":
                module.__class__ = Dense
            named = name.rpartition(".")[2] in setup.targets or setup.targets == ALL_LINEARS
            if setup.method == "lora" and named:
                base = LoraLinear(base, r=setup.r, dropout=setup.dropout, dtype=DTYPES[setup.adapters])
            if base is not module:
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, base)


def _kernels(model: Any, setup: Setup) -> None:
    if setup.norm == "fused":
        for name, module in [*model.named_modules()]:
            if type(module).__name__.endswith("RMSNorm"):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, RmsNorm(module.weight))
    for module in model.modules():
        if setup.mlp == "fused" and hasattr(module, "gate_proj") and hasattr(module, "down_proj"):
            module.forward = _fused_mlp(module)
        if setup.lora_kernel == "fused":
            if all(isinstance(getattr(module, n, None), LoraLinear) for n in ("gate_proj", "up_proj", "down_proj")):
                module.forward = _fused_mlp_lora(module)
            names = [n for n in ("q_proj", "k_proj", "v_proj") if hasattr(module, n)]
            if len(names) == 3 and all(isinstance(getattr(module, n), LoraLinear) for n in names):
                _share_product(module, names)
                if isinstance(module.o_proj, LoraLinear):
                    module.o_proj.forward = _alone(module.o_proj)


def _fused_mlp(module: Any) -> Any:
    return lambda x: module.down_proj(FusedSwiglu.apply(module.gate_proj(x), module.up_proj(x)))


def _weights(layers: list[Any]) -> list[Tensor]:
    return [w for layer in layers for w in (layer.lora_A.weight, layer.lora_B.weight)]


def _fused_mlp_lora(module: Any) -> Any:
    layers = [module.gate_proj, module.up_proj, module.down_proj]
    return lambda x: FusedMlpLora.apply(x, layers, *_weights(layers))


def _share_product(module: Any, names: list[str]) -> None:
    """The three projections are one function of one input: the first call computes, the others take what is theirs."""
    layers = [getattr(module, n) for n in names]
    waiting: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        waiting[:] = FusedLora.apply(x, layers, *_weights(layers))
        return waiting.pop(0)

    layers[0].forward = first
    for layer in layers[1:]:
        layer.forward = lambda _x: waiting.pop(0)


def _alone(layer: Any) -> Any:
    return lambda x: FusedLora.apply(x, [layer], *_weights([layer]))[0]


def _checkpoint(blocks: list[nn.Module], setup: Setup) -> None:
    if setup.checkpointing == "none":
        return
    for block in blocks:
        if setup.checkpointing == "selective":
            block.forward = _wrapped(block.forward, reentrant=False, context_fn=every_second_product)
        else:
            block.forward = _wrapped(block.forward, reentrant=setup.reentrant)


def every_second_product() -> tuple[Any, Any]:
    """torchtitan's ``selective`` with ``op``: attention's results stay, and those of the first, third, ... product."""
    seen = {False: 0, True: 0}

    def policy(context: SelectiveCheckpointContext, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op in PRODUCTS:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _wrapped(forward: Any, *, reentrant: bool, **options: Any) -> Any:
    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if reentrant:
            return checkpoint(lambda h: forward(h, *args, **kwargs), hidden_states, use_reentrant=True)
        return checkpoint(forward, hidden_states, *args, use_reentrant=False, **options, **kwargs)

    return run


@contextmanager
def rope_in_place(model: nn.Module, setup: Setup) -> Iterator[None]:
    """Within it the rotary function of the model's module is the fused one."""
    module = sys.modules[type(model.hf).__module__] if isinstance(model, PeerModel) else None
    before = getattr(module, "apply_rotary_pos_emb", None)
    if setup.rope != "fused" or module is None or before is None:
        yield
        return

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return FusedRope.apply(q, cos, sin), FusedRope.apply(k, cos, sin)

    module.apply_rotary_pos_emb = rotate
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = before
