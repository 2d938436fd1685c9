"""A token store that was interrupted, damaged at its end, cut into shards or made of several files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.config.data_schema import DataConfig
from sft_dist.data import tokenising
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.prepare import Tokenised, prepare_set, prepare_sets, tokenise_sources
from sft_dist.data.prepared import open_prepared
from sft_dist.data.token_store import CHUNKS, IDS, MASK, MAX_REJECTIONS, ROWS
from sft_dist.data.tokenising import Shard
from sft_dist.train.data import told_of_rows
from tests.helpers.templates import MISTRAL, build_tokenizer


def load() -> ChatRenderer:
    return ChatRenderer(build_tokenizer("mistral", MISTRAL))


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return load()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "CHUNK_ROWS", 4)
    monkeypatch.setattr("sft_dist.data.token_store.SECONDS_BETWEEN_SYNCS", -1.0)


def two_files(folder: Path) -> DataConfig:
    """Lines of one file and elements of another's array; the first ends inside a chunk, and two rows are bad."""
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(23)]
    rows[3], rows[20] = {"prompt": "no answer"}, {"prompt": "nor here"}
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    (folder / "rows" / "b.json").write_text(json.dumps(rows[10:]))
    return DataConfig.model_validate({"train": [{"path": str(folder / "rows")}], "on_bad_row": "skip"})


def tokenised(data: DataConfig, cache: Cache, **more: Any) -> Tokenised:
    (made,) = tokenise_sources(data, cache, **more) or ()
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stopped(Exception):
    pass


class Stopping:
    """Counts rows, and stops the work after so many of them, as Ctrl-C would."""

    def __init__(self, after_rows: float = float("inf")) -> None:
        self.rows, self.after_rows = 0, after_rows

    def source(self, name: str, *, is_there: bool) -> Any:
        return self.progress

    def progress(self, rows: int, tokens: int) -> None:
        self.rows += rows
        if self.rows >= self.after_rows:
            raise Stopped

    def say(self, line: str) -> None:
        pass


@pytest.mark.parametrize("after_rows", [3, 9, 13, 21])
def test_what_was_stopped_goes_on_behind_its_last_whole_chunk(
    tmp_path: Path, renderer: ChatRenderer, after_rows: int
) -> None:
    """Also with an end that did not reach the disk whole, and in the second of two files."""
    data = two_files(tmp_path)
    expected = tokenised(data, Cache(tmp_path / "undisturbed", renderer, load)).work.folder
    cache = Cache(tmp_path / "cache", renderer, load)
    with pytest.raises(Stopped):
        tokenised(data, cache, display=Stopping(after_rows))
    (part,) = (tmp_path / "cache" / "tokens").glob("*.building/*")
    for name, torn in ((IDS, b"\1\2\3"), (MASK, b"\1"), (ROWS, b"\0" * 50), (CHUNKS, b'{"chunk": 7, "tok')):
        with (part / name).open("ab") as file:
            file.write(torn)
    again = Stopping()
    made = tokenised(data, cache, display=again)
    assert content(made.work.folder) == content(expected)
    assert again.rows == len(made.named.store.rows) == 21, "the display counts what was there before"


def test_shards_of_several_files_make_the_store_of_one_machine(tmp_path: Path, renderer: ChatRenderer) -> None:
    data = two_files(tmp_path)
    expected = tokenised(data, Cache(tmp_path / "alone", renderer, load)).work.folder
    cache = Cache(tmp_path / "cache", renderer, load)
    assert tokenise_sources(data, cache, shard=Shard(1, 2)) is None
    made = tokenised(data, cache, shard=Shard(0, 2))
    assert content(made.work.folder) == content(expected)
    assert [path.name for path in made.work.folder.parent.iterdir() if path.name != "locks"] == [expected.name]
    store = made.named.store
    assert [store.origin(row).removeprefix(f"{tmp_path}/rows/") for row in range(len(store.rows))] == [
        *(f"a.jsonl:{n}" for n in range(1, 11) if n != 4),
        *(f"b.json row {n}" for n in range(1, 14) if n != 11),
    ]
    assert store.meta["counts"] == {"rejected_rows": 2}
    assert [what.partition(": ")[0].removeprefix(f"{tmp_path}/rows/") for what in store.meta["rejected"]] == [
        "a.jsonl:4",
        "b.json row 11",
    ]


