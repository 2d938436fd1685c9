"""Tokenises a source into a store: all cores, resumable, once.

The source is cut into chunks of some rows by its content alone. Workers tokenise chunks; this process reads them and
writes what comes back in the source's order, so the files are the same for any number of workers. Lines of JSON are
parsed by the workers too. With shards, machine i of n takes every n-th chunk, and whoever finishes last puts the
store together.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.chunk import Rows, RowSettings, tokenise_chunk
from sft_dist.data.rejected import none_left
from sft_dist.data.sources import Raw, RowParser, parser_of, read_raw
from sft_dist.data.token_store import (
    StoreWriter,
    TokenizedChunk,
    complete,
    is_complete,
    merge,
    read_chunks,
)
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from sft_dist.data.chat_template import ChatRenderer

# Of a chunk, whichever is reached first. Lines count as they are, values not at all.
CHUNK_ROWS = 1024
CHUNK_BYTES = 1 << 20

# In a folder that has all the chunks of its shard.
FINISHED = "finished"

# Chunks that a worker has waiting, so that it never runs dry.
CHUNKS_AHEAD = 3

OnProgress = Callable[[int, int], None]
"""Called with the rows and tokens that have been written since the last call."""


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 0) of ``of`` that one machine tokenises."""

    number: int = 0
    of: int = 1

    @property
    def name(self) -> str:
        return f"shard-{self.number + 1}-of-{self.of}"


WHOLE = Shard()


@dataclass(frozen=True)
class Work:
    """One source to be tokenised.

    Args:
        settings: for its rows.
        files: of the source, as ``source_files`` gives them.
        load: makes a renderer in a worker process.
        folder: where the complete store will be.
        about: entries of the store's ``meta.json`` that describe it.
    """

    source: SourceConfig
    files: Sequence[str]
    settings: RowSettings
    load: Callable[[], ChatRenderer]
    folder: Path
    about: Mapping[str, Any]

    @cached_property
    def parser(self) -> RowParser:
        """Of the rows; reads the first of them."""
        return parser_of(self.source, self.files, skips_bad_rows=self.settings.skips_bad_rows)


def tokenise(
    work: Work,
    renderer: ChatRenderer,
    *,
    num_workers: int,
    shard: Shard = WHOLE,
    on_progress: OnProgress = lambda rows, tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Makes the store of a source, or this machine's shard of it, unless it is there.

    Several processes may be told to: one works, the others wait for it.

    Args:
        renderer: what ``work.load`` makes, for this process.
        num_workers: processes that tokenise; 0: this one does.
        say: told when this process has to wait.

    Returns:
        whether the store is complete; False where shards of other machines are missing.

    Raises:
        DataError: a file or a row cannot be read or trained on.
    """
    building = work.folder.with_name(work.folder.name + ".building")
    part = building / shard.name
    with alone(work.folder, shard.name, say):
        if not is_complete(work.folder) and not (part / FINISHED).exists():
            try:
                _tokenise_shard(work, part, renderer, num_workers, shard, on_progress)
            except DataError:
                # Nothing of it is of use: with the data mended it will be another store.
                shutil.rmtree(part, ignore_errors=True)
                raise
    with alone(work.folder, "merge", say):
        parts = [building / Shard(number, shard.of).name for number in range(shard.of)]
        if is_complete(work.folder):
            return True
        if not all((each / FINISHED).exists() for each in parts):
            return False
        whole = parts[0] if shard.of == 1 else building / "merged"
        if shard.of > 1:
            merge(parts, whole)
        try:
            _check_some_left(whole, work)
        except DataError:
            shutil.rmtree(building, ignore_errors=True)
            raise
        complete(whole, work.files, special_ids=renderer.special_ids, about=work.about)
        (whole / FINISHED).unlink(missing_ok=True)
        whole.rename(work.folder)
        shutil.rmtree(building, ignore_errors=True)
    return True


@contextmanager
def alone(folder: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """While no other process, on any machine that shares the folder, does the same to the same store."""
    locks = folder.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.{what}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process is preparing the same data: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tokenise_shard(
    work: Work, folder: Path, renderer: ChatRenderer, num_workers: int, shard: Shard, on_progress: OnProgress
) -> None:
    with closing(StoreWriter(folder)) as writer:
        done = {entry["chunk"] for entry in writer.done}
        on_progress(*(sum(entry[name] for entry in writer.done) for name in ("rows", "tokens")))
        chunks = (
            rows
            for rows in _chunks(work.files, documents=work.parser.documents)
            if rows.number % shard.of == shard.number
        )
        missing = (rows for rows in chunks if rows.number not in done)
        for number, chunk in _tokenised(missing, work, renderer, num_workers):
            writer.append(number, chunk)
            on_progress(chunk.num_rows, chunk.num_tokens)
    (folder / FINISHED).touch()


def _chunks(files: Sequence[str], *, documents: bool) -> Iterator[Rows]:
    number = 0
    for index, path in enumerate(files):
        places: list[int] = []
        rows: list[Raw] = []
        size = 0
        for raw, origin in read_raw(path, documents=documents):
            places.append(origin.row)
            rows.append(raw)
            size += len(raw) if isinstance(raw, bytes) else 0
            if len(rows) == CHUNK_ROWS or size >= CHUNK_BYTES:
                yield Rows(number, index, path, origin.is_line, places, rows)
                number, places, rows, size = number + 1, [], [], 0
        if rows:
            yield Rows(number, index, path, origin.is_line, places, rows)
            number += 1


def _tokenised(
    chunks: Iterator[Rows], work: Work, renderer: ChatRenderer, num_workers: int
) -> Iterator[tuple[int, TokenizedChunk]]:
    """The chunks, tokenised, in order."""
    if num_workers == 0:
        for rows in chunks:
            yield rows.number, tokenise_chunk(rows, work.parser, renderer, work.settings)
        return
    # A server that is forked before anything else runs in it: its children are cheap, and inherit no lock or thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sft_dist.data.tokenising", "sft_dist.data.chat_template", "transformers"])
    begin = (work.load, work.parser, work.settings)
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=begin)
    waiting: deque[tuple[int, Future[TokenizedChunk]]] = deque()
    try:
        for rows in chunks:
            waiting.append((rows.number, pool.submit(_work, rows)))
            if len(waiting) >= num_workers * CHUNKS_AHEAD:
                number, future = waiting.popleft()
                yield number, future.result()
        while waiting:
            number, future = waiting.popleft()
            yield number, future.result()
    except BrokenProcessPool as e:
        raise DataError(
            "a process that tokenises was killed, perhaps for lack of memory", fix="set data.num_workers to fewer"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[ChatRenderer, RowParser, RowSettings]


def _start_worker(load: Callable[[], ChatRenderer], parser: RowParser, settings: RowSettings) -> None:
    global _worker
    # Ctrl-C, and what a scheduler sends to all processes of a job, is for the parent, with which the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = load(), parser, settings


def _end_with(sentinel: int) -> None:
    """Ends this process when its parent has ended without telling it."""
    wait([sentinel])
    os._exit(1)


def _work(rows: Rows) -> TokenizedChunk:
    renderer, parser, settings = _worker
    return tokenise_chunk(rows, parser, renderer, settings)


def _check_some_left(folder: Path, work: Work) -> None:
    """Raises ``DataError`` if every row of a source was rejected."""
    chunks = read_chunks(folder)
    if chunks and not any(entry["rows"] for entry in chunks):
        count = sum(entry["counts"].get("rejected_rows", 0) for entry in chunks)
        raise none_left(work.files, count, chunks[0]["rejected"][0])
