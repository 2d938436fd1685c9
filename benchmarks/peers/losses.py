"""From the last hidden states to the loss, as each stack does it; what is alive at which moment is what counts here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.kernels import CompiledCrossEntropy, FusedCrossEntropy, FusedLinearCrossEntropy


def head_loss(
    kind: str, head: nn.Module, hidden: Tensor, labels: Tensor, *, outputs_to_fp32: bool, rows: int
) -> Tensor:
    """The loss of [1, T, h] hidden states.

    Args:
        kind: ``hf``, ``fast_ce`` (Triton, in place), ``flce`` (foak's fused linear), ``liger``, ``chunked`` and
            ``chunked compiled`` (torchtune, the head on eight chunks), ``linear`` (torchtune, head and loss on each of
            eight chunks), ``litgpt`` (chunks of 128 tokens), ``plain`` and ``plain
            compiled`` (torchtitan), ``upcast`` (torchtune:
            what the model returns is fp32 already).
        labels: [T], already of the next tokens.
        rows: sequences that the T tokens are; of more than one the shifted logits are a copy.
        outputs_to_fp32: accelerate makes the logits that a model returns fp32 under mixed precision.
    """
    match kind:
        case "flce" | "liger":
            return FusedLinearCrossEntropy.apply(hidden[0], head.weight, True)
        case "cce":
            return FusedLinearCrossEntropy.apply(hidden[0], head.weight, False)
        case "litgpt":
            return _litgpt(head, hidden, labels, rows, outputs_to_fp32)
        case "chunked" | "chunked compiled":
            return _chunked(head, hidden, labels, compiled=kind.endswith("compiled"))
        case "linear" | "linear compiled":
            return _linear(head, hidden, labels, compiled=kind.endswith("compiled"))
        case "plain":
            logits = head(hidden)
            return F.cross_entropy(logits.flatten(0, 1).float(), labels)
        case "plain compiled":
            return CompiledCrossEntropy.apply(head(hidden).flatten(0, 1)).sum()
        case "upcast":
            return F.cross_entropy(head(hidden).float().flatten(0, 1), labels)
        case "hf inline" | "fast_ce inline":
            return _inline(kind, head, hidden, labels, rows)
        case _:
            return _whole(kind, head, hidden, labels, outputs_to_fp32, rows)


def _whole(kind: str, head: nn.Module, hidden: Tensor, labels: Tensor, outputs_to_fp32: bool, rows: int) -> Tensor:
    """Transformers' ``ForCausalLMLoss``: upcast, shift, contiguous copy; the logits live on in the output."""
    logits = head(hidden)
    loss = _shifted(kind, logits, labels, rows)
    if outputs_to_fp32:
        logits = logits.float()
    return loss


def _inline(kind: str, head: nn.Module, hidden: Tensor, labels: Tensor, rows: int) -> Tensor:
    """Transformers before 4.46: the forward upcasts its logits under their own name, so that the first ones go."""
    logits = head(hidden)
    logits = logits.float()
    shifted = logits[0, :-1].clone() if rows > 1 else logits[0, :-1]
    if kind.startswith("fast_ce"):
        return FusedCrossEntropy.apply(shifted).sum()
    return F.cross_entropy(shifted, labels[1:])


def _shifted(kind: str, logits: Tensor, labels: Tensor, rows: int) -> Tensor:
    if kind == "unsloth":  # no copy and no upcast: the labels are shifted instead
        return FusedCrossEntropy.apply(logits[0]).sum()
    upcast = logits.float()
    shifted = upcast[0, :-1].clone() if rows > 1 else upcast[0, :-1]
    if kind == "fast_ce":
        return FusedCrossEntropy.apply(shifted).sum()
    return F.cross_entropy(shifted, labels[1:])


def _litgpt(head: nn.Module, hidden: Tensor, labels: Tensor, rows: int, outputs_to_fp32: bool) -> Tensor:
    """lit-gpt ``chunked_cross_entropy``, 128 tokens of every row at a time.

    Fabric makes what a 16-bit model returns fp32, but for FSDP's; the loop's ``logits`` live until backward has ended.
    """
    half = [head(part) for part in hidden[0].split(128 * rows)]
    logits = [part.float() for part in half] if outputs_to_fp32 else half
    del half
    targets = labels.split(128 * rows)
    losses = [F.cross_entropy(part, t, reduction="none") for part, t in zip(logits, targets, strict=True)]
    loss = torch.cat(losses).mean()
    loss.logits = logits  # type: ignore[attr-defined]
    return loss


def _chunked(head: nn.Module, hidden: Tensor, labels: Tensor, *, compiled: bool) -> Tensor:
    """torchtune ``CEWithChunkedOutputLoss``: the head on eight chunks of the tokens, each upcast on its own."""
    size = -(-hidden.shape[1] // 8)
    logits = [head(part) for part in hidden[0].split(size)]
    parts = zip(logits, labels.split(size), strict=True)
    return torch.stack([_of_chunk(part, target, compiled=compiled) for part, target in parts]).sum()


def _linear(head: nn.Module, hidden: Tensor, labels: Tensor, *, compiled: bool) -> Tensor:
    """torchtune ``LinearCrossEntropyLoss``: head and loss of one of eight chunks after the other."""
    size = -(-hidden.shape[1] // 8)
    parts = zip(hidden[0].split(size), labels.split(size), strict=True)
    return torch.stack([_of_chunk(head(part), target, compiled=compiled) for part, target in parts]).sum()


def _of_chunk(logits: Tensor, labels: Tensor, *, compiled: bool) -> Tensor:
    if compiled:
        return CompiledCrossEntropy.apply(logits).sum()
    return F.cross_entropy(logits.float(), labels, reduction="sum")
