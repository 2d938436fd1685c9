"""Reads a published row: free text becomes what decides memory, or the reason why it cannot."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.peers.models import model_config
from benchmarks.peers.unmapped import Unmapped

Row = dict[str, Any]
Counter = Literal["allocated", "reserved", "nvml", "unknown"]

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION_LINEARS, "gate_proj", "up_proj", "down_proj")

# Megatron's fused layers, in Transformers' names.
FUSED_LINEARS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "proj": ("o_proj",),
    "fc1": ("gate_proj", "up_proj"),
    "fc2": ("down_proj",),
}


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a row.

    Args:
        stack: whose modules run: ``hf``, ``litgpt``, ``torchtune`` or ``titan``.
        method: ``full``, ``lora``, ``adapter`` or ``adapter_v2``.
        quant: ``nf4``, ``nf4-dq`` or empty.
        stored: dtype of the parameters that train, between steps.
        weights: dtype of everything else of the base.
        autocast: dtype of mixed precision, empty without.
        adapters: dtype of adapter weights.
        keeps_inputs: 4-bit layers keep theirs (bitsandbytes before 0.42).
        adapters_ignored: FSDP has nothing to do with the adapters.
        upcast_rest: what of a quantised model is fp32: ``all`` that is not packed (PEFT
            ``prepare_model_for_kbit_training``), ``norms`` where TRL's SFTTrainer makes the embeddings bf16 again.
        seq_lens: tokens of each sequence of a micro-batch.
        at_most: that is only how many there may be.
        loss, norm, rope, mlp, lora_kernel: which kernels run.
    """

    model: str
    config: dict[str, Any] = field(hash=False, compare=False)
    stack: str = "hf"
    method: str = "full"
    quant: str = ""
    world: int = 1
    sharding: str = "none"
    sharded_by: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    offload: frozenset[str] = frozenset()
    seq_lens: tuple[int, ...] = ()
    at_most: bool = False
    accumulates: bool = False
    checkpointing: str = "none"
    reentrant: bool = True
    stored: str = "bf16"
    weights: str = "bf16"
    autocast: str = ""
    adapters: str = "fp32"
    upcast_rest: str = ""
    r: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    loss: str = "hf"
    norm: str = "eager"
    rope: str = "eager"
    mlp: str = "eager"
    lora_kernel: str = "peft"
    attention: str = "flash"
    optimizer: str = "adamw"
    foreach: bool = True
    state_bytes: float = 8.0
    paged: bool = False
    adapters_ignored: bool = False
    keeps_inputs: bool = False
    compiled: bool = False
    float8: bool = False


def words(row: Row, *keys: str) -> str:
    """The free text under some keys, in lower case."""
    return " | ".join(str(row[k]) for k in keys if row.get(k) not in (None, "", [], False)).lower()


def counter(row: Row) -> Counter:
    """What kind of peak a row gives; an allocator's ``active`` counts as allocated."""
    text = words(row, "peak_mem_kind")
    if "alloc" in text or "active" in text:
        return "allocated"
    if "reserved" in text or "reserve" in text:
        return "reserved"
    if re.search(r"nvml|nvidia|smi|wandb|process|device|pynvml", text):
        return "nvml"
    return "unknown"


def setup_of(row: Row) -> Setup:
    """Reads a row.

    Raises:
        Unmapped: with the reason.
    """
    for key in ("model", "method"):
        if not row.get(key):
            raise Unmapped(f"{key} not given")
    if not isinstance(row.get("n_gpus", 1), int):
        raise Unmapped("number of GPUs not given")
    text = words(row, "source", "kernels", "versions", "notes", "id")
    config = model_config(str(row["model"]))
    if "num_local_experts" in config or "num_experts" in config:
        raise Unmapped("mixture of experts")
    stack = _stack(text)
    method, quant = _method(row)
    values: dict[str, Any] = {"model": str(row["model"]), "config": config, "stack": stack, "method": method}
    values |= {"quant": quant} | _batch(row) | _sharding(row) | _precision(row, text, stack, method, quant)
    values |= _kernels(row, text, stack) | _optimizer(row) | _checkpointing(row, text, stack)
    if method == "lora":
        values |= _lora(row, text, stack)
    values["keeps_inputs"] = bool(quant) and _version(text, r"(?:bitsandbytes|bnb)", (0, 43)) < (0, 42)
    if stack == "litgpt" and row.get("grad_accum") is None:
        values["accumulates"] = True  # its scripts make a batch of 128 of smaller ones
    setup = Setup(**values)
    return _combine(setup, text)


