"""The model card of a whole model that is exported: its base, how it was made, how it was trained."""

from __future__ import annotations

from pathlib import Path

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.source import Source
from sft_dist.config.schema import QloraMethod
from sft_dist.export.provenance import training_section
from sft_dist.export.trained import Whole, identity_of_source
from sft_dist.model.card import CARD, card, front_matter, whole_usage


def told_of_base(whole: Whole) -> str:
    """Which base an adapter is merged into, and what the other one would mean."""
    trained = whole.trained
    if trained is None:
        return (
            f"merged into the weights in the files of {whole.spec.path}; nothing says whether training quantised them"
        )
    if not isinstance(trained.method, QloraMethod):
        return f"merged into the weights in the files of {trained.path}"
    kind = trained.method.quantization.type
    if isinstance(whole.spec.method, QloraMethod):
        return (
            f"merged into the dequantised {kind} weights, on which the adapter was trained; --base original would take "
            "those before quantisation, which the adapter never saw"
        )
    return (
        f"merged into the original weights of {trained.path}, and not into their {kind} form, on which the adapter was "
        "trained; --base dequantized is exactly the model that was trained"
    )


def write_card(folder: Path, source: Source, whole: Whole, dtype: str, told: str | None, proven: str) -> None:
    """
    Args:
        told: of the base that an adapter was merged into; None where none was.
        proven: how it was, a line.
    """
    spec = whole.trained if whole.trained is not None else whole.spec
    base = spec.path if source.kind != "model" or source.config is None else source.config.model.path
    tags = [spec.method.type if told is not None else "full", *(["merged"] if told is not None else [])]
    made = [f"- weights in {dtype}", *([f"- {told}"] if told is not None else []), f"- {proven}"]
    text = card(
        front_matter(base, is_adapter=False, tags=tags),
        f"{base}, fine-tuned",
        [
            f"## How to load\n\n{whole_usage()}\n\n```\nvllm serve PATH_OF_THIS_FOLDER\n```",
            "## How it was made\n\n" + "\n".join(made),
            about(source),
        ],
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def about(source: Source) -> str:
    """Of any card: what was trained, on what, with what result, as Markdown; empty where nobody knows."""
    if source.config is None:
        return ""
    identity = identity_of_source(source)
    steps = Manifest.read(source.folder).position.completed_steps if source.kind == "checkpoint" else None
    return training_section(source.config, source.run_directory, identity=identity, steps=steps)
