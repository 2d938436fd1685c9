"""Trained virtual tokens in front of every row: prompt tuning, P-tuning and prefix tuning, with PEFT's encoders.

Prompt and P-tuning make embeddings, which go through the model as a row's own do. Prefix tuning makes keys and values
for every layer, which attention alone sees. In both cases the real tokens' positions begin after the virtual ones, and
what the model computes at a virtual token is dropped: labels and supervised positions stay what they are.

Rows are cut and joined by their lengths, which the host knows, so nothing here depends on a tensor's value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft.config import PromptLearningConfig
from peft.tuners.p_tuning import PromptEncoder
from peft.tuners.prefix_tuning import PrefixEncoder
from peft.tuners.prompt_tuning import PromptEmbedding
from peft.utils.other import _prepare_prompt_learning_config
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sft_dist.config.schema import PrefixMethod, PromptMethod, PTuningMethod, VirtualTokensMethod
from sft_dist.data.batch import MicroBatch
from sft_dist.errors import ConfigError

DEFAULT_PREFIX_HIDDEN_SIZE = 512  # Li & Liang 2021, section 4.3
DEFAULT_LSTM_LAYERS = 2

# What PEFT calls the parameter that it loads virtual tokens into, and the tensor in its file.
LOADED_NAME = "prompt_encoder.default.embedding.weight"
SAVED_NAME = "prompt_embeddings"


# Settings of models whose layers do not all have keys and values of one shape, each of its own making.
UNLIKE_LAYERS = ("num_kv_shared_layers", "per_layer_config", "global_head_dim", "kv_lora_rank")

# A setting of models that look up more than embeddings by the token's number, which a virtual token has not.
MORE_THAN_EMBEDDINGS = "hidden_size_per_layer_input"


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the virtual tokens, [P, kv_heads, d] for each layer.

    An object, not a tuple of tensors, so that a strategy that looks for gradients in the inputs of every block does
    not find those of all layers there.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def put_before(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, long_lens: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads in ``layer``: the virtual tokens' keys and values before each row's, and queries of 0.

        The queries keep attention square and causal; ``cut_off`` drops what it computes for them.

        Args:
            query, key, value: [T, heads or kv_heads, d].
            long_lens: lengths of the rows with their virtual tokens.

        Raises:
            ConfigError: the layer has keys or values of another shape.
        """
        prefix_key, prefix_value = self.keys[layer], self.values[layer]
        if (prefix_key.shape[1:], prefix_value.shape[1:]) != (key.shape[1:], value.shape[1:]):
            raise ConfigError(
                f"method.type prefix: layer {layer} has keys of {list(key.shape[1:])} and values of "
                f"{list(value.shape[1:])} (heads, size), not of {list(prefix_key.shape[1:])} like the prefix",
                fix="use method.type prompt, p_tuning or lora for this model",
            )
        seq_lens = tuple(n - prefix_key.shape[0] for n in long_lens)
        no_query = query.new_zeros(prefix_key.shape[0], *query.shape[1:])
        return (
            put_before(no_query, query, seq_lens),
            put_before(prefix_key, key, seq_lens),
            put_before(prefix_value, value, seq_lens),
        )

    def cut_off(self, out: Tensor, long_lens: tuple[int, ...]) -> Tensor:
        """[T, heads, d] without what was computed for virtual tokens."""
        return cut_off(out, self.keys[0].shape[0], long_lens)


def put_before(virtual: Tensor, rows: Tensor, seq_lens: tuple[int, ...]) -> Tensor:
    """[P, ...] before each of the S rows in [T, ...]: [S * P + T, ...]."""
    return torch.cat([part for row in rows.split(seq_lens) for part in (virtual, row)])


def cut_off(rows: Tensor, count: int, long_lens: tuple[int, ...]) -> Tensor:
    """The inverse of ``put_before``: [S * count + T, ...] -> [T, ...]."""
    return torch.cat([row[count:] for row in rows.split(long_lens)])


@dataclass(frozen=True)
class LongRows:
    """Where the rows of a micro-batch are when each has its virtual tokens before it.

    Args:
        position_ids: [1, T] of the real tokens, or [1, S * P + T] of all, starting anew in every row.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    seq_lens: tuple[int, ...]

    @classmethod
    def of(cls, batch: MicroBatch, count: int, *, with_virtual: bool) -> LongRows:
        """Operations on the device alone: the host knows the lengths, and reads nothing back."""
        device = batch.position_ids.device
        rows = torch.arange(len(batch.seq_lens) + 1, dtype=torch.int32, device=device)
        positions = batch.position_ids + count
        if with_virtual:
            positions = put_before(torch.arange(count, device=device), positions[0], batch.seq_lens)[None]
        return cls(positions, batch.cu_seqlens + count * rows, tuple(n + count for n in batch.seq_lens))

    @property
    def max_seq_len(self) -> int:
        return max(self.seq_lens)


class VirtualTokens(nn.Module):
    """The trained part of the three methods, on the meta device or on any other.

    Attributes:
        count: virtual tokens in front of a row.
        encoder: PEFT's, so that what is trained is what PEFT would train.
    """

    def __init__(self, method: VirtualTokensMethod, config: PretrainedConfig, dtype: torch.dtype) -> None:
        super().__init__()
        described = peft_config(method, config)
        self.count = method.num_virtual_tokens
        self.is_prefix = isinstance(method, PrefixMethod)
        self._heads, self._layers = described.num_attention_heads, described.num_layers
        self.encoder: nn.Module
        match method:
            case PrefixMethod():
                self.encoder = PrefixEncoder(described)
            case PTuningMethod():
                self.encoder = PromptEncoder(described)
                if isinstance(lstm := getattr(self.encoder, "lstm_head", None), nn.LSTM):
                    self.encoder.lstm_head = Lstm(lstm)
            case PromptMethod():
                # Or PEFT would read the embeddings of the text, which are not there yet.
                described.inference_mode = True
                self.encoder = PromptEmbedding(described, None)
        for parameter in self.parameters():
            # Module.to cannot swap parameters where a trace makes fake ones.
            parameter.data = parameter.data.to(dtype)

    def forward(self) -> Tensor:
        """[P, h] embeddings, or for a prefix [P, layers * 2 * kv_heads * d]: what PEFT saves."""
        numbers = torch.arange(self.count, device=next(self.encoder.parameters()).device)
        made: Tensor = self.encoder(numbers[None])
        return made[0]

    def prefix(self) -> Prefix:
        """Keys and values of every layer, in PEFT's order: the key of a layer, its value, the next layer."""
        assert self.is_prefix
        made = self().view(self.count, 2 * self._layers, self._heads, -1).unbind(1)
        return Prefix(made[0::2], made[1::2])


