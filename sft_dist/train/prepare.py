"""``sft-dist prepare``: all that training reads from elsewhere, brought here and made ready without a GPU.

What is here already is taken as it is, without asking the hub, as training does: so a job can run this each time, also
on a machine without network. Nothing is written into ``output_dir``, which stays free for the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from sft_dist.config.schema import Config
from sft_dist.data.audit.report_terminal import verdict
from sft_dist.data.cache import Cache, cache_path, sources_of
from sft_dist.data.hub_dataset import is_dataset_id, named
from sft_dist.data.mixing import Side
from sft_dist.data.prepare import find_set
from sft_dist.data.sources import files_here
from sft_dist.errors import RowError
from sft_dist.model.describe import describe_model
from sft_dist.model.hub import ModelNotHere, model_folder
from sft_dist.model.hub_fetch import fetch
from sft_dist.model.renderer import renderer_of
from sft_dist.train.data import table_of
from sft_dist.train.inputs import prepare_inputs
from sft_dist.train.preflight import check_inputs

Say = Callable[[str], None]


def prepare(configs: Sequence[Config], *, say: Say) -> None:
    """Fetches the models and prepares the data of one run, or of several that may share them.

    Args:
        say: gets one line for each thing worth telling.

    Raises:
        SftError: as training would before its first step: a model or dataset that cannot be had, data that cannot be
            trained on or in which more is wrong than ``data.audit`` allows.
    """
    started, wanted = time.perf_counter(), distinct(configs)
    for config in wanted:
        check_inputs(config)
    for path, revision in dict.fromkeys((config.model.path, config.model.revision) for config in wanted):
        bring_model(path, revision, say=say)
    for number, config in enumerate(wanted, start=1):
        if len(wanted) > 1:
            say(f"data of {number} of {len(wanted)} settings, as {config.output_dir} has them")
        _prepare_data(config, say)
    say(f"ready in {time.perf_counter() - started:.1f} s: training needs no network for model and data")


def distinct(configs: Sequence[Config]) -> list[Config]:
    """The first of all that differ in model, method, data, or what else the preparation follows from."""
    seen: dict[str, Config] = {}
    for config in configs:
        parts = (config.model, config.method, config.data, config.precision)
        key = "".join(part.model_dump_json() for part in parts)
        seen.setdefault(f"{key}{config.train.seed}{cache_path(config.data, config.output_dir)}", config)
    return list(seen.values())


def bring_model(path: str, revision: str | None, *, say: Say) -> None:
    """A model into the local hub cache, unless it is a folder or is there.

    Raises:
        ConfigError, CheckpointError: as ``fetch`` and ``model_folder``.
    """
    try:
        for part in ("config", "tokenizer", "weights"):
            folder = model_folder(path, revision, part)
    except ModelNotHere:
        fetched = fetch(path, revision, say=say)
        say(f"model     {path} is in {fetched.folder}: {fetched.new_bytes / 1e9:,.3f} GB of weights fetched")
        return
    where = "a folder on this machine" if Path(path).is_dir() else f"in the local hub cache, {folder}"
    say(f"model     {path} is {where}: there is nothing to fetch")


def _prepare_data(config: Config, say: Say) -> None:
    console = Console(highlight=False)
    for source in {source.path: source for source in (*config.data.train, *config.data.eval)}.values():
        if is_dataset_id(source.path) and files_here(source) is None:
            say(f"data      fetching the dataset {named(source)}")
    load = renderer_of(config.model, config.data)
    model, method = config.model, config.method
    spec = describe_model(model.path, model.revision, method, config.precision.compute, model.add_tokens)
    renderer = load()
    was_there = _is_prepared(config, Cache(cache_path(config.data, config.output_dir), renderer, load))
    try:
        sets, found = prepare_inputs(config, spec, renderer, load)
    except RowError as error:
        raise RowError(error.what, fix=f"{error.fix}; `sft-dist data audit CONFIG` lists all such rows") from error
    for name, folder in (("train", sets.train), ("eval", sets.eval)):
        if folder is not None:
            console.print(table_of(f"data.{name}", folder, config.data))
    say(f"audit     {verdict(found)}" + ("; `sft-dist data audit CONFIG` tells which rows" if found.findings else ""))
    all_there = ": all of it was prepared before" if was_there else ""
    say(f"data      in {cache_path(config.data, config.output_dir)}{all_there}")


def _is_prepared(config: Config, cache: Cache) -> bool:
    """Whether each set of the run is there already."""
    sides: tuple[Side, ...] = ("train", "eval") if sources_of(config.data, "eval") else ("train",)
    return all(find_set(config.data, cache, side=side, seed=config.train.seed) is not None for side in sides)
