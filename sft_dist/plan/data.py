"""What a run trains on, for a dry run: counted where it is prepared, else estimated from a sample or from the text
alone, else as stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sft_dist.config.schema import Config
from sft_dist.data.cache import Cache, cache_path, sources_of
from sft_dist.data.mixing import Side
from sft_dist.data.prepare import find_set
from sft_dist.data.prepared import PreparedData, open_prepared, open_stores
from sft_dist.data.sources import files_here
from sft_dist.errors import CheckpointError
from sft_dist.model.hub import ModelNotHere
from sft_dist.model.renderer import renderer_of
from sft_dist.plan.assumed import AssumedData, assumed_plan
from sft_dist.plan.epoch import Epoch, data_plan, tokens_of_run
from sft_dist.plan.estimated import estimated_plan
from sft_dist.plan.result import DataPlan, Range
from sft_dist.plan.sampled import sampled_plan
from sft_dist.run import Run

MAX_SAMPLE_ROWS = 2000


def plan_data(
    config: Config,
    run: Run,
    *,
    assumed: AssumedData | None = None,
    max_sample_rows: int = MAX_SAMPLE_ROWS,
    seed: int = 0,
) -> DataPlan | None:
    """What ``run`` trains on. Writes nothing and asks no network.

    What is stated (``assumed``) is taken as it is. Else a prepared set in the run's cache is counted: rows, tokens and
    steps are those of the trainer. Else some rows of the files are tokenised; where the tokenizer is not here, as
    before the model is fetched, their tokens are estimated from the text.

    Args:
        config: that ``run`` was resolved from.
        max_sample_rows: rows of a set that are tokenised where it is not prepared.
        seed: of which rows these are.

    Returns:
        None where files are missing, or behind a URL, and nothing is stated.

    Raises:
        DataError: what is here cannot be trained on, as training would find.
    """
    if assumed is not None:
        return assumed_plan(run, assumed)
    if max_sample_rows < 1:
        raise ValueError(f"a sample has at least one row, got {max_sample_rows}")
    sides: tuple[Side, ...] = ("train", "eval")
    files = {side: source_files(run, side) for side in sides}
    try:
        load = renderer_of(config.model, run.data)
        renderer = load()
    except (ModelNotHere, CheckpointError):
        if files["train"] is None:
            return None
        return estimated_plan(config, run, files, max_sample_rows=max_sample_rows, seed=seed)
    cache = Cache(cache_path(run.data, run.output_dir), renderer, load)
    prepared = _prepared(run, cache)
    if prepared is not None:
        return prepared
    if files["train"] is None:
        return None
    return sampled_plan(run, renderer, files, max_sample_rows=max_sample_rows, seed=seed)


def source_files(run: Run, side: Side) -> list[list[str]] | None:
    """Those of each source of a set; None where one is missing, or there is no source."""
    found: list[list[str]] = []
    for source in sources_of(run.data, side):
        here = files_here(source)
        if here is None:
            return None
        found.append(here)
    return found or None


def _prepared(run: Run, cache: Cache) -> DataPlan | None:
    """Counted, if all sets of the run are prepared."""
    folders = [find_set(run.data, cache, seed=run.seed)]
    if sources_of(run.data, "eval"):
        folders.append(find_set(run.data, cache, side="eval", seed=run.seed))
    there = [folder for folder in folders if folder is not None]
    if len(there) < len(folders):
        return None
    train = open_prepared(there[0])
    held_out = open_prepared(there[1]) if len(there) > 1 else None
    return counted_plan(run, train, held_out, cache_bytes=folder_bytes(there), source=f"counted in {there[0]}")


def counted_plan(
    run: Run, train: PreparedData, held_out: PreparedData | None, *, cache_bytes: int = 0, source: str
) -> DataPlan:
    """What is trained on, counted: steps and tokens are exactly those of the trainer.

    Args:
        held_out: what is evaluated on, or None.
        cache_bytes: of both on disk.
    """
    epoch = Epoch.of(train.lengths, int(train.num_supervised.sum()), train.packs)
    return data_plan(
        run,
        epoch,
        basis="prepared",
        tokens=Range(epoch.tokens, epoch.tokens, epoch.tokens),
        eval_tokens=0 if held_out is None else int(held_out.lengths.sum()),
        cache_bytes=cache_bytes,
        source=source,
        tokens_of_run=tokens_of_run(run, train),
    )


def folder_bytes(sets: Sequence[Path]) -> int:
    """Of prepared sets and the token stores that they share."""
    stores = {store.folder.resolve() for folder in sets for store in open_stores(folder)}
    folders = [*(folder.resolve() for folder in sets), *stores]
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())
