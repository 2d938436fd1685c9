"""Builds the model a run trains, without its weights: base -> quantised -> adapters -> loss head, in that order.

The same function builds the model that describes a run and the one that is sharded, filled (``model/weights.py``) and
trained, so that the description cannot drift from the thing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sft_dist.config.schema import LoraMethod, MethodConfig, QloraMethod, QuantizationConfig, VirtualTokensMethod
from sft_dist.data.batch import MicroBatch
from sft_dist.errors import ConfigError
from sft_dist.model.adapters import add_lora, trained_parts
from sft_dist.model.attention import ATTENTION_NAME
from sft_dist.model.cpu_shapes import filled
from sft_dist.model.fused import fuse
from sft_dist.model.hub import model_folder
from sft_dist.model.int8 import Int8Linear
from sft_dist.model.loss import LossHead
from sft_dist.model.names import covered
from sft_dist.model.neftune import add_noise
from sft_dist.model.nf4 import NF4Linear
from sft_dist.model.prequantized import DENSE_FIX, StoredQuantization, stored_quantization
from sft_dist.model.quantized import QuantizedLinear
from sft_dist.model.row_cache import RowCache
from sft_dist.model.sequence_parallel import SequenceParallel
from sft_dist.model.spec import NO_TOKENS, Dtype, ModelSpec, Tokens
from sft_dist.model.support import load_model_config
from sft_dist.model.token_rows import train_token_rows
from sft_dist.model.virtual_tokens import LongRows, VirtualTokens, check_base, cut_off, put_before

QUANTIZED: dict[str, type[QuantizedLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BaseTensor:
    """A parameter or buffer that is in the base model's files.

    Args:
        names: that Transformers knows it by; several where it is tied.
        shape: of the weight in the files; one that is quantised there or in the model has another one, and a matrix
            that grew has more rows in the model.
        is_packed: it is quantised in the files.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    is_buffer: bool
    is_packed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class SftModel(nn.Module):
    """A causal language model whose forward returns its summed loss.

    Loss and trunk are one module because sharded strategies gather a weight only while the module that they wrap runs.

    Args:
        hf: the Transformers model, wrapped by PEFT when there are adapters; its ``lm_head`` is a ``LossHead``.
        base: the tensors that come from the base model's files, by their names here.
        prompt: what stands in front of every row, with a method of virtual tokens.

    Attributes:
        neftune_alpha: of the noise on the embeddings in training; None: there is none.
        token_multiple: what the tokens of a batch are filled up to a multiple of; see ``cpu_shapes``.
        sequence_group: the ranks that share the sequences of a micro-batch, set where some do; a micro-batch that is
            not split is computed by each rank alone in any case.
    """

    def __init__(self, hf: nn.Module, base: dict[str, BaseTensor], prompt: VirtualTokens | None = None) -> None:
        super().__init__()
        self.hf = hf
        self.base = base
        self.prompt = prompt
        self.sequence_group: dist.ProcessGroup | None = None
        self.neftune_alpha: float | None = None
        self.token_multiple = 1

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Transformers model, without PEFT's wrapper around it."""
        base = self.hf.get_base_model() if isinstance(self.hf, PeftModel) else self.hf
        assert isinstance(base, PreTrainedModel)
        return base

    def blocks(self) -> dict[str, nn.Module]:
        """The decoder blocks by name, first to last."""
        kinds = set(self.causal_lm._no_split_modules or ())
        return {name: module for name, module in self.named_modules() if type(module).__name__ in kinds}

    def forward(self, batch: MicroBatch, *, logits: bool = False, cache: RowCache | None = None) -> Tensor:
        """Sum of the losses of the batch's supervised tokens, an fp32 scalar; divide by their number yourself.

        Args:
            logits: return the [N, V] logits at the supervised positions instead.
            cache: is filled with the rows of the batch; or is filled, and the batch has the next token of each row.
        """
        if cache is None and self.prompt is None:
            batch = filled(batch, self.token_multiple)
        hidden = self.hidden_states(batch, cache).index_select(0, batch.supervised_index)
        result: Tensor = self.head(hidden) if logits else self.head(hidden, batch.labels)
        return result

    @property
    def head(self) -> LossHead:
        """The output layer."""
        head = self.causal_lm.get_output_embeddings()
        assert isinstance(head, LossHead)
        return head

    def hidden_states(self, batch: MicroBatch, cache: RowCache | None = None) -> Tensor:
        """[t, h] what the output layer reads, of the batch's own tokens that are here."""
        if self.prompt is None:
            return self._trunk(batch, cache, **self._tokens(batch), sequence_parallel=self._sequence_parallel(batch))
        if cache is not None and cache.is_filled:
            after_virtual = replace(batch, position_ids=batch.position_ids + self.prompt.count)
            return self._trunk(after_virtual, cache, **self._tokens(batch))
        # Called in here, because sharded strategies gather its weights while this module runs.
        if self.prompt.is_prefix:
            long_rows = LongRows.of(batch, self.prompt.count, with_virtual=False)
            return self._trunk(long_rows, cache, **self._tokens(batch), prefix=self.prompt.prefix())
        embeddings = put_before(self.prompt(), self._embeddings(batch), batch.seq_lens)
        long_rows = LongRows.of(batch, self.prompt.count, with_virtual=True)
        hidden = self._trunk(long_rows, cache, inputs_embeds=embeddings[None])
        return cut_off(hidden, self.prompt.count, long_rows.seq_lens)

    def _tokens(self, batch: MicroBatch) -> dict[str, Tensor]:
        """What the trunk reads: ids; embeddings where there is noise on them, in evaluation too, so that a rank that
        has nothing to train gathers weights in the same order as the others."""
        if self.neftune_alpha is None:
            return {"input_ids": batch.input_ids}
        return {"inputs_embeds": self._embeddings(batch)[None]}

    def _embeddings(self, batch: MicroBatch) -> Tensor:
        """[t, h], with noise in training."""
        embeddings: Tensor = self.causal_lm.get_input_embeddings()(batch.input_ids)[0]
        if self.neftune_alpha is None or not self.training:
            return embeddings
        rank = 0 if batch.split is None else dist.get_rank(self.sequence_group)
        return add_noise(embeddings, batch, alpha=self.neftune_alpha, rank_in_group=rank)

    def _trunk(self, rows: MicroBatch | LongRows, cache: RowCache | None, **inputs: Any) -> Tensor:
        """[t, h] for as many tokens as ``inputs`` have."""
        if cache is not None:
            cache.begin_pass(rows.seq_lens)
            inputs["row_cache"] = cache
        output = self.causal_lm.base_model(
            position_ids=rows.position_ids,
            use_cache=False,
            seq_lens=rows.seq_lens,
            max_seq_len=rows.max_seq_len,
            cu_seqlens=rows.cu_seqlens,
            **inputs,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _sequence_parallel(self, batch: MicroBatch) -> SequenceParallel | None:
        if batch.split is None:
            return None
        assert self.sequence_group is not None, "a part of a micro-batch needs the ranks that have the others"
        return SequenceParallel(self.sequence_group, batch.split)


def build_meta_model(
    path: str, revision: str | None, method: MethodConfig, compute: Dtype, tokens: Tokens = NO_TOKENS
) -> SftModel:
    """The model without its weights: every parameter on the meta device.

    Buffers that the model computes when it is made (rotary frequencies) are real; those of quantised layers come with
    the weights.

    Raises:
        ConfigError: as ``describe_model``.
    """
    config = load_model_config(path, revision)
    config.vocab_size += tokens.new_rows
    dtype = TORCH_DTYPES[compute]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    model.tie_weights()
    fuse(model)
    _load_generation_config(model, path, revision)
    with torch.device("meta"):
        return _assemble(model, method, dtype, stored_quantization(config, path), tokens)


def build_model(spec: ModelSpec) -> SftModel:
    """The model that ``spec`` describes, without its weights."""
    return build_meta_model(spec.path, spec.revision, spec.method, spec.compute, spec.tokens)


def _load_generation_config(model: PreTrainedModel, path: str, revision: str | None) -> None:
    with contextlib.suppress(OSError):  # a model need not have one
        model.generation_config = GenerationConfig.from_pretrained(model_folder(path, revision, "config"))


def _assemble(
    model: PreTrainedModel,
    method: MethodConfig,
    dtype: torch.dtype,
    stored: StoredQuantization | None,
    tokens: Tokens,
) -> SftModel:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(
            f"{type(model).__name__} has an output layer that is not a plain linear layer without bias",
            fix="choose a model with an ordinary lm_head",
        )
    model.set_output_embeddings(LossHead.from_linear(head))
    model.config.use_cache = False
    base = _base_tensors(model, tokens.new_rows)
    if isinstance(method, QloraMethod):
        for name in _quantize_linears(model, method.quantization, dtype, stored):
            base[name] = replace(base[name], is_packed=stored is not None)
    hf_names = {id(tensor): name for name, tensor in _stored_tensors(model)}
    hf: nn.Module = model
    prompt = None
    if isinstance(method, LoraMethod):
        whole = trained_parts(model, method)
        hf = add_lora(model, method, dtype)
        train_token_rows(model, tokens, whole, named=bool(method.train_tokens))
    elif isinstance(method, VirtualTokensMethod):
        model.requires_grad_(False)
        check_base(method, model, new_rows=tokens.new_rows)
        prompt = VirtualTokens(method, model.config, dtype)
    elif method.freeze:
        _freeze(model, method.freeze)
    base = {f"hf.{n}": base[hf_names[id(t)]] for n, t in _stored_tensors(hf) if id(t) in hf_names}
    return SftModel(hf, base, prompt)


def _freeze(model: PreTrainedModel, patterns: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    parts = ", ".join(sorted({part for name in names for part in name.split(".") if not part.isdigit()}))
    frozen = set(covered(patterns, names, key="method.freeze", kind="parameter", fix=f"use parts of names: {parts}"))
    if len(frozen) == len(names):
        raise ConfigError("method.freeze covers the whole model: nothing is left to train", fix="freeze less of it")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _base_tensors(model: PreTrainedModel, new_rows: int) -> dict[str, BaseTensor]:
    """Every tensor that the model's files hold, by the first of its names."""
    grown = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {
        name: BaseTensor(
            tuple(names[id(tensor)]),
            (tensor.shape[0] - new_rows, *tensor.shape[1:]) if id(tensor) in grown else tuple(tensor.shape),
            not isinstance(tensor, nn.Parameter),
        )
        for name, tensor in _stored_tensors(model)
    }


def _stored_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and the buffers that a state dict holds, each once, by its first name."""
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        seen.setdefault(id(tensor), (name, tensor))
    return list(seen.values())


def quantizable(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer but the output layer, by its path."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _quantize_linears(
    model: PreTrainedModel, config: QuantizationConfig, storage: torch.dtype, stored: StoredQuantization | None
) -> Iterator[str]:
    """Replaces the linear layers that ``config`` does not skip; where the files hold quantised weights, just those.

    Yields:
        names of the weights of the layers that were replaced.
    """
    kind, linears = QUANTIZED[config.type], quantizable(model)
    if stored is None:
        assert config.skip != "auto", "describe_model has measured what auto is"
        skipped = set(skipped_layers(config.skip, linears))
    else:
        covers = stored.covers(model)
        output = next(name for name, module in model.named_modules() if isinstance(module, LossHead))
        if covers(output):
            raise ConfigError(
                f"model.path: {output}, the output layer, is quantised in the files, which is not supported",
                fix="give a model that was quantised with llm_int8_skip_modules: null",
            )
        skipped = {name for name in linears if not covers(name)}
    for name, linear in linears.items():
        indivisible = kind.indivisible(linear, storage)
        if name not in skipped and indivisible is not None:
            fix = (
                "name it in method.quantization.skip or set that to auto, or use method.type lora"
                if stored is None
                else DENSE_FIX
            )
            raise ConfigError(f"method.quantization.type is {kind.kind}, but {name} has {indivisible}", fix=fix)
    for name, linear in linears.items():
        if name not in skipped:
            quantized = kind.in_place_of(linear, storage) if stored is None else stored.in_place_of(linear, storage)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized)
            yield f"{name}.weight"


def skipped_layers(patterns: Sequence[str], linears: Iterable[str]) -> list[str]:
    """The linear layers that ``method.quantization.skip`` names.

    Raises:
        ConfigError: a name covers no linear layer, or together they cover all.
    """
    linears = list(linears)
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    key = "method.quantization.skip"
    skipped = covered(patterns, linears, key=key, kind="linear layer", fix=f"choose from {leaves}, or say auto")
    if len(skipped) == len(linears):
        raise ConfigError(
            f"{key} covers every linear layer: nothing is left to quantise",
            fix="use method.type lora, or skip fewer layers (with auto: lower method.quantization.skip_budget)",
        )
    return skipped
