"""Datasets of the hub: which files a split has, and fetching them over HTTP from a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.hub_dataset import check_in_cache, data_files, dataset_files, is_dataset_id
from sft_dist.data.sources import check_source, source_files
from sft_dist.errors import ConfigError, DataError
from tests.helpers.fake_hub import COMMIT, FakeHub

TOKEN = "hf_averysecrettokenofthistest"


def source(**keys: str) -> SourceConfig:
    return SourceConfig.model_validate({"path": "org/chat", **keys})


@pytest.mark.parametrize("path", ["org/name", "Org-1/a.b_c-v1.5", "user/data"])
def test_what_is_a_dataset(path: str) -> None:
    assert is_dataset_id(path)


@pytest.mark.parametrize(
    "path",
    ["rows.jsonl", "data/rows.jsonl", "data/rows.gz", "a/b/c", "./a/b", "~/a", "data/*", "-a/b", "a/b c", "日/本"],
)
def test_what_is_none(path: str) -> None:
    assert not is_dataset_id(path)


def test_what_is_here_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_dataset_id("org/chat")
    (tmp_path / "org/chat").mkdir(parents=True)
    (tmp_path / "org/chat/rows.jsonl").write_text("{}")
    assert source_files(source()) == ["org/chat/rows.jsonl"]
    for key in ("split", "subset", "revision"):
        with pytest.raises(ConfigError, match=f"{key} of org/chat has no effect") as raised:
            check_source(source(**{key: "x"}))
        assert raised.value.fix == f"remove {key}, or correct path"


README = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: "english/*.jsonl"}
  - {split: test, path: english/held_out.json}
- config_name: ja
  default: true
  data_files: [{split: train, path: [ja-b.csv, ja-a.csv]}]
---
# Chat
"""


