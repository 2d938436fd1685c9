"""The cache of prepared data: made once, by whom or however often interrupted, and the same bytes each time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.config.data_schema import DataConfig
from sft_dist.data import tokenising
from sft_dist.data.cache import Cache, cache_folder
from sft_dist.data.chat_template import ChatRenderer, load_renderer
from sft_dist.data.packing import pack_in_windows
from sft_dist.data.prepare import PreparedSets, counts_of, prepare_sets
from sft_dist.data.prepared import open_prepared
from sft_dist.data.tokenising import Shard
from sft_dist.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


class Told:
    """What a display is told."""

    def __init__(self) -> None:
        self.there: list[bool] = []
        self.rows = self.tokens = 0
        self.lines: list[str] = []

    def source(self, name: str, *, is_there: bool) -> Callable[[int, int], None]:
        self.there.append(is_there)
        return self.progress

    def progress(self, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens

    def say(self, line: str) -> None:
        self.lines.append(line)


def write_rows(path: Path, number: int, *, seed: int = 0) -> None:
    words = ["alpha", "beta", "gamma", "delta", "東京", "大阪", "epsilon", "zeta", "eta", "theta"]
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            prompt, answer = (" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(2))
            row = {"prompt": f"{index}: {prompt}", "completion": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def settings(folder: Path, **data: Any) -> DataConfig:
    return DataConfig.model_validate({"train": [{"path": str(folder / "rows.jsonl")}], "max_seq_len": 256, **data})


def cache(folder: Path, base: Path, name: str = "cache", **more: Any) -> Cache:
    load: Callable[[], ChatRenderer] = partial(load_renderer, str(base), None, None)
    return Cache(folder / name, load(), load, **more)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cache but locks and digests of files, by its path."""
    files = (path for kind in ("tokens", "sets") for path in (folder / kind).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.parent.name != "locks"}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "CHUNK_ROWS", 8)
    monkeypatch.setattr("sft_dist.data.token_store.SECONDS_BETWEEN_SYNCS", 0.0)


def test_a_source_is_tokenised_once_for_all_that_reads_the_same(tmp_path: Path, tiny_base: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 30)

    def prepared(told: Told, **data: Any) -> PreparedSets:
        return prepare_sets(settings(tmp_path, **data), cache(tmp_path, tiny_base), display=told)

    first, again, longer, other = Told(), Told(), Told(), Told()
    sets = prepared(first)
    assert first.there == [False]
    assert first.rows == 30
    assert prepared(again) == sets
    assert again.there == [True]
    assert prepared(longer, max_seq_len=512, packing="none") != sets, "another set of the same tokens"
    assert longer.there == [True]
    assert prepared(Told(), num_workers=1, cache_dir="elsewhere") == sets, "where and by whom changes nothing"
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    os.utime(rows, (1, 1))
    assert prepared(Told()) == sets, "the content counts, not the time"
    rows.rename(tmp_path / "moved.jsonl")
    assert prepared(Told(), train=[{"path": str(tmp_path / "moved.jsonl")}]).train is not None
    write_rows(rows, 31)
    assert prepared(other) != sets
    assert other.there == [False]


def test_a_packing_window_keeps_the_rows_of_a_pack_together(tmp_path: Path, tiny_base: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 60)
    made = {
        window: open_prepared(
            prepare_sets(settings(tmp_path, packing_window=window), cache(tmp_path, tiny_base)).train or tmp_path
        )
        for window in (10, None)
    }
    expected = pack_in_windows(made[10].lengths, 256, window=10)
    assert [pack.tolist() for pack in made[10].packs] == [pack.tolist() for pack in expected]
    spans = {window: max(int(pack[-1] - pack[0]) for pack in data.packs) for window, data in made.items()}
    assert spans[10] < 20 < spans[None]


