"""Run directories of models whose trained weights have moved, without a training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.model.build import SftModel
from sft_dist.model.export import export, publish
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells
from tests.helpers.loaded import load_model


def moved_weights(model: SftModel, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Master weights somewhere else than where a run starts, the same for the same names."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(parameter.shape, generator=generator)
            yield name, parameter.detach().float() + 0.02 * noise
        elif not trainable_only:
            yield name, parameter.detach().float()


def finished_run(
    base: Path, folder: Path, method: str | dict[str, Any], *, add_tokens: tuple[str, ...] = (), compute: str = "fp32"
) -> Config:
    """``folder`` as a run directory with config.yaml and ``final/``; its configuration."""
    config = cells.config(
        str(base), method, model={"add_tokens": list(add_tokens)}, precision={"compute": compute},
        data={"chat_template": None},
    )  # fmt: skip
    config = Config.model_validate(config.model_dump(mode="json") | {"output_dir": str(folder)})
    run = resolve(config, WorldShape())
    model = load_model(run.model, seed=run.seed)
    is_full = run.model.method.type == "full"
    tokenizer = load_tokenizer(str(base), added=run.model.tokens.added)
    export(
        folder / "final", run.model, model, moved_weights(model, trainable_only=not is_full), tokenizer,
        is_main=True, seed=run.seed,
    )  # fmt: skip
    publish(folder / "final")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return config