@pytest.mark.parametrize(
    ("names", "readme", "keys", "expected"),
    [
        (["train.jsonl", "test.jsonl", "README.md"], None, {}, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], None, {"split": "test"}, ["test.jsonl"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         None, {}, ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (["validation/a.json", "train/b.json", "train/a.json"], None, {}, ["train/a.json", "train/b.json"]),
        (["validation/a.json", "train/b.json"], None, {"split": "validation"}, ["validation/a.json"]),
        (["rows.csv", "images.zip", ".gitattributes"], None, {"subset": "default"}, ["rows.csv"]),
        (["english/b.jsonl", "english/a.jsonl", "english/held_out.json", "ja-a.csv", "ja-b.csv"], README, {"subset": "en"},
         ["english/a.jsonl", "english/b.jsonl"]),
        (["english/a.jsonl", "english/held_out.json", "ja-a.csv", "ja-b.csv"], README, {"subset": "en", "split": "test"},
         ["english/held_out.json"]),
        (["english/a.jsonl", "english/held_out.json", "ja-a.csv", "ja-b.csv"], README, {}, ["ja-b.csv", "ja-a.csv"]),
        (["train.txt"], None, {"format": "text"}, ["train.txt"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(
    tmp_path: Path, names: list[str], readme: str | None, keys: dict[str, str], expected: list[str]
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    assert data_files(names, tmp_path, source(**keys)) == expected


@pytest.mark.parametrize(
    ("names", "readme", "keys", "what", "fix"),
    [
        (["train.jsonl", "test.jsonl"], None, {"split": "tset"}, "has no split tset, but train, test", "to test"),
        (["a.jsonl"], None, {"subset": "en"}, "has no subset en, but default", "`subset` of the source to default"),
        (
            ["english/a.jsonl", "english/held_out.json"],
            README.replace("  default: true\n", ""),
            {},
            "has the subsets en, ja",
            "choose one",
        ),
        (["chat.py"], None, {}, "no data files are found in it", "hf://datasets/org/chat/FILE"),
        (["train.txt"], None, {}, "train.txt is no file of rows", ".parquet"),
        (["a.jsonl"], "---\nconfigs: [\n---\n", {}, "no data files are found in it", "hf://"),
        (["../../outside.jsonl"], None, {}, "no data files are found in it", "hf://"),
    ],
)
def test_what_a_dataset_has_not(
    tmp_path: Path, names: list[str], readme: str | None, keys: dict[str, str], what: str, fix: str
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        data_files(names, tmp_path, source(**keys))
    assert raised.value.what.startswith("org/chat")
    assert what in raised.value.what
    assert fix in raised.value.fix


def test_offline_and_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for look in (check_in_cache, dataset_files):
        with pytest.raises(
            DataError, match=r"no file or folder org/chat here, and .* not in the local hub cache"
        ) as raised:
            look(source())
        assert "sft-dist data prepare" in raised.value.fix
        assert "HF_TOKEN" in raised.value.fix


def row(name: str) -> str:
    return json.dumps({"prompt": "Hi", "completion": name}) + "\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("dataset")
    for name in ("data/train-[1].jsonl", "data/train-[2].jsonl", "data/test-1.jsonl", "images/cat.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(row(name))
    (folder / "README.md").write_text("# Chat")
    with FakeHub(folder, name="org/chat", kind="datasets") as served:
        yield served


Read = Callable[..., list[str]]

# Reads sources in a process of its own: that of the tests has imported huggingface_hub with HF_HUB_OFFLINE.
READ = """
import json, sys
from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.sources import check_source, read_source
from sft_dist.errors import SftError
for line in sys.stdin:
    source = SourceConfig.model_validate_json(line)
    try:
        check_source(source)
        found = [row.messages[-1].content for row in read_source(source)]
    except SftError as error:
        found = [type(error).__name__, error.what, error.fix]
    print(json.dumps(found), flush=True)
"""


@contextmanager
def reader(hub: FakeHub, home: Path, **environment: str) -> Iterator[Read]:
    """``read(**keys of the source)``: the answers of its rows, or the error's name, what and fix."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN} | environment
    with (home / f"stderr{len(environment)}").open("w+") as said, subprocess.Popen(
        [sys.executable, "-c", READ], env=env, cwd=home, text=True, stdin=PIPE, stdout=PIPE, stderr=said
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def read(**keys: str) -> list[str]:
            print(source(**keys).model_dump_json(), file=process.stdin, flush=True)
            line = process.stdout.readline()  # type: ignore[union-attr]
            said.seek(0)
            assert line, said.read()
            assert TOKEN not in line + said.read()
            found: list[str] = json.loads(line)
            return found

        yield read
        process.stdin.close()


@pytest.fixture(scope="module")
def online(hub: FakeHub, home: Path) -> Iterator[Read]:
    with reader(hub, home) as read:
        yield read


@pytest.fixture(scope="module")
def offline(hub: FakeHub, home: Path) -> Iterator[Read]:
    with reader(hub, home, HF_HUB_OFFLINE="1") as read:
        yield read


TRAIN = ["data/train-[1].jsonl", "data/train-[2].jsonl"]


def test_a_split_is_fetched_once_and_read_offline(hub: FakeHub, home: Path, online: Read, offline: Read) -> None:
    assert online() == TRAIN
    assert set(hub.served) == {*TRAIN, "README.md"}, "and nothing else"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    before = hub.requests
    assert offline() == offline(revision=COMMIT) == online() == TRAIN
    kind, what, _ = offline(split="test")
    assert kind == "DataError"
    assert "not all of its split test" in what
    assert hub.requests == before, "what is there is not asked for again"
    hub.served.clear()
    assert online(split="test", revision="v1") == ["data/test-1.jsonl"]
    assert set(hub.served) == {"data/test-1.jsonl"}
    no_revision = "org/chat (revision v2): there is no such revision"
    assert online(revision="v2") == ["DataError", no_revision, "give a branch, a tag or a commit"]
    # A file that was lost, as after a copy of a part of the cache.
    (home / f"hub/datasets--org--chat/snapshots/{COMMIT}/{TRAIN[1]}").unlink()
    assert offline()[0] == "DataError"
    assert online() == TRAIN


@pytest.mark.parametrize(
    ("status", "error_code", "what", "fix"),
    [
        (403, "GatedRepo", "org/other is gated", "set HF_TOKEN"),
        (401, "RepoNotFound", "no such dataset on the hub, or it is private", "HF_TOKEN"),
        (403, None, "the hub does not accept the token", "HF_TOKEN"),
        (404, "RepoNotFound", "no such dataset on the hub", "correct the path"),
        (500, None, "org/other: the hub answered 500", "later"),
    ],
)
def test_what_the_hub_refuses(
    hub: FakeHub, online: Read, status: int, error_code: str | None, what: str, fix: str
) -> None:
    hub.status, hub.error_code = status, error_code
    try:
        kind, found_what, found_fix = online(path="org/other")
    finally:
        hub.status, hub.error_code = 200, None
    assert kind == "DataError"
    assert what in found_what
    assert fix in found_fix


def test_no_way_to_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    with reader(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") as read:
        kind, what, fix = read()
    assert kind == "DataError"
    assert "no file or folder org/chat here, and the hub was not reached" in what
    assert "sft-dist data prepare" in fix
