"""Makes of a checkpoint the artefact that its run would have ended with there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sft_dist.checkpoint.reader import CheckpointReader
from sft_dist.checkpoint.source import Source
from sft_dist.export.trained import (
    MASTER,
    describe_trained,
    open_checkpoint,
    require_same_base,
    tokenizer_of,
    trained_with,
)
from sft_dist.model.build import SftModel, build_model
from sft_dist.model.export import export, publish
from sft_dist.model.spec import ModelSpec
from sft_dist.model.weights import Weights
from sft_dist.sharding.strategy import whole_parameter

CPU = torch.device("cpu")


def artefact_of_checkpoint(source: Source, folder: Path) -> Path:
    """Writes the model or the adapter of a checkpoint in Hugging Face layout as ``folder``; returns it.

    Raises:
        CheckpointError, ConfigError: as ``write_artefact``.
    """
    write_artefact(source, folder)
    publish(folder)
    return folder


def write_artefact(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    about: str = "",
    on_saved: Callable[[str, Tensor], None] = lambda *_: None,
) -> None:
    """Writes the model or the adapter of a checkpoint as ``folder`` with ``.unfinished`` behind its name.

    Args:
        dtype: of an adapter's weights; None: that of the master weights.
        about, on_saved: as for ``model.export.export``.

    Raises:
        CheckpointError: the checkpoint is damaged or holds other parameters, or the folder cannot be written.
        ConfigError: the base model is not here, or it is another one now.
    """
    trained = trained_with(source)
    assert trained is not None, "a checkpoint has its configuration"
    spec = describe_trained(trained)
    require_same_base(source, spec.path)
    model = build_model(spec)
    with open_checkpoint(source.folder, spec) as reader:
        parameters = _parameters(reader, model, spec, seed=trained.seed)
        export(
            folder, spec, model, ((name, value if dtype is None else value.to(dtype)) for name, value in parameters),
            tokenizer_of(source), is_main=True, seed=trained.seed, about=about, on_saved=on_saved,
        )  # fmt: skip


def _parameters(
    reader: CheckpointReader, model: SftModel, spec: ModelSpec, *, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter from the checkpoint; of a whole model those that were frozen from its base."""
    frozen = Weights(model, spec, seed=seed) if spec.method.type == "full" else None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, reader.read(f"{MASTER}{name}")
        elif frozen is not None:
            with whole_parameter(parameter, CPU) as part:
                frozen.read_into(name, part)
                yield name, part.parameter.detach()
