"""Files of texts that are longer than what a model sees at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.messages import Segments
from sft_dist.data.sources import read_source
from sft_dist.errors import ConfigError
from sft_dist.evaluation.prompt import Prompter


def read_long_texts(paths: Sequence[str], prompter: Prompter) -> list[NDArray[np.int64]]:
    """Token ids of every text, as a document begins.

    Raises:
        DataError: a file cannot be read.
        ConfigError: its rows are no texts.
    """
    found = []
    for path in paths:
        for row in read_source(SourceConfig(path=path, format="text")):
            if not isinstance(row, Segments):
                raise ConfigError(f"eval.long_texts.paths: {path} has rows that are no texts", fix="give texts")
            text = "".join(segment.text for segment in row.segments)
            found.append(np.array(prompter.complete(text), np.int64))
    return found