def _combine(setup: Setup, text: str) -> Setup:
    """What follows from several keys together."""
    if setup.lora_kernel == "fused" and setup.sharding.startswith("fsdp") and "foak" in text:
        # foak hands the adapters to FSDP as ignored modules and reduces their gradients itself.
        setup = replace(setup, adapters_ignored=True)
    if setup.sharding == "fsdp1" and setup.autocast and setup.method == "full" and setup.stack == "hf":
        setup = replace(setup, stored="fp32")  # accelerate keeps sharded parameters that train in fp32
    if setup.loss in ("hf", "fast_ce") and _upcasts_inline(setup, text):
        setup = replace(setup, loss=f"{setup.loss} inline")
    if setup.attention == "flash" and _repeats_heads(setup, text):
        setup = replace(setup, attention="flash repeated")
    if setup.sharding.startswith("zero") and setup.autocast:
        setup = replace(setup, autocast="", adapters="bf16")  # DeepSpeed casts the whole model instead
    return setup


def _upcasts_inline(setup: Setup, text: str) -> bool:
    """Transformers computed the loss inside each model's forward until 4.46, Granite's longer."""
    given = _transformers(text)
    return given < (4, 46) or (setup.config["model_type"] == "granite" and given < (4, 49))


def _repeats_heads(setup: Setup, text: str) -> bool:
    """Before 4.48 some models copied shared key and value heads out even for flash attention."""
    return _transformers(text) < (4, 48) and setup.config["model_type"] in ("mistral", "mixtral", "qwen2", "phi3")


def _transformers(text: str) -> tuple[int, int]:
    """The version a row names; where it does not, one behind both changes."""
    return _version(text, "transformers", (4, 49))


def _version(text: str, package: str, unnamed: tuple[int, int]) -> tuple[int, int]:
    version = re.search(rf"\b{package}[ =v]*(\d+)\.(\d+)", text)
    return (int(version[1]), int(version[2])) if version else unnamed


def _stack(text: str) -> str:
    for name, pattern in {
        "litgpt": r"lit-?gpt",
        "titan": r"torchtitan",
        "torchtune": r"torchtune",
        "unsloth": r"unsloth(?!_)(?!.*foak)",
    }.items():
        if re.search(pattern, text) and not (name == "unsloth" and "foak" in text):
            return name
    return "hf"


def _method(row: Row) -> tuple[str, str]:
    method, quant = str(row["method"]).lower(), words(row, "method", "quant", "weights_dtype")
    if re.search(r"galore|dora|ia3|prompt|prefix|oft|boft|lokr|loha|vera|dpo|ppo|grpo|rlhf|relora|freeze", method):
        raise Unmapped(f"method {row['method']}")
    kind = ""
    if re.search(r"nf4|4-?bit|int4|fp4|qlora", quant):
        if re.search(r"gptq|awq|hqq|aqlm", quant):
            raise Unmapped(f"quantisation {row.get('quant')}")
        single = "nf4" if re.search(r"nf4(?!.*(dq|double))", quant) and "qlora" not in method else "nf4-dq"
        kind = "nf4-dq" if re.search(r"dq|double", quant) else single
    elif re.search(r"8-?bit|int8|gptq|awq|hqq|fp8", words(row, "quant")):
        raise Unmapped(f"quantisation {row.get('quant')}")
    for name in ("adapter_v2", "adapter", "lora", "full"):
        if method.startswith(name) or (name == "lora" and "lora" in method):
            return name, kind
    raise Unmapped(f"method {row['method']}")


def _batch(row: Row) -> dict[str, Any]:
    seq, micro = row.get("seq_len"), row.get("micro_batch")
    if not isinstance(seq, int | float) or not isinstance(micro, int | float):
        raise Unmapped("micro-batch or sequence length not given")
    accumulation = row.get("grad_accum")
    vary = bool(re.search(r"lengths? var(y|ies)", words(row, "packing", "notes", "seq_len")))
    return {
        "seq_lens": (int(seq),) * int(micro),
        "at_most": vary,
        "accumulates": isinstance(accumulation, int) and accumulation > 1,
    }


