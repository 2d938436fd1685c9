"""The proof of an exported folder: a fresh process loads it and compares it with the adapter on its base."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sft_dist.checkpoint import fresh_process
from sft_dist.checkpoint.artefact import TOLERANCE, require_proof
from sft_dist.config.schema import QloraMethod
from sft_dist.model.spec import Dtype, ModelSpec

# Two short texts; whoever answers them differently is another model.
PROMPTS = ("The capital of Japan is", "1, 2, 3, 5, 8,")

# Of tokens that were added or trained by themselves: so many more ids stand behind the second prompt.
MAX_TRAINED_IDS = 8


@dataclass(frozen=True)
class Reference:
    """An artefact whose logits an exported folder must have.

    Args:
        folder: an adapter or a whole model.
        quantization: of the adapter's base: ``type`` and ``skip``; None where it is not quantised.
        vocabulary: to which that is resized, or None.
        stored: dtype of that before it is quantised, "fp32" or "bf16"; fp32 where it is not.
        tolerance: of the logits, root mean square over root mean square; None: the difference is only measured.
    """

    folder: str
    quantization: dict[str, object] | None
    vocabulary: int | None
    tolerance: float | None
    stored: Dtype = "fp32"

    @classmethod
    def adapter(cls, folder: Path, spec: ModelSpec, *, tolerance: float | None) -> Reference:
        """An adapter on the base that ``spec`` describes."""
        method = spec.method
        quantization = method.quantization.model_dump() if isinstance(method, QloraMethod) else None
        vocabulary = spec.vocab_size if spec.tokens.new_rows else None
        stored = spec.compute if quantization is not None else "fp32"
        return cls(str(folder), quantization, vocabulary, tolerance, stored)


def tolerance_of(*dtypes: str) -> float:
    """Of the coarsest of some dtypes, "fp32", "bf16" or "fp16"."""
    return max(TOLERANCE["fp32" if dtype == "fp32" else "bf16"] for dtype in dtypes)


def prove_export(
    folder: Path,
    references: Sequence[Reference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Mapping[str, str] | None,
    adapter: Reference | None = None,
    token_ids: Sequence[int] = (),
) -> list[float]:
    """Loads ``folder`` in a fresh process and compares it, computing in fp32.

    Args:
        references: whose logits are compared.
        weights: digests of what was written, by the names of Transformers or PEFT; None: not compared.
        adapter: how ``folder`` itself is loaded, where it is an adapter; None for a whole model.
        token_ids: that were trained by themselves, which the prompts must have.

    Returns:
        the largest difference from each reference on the prompts.

    Raises:
        CheckpointError: it does not load, or differs by more than a tolerance; ``folder`` stays as it is.
    """
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    ids[-1] = [*ids[-1], *list(token_ids)[:MAX_TRAINED_IDS]]
    expected = {
        "method": "full" if adapter is None else "adapter",
        "quantization": None if adapter is None else adapter.quantization,
        "dtype": "fp32",
        "vocabulary": None if adapter is None else adapter.vocabulary,
        "stored": "fp32" if adapter is None else adapter.stored,
        "weights": None if weights is None else dict(weights),
        "probes": [{"input_ids": each, "positions": list(range(len(each)))} for each in ids],
        "template": None,
        "references": [asdict(reference) for reference in references],
    }
    with tempfile.TemporaryDirectory(prefix="sft_dist_export_") as temporary:
        told = Path(temporary)
        (told / fresh_process.EXPECTED).write_text(json.dumps(expected), encoding="utf-8")
        require_proof(folder, told, fix="the source is as it was, and what was written is kept")
        differences: list[float] = json.loads((told / fresh_process.DIFFERENCES).read_text(encoding="utf-8"))
    return differences