class Lstm(nn.Module):
    """A bidirectional ``nn.LSTM`` that looks up its weights by name each time it runs.

    ``nn.LSTM`` keeps references to them, which go stale when a strategy puts a shard or a cast in their place.
    """

    def __init__(self, like: nn.LSTM) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = like.hidden_size, like.num_layers
        for name, parameter in like.named_parameters():
            self.register_parameter(name, parameter)
        self._names = [name for names in like._all_weights for name in names]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """[1, P, in] -> [1, P, 2 * hidden], in a tuple as from ``nn.LSTM``."""
        weights = [getattr(self, name) for name in self._names]
        start = x.new_zeros(2 * self.num_layers, x.shape[0], self.hidden_size)
        # cuDNN's would multiply fp32 in TF32, and wants all weights in one piece of memory.
        with torch.backends.cudnn.flags(enabled=False):
            out, *_ = torch.lstm(x, (start, start), weights, True, self.num_layers, 0.0, self.training, True, True)
        return (out,)


def check_base(method: VirtualTokensMethod, model: PreTrainedModel, *, new_rows: int) -> None:
    """
    Args:
        new_rows: by which the vocabulary grows.

    Raises:
        ConfigError: the model has no place for virtual tokens of this kind, or PEFT would see another one.
    """
    if new_rows:
        raise ConfigError(
            f"model.add_tokens: the vocabulary grows by {new_rows} rows, and what method.type {method.type} saves has "
            "no place for them",
            fix="use method.type lora, qlora or full, or a model whose embedding has spare rows",
        )
    settings = model.config.to_dict()
    why = None
    if isinstance(method, PrefixMethod):
        found = [name for name in UNLIKE_LAYERS if settings.get(name)]
        if found:
            why = f"has {found[0]}: its layers do not all have keys and values of one shape, and of their own"
    elif settings.get(MORE_THAN_EMBEDDINGS):
        why = f"has {MORE_THAN_EMBEDDINGS}: it reads more of a token than its embedding"
    elif isinstance(method, PromptMethod) and method.init_text is not None:
        embedding = type(model.get_input_embeddings())
        if embedding is not nn.Embedding:
            why = f"has embeddings of its own kind ({embedding.__name__}), from which method.init_text cannot start"
    if why is not None:
        raise ConfigError(
            f"method.type {method.type}: model.path is a {model.config.model_type} model that {why}",
            fix="use another method.type, such as lora"
            + (", or remove method.init_text" if "init_text" in why else ""),
        )


def peft_config(
    method: VirtualTokensMethod, config: PretrainedConfig, base_model: str | None = None, revision: str | None = None
) -> PromptLearningConfig:
    """PEFT's description of the virtual tokens, as it is saved beside them.

    Args:
        config: of the base model, which decides their width.
    """
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": method.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "base_model_name_or_path": base_model,
        "revision": revision,
    }
    described: PromptLearningConfig
    match method:
        case PromptMethod(init_text=None):
            described = PromptTuningConfig(**common)
        case PromptMethod():
            described = PromptTuningConfig(
                **common,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=method.init_text,
                tokenizer_name_or_path=base_model or config.name_or_path,
            )
        case PTuningMethod():
            layers = {"encoder_num_layers": method.encoder_num_layers or DEFAULT_LSTM_LAYERS}
            described = PromptEncoderConfig(
                **common,
                encoder_reparameterization_type=method.encoder.upper(),
                encoder_hidden_size=method.encoder_hidden_size,  # type: ignore[arg-type]  # None: the hidden size
                **(layers if method.encoder == "lstm" else {}),
            )
        case PrefixMethod():
            described = PrefixTuningConfig(
                **common,
                prefix_projection=method.projection,
                encoder_hidden_size=method.encoder_hidden_size or DEFAULT_PREFIX_HIDDEN_SIZE,
            )
    prepared: PromptLearningConfig = _prepare_prompt_learning_config(described, config)
    return prepared


def to_save(
    method: VirtualTokensMethod, config: PretrainedConfig, trained: dict[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """What PEFT keeps of trained virtual tokens: not the encoder, but what it makes.

    Embeddings without an encoder are kept as they are; an encoder runs in ``dtype``, as it does in training.

    Args:
        trained: parameters of ``VirtualTokens`` by name, whole, on the CPU.
    """
    with torch.device("meta"):
        virtual = VirtualTokens(method, config, dtype)
    if len(trained) > 1:
        trained = {name: tensor.to(dtype) for name, tensor in trained.items()}
    virtual.load_state_dict(trained, assign=True)
    with torch.no_grad():
        saved: Tensor = virtual.eval()()
    return saved.contiguous()