def test_few_of_many_rejected_rows_are_kept_and_all_are_counted(tmp_path: Path, renderer: ChatRenderer) -> None:
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "c"}
    paths = [tmp_path / f"{name}.jsonl" for name in "xy"]
    for path in paths:
        path.write_text("".join(json.dumps(row) + "\n" for row in [good, *[bad] * 30]))
    sources = [{"path": str(path)} for path in paths]
    data = DataConfig.model_validate({"train": sources, "on_bad_row": "skip"})
    made = tokenise_sources(data, Cache(tmp_path / "cache", renderer, load)) or []
    assert [len(each.named.store.meta["rejected"]) for each in made] == [MAX_REJECTIONS] * 2
    folder = prepare_sets(data, Cache(tmp_path / "cache", renderer, load)).train
    assert folder is not None
    head, first, *_, more = told_of_rows(folder, data)
    assert head.startswith("60 rows rejected")
    assert f"{paths[0]}:2: " in first
    assert more == "... and 55 more"


def literal(path: Path, *trained: bool) -> None:
    """One row of three segments."""
    segments = [{"text": text, "train": on} for text, on in zip("abc", trained, strict=True)]
    path.write_text(json.dumps({"segments": segments}) + "\n")


def test_the_digest_of_a_set_is_of_its_tokens_and_masks(tmp_path: Path, renderer: ChatRenderer) -> None:
    """By it a resumed run knows that it goes on with the data it began with."""
    path, cache = tmp_path / "rows.jsonl", Cache(tmp_path / "cache", renderer, load)
    data = DataConfig.model_validate({"train": [{"path": str(path)}]})
    digests, kept = [], []
    for text in ("second", "third", "other"):
        literal(path, False, text != "third", text == "third")
        if text == "other":
            path.write_text(path.read_text().replace('"b"', '"d"'))
        prepared = open_prepared(prepare_set(data, cache) or tmp_path)
        digests.append(prepared.digest)
        kept.append(np.array(prepared.rows).tobytes())
    assert len(set(kept)) == 1, "the records of rows alone would be the same"
    assert len(set(digests)) == 3


def test_the_digest_of_a_set_is_of_its_packs_too(tmp_path: Path, renderer: ChatRenderer) -> None:
    data, cache = two_files(tmp_path), Cache(tmp_path / "cache", renderer, load)
    made = [
        open_prepared(prepare_set(data.model_copy(update={"packing": packing}), cache) or tmp_path)
        for packing in ("none", "best_fit")
    ]
    assert made[0].rows.tobytes() == made[1].rows.tobytes()
    assert made[0].digest != made[1].digest


def test_the_first_token_of_a_row_is_never_counted_as_trained(tmp_path: Path, renderer: ChatRenderer) -> None:
    """Nothing predicts it, and a loss that were divided by it would be too low."""
    path, data = tmp_path / "rows.jsonl", two_files(tmp_path)
    path.write_text(json.dumps({"input_ids": [5, 6, 7], "labels": [5, -100, 7]}) + "\n")
    source = data.train[0].model_copy(update={"path": str(path)})
    data = data.model_copy(update={"train": [source]})
    prepared = open_prepared(prepare_set(data, Cache(tmp_path / "cache", renderer, load)) or tmp_path)
    assert prepared.row(0)[1].tolist() == [1, 0, 1]
    assert prepared.num_supervised.tolist() == [1]


def test_an_unfinished_set_is_made_anew(tmp_path: Path, renderer: ChatRenderer) -> None:
    """As after a kill while the rows were chosen."""
    path, cache = tmp_path / "rows.jsonl", partial(Cache, renderer=renderer, load=load)
    literal(path, False, True, True)
    data = DataConfig.model_validate({"train": [{"path": str(path)}]})
    expected = prepare_set(data, cache(tmp_path / "undisturbed"))
    assert expected is not None
    unfinished = tmp_path / "cache" / "sets" / f"{expected.name}.building"
    unfinished.mkdir(parents=True)
    (unfinished / "rows.npy").write_bytes(b"half of it")
    made = prepare_set(data, cache(tmp_path / "cache"))
    assert made is not None
    assert content(made).keys() == content(expected).keys()
    assert open_prepared(made).digest == open_prepared(expected).digest
    assert not unfinished.exists()


def test_columns_and_what_a_file_is_make_a_store_of_its_own(tmp_path: Path, renderer: ChatRenderer) -> None:
    """The same bytes, read in another way, in one cache."""
    row = {"question": "a", "short": "b", "long": "c", "text": "d"}
    path, cache = tmp_path / "rows.jsonl", Cache(tmp_path / "cache", renderer, load)
    for each in (path, path.with_suffix(".txt")):
        each.write_text(json.dumps(row) + "\n")
    sources: list[dict[str, Any]] = [
        *({"path": str(path), "format": "prompt_completion", "columns": {"prompt": "question", "completion": answer}}
          for answer in ("short", "long")),
        *({"path": str(each), "format": "text"} for each in (path, path.with_suffix(".txt"))),
    ]  # fmt: skip
    made = [tokenised(DataConfig.model_validate({"train": [source]}), cache) for source in sources]
    assert len({each.named.store.input_ids.tobytes() for each in made}) == 4
