"""What an export is compared with, and how its proof is told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_dist.checkpoint.source import Source
from sft_dist.export.check import Reference, tolerance_of
from sft_dist.export.checkpoint_artefact import write_artefact
from sft_dist.export.dtype import base_dtype, name_of
from sft_dist.export.trained import Whole
from sft_dist.export.wish import Wish
from sft_dist.model.export import UNFINISHED
from sft_dist.model.spec import ModelSpec

NOT_CHECKED = "not checked (--no-check): no process has loaded it"


@contextmanager
def references_of(source: Source, whole: Whole, wish: Wish, name: str) -> Iterator[list[Reference]]:
    """What a whole model is compared with; an adapter that is nowhere in PEFT's format is written for it."""
    if not wish.merge:
        same = tolerance_of(name, name_of(base_dtype(whole)))
        yield [Reference(str(source.folder), None, None, same)] if source.kind == "model" else []
        return
    spec = whole.trained if whole.trained is not None else whole.spec
    tolerance = tolerance_of(name, spec.compute)
    folder, made = source.folder, None
    if source.kind == "checkpoint":
        made = source.folder.with_name(f"{source.folder.name}.adapter")
        folder = made.with_name(made.name + UNFINISHED)
        write_artefact(source, made)
    try:
        if whole.spec.method == spec.method:
            yield [Reference.adapter(folder, spec, tolerance=tolerance)]
        else:
            # The second is what was trained; how far the merged model is from it is only told.
            merged_into = Reference.adapter(folder, whole.spec, tolerance=tolerance)
            yield [merged_into, Reference.adapter(folder, spec, tolerance=None)]
    finally:
        if made is not None:
            shutil.rmtree(folder, ignore_errors=True)


def reference(folder: Path, spec: ModelSpec | None, tolerance: float | None) -> Reference:
    """An adapter; without a description of its base, on that as its files are."""
    if spec is None:
        return Reference(str(folder), None, None, tolerance)
    return Reference.adapter(folder, spec, tolerance=tolerance)


def proven_by(wish: Wish, differences: list[float]) -> str:
    """How a whole model was proven, for people."""
    how = "loaded by plain transformers in a fresh process: "
    if not wish.merge:
        same = f"equal to its source to {differences[0]:.1e} (rms, relative)" if differences else ""
        return how + (same or "every weight is that of the checkpoint in this dtype, bit for bit")
    trained = f"; the model as it was trained differs by {differences[1]:.1e}" if len(differences) > 1 else ""
    return f"{how}merged = adapter to {differences[0]:.1e} (rms, relative){trained}"
