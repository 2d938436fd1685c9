"""The configuration file, key by key.

The schema holds intent and nothing else: it is frozen, refuses unknown keys and never rewrites what the user wrote.
Whatever follows from several keys together (steps, accumulation, dtypes per strategy) is derived in ``resolve``.
Each key's ``description`` is its documentation: ``config schema`` exports it for editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Discriminator, Field, Tag

from sft_dist.config.cluster_schema import ClusterConfig
from sft_dist.config.control_schema import EVAL_LOSS, MODE, EarlyStoppingConfig, Goal, Mode, best_of, goal_of
from sft_dist.config.data_schema import DataConfig
from sft_dist.config.eval_schema import EvalConfig
from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.config.section import Section
from sft_dist.config.spikes_schema import SpikesConfig
from sft_dist.config.watchdog_schema import WatchdogConfig


class ModelConfig(Section):
    path: str = Field(
        description="Folder in Hugging Face layout, or a hub id that `sft-dist model fetch` brought into the hub cache."
    )
    revision: str | None = Field(None, description="Branch, tag or commit when `path` is a hub id.")
    add_tokens: list[str] = Field(
        default_factory=list,
        description="Special tokens that the tokenizer lacks. Where the embedding has no spare rows for them, it and "
        "the output layer grow by what is needed; a new row starts as the mean of the others.",
    )


NAMES = (
    "A name covers every part of the model whose dotted path has it, e.g. q_proj, self_attn or layers.0; with re: in "
    "front it is a regular expression for the whole path."
)


class FullMethod(Section):
    type: Literal["full"] = "full"
    freeze: list[str] = Field(
        default_factory=list, description=f"Parts that stay as they are, e.g. [embed_tokens, layers.0]. {NAMES}"
    )


class LoraMethod(Section):
    """Low-rank adapters on frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    type: Literal["lora"]
    r: int = Field(16, ge=1, description="Rank of the adapter.")
    alpha: float = Field(32, gt=0, description="Scale: the adapter's output is multiplied by alpha / r.")
    rslora: bool = Field(False, description="Multiply by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).")
    dora: bool = Field(
        False,
        description="Train the length of each row of the adapted weight apart from its direction (DoRA, arXiv "
        "2402.09353).",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapter's input.")
    init: Literal["default", "pissa", "loftq"] = Field(
        "default",
        description="First values. default: A random, B zero. pissa: the largest singular directions of the weight, "
        "whose rest is frozen (arXiv 2404.02948); saved as an adapter of twice the rank on the base as it was. loftq: "
        "those of the error that quantising makes, for qlora (arXiv 2310.08659, one iteration).",
    )
    init_from: str | None = Field(
        None,
        description="Folder of an adapter in PEFT's format to go on from; its shape must be the one asked for here.",
    )
    target_modules: Literal["all-linear", "attention", "mlp"] | list[str] = Field(
        "all-linear",
        description="Linear layers that get an adapter: all but the output layer, those of the attention or of the "
        f"feed-forward part, or a list of names. {NAMES}",
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Parts of the base that are trained whole and saved with the adapter, e.g. [embed_tokens, "
        f"lm_head]. {NAMES}",
    )
    train_tokens: list[str] | None = Field(
        None,
        description="Tokens whose own rows of the embedding and of the output layer are trained and saved with the "
        "adapter; null: those of model.add_tokens.",
    )


class QuantizationConfig(Section):
    """How the linear layers of a frozen base are stored; the output layer always stays in ``compute``."""

    type: Literal["nf4", "int8"] = Field(
        "nf4",
        description="nf4: 4 bits with double quantisation; int8: 8 bits with a scale a row. A base that bitsandbytes "
        "has quantised before is trained as it is, and must be of this kind.",
    )
    skip: Literal["auto"] | list[str] = Field(
        default_factory=list,
        description="Linear layers that stay in `compute`, by names; auto: those that quantising changes most, "
        f"measured on a sample of each layer's weights, as many as skip_budget allows. {NAMES}",
    )
    skip_budget: float | None = Field(
        None,
        gt=0,
        description="With skip auto: memory that it may cost, as a share of that of the quantised layers if none were "
        "skipped; null: 0.1.",
    )


class QloraMethod(LoraMethod):
    """LoRA on a quantised base (Dettmers et al. 2023, arXiv 2305.14314), quantised while it is loaded or before."""

    type: Literal["qlora"]  # type: ignore[assignment]
    quantization: QuantizationConfig = QuantizationConfig()


class _VirtualTokens(Section):
    """Trained vectors in front of every row, on a frozen model. Needs data.packing none."""

    num_virtual_tokens: int = Field(
        20, ge=1, description="Virtual tokens in front of every row; they come on top of data.max_seq_len."
    )


class PromptMethod(_VirtualTokens):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): the embeddings of the virtual tokens are trained."""

    type: Literal["prompt"]
    init_text: str | None = Field(
        None,
        description="Start from the embeddings of this text's tokens, repeated or cut to num_virtual_tokens; null: "
        "drawn at random.",
    )


class PTuningMethod(_VirtualTokens):
    """P-tuning (Liu et al. 2021, arXiv 2103.10385): the embeddings of the virtual tokens are what an encoder makes."""

    type: Literal["p_tuning"]
    encoder: Literal["mlp", "lstm"] = Field(
        "mlp", description="A perceptron of three layers, or a bidirectional LSTM and a perceptron of two layers."
    )
    encoder_hidden_size: int | None = Field(
        None, ge=1, description="Width of the encoder; null: the model's hidden size."
    )
    encoder_num_layers: int | None = Field(None, ge=1, description="Layers of the LSTM, with encoder lstm; null: 2.")


class PrefixMethod(_VirtualTokens):
    """Prefix tuning (Li & Liang 2021, arXiv 2101.00190): keys and values of the virtual tokens in every layer."""

    type: Literal["prefix"]
    projection: bool = Field(
        False, description="Make them by a perceptron of two layers from one vector a virtual token, as the paper does."
    )
    encoder_hidden_size: int | None = Field(
        None, ge=1, description="Width of that perceptron, with projection; null: 512."
    )


VirtualTokensMethod = PromptMethod | PTuningMethod | PrefixMethod

MethodConfig = Annotated[
    FullMethod | LoraMethod | QloraMethod | PromptMethod | PTuningMethod | PrefixMethod, Field(discriminator="type")
]


class _Sharding(Section):
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Consecutive ranks that share the sequences of a micro-batch and so the memory of its activations "
        "(Ulysses); divides the number of processes and that of attention heads.",
    )


class AutoSharding(_Sharding):
    """What ``accelerate launch`` chose; else DDP if the model's states fit in half of a device's memory, else FSDP2."""

    strategy: Literal["auto"] = "auto"


class DdpSharding(_Sharding):
    strategy: Literal["ddp"]


class Fsdp2Sharding(_Sharding):
    strategy: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = Field(
        True, description="Free a layer's gathered weights after forward and gather them again in backward."
    )
    reduce_once_a_step: bool = Field(
        False,
        description="Reduce gradients in the last micro-batch of a step alone, as DDP does: less traffic where several "
        "are accumulated, but until then every process holds the whole gradients of what trains, in fp32.",
    )
    cpu_offload: bool = Field(
        False,
        description="Keep parameters, gradients and optimizer states in host memory; the optimizer steps there, and a "
        "layer's weights are copied to the GPU as they are gathered.",
    )
    dp_replicate: int = Field(
        1,
        ge=1,
        description="Hold the model this many times and shard it over world size / dp_replicate ranks that follow each "
        "other (HSDP): gathers stay among these, e.g. in a node; gradients are averaged over all.",
    )


class _ZeroSharding(_Sharding):
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
    master: Literal["fp32", "bf16"] = Field("fp32", description="Dtype of the weights that the optimizer updates.")
    reduce: Literal["fp32", "bf16"] = Field("fp32", description="Dtype in which gradients are reduced over ranks.")
    optimizer_state: Literal["fp32", "bf16", "8bit"] | None = Field(
        None,
        description="How AdamW stores its two moments: 4, 2 or 1 bytes an element each; null: as `master`. "
        "bf16 is rounded stochastically; 8bit is bitsandbytes' blockwise form, a scale for every 256 elements.",
    )


class ActivationCheckpointingConfig(Section):
    mode: Literal["auto", "none", "full", "selective", "every_k"] = Field(
        "auto",
        description="Recompute no layer, every layer, or every k-th layer in backward; selective: every layer, but not "
        "its attention and every second matrix product, whose results are kept; auto: the least recomputation "
        "that fits: none, selective or full.",
    )
    k: int | None = Field(None, ge=2, description="With mode every_k: layers 0, k, 2k, ... are recomputed.")
    offload: bool = Field(
        False, description="Keep the inputs of recomputed layers, from which they start anew, in host memory."
    )


# What ``activation_checkpointing.mode: auto`` may become, the least recomputation first.
Recomputation = Literal["none", "selective", "full"]
RECOMPUTATION: tuple[Recomputation, ...] = ("none", "selective", "full")


class _Optim(Section):
    lr: float = Field(2.0e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0, ge=0, description="Applied to parameters with two or more dimensions: not to norms and biases."
    )
    no_decay: list[str] = Field(
        default_factory=list, description=f"Further parts without weight decay, e.g. [embed_tokens, lm_head]. {NAMES}"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up, to 0.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of all steps over which lr rises linearly.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip gradients to this L2 norm; null: measure only.")
    lora_plus_ratio: float = Field(
        1.0, ge=1, description="The learning rate of LoRA's B is this many times lr (LoRA+, arXiv 2402.12354: 16)."
    )


class AdamWConfig(_Optim):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    paged: bool = Field(
        False,
        description="Keep the moments in CUDA's managed memory (bitsandbytes): pages that a full GPU needs for other "
        "things move to host memory. Needs a GPU.",
    )


class AdafactorConfig(_Optim):
    """Adafactor without a first moment (Shazeer & Stern 2018, arXiv 1804.04235): a mean of squares for every row and
    column of a matrix in place of AdamW's two numbers for every element."""

    type: Literal["adafactor"]
    decay_rate: float = Field(-0.8, ge=-1, lt=0, description="The second moment's decay in step t is 1 - t^decay_rate.")
    clip_threshold: float = Field(1.0, gt=0, description="Largest root mean square of a tensor's update, before lr.")
    scale_parameter: bool = Field(
        False, description="Multiply lr by the root mean square of the tensor (at least 1e-3), as in the paper."
    )


class SgdConfig(_Optim):
    type: Literal["sgd"]
    momentum: float = Field(0.0, ge=0, lt=1)


def _optim_type(value: Any) -> str:
    return str(value.get("type", "adamw") if isinstance(value, dict) else value.type)


OptimConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[AdafactorConfig, Tag("adafactor")]
    | Annotated[SgdConfig, Tag("sgd")],
    Discriminator(
        _optim_type,
        custom_error_type="optim_type",
        custom_error_message="type must be adamw, adafactor or sgd",
    ),
]