def test_a_template_or_format_of_its_own_is_tokenised_anew(tmp_path: Path, tiny_base: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 5)
    template = tmp_path / "other.jinja"
    template.write_text(load_renderer(str(tiny_base), None, None).tokenizer.chat_template.replace("\n", "\n\n"))
    load = partial(load_renderer, str(tiny_base), None, str(template))
    folders = {
        prepare_sets(settings(tmp_path), cache(tmp_path, tiny_base)).train,
        prepare_sets(settings(tmp_path), Cache(tmp_path / "cache", load(), load)).train,
        prepare_sets(
            settings(tmp_path, train=[{"path": str(tmp_path / "rows.jsonl"), "format": "prompt_completion"}]),
            cache(tmp_path, tiny_base),
        ).train,
    }
    assert len(folders) == 3


def test_rows_are_what_the_renderer_makes(tmp_path: Path, tiny_base: Path, small_chunks: None) -> None:
    from sft_dist.data.sources import read_source

    write_rows(tmp_path / "rows.jsonl", 30)
    data = settings(tmp_path)
    made = cache(tmp_path, tiny_base)
    folder = prepare_sets(data, made).train
    assert folder is not None
    prepared = open_prepared(folder)
    for number, conversation in enumerate(read_source(data.train[0])):
        expected, (ids, mask) = made.renderer.render(conversation), prepared.row(number)
        assert (ids.tolist(), mask.astype(bool).tolist()) == (expected.input_ids, expected.supervised)
    assert sorted(row for pack in prepared.packs for row in pack) == list(range(30))
    assert prepared.num_tokens.max() <= 256
    assert prepared.num_supervised.sum() == sum(mask[1:].sum() for _, mask in map(prepared.row, range(30)))
    special = made.renderer.special_ids
    assert prepared.occurring(special) == sorted({int(i) for i in prepared.stores[0].input_ids} & set(special))


def test_workers_and_shards_make_the_same_bytes(tmp_path: Path, tiny_base: Path, small_chunks: None) -> None:
    write_rows(tmp_path / "rows.jsonl", 100)
    data = settings(tmp_path)
    prepare_sets(data, cache(tmp_path, tiny_base, "alone"))
    expected = content(tmp_path / "alone")
    sharded = cache(tmp_path, tiny_base, "sharded")
    assert prepare_sets(data, sharded, shard=Shard(1, 3)).train is None
    assert prepare_sets(data, sharded, shard=Shard(0, 3)).train is None
    done = prepare_sets(data, sharded, shard=Shard(2, 3)).train
    assert done is not None
    assert content(tmp_path / "sharded") == expected
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("sft_dist.data.prepare.MIN_BYTES_FOR_WORKERS", 1)
        prepare_sets(data, cache(tmp_path, tiny_base, "workers", num_workers=2))
    assert content(tmp_path / "workers") == expected


def test_an_error_of_a_row_in_a_worker_names_it(
    tmp_path: Path, tiny_base: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", 40)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a"}\n')
    monkeypatch.setattr("sft_dist.data.prepare.MIN_BYTES_FOR_WORKERS", 1)
    with pytest.raises(DataError, match=r"rows.jsonl:41: "):
        prepare_sets(settings(tmp_path), cache(tmp_path, tiny_base, num_workers=1))
    assert content(tmp_path / "cache") == {}


def test_long_rows_are_counted_before_they_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    rows = [("a", "b"), ("a", "b" * 300), ("a", "b" * 400)]
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows)
    with pytest.raises(DataError) as error:
        prepare_sets(settings(tmp_path), cache(tmp_path, tiny_base))
    assert error.value.what.startswith(
        "data.train: 2 of 3 rows have more than data.max_seq_len=256 tokens, the longest 4"
    )
    assert error.value.what.endswith(f"(first: {tmp_path / 'rows.jsonl'}:2)")
    for how, rows_left in (("drop", 1), ("truncate", 3)):
        folder = prepare_sets(settings(tmp_path, over_length=how), cache(tmp_path, tiny_base)).train
        assert folder is not None
        prepared, (counts,) = open_prepared(folder), counts_of(folder).values()
        assert prepared.num_rows == counts["rows"] == rows_left
        for number in range(prepared.num_rows):
            ids, mask = prepared.row(number)
            assert len(ids) == len(mask) == prepared.lengths[number] <= 256
            assert prepared.rows["supervised"][number] == mask[1:].sum()


