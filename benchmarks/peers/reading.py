"""Reads a published row: free text becomes what decides memory, or the reason why it cannot."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from benchmarks.peers.models import model_config
from benchmarks.peers.reading_kernels import checkpointing, kernels, precision
from benchmarks.peers.reading_sharding import offload, sharding
from benchmarks.peers.setup import ALL_LINEARS, ATTENTION_LINEARS, Setup
from benchmarks.peers.unmapped import Unmapped
from benchmarks.peers.words import Row, absent, number, version, words

# Other methods and optimizers, whose memory is not modelled.
OTHER_METHODS = (
    r"galore|q?dora\b|ia3|\(ia\)|prompt|prefix|p-?tuning|\b[bc]?oft|lokr|loha|vera|\bdpo|ppo|grpo|orpo|kto|rlhf|relora"
    r"|freeze|bitfit|lora[-_ ]?fa|\blisa\b|randlora|fourier|c3a|miss\b|bone\b|ln[ _-]tuning|qat\b|distill"
)
OTHER_OPTIMIZERS = r"adafactor|galore|muon|lomo|shampoo|soap|apollo|badam|came\b|prodigy|sophia|adam[-_ ]?mini|adagrad"

# Megatron's fused layers, in Transformers' names, and what others call them.
LINEAR_NAMES = {
    **dict.fromkeys(("qkv", "qkv_proj", "wqkv", "query_key_value"), ("q_proj", "k_proj", "v_proj")),
    **dict.fromkeys(("fc1", "gate_up_proj"), ("gate_proj", "up_proj")),
    **dict.fromkeys(("proj", "o", "wo", "output_proj", "out_proj"), ("o_proj",)),
    **dict.fromkeys(("q", "wq"), ("q_proj",)),
    **dict.fromkeys(("k", "wk"), ("k_proj",)),
    **dict.fromkeys(("v", "wv"), ("v_proj",)),
    **dict.fromkeys(("gate", "w1"), ("gate_proj",)),
    **dict.fromkeys(("up", "w3"), ("up_proj",)),
    **dict.fromkeys(("down", "w2", "fc2"), ("down_proj",)),
}


def setup_of(row: Row) -> Setup:
    """Reads a row.

    Raises:
        Unmapped: with the reason.
    """
    for key in ("model", "method"):
        if not row.get(key):
            raise Unmapped(f"{key} not given")
    if "n_gpus" in row and not number(row, "n_gpus"):
        raise Unmapped("number of GPUs not given")
    text = words(row, "source", "kernels", "versions", "notes", "id")
    config = model_config(str(row["model"]))
    if "num_local_experts" in config or "num_experts" in config:
        raise Unmapped("mixture of experts")
    stack = _stack(text)
    method, quant = _method(row)
    values: dict[str, Any] = {"model": str(row["model"]), "config": config, "stack": stack, "method": method}
    values |= {"quant": quant, "offload": offload(row)} | _batch(row) | sharding(row)
    values |= precision(row, text, stack, quant) | kernels(row, text, stack)
    values |= _optimizer(row, stack) | checkpointing(row, text, stack)
    if method == "lora":
        values |= _lora(row, stack)
    values["keeps_inputs"] = bool(quant) and version(text, r"(?:bitsandbytes|bnb)", (0, 43)) < (0, 42)
    if stack == "litgpt" and row.get("grad_accum") is None:
        values["accumulates"] = True  # its scripts make a batch of 128 of smaller ones
    return _combine(Setup(**values), text)


def _combine(setup: Setup, text: str) -> Setup:
    """What follows from several keys together."""
    if setup.lora_kernel == "fused" and setup.sharding.startswith("fsdp") and "foak" in text:
        # foak hands the adapters to FSDP as ignored modules and reduces their gradients itself.
        setup = replace(setup, adapters_ignored=True)
    if setup.sharding == "fsdp1" and setup.autocast and setup.method == "full" and setup.stack == "hf":
        setup = replace(setup, stored="fp32")  # accelerate keeps sharded parameters that train in fp32
    if setup.loss in ("hf", "fast_ce") and _upcasts_inline(setup, text):
        setup = replace(setup, loss=f"{setup.loss} inline")
    if setup.attention == "flash" and setup.stack != "torchtune" and _repeats_heads(setup, text):
        setup = replace(setup, attention="flash repeated")
    if setup.sharding.startswith("zero") and setup.autocast:
        setup = replace(setup, autocast="", adapters="bf16")  # DeepSpeed casts the whole model instead
    if setup.shard_grad_op and setup.stack == "litgpt":
        raise Unmapped("SHARD_GRAD_OP")
    return setup


def _upcasts_inline(setup: Setup, text: str) -> bool:
    """Transformers computed the loss inside each model's forward until 4.46, Granite's longer."""
    given = _transformers(setup, text)
    return given < (4, 46) or (setup.config["model_type"] == "granite" and given < (4, 49))


def _repeats_heads(setup: Setup, text: str) -> bool:
    """Before 4.48 some models copied shared key and value heads out even for flash attention."""
    return _transformers(setup, text) < (4, 48) and setup.config["model_type"] in (
        "mistral",
        "mixtral",
        "qwen2",
        "phi3",
    )


def _transformers(setup: Setup, text: str) -> tuple[int, int]:
    """The version a row names; where it does not, one behind both changes, or that of a script of known date."""
    return version(text, "transformers", (4, 38) if setup.stack == "fsdp_qlora" else (4, 49))


def _stack(text: str) -> str:
    for name, pattern in {
        "litgpt": r"lit-?gpt|lit_gpt|lit-llama",
        "titan": r"torchtitan",
        "torchtune": r"torchtune",
        "fsdp_qlora": r"fsdp_qlora",
        "unsloth": r"unsloth(?!_)(?!.*foak)(?!.{0,3}offload)",
    }.items():
        if re.search(pattern, text) and not (name == "unsloth" and "foak" in text):
            return name
    return "hf"


def _method(row: Row) -> tuple[str, str]:
    method, quant = str(row["method"]).lower(), words(row, "method", "quant", "weights_dtype")
    if re.search(OTHER_METHODS, method):
        raise Unmapped(f"method {row['method']}")
    kind = ""
    if re.search(r"gptq|awq|hqq|aqlm|quanto|eetq|vptq", quant):
        raise Unmapped(f"quantisation {row.get('quant') or row['method']}")
    if re.search(r"nf4|4[- ]?bit|int4|fp4|qlora", quant) and not re.search(r"8-?bit|int8", quant):
        double = re.search(r"dq|double", quant) and not re.search(r"(no|not|without|single)[^|]{0,8}(dq|double)", quant)
        single = re.search(r"nf4|4[- ]?bit", words(row, "quant")) and "qlora" not in method
        said_single = re.search(r"(no|not|without|single)[^|]{0,8}(dq|double|quant)", quant)
        kind = "nf4-dq" if double or not (single or said_single) else "nf4"
    elif re.search(r"8-?bit|int8|fp8", words(row, "method", "quant")):
        raise Unmapped(f"quantisation {row.get('quant') or row['method']}")
    for name in ("adapter_v2", "adapter"):
        if method.startswith(name):
            return name, kind
    if "lora" in method:
        return "lora", kind
    if re.search(r"^full|full[- _](fine|param|sft|ft)|^sft|^fft|^pre-?train|^continued|^fine-?tun", method):
        return "full", kind
    raise Unmapped(f"method {row['method']}")


def _batch(row: Row) -> dict[str, Any]:
    seq, micro = number(row, "seq_len"), number(row, "micro_batch")
    if not seq or not micro:
        raise Unmapped("micro-batch or sequence length not given")
    packed = re.search(r"\bpacked|constant|fixed", words(row, "packing")) and not absent(words(row, "packing"))
    vary = bool(re.search(r"lengths? var(y|ies)", words(row, "packing", "seq_len", "notes")))
    vary = vary or bool(re.search(r"<=|up to|\bmax", words(row, "seq_len")) and not packed)
    return {
        "seq_lens": (int(seq),) * int(micro),
        "at_most": vary,
        "accumulates": (number(row, "grad_accum") or 1) > 1,
    }


def _optimizer(row: Row, stack: str) -> dict[str, Any]:
    text = words(row, "optimizer")
    if not text:
        raise Unmapped("optimizer not given")
    if re.search(OTHER_OPTIMIZERS, text):
        raise Unmapped(f"optimizer {row['optimizer']}")
    beside = words(row, "kernels", "notes")
    fused = re.search(r"fused|cpu_?adam|paged|bnb|bitsandbytes|[48]-?bit|deepspeed|apex|torchao", text)
    # torchtune's recipes name the fused one.
    foreach = not fused and (stack != "torchtune" or "foreach" in text)
    beside = f"{text} | {beside}"
    in_backward = re.search(r"in[- _]?(bwd|backward)|(step|optimi[sz]er)[^|]{0,20}into[^|]{0,5}backward", beside)
    not_so = re.search(r"(no|not|without)[^|]{0,12}in[- _]?(bwd|backward)|in[-_ ]bwd[ =:]*(false|off)", beside)
    found: dict[str, Any] = {
        "paged": "paged" in text,
        "foreach": foreach,
        "in_backward": bool(in_backward) and not not_so,
    }
    if re.search(r"\bsgd", text):
        found |= {"moments": 1 if "momentum" in text else 0, "foreach": False}
    elif "lion" in text:
        found |= {"moments": 1, "foreach": False}
    if re.search(r"8-?bit", text):
        found["state_bytes"] = 2.03 / 2 * found.get("moments", 2)
    elif re.search(r"4-?bit", text):
        found["state_bytes"] = 1.0625 / 2 * found.get("moments", 2)
    elif "fused/foreach" in text:
        found["foreach"] = False
    if "fp32 states" in text:
        found["state_bytes"] = 8.0
    return found


def _lora(row: Row, stack: str) -> dict[str, Any]:
    r = number(row, "lora_r")
    if r is None:
        in_words = re.search(r"(?:\br|rank)[ =:]*(\d+)", words(row, "method", "notes"))
        r = float(in_words[1]) if in_words else None
    if not r:
        raise Unmapped("LoRA rank not given")
    given = row.get("lora_targets") or []
    asked = " ".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    return {"r": int(r), "targets": _targets(asked.lower(), stack), "dropout": number(row, "lora_dropout") or 0.0}


def _targets(asked: str, stack: str) -> tuple[str, ...]:
    attention = re.search(r"attn|attention", asked)
    mlp = re.search(r"mlp|ffn|feed[-_ ]?forward", asked)
    if re.search(r"\ball\b|all[-_ ]linear|^linears?$|every linear", asked) and not (bool(attention) ^ bool(mlp)):
        return ALL_LINEARS
    if stack == "litgpt":
        return ("q", "v")
    parts = re.findall(r"[a-z_0-9]+", asked)
    named = [t for part in parts for t in LINEAR_NAMES.get(part.removeprefix("linear_"), (part,))]
    targets = [t for t in named if t in ALL_LINEARS]
    if mlp:
        targets += ["gate_proj", "up_proj", "down_proj"]
    if attention:
        targets = [*ATTENTION_LINEARS, *targets]
    if not targets:
        raise Unmapped("LoRA targets not given")
    return tuple(dict.fromkeys(targets))