def _sharding(row: Row) -> dict[str, Any]:
    text, world = words(row, "sharding"), int(row.get("n_gpus") or 1)
    offload = words(row, "offload")
    found: dict[str, Any] = {"world": world, "sharded_by": world}
    stage = re.search(r"zero[-_ ]?(?:stage)?[-_ ]?([123])|stage[-_ ]?([123])", text)
    if world == 1 or re.search(r"^none|^no\b|single", text) or not text:
        kind = "none" if world == 1 else "ddp"
    elif stage:
        kind = f"zero{stage[1] or stage[2]}"
    elif "fsdp2" in text or "fully_shard" in text:
        kind = "fsdp2"
    elif "fsdp" in text or "full_shard" in text:
        kind = "fsdp1"
    elif "ddp" in text or "data parallel" in text or "dp" in text.split():
        kind = "ddp"
    else:
        raise Unmapped(f"sharding {row.get('sharding')}")
    if tensor := re.search(r"\btp[ =x]*(\d+)|tensor[- ]parallel[^|\d]*(\d+)", text):
        found["tensor_parallel"] = int(tensor[1] or tensor[2])
    if context := re.search(r"\bcp[ =x]*(\d+)|context[- ]parallel[^|\d]*(\d+)", text):
        found["context_parallel"] = int(context[1] or context[2])
    if re.search(r"\bpp[ =x]*[2-9]|pipeline", text):
        raise Unmapped("pipeline parallelism")
    found["sharded_by"] = world // found.get("tensor_parallel", 1) if kind not in ("none", "ddp") else 1
    if kind == "none" and re.search(r"shard_grad|grad_op", text):
        raise Unmapped("SHARD_GRAD_OP")
    parts = set()
    if re.search(r"offload|unsloth", words(row, "grad_ckpt")):
        parts.add("activations")
    if offload and not re.match(r"(none|no|false)\b", offload):
        if "activation" in offload:
            parts.add("activations")
        if re.search(r"optim", offload):
            parts.add("optimizer")
        if re.search(r"param|cpu offload|cpuoffload|fsdp|cpu_offload|^cpu|weights", offload):
            parts |= {"parameters", "optimizer"}
        if not parts - ({"activations"} if "activation" not in offload else set()):
            raise Unmapped(f"offload {row.get('offload')}")
    return found | {"sharding": kind, "offload": frozenset(parts)}


def _dtype(text: str) -> str:
    if re.search(r"fp32|float32|32-true", text):
        return "fp32"
    if re.search(r"fp16|float16(?!.*bfloat)|16-true|half", text) and not re.search(r"bf16|bfloat16", text):
        return "fp16"
    return "bf16"


def _precision(row: Row, text: str, stack: str, method: str, quant: str) -> dict[str, Any]:
    stored, compute = words(row, "weights_dtype"), words(row, "compute_dtype")
    mixed = bool(re.search(r"amp|mixed|autocast", compute))
    weights = _dtype(stored) if stored else "bf16"
    found: dict[str, Any] = {"weights": weights, "stored": weights, "autocast": ""}
    if stack == "titan":
        return found | {"weights": "bf16", "stored": "fp32", "adapters": "bf16"}
    fused_engine = re.search(r"nemo|transformer ?engine|megatron", text)
    if fused_engine:
        return found | {"adapters": weights}
    if stack == "hf" and (mixed or quant):  # quantised models are trained under autocast, whatever is said of it
        found["autocast"] = _dtype(compute or stored)
    if stack in ("litgpt", "torchtune"):
        return found | {"adapters": weights}
    own = "accelerated-peft" in text or "axolotl" in text or "llama-factory" in text or "llamafactory" in text
    fsdp = "fsdp" in words(row, "sharding") and int(row.get("n_gpus") or 1) > 1
    if quant and not own and not fsdp and stack == "hf":
        trl = re.search(r"\btrl\b", text) and (found["autocast"] or weights) == "bf16"
        found["upcast_rest"] = "norms" if trl else "all"
        found["autocast"] = found["autocast"] or weights  # fp32 norms before a head that is not
    if re.search(r"adapters?[ _]?(dtype)?[ :=]*(in )?bf16|pure_bf16|autocast_adapter_dtype[ =]*false", text):
        found["adapters"] = "bf16"
    return found