class TrainConfig(Section):
    global_batch_size: int = Field(
        ge=1, description="Sequences of one optimizer step over all ranks: packs when packing, else rows."
    )
    micro_batch_size: Annotated[int, Ge(1)] | Literal["auto"] = Field(
        1,
        description="Most sequences of one forward on a rank; auto: the largest power of two that fits, up to a rank's "
        "sequences of a step and to 16,384 tokens.",
    )
    num_epochs: int | None = Field(None, ge=1, description="Passes over the training data. This or max_steps.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps. This or num_epochs.")
    seed: int = Field(0, ge=0, description="Of adapters, dropout, noise and the order of the data.")
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description="Add uniform noise to the embeddings of each row of L tokens of width d while training, within "
        "+- neftune_alpha / sqrt(L d) (NEFTune, arXiv 2310.05914: 5 to 15); null: none.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the target that is spread over the whole vocabulary while training (Szegedy et al. "
        "2016, arXiv 1512.00567); evaluation goes without.",
    )
    compile: bool = Field(
        False,
        description="Compile norms, gated products and rotary embeddings with torch.compile: fewer passes over memory, "
        "for some seconds at the start. Needs a C++ compiler.",
    )


FinalState = Literal["last", "best"]


class CheckpointConfig(Section):
    every_steps: int | None = Field(
        None, ge=1, description="Save after this many steps; after every epoch and at the end in any case."
    )
    every_minutes: float | None = Field(
        None, gt=0, description="Save when the last checkpoint is older than this many minutes, too."
    )
    keep_last: int = Field(2, ge=1, description="Newest checkpoints that stay; older ones are deleted.")
    keep_every_hours: float | None = Field(
        None, gt=0, description="For each of these many hours of training the first checkpoint stays, too."
    )
    keep_best: bool = Field(
        False, description="Save after an evaluation with the best value so far, and keep that checkpoint, too."
    )
    best_metric: str | None = Field(
        None,
        min_length=1,
        description="What is best: a key of an evaluation's line in metrics.jsonl, as for early_stopping.metric; null: "
        "that one and its mode with early_stopping, else eval_loss.",
    )
    best_mode: Mode | None = Field(None, description=MODE)
    final: FinalState | None = Field(
        None,
        description="The state that final/ is exported from: the last one, or that of the best evaluation, whose "
        "checkpoint is then kept as with keep_best; null: best with early_stopping, else last.",
    )
    asynchronous: bool = Field(
        True,
        description="Write while training goes on; needs host memory for one copy of what each rank saves.",
    )
    on_failure: Literal["continue", "stop"] = Field(
        "continue",
        description="When a checkpoint cannot be written, such as on a full disk: train on, if there is an earlier "
        "one, or stop.",
    )
    mirror: str | None = Field(
        None,
        description="URL below which complete checkpoints are copied, such as s3://bucket/runs/x, gs://, az:// or "
        "file:///mnt/x, and fetched from by --resume auto where output_dir has none as new; it holds those that "
        "output_dir holds.",
    )
    prove_final: bool = Field(
        True,
        description="Load final/ in a fresh process on the CPU with plain transformers and peft, and compare it with "
        "the trained model; needs host memory for the model once more.",
    )

    @property
    def goal(self) -> Goal:
        """By these keys alone; ``Config.best_goal`` is that of a run."""
        return goal_of(self.best_metric or EVAL_LOSS, self.best_mode)


class WandbConfig(Section):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = Field("sft-dist", min_length=1)
    name: str | None = Field(None, description="Name of the run; W&B makes one up without it.")


class LoggingConfig(Section):
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = Field(False, description="Write output_dir/tensorboard, too; needs the package tensorboard.")


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
    spikes: SpikesConfig = SpikesConfig()
    eval: EvalConfig = EvalConfig()
    early_stopping: EarlyStoppingConfig | None = Field(
        None, description="End the run when its evaluations no longer improve; null: train all steps."
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    hardware: HardwareConfig = HardwareConfig()
    cluster: ClusterConfig = ClusterConfig()
    output_dir: str = Field(description="Run directory; must not hold another run, unless that run is resumed.")

    @property
    def final_state(self) -> FinalState:
        """What ``checkpoint.final`` is, where it is null too."""
        return self.checkpoint.final or ("last" if self.early_stopping is None else "best")

    @property
    def best_goal(self) -> Goal:
        """What the best state is, where ``checkpoint.best_metric`` is null too."""
        metric, mode = best_of(self.checkpoint.best_metric, self.checkpoint.best_mode, self.early_stopping)
        return goal_of(metric, mode)
