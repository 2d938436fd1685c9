"""``sft-dist data audit``, and the part of it that every training run does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft_dist.config.data_schema import DataConfig
from sft_dist.config.schema import Config
from sft_dist.data.audit.audit import audit, enforce, sorted_findings
from sft_dist.data.audit.findings import VERSION, Audit, RenderDiff
from sft_dist.data.audit.render_diff import compare_prompts
from sft_dist.data.audit.report_html import render
from sft_dist.data.audit.report_terminal import show
from sft_dist.data.audit.settings import AuditSettings, PackUse
from sft_dist.data.audit.stored import StoredSource, audit_stores, audited_rows, rejected_rows
from sft_dist.data.cache import Cache, cache_folder
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.messages import Conversation
from sft_dist.data.mixing import Side
from sft_dist.data.prepare import PreparedSets, Tokenised, prepare_sets, tokenise_sources
from sft_dist.data.prepared import open_prepared
from sft_dist.data.selection import rows_of_side
from sft_dist.data.sources import read_source
from sft_dist.errors import DataError, RowError
from sft_dist.model.renderer import renderer_of
from sft_dist.train.data import showing, tell_of_template

# Of each training source, for the comparison of prompts in training and at inference.
COMPARED_ROWS = 20


def audit_data(config: Config, *, html: Path | None, json: Path | None) -> None:
    """Tokenises the data of a run, or finds it tokenised, and reports what is wrong with it.

    Args:
        html, json: files for the report, besides the terminal.

    Raises:
        DataError: the data cannot be read, or more is wrong with it than ``data.audit`` allows.
    """
    load, seed = renderer_of(config.model, config.data), config.train.seed
    # Bad rows are a finding among others; whether a run takes them is asked at the end.
    data = config.data.model_copy(update={"on_bad_row": "skip"})
    cache = Cache(cache_folder(data, config.output_dir), load(), load, data.num_workers)
    tell_of_template(cache.renderer, Console(highlight=False))
    with showing() as display:
        sides = {side: tokenise_sources(data, cache, side=side, seed=seed, display=display) for side in SIDES}
        try:
            packs = packs_of(prepare_sets(data, cache, seed=seed), data)
        except DataError:
            packs = {}  # over-long rows or the like, of which the audit tells more
    train, held_out = ([_stored(each, data, side, config.train.seed) for each in sides[side] or ()] for side in SIDES)
    total = sum(len(source.numbers) for source in (*train, *held_out))
    settings = settings_of(data, cache.renderer)
    with _progress(total) as on_row:
        found = audit(
            (row for source in train for row in audited_rows(source)),
            (row for source in held_out for row in audited_rows(source)) if held_out else None,
            settings=settings,
            packs=packs,
            render_diffs=list(_compared(data, cache.renderer)),
            on_row=on_row,
        )
    rejected = [*rejected_rows(train, "train", settings), *rejected_rows(held_out, "eval", settings)]
    found = replace(found, findings=sorted_findings([*found.findings, *rejected]))
    show(found, Console(highlight=False))
    for path, text in ((html, lambda: render(found)), (json, found.to_json)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
    enforce(found, data.audit.max_share)
    prepare_sets(config.data, cache, seed=seed)  # what a run would refuse


def audit_prepared(config: Config, cache: Cache, sets: PreparedSets, *, untrained: Sequence[str] = ()) -> Audit:
    """What a training run is told about its data: the checks that need no text.

    Args:
        untrained: special tokens that the base never learned and the run does not train.

    Raises:
        DataError: more is wrong than ``data.audit`` allows.
    """
    data, seed = config.data, config.train.seed
    settings = settings_of(data, cache.renderer, untrained)
    asked = repr((sets, settings, VERSION))
    kept = cache.folder / "audits" / f"{xxhash.xxh3_128_hexdigest(asked.encode())}.json"
    if kept.exists():
        found = Audit.read(kept)
        enforce(found, data.audit.max_share)
        return found
    train, held_out = (
        [_stored(each, data, side, seed) for each in tokenise_sources(data, cache, side=side, seed=seed) or ()]
        for side in SIDES
    )
    found = audit_stores(
        train,
        held_out,
        settings=settings,
        packs=packs_of(sets, data),
        decode=cache.renderer.tokenizer.decode,
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
    unfinished.write_text(found.to_json(), encoding="utf-8")
    unfinished.replace(kept)
    enforce(found, data.audit.max_share)
    return found


SIDES: tuple[Side, Side] = ("train", "eval")


def settings_of(data: DataConfig, renderer: ChatRenderer, untrained: Sequence[str] = ()) -> AuditSettings:
    """What the audit has to know of a run's tokenizer and template."""
    tokenizer = renderer.tokenizer
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(renderer.special_ids)]
    ends = {tokenizer.eos_token, *renderer.end_tokens} & set(names)
    return AuditSettings(
        config=data.audit,
        max_seq_len=data.max_seq_len,
        over_length=data.over_length,
        special_tokens=dict(zip(names, renderer.special_ids, strict=True)),
        bos_token=tokenizer.bos_token,
        end_tokens=sorted(ends),
        untrained_tokens=untrained,
    )


def packs_of(sets: PreparedSets, data: DataConfig) -> dict[str, PackUse]:
    """The sequences of each set."""
    folders = {"train": sets.train, "eval": sets.eval}
    return {
        name: PackUse(open_prepared(folder).num_tokens, data.max_seq_len)
        for name, folder in folders.items()
        if folder is not None
    }


def _stored(tokenised: Tokenised, data: DataConfig, side: Side, seed: int) -> StoredSource:
    is_in_set = rows_of_side(tokenised.index, tokenised.named.store, data, side=side, seed=seed)
    return StoredSource(tokenised.named, tokenised.work, is_in_set)


def _compared(data: DataConfig, renderer: ChatRenderer) -> Iterator[RenderDiff]:
    for source in data.train:
        for row in islice(read_source(source, on_rejected=lambda _: None), COMPARED_ROWS):
            # A row that the template refuses is told as rejected.
            with suppress(RowError):
                if isinstance(row, Conversation):
                    yield from compare_prompts(renderer, row)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    columns = TextColumn("auditing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("auditing", total=total)
        yield lambda: progress.advance(task)