def _kernels(row: Row, text: str, stack: str) -> dict[str, Any]:
    kernels = words(row, "kernels")
    found: dict[str, Any] = {"loss": {"litgpt": "litgpt", "torchtune": "chunked", "titan": "plain"}.get(stack, "hf")}
    if re.search(r"nemo|transformer ?engine|megatron|\bte\b", kernels):
        found |= {"norm": "fused", "rope": "fused", "mlp": "fused"}
    compiled = "compile" in kernels and not re.search(r"no[t]? compile|compile[=: ]*(false|off|no)", kernels)
    unsloth = stack == "unsloth" or "unsloth" in kernels
    liger = "liger" in kernels and "flce" not in kernels
    if re.search(r"rmsnorm|rms", kernels) or unsloth or liger or compiled:
        found["norm"] = "fused"
    if "rope" in kernels or unsloth or liger or compiled:
        found["rope"] = "fused"
    if "swiglu" in kernels or "geglu" in kernels or liger or compiled:
        found["mlp"] = "fused"
    if re.search(r"flce|fused linear|cut cross|\bcce\b", kernels) or liger:
        found["loss"] = "cce" if re.search(r"cut cross|\bcce\b", kernels) else "liger" if liger else "flce"
    elif re.search(r"fast[- _]?ce|cross[- _]?ent", kernels) and "foak" in kernels:
        found["loss"] = "fast_ce"
    elif unsloth:
        found["loss"] = "unsloth"
    elif re.search(r"chunk", kernels) and stack != "litgpt":
        found["loss"] = "chunked"
    if "fused lora" in kernels or "fused_lora" in kernels or unsloth:
        found["lora_kernel"] = "fused"
    attention = words(row, "attention")
    if re.search(r"flash|flex|xformers|te\b|transformer|packed", attention) or "flash" in kernels:
        found["attention"] = "flash"
    elif "sdpa" in attention or not attention:
        padded = bool(re.search(r"pad|short|no\b", words(row, "packing"))) and stack == "hf"
        found["attention"] = "sdpa" if padded else "flash"
    elif "eager" in attention:
        found["attention"] = "eager"
    else:
        raise Unmapped(f"attention {row.get('attention')}")
    return found | {"compiled": compiled, "float8": "float8" in kernels or "fp8" in kernels}


def _checkpointing(row: Row, text: str, stack: str) -> dict[str, Any]:
    given = words(row, "grad_ckpt")
    if not given:
        raise Unmapped("activation checkpointing not given")
    if re.match(r"(none|no|off|false)\b", given):
        return {"checkpointing": "none"}
    kind = "selective" if "selective" in given else "full"
    own = re.search(r"fsdp_qlora|nemo|transformer ?engine|megatron", text)
    reentrant = stack in ("hf", "unsloth") and not own
    if re.search(r"reentrant[^|]{0,12}(false|=no)|non?[- _]?reentrant", given):
        reentrant = False
    return {"checkpointing": kind, "reentrant": reentrant}


def _optimizer(row: Row) -> dict[str, Any]:
    text = words(row, "optimizer")
    if not text:
        raise Unmapped("optimizer not given")
    if re.search(r"adafactor|lion|sgd|galore|muon|lomo|shampoo|apollo|badam", text):
        raise Unmapped(f"optimizer {row['optimizer']}")
    found: dict[str, Any] = {
        "paged": "paged" in text,
        "foreach": not re.search(r"fused|paged|bnb|8-?bit|deepspeed", text),
    }
    if re.search(r"8-?bit", text):
        found["state_bytes"] = 2.03
    elif "fused/foreach" in text:
        found["foreach"] = False
    if "fp32 states" in text:
        found["state_bytes"] = 8.0
    return found


def _lora(row: Row, text: str, stack: str) -> dict[str, Any]:
    r = row.get("lora_r")
    if not isinstance(r, int):
        raise Unmapped("LoRA rank not given")
    given = row.get("lora_targets") or []
    asked = " ".join(given) if isinstance(given, list) else str(given)
    asked = asked.lower()
    if re.search(r"\ball\b|all[-_ ]linear|^linear$", asked):
        targets = ALL_LINEARS
    elif stack == "litgpt":
        targets = ("q", "v")
    else:
        short = {
            "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "output_proj": "o_proj", "gate": "gate_proj",
            "up": "up_proj", "down": "down_proj", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
            "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
        }  # fmt: skip
        parts = re.findall(r"[a-z_0-9]+", asked)
        named = [t for p in parts for t in FUSED_LINEARS.get(p.removeprefix("linear_"), (short.get(p, p),))]
        targets = tuple(dict.fromkeys(t for t in named if t in ALL_LINEARS))
        if re.search(r"mlp|ffn|feed_?forward", asked):
            targets = tuple(dict.fromkeys((*targets, "gate_proj", "up_proj", "down_proj")))
        if re.search(r"attn|attention", asked):
            targets = tuple(dict.fromkeys((*ATTENTION_LINEARS, *targets)))
        if not targets:
            raise Unmapped("LoRA targets not given")
    return {"r": r, "targets": targets, "dropout": float(row.get("lora_dropout") or 0.0)}
