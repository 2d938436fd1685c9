"""A whole model in this process, as a strategy without sharding would fill it."""

from __future__ import annotations

from functools import partial

import torch

from sft_dist.model import build
from sft_dist.model.build import SftModel
from sft_dist.model.spec import ModelSpec
from sft_dist.model.weights import Weights, fill
from sft_dist.sharding.strategy import whole_parameter

CPU = torch.device("cpu")


def load_model(spec: ModelSpec, *, seed: int) -> SftModel:
    """The model that ``spec`` describes, in its ``compute`` dtype, on the CPU."""
    model = build.build_model(spec)
    fill(model, Weights(model, spec, seed=seed), partial(whole_parameter, device=CPU), CPU, group=None)
    return model
