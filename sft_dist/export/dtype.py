"""In which dtype weights are written."""

from __future__ import annotations

import torch

from sft_dist.checkpoint.source import Source
from sft_dist.errors import ConfigError
from sft_dist.export.trained import Whole
from sft_dist.export.wish import WrittenDtype
from sft_dist.model.support import load_model_config

DTYPES: dict[WrittenDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_dtype(source: Source, whole: Whole) -> torch.dtype:
    """What the run computed in; without a run, that of the base."""
    known = whole.trained.compute if whole.trained is not None else None
    if source.kind == "model" and source.config is not None:
        known = source.config.precision.compute
    return base_dtype(whole) if known is None else DTYPES[known]


def base_dtype(whole: Whole) -> torch.dtype:
    """Of the weights in the files of a base, as its configuration says."""
    dtype = load_model_config(whole.spec.path, whole.spec.revision).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def name_of(dtype: torch.dtype) -> WrittenDtype:
    """
    Raises:
        ConfigError: nothing is written in it.
    """
    for name, each in DTYPES.items():
        if each == dtype:
            return name
    raise ConfigError(f"the base is stored in {dtype}, which is not written", fix="say --dtype bf16, fp16 or fp32")
