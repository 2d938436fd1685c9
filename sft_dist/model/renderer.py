"""The renderer that belongs to a model: its tokenizer with the run's template and tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sft_dist.config.data_schema import DataConfig
from sft_dist.config.schema import ModelConfig
from sft_dist.data.chat_template import ChatRenderer, load_renderer
from sft_dist.model.hub import model_folder


def renderer_of(model: ModelConfig, data: DataConfig) -> Callable[[], ChatRenderer]:
    """Makes the renderer of a model's tokenizer and a run's template, in this process or in another one."""
    folder = model_folder(model.path, model.revision, "tokenizer")
    return partial(load_renderer, str(folder), None, data.chat_template, added_tokens=model.add_tokens)
