"""Which kernels run in a row, in which dtypes, and what is recomputed."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.peers.unmapped import Unmapped
from benchmarks.peers.words import Row, absent, dtype, gpus, month, said, version, words

FUSED_ENGINE = r"nemo|transformer[ _-]?engine|megatron|\bte\b"


def precision(row: Row, text: str, stack: str, quant: str) -> dict[str, Any]:
    """Dtypes of weights, of what trains between steps, of autocast and of adapters."""
    stored, compute = words(row, "weights_dtype"), words(row, "compute_dtype")
    mixed = bool(re.search(r"\bamp\b|mixed|autocast", compute))
    weights = dtype(stored) if stored else "bf16"
    found: dict[str, Any] = {"weights": weights, "stored": weights, "autocast": ""}
    if stack == "titan":
        return found | {"weights": "bf16", "stored": "fp32", "adapters": "bf16"}
    if re.search(FUSED_ENGINE, text):
        return found | {"adapters": weights}
    if stack == "hf" and (mixed or quant):  # quantised models are trained under autocast, whatever is said of it
        found["autocast"] = dtype(compute or stored).replace("fp32", "")
    if stack in ("litgpt", "torchtune", "fsdp_qlora"):
        return found | {"adapters": weights, "autocast": ""}
    own = re.search(r"accelerated-peft|axolotl|llama-?factory", text)
    fsdp = "fsdp" in words(row, "sharding") and gpus(row) > 1
    if quant and not own and not fsdp and stack == "hf":
        trl = re.search(r"\btrl\b", text) and (found["autocast"] or weights) == "bf16"
        found["upcast_rest"] = "norms" if trl else "all"
        found["autocast"] = found["autocast"] or weights.replace("fp32", "")  # fp32 norms before a head that is not
    if re.search(r"adapters?[ _]?(dtype)?[ :=]*(in )?bf16|pure_bf16|autocast_adapter_dtype[ =:]*false", text):
        found["adapters"] = "bf16"
    elif not quant and version(text, "peft", (0, 12)) < (0, 12):
        found["adapters"] = weights  # autocast_adapter_dtype came with 0.12
    return found


def kernels(row: Row, text: str, stack: str) -> dict[str, Any]:
    """Which operations are fused, by whom; the loss; attention."""
    given = words(row, "kernels")
    compiled = bool(re.search(r"compile|inductor", given)) and not re.search(
        r"no[nt]?[- ]?compiled?|un-?compiled|without (torch\.)?compile|compile[=: ]*(false|off|no)\b", given
    )
    found: dict[str, Any] = {"loss": _loss(given, text, stack, compiled=compiled), "compiled": compiled}
    unsloth = stack == "unsloth" or "unsloth" in given
    liger = _whole_liger(given)
    engine = bool(re.search(FUSED_ENGINE, given))
    if re.search(r"rms", given) or unsloth or liger or compiled or engine:
        found["norm"] = "fused"
    if "rope" in given or unsloth or liger or compiled or engine:
        found["rope"] = "fused"
    if re.search(r"swiglu|geglu", given) or liger or compiled or engine:
        found["mlp"] = "fused"
    if re.search(r"fused[ _-]lora", given) or unsloth:
        found["lora_kernel"] = "fused"
    return found | {"attention": _attention(row, given, text, stack), "float8": bool(re.search(r"float8|fp8", given))}


def _whole_liger(given: str) -> bool:
    """Liger by name patches everything; with a list behind it, what is listed."""
    listed = re.search(r"flce|fused[ _-]linear|rms|swiglu|rope", given)
    return "liger" in given and not listed and not re.search(r"(no|without|not) liger", given)


def _loss(given: str, text: str, stack: str, *, compiled: bool) -> str:
    if stack == "litgpt":
        return "litgpt"
    if re.search(r"cut[ _-]?cross|\bcce\b", given):
        return "cce"
    if re.search(r"flce|fused[ _-]linear", given) or _whole_liger(given):
        return "liger" if "liger" in given and "foak" not in given else "flce"
    if stack == "torchtune":
        kind = "linear" if re.search(r"linear[ _-]?(ce|cross)", given) else "chunked" if "chunk" in given else ""
        kind = kind or ("chunked" if "recipe default" in text else "upcast")
        return f"{kind} compiled" if compiled and kind != "upcast" else kind
    if re.search(r"fast[- _]?ce|cross[- _]?ent", given) and "foak" in given:
        return "fast_ce"
    if stack == "unsloth" or "unsloth" in given:
        return "unsloth"
    if re.search(r"liger[^|]*\bce\b|liger[^|]*cross|triton[^|]*(ce\b|cross)", given):
        return "fast_ce"
    if "chunk" in given:
        return "linear"
    if stack == "titan":  # compiled since pull request 1033; before, compiling it did not work
        return "plain compiled" if compiled and month(text) >= (2025, 4) else "plain"
    return "hf"


def _attention(row: Row, given: str, text: str, stack: str) -> str:
    asked = words(row, "attention")
    own = stack in ("hf", "fsdp_qlora") and not re.search(FUSED_ENGINE, text)
    if own and ("sdpa" in asked or not asked) and not re.search(r"flash|\bfa[ -]?[23]?\b", f"{asked} {given}"):
        return "sdpa"
    if re.search(r"flash|\bfa[ -]?[23]?\b|flex|xformers|\bte\b|transformer|packed|sdpa|cudnn|mem.*efficient", asked):
        return "flash"
    if "flash" in given or not asked:
        return "flash"
    if re.search(r"eager|naive|math|vanilla", asked):
        return "eager"
    raise Unmapped(f"attention {row.get('attention')}")


def checkpointing(row: Row, text: str, stack: str) -> dict[str, Any]:
    """What is recomputed in backward, and by which of torch's two implementations."""
    given = said(row, "grad_ckpt")
    if not given:
        raise Unmapped("activation checkpointing not given")
    if absent(given):
        return {"checkpointing": "none"}
    if "selective" in given and re.search(FUSED_ENGINE, text):
        return {"checkpointing": "none"}  # Megatron's recomputes attention alone, which flash attention does anyway
    if stack != "titan" and re.search(r"selective|every (2|3|4|other|second|third|n)\b|partial|half", given):
        raise Unmapped(f"activation checkpointing {row.get('grad_ckpt')}")
    own = stack in ("fsdp_qlora", "litgpt", "torchtune", "titan") or re.search(FUSED_ENGINE, text)
    # accelerate's own wrapper goes around each layer when FSDP has wrapped it, and is the other implementation.
    by_fsdp = re.search(r"fsdp[_ ]?(config|activation|plugin)|activation_checkpointing|checkpoint_?wrapper", given)
    outside = bool(by_fsdp) or stack == "fsdp_qlora"
    reentrant = not own and not by_fsdp
    if re.search(r"reentrant[^|]{0,12}(false|=no)|non?[- _]?reentrant", given):
        reentrant = False
    elif re.search(r"reentrant", given):
        reentrant = True
    kind = "selective" if "selective" in given else "full"
    return {"checkpointing": kind, "reentrant": reentrant, "fsdp_outside": outside}
