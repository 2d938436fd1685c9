"""Builds the model a run trains: base -> NF4 -> adapters -> loss head, in that order, on real or meta tensors.

The same function builds the meta model that describes a run and the real one that is trained, so that the description
cannot drift from the thing.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_dist.config.schema import LoraMethod, MethodConfig, QloraMethod
from sft_dist.data.batch import MicroBatch
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model.adapters import add_lora
from sft_dist.model.attention import ATTENTION_NAME
from sft_dist.model.loss import LossHead
from sft_dist.model.nf4 import BLOCK_SIZE, NF4Linear
from sft_dist.model.sequence_parallel import SequenceParallel
from sft_dist.model.spec import Dtype, ModelSpec, ParameterSpec
from sft_dist.model.support import first_line, has_dynamic_rope, heads_of, load_model_config

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

WEIGHTS_FIX = "the folder needs model.safetensors, or its shards and model.safetensors.index.json"


class SftModel(nn.Module):
    """A causal language model whose forward returns its summed loss.

    Loss and trunk are one module because sharded strategies gather a weight only while the module that they wrap runs.

    Args:
        hf: the Transformers model, wrapped by PEFT when there are adapters; its ``lm_head`` is a ``LossHead``.

    Attributes:
        sequence_group: the ranks that share the sequences of a micro-batch, set where some do; a micro-batch that is
            not split is computed by each rank alone in any case.
    """

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        self.sequence_group: dist.ProcessGroup | None = None

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

    def forward(self, batch: MicroBatch, *, logits: bool = False) -> Tensor:
        """Sum of the losses of the batch's supervised tokens, an fp32 scalar; divide by their number yourself.

        Args:
            logits: return the [N, V] logits at the supervised positions instead.
        """
        hidden = self.hidden_states(batch).index_select(0, batch.supervised_index)
        result: Tensor = self.head(hidden) if logits else self.head(hidden, batch.labels)
        return result

    @property
    def head(self) -> LossHead:
        """The output layer."""
        head = self.causal_lm.get_output_embeddings()
        assert isinstance(head, LossHead)
        return head

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """[t, h] what the output layer reads, of the tokens that are here."""
        output = self.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            seq_lens=batch.seq_lens,
            max_seq_len=batch.max_seq_len,
            cu_seqlens=batch.cu_seqlens,
            sequence_parallel=self._sequence_parallel(batch),
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _sequence_parallel(self, batch: MicroBatch) -> SequenceParallel | None:
        if batch.split is None:
            return None
        assert self.sequence_group is not None, "a part of a micro-batch needs the ranks that have the others"
        return SequenceParallel(self.sequence_group, batch.split)


def build_model(spec: ModelSpec, *, seed: int) -> SftModel:
    """The real model on the CPU, with trainable parameters in fp32 or bf16 as ``compute`` says.

    Args:
        seed: of the adapters' first values: every rank and every strategy starts from the same ones.

    Raises:
        ConfigError: the path is no model, or one with settings that are not supported.
        CheckpointError: the weights are missing, damaged or of another architecture.
    """
    config = load_model_config(spec.path, spec.revision)
    dtype = TORCH_DTYPES[spec.compute]
    model = _load_weights(spec.path, spec.revision, config, dtype)
    torch.manual_seed(seed)
    return _assemble(model, spec.method, dtype)


def describe_model(path: str, revision: str | None, method: MethodConfig, compute: Dtype) -> ModelSpec:
    """The description of the model that ``build_model`` builds, from its configuration alone.

    Raises:
        ConfigError: as ``build_model``.
    """
    config = load_model_config(path, revision)
    meta = build_meta_model(path, revision, method, compute)
    heads, kv_heads, head_dim = heads_of(config)
    owner = {id(parameter): name for name, block in meta.blocks().items() for parameter in block.parameters()}
    parameters = tuple(
        ParameterSpec(name, tuple(p.shape), p.requires_grad, owner.get(id(p))) for name, p in meta.named_parameters()
    )
    return ModelSpec(
        path=path,
        revision=revision,
        method=method,
        compute=compute,
        parameters=parameters,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        has_dynamic_rope=has_dynamic_rope(config),
        buffer_bytes=sum(b.numel() * b.element_size() for b in meta.buffers()),
    )


def build_meta_model(path: str, revision: str | None, method: MethodConfig, compute: Dtype) -> SftModel:
    """The model without its weights: every parameter and buffer on the meta device."""
    config = load_model_config(path, revision)
    dtype = TORCH_DTYPES[compute]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
        model.tie_weights()
        return _assemble(model, method, dtype)


def check_weights(spec: ModelSpec) -> None:
    """Answers at once whether a model folder has weights; a hub id is looked up when it is loaded.

    Raises:
        CheckpointError: the folder has none.
    """
    folder = Path(spec.path)
    if folder.is_dir() and not (list(folder.glob("*.safetensors"))):
        raise CheckpointError(f"model.path: {folder} has no .safetensors weights", fix=WEIGHTS_FIX)


def _load_weights(path: str, revision: str | None, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # Transformers logs a table of missing keys and goes on with random weights; here each of them is an error.
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME,
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as e:
        raise CheckpointError(
            f"model.path: no readable weights in {path} ({first_line(e)})",
            fix=WEIGHTS_FIX,
        ) from e
    finally:
        logger.setLevel(level)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            first = sorted(str(key) for key in report[kind])[0]
            raise CheckpointError(
                f"model.path: the weights in {path} have {len(report[kind])} {kind.replace('_', ' ')}, such as {first}",
                fix="config.json and the weights must come from the same model",
            )
    return model.train()


def _assemble(model: PreTrainedModel, method: MethodConfig, dtype: torch.dtype) -> SftModel:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(
            f"{type(model).__name__} has an output layer that is not a plain linear layer without bias",
            fix="choose a model with an ordinary lm_head",
        )
    model.set_output_embeddings(LossHead.from_linear(head))
    model.config.use_cache = False
    if not isinstance(method, LoraMethod):
        return SftModel(model)
    model.requires_grad_(False)
    if isinstance(method, QloraMethod):
        _quantize_linears(model, dtype)
    return SftModel(add_lora(model, method, dtype))


def _quantize_linears(model: PreTrainedModel, storage: torch.dtype) -> None:
    """Replaces every linear layer but the output layer; embeddings and norms stay as they are."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        if module.weight.numel() % BLOCK_SIZE:
            raise ConfigError(
                f"method.type=qlora: {name} has {module.weight.numel()} weights, not a multiple of {BLOCK_SIZE}",
                fix="use method.type=lora for this model",
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear.quantize(module, storage))
