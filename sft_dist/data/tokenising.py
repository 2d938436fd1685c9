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
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.literal_rows import prompt_of, tokenize_literal
from sft_dist.data.messages import Conversation, Origin, Row
from sft_dist.data.rejected import none_left
from sft_dist.data.sources import Raw, RowParser, parser_of, read_raw
from sft_dist.data.splitting import Part, split_conversation, split_tokens
from sft_dist.data.supervision import DEFAULT, Supervision, vary_prompt
from sft_dist.data.token_store import (
    MAX_REJECTIONS,
    ROW,
    StoreWriter,
    TokenizedChunk,
    complete,
    is_complete,
    merge,
    read_chunks,
)
from sft_dist.errors import DataError, RowError

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
class RowSettings:
    """How a row becomes tokens, beside the tokenizer and its template.

    Args:
        split_at: rows with more tokens become several; None: they stay as they are.
        templates: for the first question, one of which is drawn by ``seed``; empty: it stays as it is.
        skips_bad_rows: rows that cannot be read or trained on are left out and counted.
    """

    supervision: Supervision = DEFAULT
    split_at: int | None = None
    templates: tuple[str, ...] = ()
    seed: int = 0
    skips_bad_rows: bool = False


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


@dataclass(frozen=True)
class _Rows:
    """A chunk of a source: consecutive rows of a file, as ``read_raw`` gives them."""

    number: int
    file: int
    path: str
    by_line: bool
    places: list[int]
    rows: list[Raw]


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


def _chunks(files: Sequence[str], *, documents: bool) -> Iterator[_Rows]:
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
                yield _Rows(number, index, path, origin.is_line, places, rows)
                number, places, rows, size = number + 1, [], [], 0
        if rows:
            yield _Rows(number, index, path, origin.is_line, places, rows)
            number += 1


def _tokenised(
    chunks: Iterator[_Rows], work: Work, renderer: ChatRenderer, num_workers: int
) -> Iterator[tuple[int, TokenizedChunk]]:
    """The chunks, tokenised, in order."""
    if num_workers == 0:
        for rows in chunks:
            yield rows.number, _tokenise_chunk(rows, work.parser, renderer, work.settings)
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = load(), parser, settings


def _end_with(sentinel: int) -> None:
    """Ends this process when its parent has ended without telling it."""
    wait([sentinel])
    os._exit(1)


def _work(rows: _Rows) -> TokenizedChunk:
    renderer, parser, settings = _worker
    return _tokenise_chunk(rows, parser, renderer, settings)


def _tokenise_chunk(rows: _Rows, parser: RowParser, renderer: ChatRenderer, settings: RowSettings) -> TokenizedChunk:
    chunk = TokenizedChunk(rows.file, rows.by_line)
    ids, masks = array("i"), bytearray()
    records: list[tuple[int, ...]] = []
    rewritten = renderer.rewritten_rows
    for raw, place in zip(rows.rows, rows.places, strict=True):
        try:
            row = parser.parse(raw, Origin(rows.path, place, rows.by_line))
            parts = _parts(row, renderer, settings, chunk.counts)
        except RowError as error:
            if not settings.skips_bad_rows:
                raise
            chunk.counts["rejected_rows"] += 1
            chunk.rejected += [error.what] * (len(chunk.rejected) < MAX_REJECTIONS)
            continue
        prompt = _digest_of_prompt(row)
        for part in parts:
            mask, tokens = bytes(part.supervised), array("i", part.input_ids)
            ids += tokens
            masks += mask
            last, content = tokens[mask.rindex(1)], xxhash.xxh3_64_intdigest(tokens.tobytes() + mask)
            records.append((len(mask), mask.count(1, 1), rows.file, place, last, prompt, content))
    chunk.counts["rewritten_rows"] = renderer.rewritten_rows - rewritten
    chunk.input_ids, chunk.supervised = ids.tobytes(), bytes(masks)
    chunk.rows = np.array(records, ROW).tobytes()
    return chunk


def _parts(row: Row, renderer: ChatRenderer, settings: RowSettings, counts: Counter[str]) -> list[Part]:
    """What is trained of a row: one part, or several of one that is too long.

    Counts: split_rows, cut_parts (that begin or end inside a turn), untrained_parts (left out).
    """
    if not isinstance(row, Conversation):
        if settings.templates:
            raise DataError(
                f"{row.origin}: the row has no question that templates of the source could vary",
                fix="remove templates from the source",
            )
        tokens = tokenize_literal(renderer, row)
        whole = _trained(Part(tokens.input_ids, tokens.supervised, is_cut=False), row)
        if settings.split_at is None or len(whole.input_ids) <= settings.split_at:
            return [whole]
        return _counted(list(split_tokens((whole.input_ids, whole.supervised), settings.split_at)), counts)
    conversation = row
    if settings.templates:
        conversation = vary_prompt(conversation, settings.templates, settings.seed)
    conversation = settings.supervision.choose(conversation)

    def render(conversation: Conversation) -> tuple[list[int], list[bool]]:
        row = renderer.render(conversation, settings.supervision)
        return row.input_ids, row.supervised

    whole = _trained(Part(*render(conversation), is_cut=False), row)
    if settings.split_at is None or len(whole.input_ids) <= settings.split_at:
        return [whole]
    return _counted(list(split_conversation(conversation, settings.split_at, render)), counts)


def _trained(part: Part, row: Row) -> Part:
    if not part.is_trained:
        raise RowError(
            f"{row.origin}: no token of the row would be trained on, every label is masked",
            fix="give the row an answer, or check that the chat template renders the assistant's turns",
        )
    return part


def _counted(parts: Sequence[Part], counts: Counter[str]) -> list[Part]:
    """The parts that have something to train."""
    trained = [part for part in parts if part.is_trained]
    counts["split_rows"] += 1
    counts["cut_parts"] += sum(part.is_cut for part in trained)
    counts["untrained_parts"] += len(parts) - len(trained)
    return trained


def _digest_of_prompt(row: Row) -> int:
    """XXH3-64 of what comes before the first trained answer."""
    digest = xxhash.xxh3_64()
    for part in prompt_of(row):
        digest.update(part)
    return digest.intdigest()


def _check_some_left(folder: Path, work: Work) -> None:
    """Raises ``DataError`` if every row of a source was rejected."""
    chunks = read_chunks(folder)
    if chunks and not any(entry["rows"] for entry in chunks):
        count = sum(entry["counts"].get("rejected_rows", 0) for entry in chunks)
        raise none_left(work.files, count, chunks[0]["rejected"][0])
