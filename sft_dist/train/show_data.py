"""``sft-dist data show``: prepares the data of a run, or finds it prepared, and shows rows of it."""

from __future__ import annotations

import json

from rich.console import Console

from sft_dist.config.schema import Config
from sft_dist.data.cache import Cache, cache_folder
from sft_dist.data.prepare import prepare_sets
from sft_dist.data.prepared import open_prepared, open_stores
from sft_dist.data.show import Shown, look, to_json
from sft_dist.data.show_choice import Choice, Form
from sft_dist.data.show_html import render
from sft_dist.data.show_terminal import print_shown
from sft_dist.errors import ConfigError
from sft_dist.model.renderer import renderer_of
from sft_dist.train.data import showing, tell_of_template


def show_data(config: Config, choice: Choice, form: Form) -> None:
    """Shows rows or packs on stdout, or writes a page of them.

    Raises:
        ConfigError: there is no such set, row or source.
        SftError: the data cannot be prepared; see ``prepare_data``.
    """
    if choice.side == "eval" and not config.data.eval and config.data.eval_split is None:
        raise ConfigError(
            "--set eval: the configuration has no evaluation data",
            fix="set data.eval or data.eval_split, or leave out --set eval",
        )
    shown = _look(config, choice)
    if form.html is not None:
        form.html.write_text(render(shown, tokens=form.tokens), encoding="utf-8")
        print(f"{form.html} written")
    elif form.as_json:
        print(json.dumps(to_json(shown), ensure_ascii=False))
    else:
        print_shown(shown, Console(highlight=False), tokens=form.tokens)


def _look(config: Config, choice: Choice) -> Shown:
    load = renderer_of(config.model, config.data)
    cache = Cache(cache_folder(config.data, config.output_dir), load(), load, config.data.num_workers)
    # Not on stdout, which is for the rows.
    console = Console(highlight=False, stderr=True)
    tell_of_template(cache.renderer, console)
    with showing(console) as display:
        sets = prepare_sets(config.data, cache, seed=config.train.seed, display=display)
    folder = sets.train if choice.side == "train" else sets.eval
    assert folder is not None  # without shards a set that is configured is complete
    return look(
        open_prepared(folder),
        open_stores(folder),
        cache.renderer.tokenizer,
        choice,
        capacity=config.data.max_seq_len,
        is_packed=config.data.packing == "best_fit",
    )
