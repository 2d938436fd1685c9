"""Makes of a checkpoint the artefact that its run would have ended with there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sft_dist.checkpoint.manifest import MOVE_AWAY
from sft_dist.checkpoint.proof import verify_files
from sft_dist.checkpoint.reader import CheckpointReader
from sft_dist.config.load import load_config
from sft_dist.errors import CheckpointError
from sft_dist.model.build import SftModel, build_model
from sft_dist.model.describe import describe_model
from sft_dist.model.export import export, publish
from sft_dist.model.renderer import renderer_of
from sft_dist.model.spec import ModelSpec
from sft_dist.model.weights import Weights
from sft_dist.sharding.strategy import whole_parameter

CPU = torch.device("cpu")


def artefact_of_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Writes the model or the adapter of a checkpoint in Hugging Face layout as ``folder``; returns it.

    Raises:
        CheckpointError: the checkpoint is damaged or holds other parameters, or ``folder`` cannot be written.
        ConfigError: the base model is not here.
    """
    config = load_config(checkpoint / "config.yaml")
    base = config.model
    spec = describe_model(base.path, base.revision, config.method, config.precision.compute, base.add_tokens)
    model = build_model(spec)
    tokenizer = renderer_of(base, config.data)().tokenizer
    with CheckpointReader(checkpoint) as reader:
        problems = verify_files(checkpoint, reader.manifest, part=0, parts=1)
        if problems:
            raise CheckpointError(f"{checkpoint} is damaged: {problems[0]}", fix=MOVE_AWAY)
        parameters = _parameters(checkpoint, reader, model, spec, seed=config.train.seed)
        export(folder, spec, model, parameters, tokenizer, is_main=True, seed=config.train.seed)
    publish(folder)
    return folder


def _parameters(
    checkpoint: Path, reader: CheckpointReader, model: SftModel, spec: ModelSpec, *, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter from the checkpoint; of a whole model those that were frozen from its base."""
    frozen = Weights(model, spec, seed=seed) if spec.method.type == "full" else None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if f"model.{name}" not in reader.names:
                raise CheckpointError(f"{checkpoint} does not hold {name}, which its config.yaml trains", fix=MOVE_AWAY)
            yield name, reader.read(f"model.{name}")
        elif frozen is not None:
            with whole_parameter(parameter, CPU) as part:
                frozen.read_into(name, part)
                yield name, part.parameter.detach()
