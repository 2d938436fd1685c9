"""A run's data, tokenised, packed and audited, and what is told of it: by ``sft-dist prepare``, or as a run begins."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from sft_dist.config.schema import Config
from sft_dist.data.audit.findings import Audit
from sft_dist.data.cache import Cache, cache_folder
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.prepare import PreparedSets, prepare_sets
from sft_dist.data.prepared import PreparedData, open_prepared
from sft_dist.model.spec import ModelSpec
from sft_dist.model.untrained import untrained_tokens
from sft_dist.model.weights import check_weights
from sft_dist.train.audit import audit_prepared
from sft_dist.train.data import showing, told_of_rows
from sft_dist.train.summary import long_rows_notice, untrained_notice


def prepare_inputs(
    config: Config, model: ModelSpec, renderer: ChatRenderer, load: Callable[[], ChatRenderer]
) -> tuple[PreparedSets, Audit]:
    """Looks at the weights, prepares the data or finds them prepared, and audits them.

    Args:
        load: makes ``renderer`` in another process.

    Raises:
        CheckpointError: the weights are not those of the model.
        ConfigError, DataError: the data cannot be prepared, or more is wrong with them than ``data.audit`` allows.
    """
    check_weights(model)
    cache = Cache(cache_folder(config.data, config.output_dir), renderer, load, config.data.num_workers)
    with showing() as display:
        sets = prepare_sets(config.data, cache, seed=config.train.seed, display=display)
    assert sets.train is not None  # nothing is left to other machines
    untrained = _warn_of_the_data(model, renderer, open_prepared(sets.train))
    found = audit_prepared(config, cache, sets, untrained=untrained)
    for folder, name in ((sets.train, "data.train"), (sets.eval, "data.eval")):
        if folder is not None:
            for line in told_of_rows(folder, config.data):
                Console(highlight=False).print(f"[yellow]{name}: {escape(line)}", soft_wrap=True)
    return sets, found


def _warn_of_the_data(model: ModelSpec, renderer: ChatRenderer, data: PreparedData) -> list[str]:
    """Tells of tokens that the model never learned, which are returned, and of rows longer than it was made for."""
    special = renderer.special_ids
    untrained = untrained_tokens(model, data.occurring(special), special)
    lines = [renderer.notice, long_rows_notice(data.lengths, model)]
    names = [str(name) for name in renderer.tokenizer.convert_ids_to_tokens(untrained)]
    if names:
        lines.append(untrained_notice(names, model))
    for line in lines:
        if line is not None:
            Console(highlight=False).print(f"[yellow]model: {escape(line)}", soft_wrap=True)
    return names
