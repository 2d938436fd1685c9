"""The configuration file, key by key.

The schema holds intent and nothing else: it is frozen, refuses unknown keys and never rewrites what the user wrote.
Whatever follows from several keys together (steps, accumulation, dtypes per strategy) is derived in ``resolve``.
Each key's ``description`` is its documentation: ``config schema`` exports it for editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

DataFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "input_output"]


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    path: str = Field(
        description="Folder in Hugging Face layout, or a hub id that is in the local hub cache or reachable."
    )
    revision: str | None = Field(None, description="Branch, tag or commit when `path` is a hub id.")


class FullMethod(Section):
    type: Literal["full"] = "full"


class LoraMethod(Section):
    """Low-rank adapters on frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    type: Literal["lora"]
    r: int = Field(16, ge=1, description="Rank of the adapter.")
    alpha: float = Field(32, gt=0, description="Scale: the adapter's output is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapter's input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Names of the linear layers that get an adapter, or all of them but the output layer."
    )


class QloraMethod(LoraMethod):
    """LoRA on a quantised base (Dettmers et al. 2023, arXiv 2305.14314), quantised while it is loaded or before."""

    type: Literal["qlora"]  # type: ignore[assignment]
    quantization: Literal["nf4", "int8"] = Field(
        "nf4",
        description="How the base is stored: nf4, 4 bits with double quantisation; int8, 8 bits with a scale a row. A "
        "base that bitsandbytes has quantised before is trained as it is, and must be of this kind.",
    )


MethodConfig = Annotated[FullMethod | LoraMethod | QloraMethod, Field(discriminator="type")]


class SourceConfig(Section):
    path: str = Field(description="A .json or .jsonl file, or a glob of them.")
    format: DataFormat = Field(
        "auto", description="Layout of the rows; `auto` recognises it by the first row's content."
    )


class DataConfig(Section):
    train: list[SourceConfig] = Field(min_length=1, description="Training sources, concatenated in this order.")
    eval: list[SourceConfig] = Field(default_factory=list, description="Held-out sources.")
    chat_template: str | None = Field(
        None,
        description="Path of a Jinja file that replaces the tokenizer's chat template; it is saved with the result.",
    )
    max_seq_len: int = Field(2048, ge=8, description="Tokens; the size of a pack and the most a row may have.")
    over_length: Literal["error", "drop", "truncate"] = Field(
        "error", description="What happens to a row longer than max_seq_len; dropped and cut rows are counted."
    )
    packing: Literal["best_fit", "none"] = Field(
        "best_fit", description="Pack rows into sequences of at most max_seq_len tokens, or train one row a sequence."
    )


class AutoSharding(Section):
    """What ``accelerate launch`` chose; else DDP if the model's states fit in half of a device's memory, else FSDP2."""

    strategy: Literal["auto"] = "auto"


class DdpSharding(Section):
    strategy: Literal["ddp"]


class Fsdp2Sharding(Section):
    strategy: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = Field(
        True, description="Free a layer's gathered weights after forward and gather them again in backward."
    )


class _ZeroSharding(Section):
    deepspeed_config: str | dict[str, Any] | None = Field(
        None,
        description="DeepSpeed's knobs: path of a JSON file, or its content; null: the shipped file of the stage. "
        "configs/deepspeed/README.md lists them.",
    )


class Zero1Sharding(_ZeroSharding):
    strategy: Literal["zero1"]


class Zero2Sharding(_ZeroSharding):
    strategy: Literal["zero2"]


class Zero3Sharding(_ZeroSharding):
    strategy: Literal["zero3"]


ConcreteSharding = DdpSharding | Fsdp2Sharding | Zero1Sharding | Zero2Sharding | Zero3Sharding

ShardingConfig = Annotated[
    AutoSharding | DdpSharding | Fsdp2Sharding | Zero1Sharding | Zero2Sharding | Zero3Sharding,
    Field(discriminator="strategy"),
]


class PrecisionConfig(Section):
    """See docs/architecture.md for the dtype of every tensor under every strategy."""

    compute: Literal["bf16", "fp32"] = Field(
        "bf16", description="Dtype of matrix products, activations and frozen weights."
    )
    master: Literal["fp32", "bf16"] = Field("fp32", description="Dtype that the optimizer updates, and of its states.")
    reduce: Literal["fp32", "bf16"] = Field("fp32", description="Dtype in which gradients are reduced over ranks.")


class ActivationCheckpointingConfig(Section):
    mode: Literal["auto", "none", "full", "every_k"] = Field(
        "auto",
        description="Recompute no layer, every layer, or every k-th layer in backward; auto: none where activations "
        "fit, else every layer.",
    )
    k: int | None = Field(None, ge=2, description="With mode every_k: layers 0, k, 2k, ... are recomputed.")


class _Optim(Section):
    lr: float = Field(2.0e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Applied to parameters with two or more dimensions.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up, to 0.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of all steps over which lr rises linearly.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip gradients to this L2 norm; null: measure only.")


class AdamWConfig(_Optim):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)


class SgdConfig(_Optim):
    type: Literal["sgd"]
    momentum: float = Field(0.0, ge=0, lt=1)


def _optim_type(value: Any) -> str:
    return str(value.get("type", "adamw") if isinstance(value, dict) else value.type)


OptimConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")] | Annotated[SgdConfig, Tag("sgd")],
    Discriminator(
        _optim_type,
        custom_error_type="optim_type",
        custom_error_message="type must be adamw or sgd",
    ),
]


class TrainConfig(Section):
    global_batch_size: int = Field(
        ge=1, description="Sequences of one optimizer step over all ranks: packs when packing, else rows."
    )
    micro_batch_size: int = Field(1, ge=1, description="Most sequences of one forward on a rank.")
    num_epochs: int | None = Field(None, ge=1, description="Passes over the training data. This or max_steps.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps. This or num_epochs.")
    seed: int = Field(0, ge=0, description="Of adapters, dropout and the order of the data.")


class EvalConfig(Section):
    every_steps: int | None = Field(None, ge=1, description="Evaluate after this many steps; always at the end.")
    before_training: bool = Field(True, description="Evaluate the untrained model too.")


class CheckpointConfig(Section):
    every_steps: int | None = Field(
        None, ge=1, description="Save after this many steps; after every epoch and at the end in any case."
    )
    keep_last: int = Field(2, ge=1, description="Complete checkpoints that stay; older ones are deleted.")
    prove_final: bool = Field(
        True,
        description="Load final/ in a fresh process on the CPU with plain transformers and peft, and compare it with "
        "the trained model; needs host memory for the model once more.",
    )


class WandbConfig(Section):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = Field("sft-dist", min_length=1)
    name: str | None = Field(None, description="Name of the run; W&B makes one up without it.")


class LoggingConfig(Section):
    wandb: WandbConfig = WandbConfig()


class Config(Section):
    """One run."""

    model: ModelConfig
    method: MethodConfig = FullMethod()
    data: DataConfig
    sharding: ShardingConfig = AutoSharding()
    precision: PrecisionConfig = PrecisionConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    optim: OptimConfig = AdamWConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    output_dir: str = Field(description="Run directory; must not hold another run, unless that run is resumed.")