def forked(what: str, folder: Path, base: Path) -> list[int]:
    command = [sys.executable, "-m", "tests.helpers.forked_prepare", what, str(folder), str(base)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    told: list[int] = json.loads(done.stdout)
    return told


def test_killed_at_any_moment_it_goes_on(tmp_path: Path, tiny_base: Path, small_chunks: None) -> None:
    """Ten times ``kill -9``; then it ends, with the bytes of an undisturbed one."""
    write_rows(tmp_path / "rows.jsonl", 20_000)
    prepare_sets(settings(tmp_path), cache(tmp_path, tiny_base, "undisturbed"))
    *killed, ended, written = forked("kill", tmp_path, tiny_base)
    assert killed == [-signal.SIGPROF] * 10
    assert ended == 0
    assert 0 < written < 2500, "some was done when they were killed, and not all"
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")


def test_two_that_start_at_once_make_it_once(tmp_path: Path, tiny_base: Path, small_chunks: None) -> None:
    write_rows(tmp_path / "rows.jsonl", 1000)
    prepare_sets(settings(tmp_path), cache(tmp_path, tiny_base, "undisturbed"))
    assert forked("together", tmp_path, tiny_base) == [0, 0]
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, tiny_base: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 20000)
    below = forked("orphan", tmp_path, tiny_base)
    assert len(below) == 4
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in below):
        time.sleep(0.02)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_ten_million_rows_are_opened_at_once(tmp_path: Path, tiny_base: Path) -> None:
    """The index of a set is mapped, not read: here ten million rows of one store, whose tokens are never touched."""
    write_rows(tmp_path / "rows.jsonl", 3)
    folder = prepare_sets(settings(tmp_path), cache(tmp_path, tiny_base)).train
    assert folder is not None
    rows = np.load(folder / "rows.npy")
    many = 10_000_000
    for name, dtype in (("rows.npy", rows.dtype), ("pack_rows.npy", np.int64), ("pack_bounds.npy", np.int64)):
        large = np.lib.format.open_memmap(
            folder / name, mode="w+", dtype=dtype, shape=(many,)
        )  # holes, but for its end
        if name == "rows.npy":
            large[-1] = rows[1]
    started = time.perf_counter()
    prepared = open_prepared(folder)
    ids, _ = prepared.row(many - 1)
    assert time.perf_counter() - started < 1
    assert len(ids) == rows[1]["length"]
    assert prepared.num_sequences == many - 1


def test_what_was_prepared_from_a_url_is_found_offline(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a compute node: nothing is asked, neither for the files nor for their first row."""
    write_rows(tmp_path / "rows.jsonl", 5)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
    data, made = settings(tmp_path, train=[{"path": url}]), cache(tmp_path, tiny_base)
    try:
        online = prepare_sets(data, made)
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"there is no file at .*rows\.jsonl"):
        prepare_sets(data, made)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert prepare_sets(data, made) == online
    with pytest.raises(DataError, match=r"there is no file at .*\?other"):
        prepare_sets(settings(tmp_path, train=[{"path": url + "?other"}]), made)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*file cannot be written"):
        cache_folder(settings(tmp_path, cache_dir=str(tmp_path / "file")), "unused")
    assert cache_folder(settings(tmp_path), str(tmp_path / "runs" / "one")) == tmp_path / "runs" / "data_cache"


def test_weights_that_draw_nothing_are_told(tmp_path: Path, tiny_base: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 5)
    train = [{"path": str(tmp_path / "rows.jsonl"), "name": "few", "weight": 0.001}]
    with pytest.raises(DataError, match=r"data\.train: the weights draw none of 5 rows \(few: 0\.001\)"):
        prepare_sets(settings(tmp_path, train=train), cache(tmp_path, tiny_base))
