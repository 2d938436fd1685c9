"""Preparing a run's data: with the renderer of its model, and shown on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sft_dist.config.data_schema import DataConfig
from sft_dist.config.schema import Config
from sft_dist.data.cache import Cache, cache_folder
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.prepare import counts_of, prepare_sets, rejected_of
from sft_dist.data.prepared import ChosenRows, open_prepared
from sft_dist.data.rejected import rejections
from sft_dist.data.tokenising import WHOLE, Shard
from sft_dist.model.renderer import renderer_of
from sft_dist.plan.units import duration
from sft_dist.train.summary import notices

# What is written to a file tells how far it is.
LINE_EVERY_S = 30.0


def prepare_data(config: Config, *, shard: Shard = WHOLE) -> None:
    """``sft-dist data prepare``: makes the prepared data of a run, or this machine's part of it, and tells about it.

    Raises:
        SftError: the tokenizer or a source cannot be read, or a row cannot be trained on.
    """
    console, started = Console(highlight=False), time.perf_counter()
    load = renderer_of(config.model, config.data)
    cache = Cache(cache_folder(config.data, config.output_dir), load(), load, config.data.num_workers)
    tell_of_template(cache.renderer, console)
    with showing() as display:
        sets = prepare_sets(config.data, cache, seed=config.train.seed, shard=shard, display=display)
    for name, folder in (("train", sets.train), ("eval", sets.eval)):
        if folder is not None:
            console.print(table_of(f"data.{name}", folder, config.data))
            for line in told_of_rows(folder, config.data):
                console.print(f"[yellow]data.{name}: {escape(line)}", soft_wrap=True)
    if sets.train is None or (sets.eval is None and (config.data.eval or config.data.eval_split)):
        console.print(f"shard {shard.number + 1} of {shard.of} is done; the others are not yet, or on another machine")
    console.print(f"{cache.folder} in {time.perf_counter() - started:.1f} s", soft_wrap=True)


def told_of_rows(folder: Path, data: DataConfig) -> list[str]:
    """What became of the rows of a prepared set that are not trained as they are, a line each."""
    each, lines = counts_of(folder), []
    for name, counts in each.items():
        place = f"{name}: " if len(each) > 1 else ""
        lines += [place + line for line in notices(counts, data.max_seq_len)]
    rejected = sum(counts["rejected_rows"] for counts in each.values())
    return [*lines, *rejections(rejected, rejected_of(folder))]


def tell_of_template(renderer: ChatRenderer, console: Console) -> None:
    """Says which template was built where there was none."""
    if renderer.notice is not None:
        console.print(f"[yellow]model: {escape(renderer.notice)}", soft_wrap=True)


def table_of(name: str, folder: Path, data: DataConfig) -> Table:
    """What a prepared set holds, of each source and in all."""
    prepared = open_prepared(folder)
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(name, overflow="fold")
    for title in ("rows", "tokens", "trained", "longest"):
        table.add_column(title, justify="right")
    for number, source in enumerate(prepared.sources):
        _add_rows(table, escape(source), prepared.rows[prepared.rows["store"] == number])
    table.add_section()
    kind = ("pack" if data.packing == "best_fit" else "row") + ("" if prepared.num_sequences == 1 else "s")
    fill = prepared.lengths.sum() / (prepared.num_sequences * data.max_seq_len)
    filled = f", {fill:.1%} full" if data.packing == "best_fit" else ""
    _add_rows(table, f"{prepared.num_sequences:,} {kind} of {data.max_seq_len:,}{filled}", prepared.rows)
    return table


def _add_rows(table: Table, name: str, rows: ChosenRows) -> None:
    tokens, supervised = (int(rows[key].sum(dtype=np.int64)) for key in ("length", "supervised"))
    share = f"{supervised / tokens:.1%}" if tokens else ""
    table.add_row(name, f"{len(rows):,}", f"{tokens:,}", share, f"{int(rows['length'].max(initial=0)):,}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = task.finished_time or task.elapsed
        return Text(f"{task.completed / elapsed:,.0f} rows/s" if elapsed and task.completed else "")


class _Bars:
    """Shows each source that is tokenised, and what waits for another process.

    Args:
        line_every_s: between two lines about a source where nothing moves; a file of a job's output grows by them.
    """

    def __init__(self, console: Console, progress: Progress, *, line_every_s: float) -> None:
        self._console, self._progress, self._line_every_s = console, progress, line_every_s

    def source(self, name: str, *, is_there: bool) -> Callable[[int, int], None]:
        if is_there:
            return lambda rows, tokens: None
        task = self._progress.add_task(escape(name), total=None, tokens=0)
        all_rows = all_tokens = 0
        started = told = time.monotonic()

        def on_progress(rows: int, tokens: int) -> None:
            nonlocal all_rows, all_tokens, told
            all_rows, all_tokens = all_rows + rows, all_tokens + tokens
            self._progress.update(task, advance=rows, tokens=all_tokens)
            now = time.monotonic()
            if not self._console.is_terminal and now - told >= self._line_every_s:
                told = now
                self.say(
                    f"tokenising {name}: {all_rows:,} rows, {all_tokens:,} tokens, {duration(now - started)} so far"
                )

        return on_progress

    def say(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)


@contextmanager
def showing(console: Console | None = None, *, line_every_s: float = LINE_EVERY_S) -> Iterator[_Bars]:
    """A display of what is prepared, on stdout by default; on a terminal it moves, elsewhere it is a line at times."""
    console = console or Console(highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("tokenising {task.description}: {task.completed:,.0f} rows, {task.fields[tokens]:,} tokens"),
        _Rate(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bars(console, progress, line_every_s=line_every_s)
