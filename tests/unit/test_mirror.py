"""Copies of checkpoints in storage of several kinds: complete or absent, whatever is interrupted there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST
from sft_dist.checkpoint.mirror import Mirror, split_url
from sft_dist.errors import CheckpointError, ConfigError
from tests.helpers.object_store import s3_server

everywhere = pytest.mark.parametrize("url", ["file", "memory", "s3"], indirect=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An URL in a bucket of a server that speaks S3."""
    with s3_server() as bucket:
        yield bucket


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.ci)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a run's mirror, where nothing is yet."""
    if request.param == "file":
        yield f"file://{tmp_path}/elsewhere/runs/x"
    elif request.param == "memory":
        yield "memory://runs/x"
        fsspec.filesystem("memory").store.clear()
    else:
        yield f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def checkpoint(output: Path, step: int, *, content: bytes = b"weights") -> Path:
    """A complete one with two shards and the settings."""
    unfinished = store.begin(output / "checkpoints", step)
    files = {f"shard-{rank}.safetensors": content * (step + rank) for rank in (1, 2)} | {"config.yaml": b"a: 1\n"}
    for name, data in files.items():
        (unfinished / name).write_bytes(data)
    records = {n: {"num_bytes": len(d), "digest": xxhash.xxh3_128(d).hexdigest()} for n, d in files.items()}
    store.write_synced(unfinished / MANIFEST, json.dumps({"format": 7, "files": records}))
    return store.commit(unfinished)


def mirror_of(url: str, **settings: Any) -> Mirror:
    return Mirror(url, **{"attempts": 3, "first_pause_s": 0.001, **settings})


def names(url: str) -> list[str]:
    """All files below a URL."""
    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return sorted(path[len(root) + 1 :] for path in system.find(root))


@everywhere
def test_what_was_uploaded_comes_back(url: str, tmp_path: Path) -> None:
    mirror = mirror_of(url)
    mirror.prove_writable()
    assert mirror.complete() == []
    first, second = checkpoint(tmp_path, 9), checkpoint(tmp_path, 100)
    mirror.upload(second)
    mirror.upload(first)
    assert mirror.complete() == [9, 100]
    fetched = mirror_of(url).fetch(100, tmp_path / "other/checkpoints")
    assert fetched == tmp_path / "other/checkpoints/step-00000100"
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}
    assert list(fetched.parent.iterdir()) == [fetched]
    assert len(names(url)) == 8, "no probe is left"


@everywhere
def test_a_copy_without_its_manifest_is_absent(url: str, tmp_path: Path) -> None:
    """As a process leaves it that is killed between the files and the manifest."""
    mirror, local = mirror_of(url), checkpoint(tmp_path, 1)
    mirror.upload_files(local, ["shard-1.safetensors", "shard-2.safetensors", "config.yaml"])
    assert mirror.complete() == []
    with pytest.raises(CheckpointError, match="step-00000001 is not a complete checkpoint"):
        mirror.fetch(1, tmp_path / "other")
    mirror.commit(local)
    assert mirror.complete() == [1]


def test_a_manifest_waits_for_all_files(url: str, tmp_path: Path) -> None:
    mirror, local = mirror_of(url), checkpoint(tmp_path, 1)
    mirror.upload_files(local, ["shard-1.safetensors", "config.yaml"])
    with pytest.raises(CheckpointError, match=r"cannot be completed \(shard-2.safetensors is missing\)"):
        mirror.commit(local)
    assert mirror.complete() == []


def test_a_copy_that_is_written_again_is_absent_meanwhile(url: str, tmp_path: Path) -> None:
    """Files of two tries with the same sizes must not pass for one checkpoint."""
    mirror = mirror_of(url)
    mirror.upload(checkpoint(tmp_path / "a", 3))
    again = checkpoint(tmp_path / "b", 3, content=b"WEIGHTS")
    mirror.upload_files(again, ["shard-1.safetensors"])
    assert mirror.complete() == []
    mirror.upload(again)
    fetched = mirror.fetch(3, tmp_path / "c")
    assert (fetched / "shard-2.safetensors").read_bytes() == b"WEIGHTS" * 5


@pytest.mark.parametrize("damage", ["truncated", "absent", "manifest truncated"])
def test_a_copy_of_another_size_is_not_taken(url: str, tmp_path: Path, damage: str) -> None:
    mirror = mirror_of(url)
    mirror.upload(checkpoint(tmp_path, 1))
    mirror.upload(checkpoint(tmp_path, 2))
    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    victim = f"{root}/step-00000002/" + (MANIFEST if damage.startswith("manifest") else "shard-2.safetensors")
    content = system.cat_file(victim)
    system.rm_file(victim) if damage == "absent" else system.pipe_file(victim, content[:-1])
    assert mirror.complete() == [1]


def test_a_flipped_bit_is_found_when_it_is_fetched(url: str, tmp_path: Path) -> None:
    mirror = mirror_of(url)
    mirror.upload(checkpoint(tmp_path, 2))
    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    system.pipe_file(f"{root}/step-00000002/shard-2.safetensors", b"weighTs" + b"weights" * 3)
    assert mirror.complete() == [2]
    with pytest.raises(
        CheckpointError, match=r"step-00000002 is damaged: shard-2.safetensors is not the file that was"
    ):
        mirror.fetch(2, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == [], "nothing half fetched is left"


def test_a_deletion_takes_one_copy_whole(url: str, tmp_path: Path) -> None:
    mirror = mirror_of(url)
    for step in (10_000_000, 100_000_000):  # the name of one begins with that of the other
        mirror.upload(checkpoint(tmp_path, step, content=b""))
    mirror.delete(10_000_000)
    assert mirror.complete() == [100_000_000]
    assert {name.partition("/")[0] for name in names(url)} == {"step-100000000"}
    mirror.delete(10_000_000)


def test_half_a_deletion_leaves_nothing_that_looks_complete(url: str, tmp_path: Path, monkeypatch: Any) -> None:
    mirror = mirror_of(url)
    mirror.upload(checkpoint(tmp_path, 1))
    remove = mirror._objects.remove

    def end_after_the_manifest(path: str) -> None:
        if not path.endswith(MANIFEST):
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(mirror._objects, "remove", end_after_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        mirror.delete(1)
    assert mirror_of(url).complete() == []
    assert len(names(url)) == 3


def test_it_follows_the_folder(url: str, tmp_path: Path) -> None:
    mirror, folder = mirror_of(url), tmp_path / "checkpoints"
    first = checkpoint(tmp_path, 1)
    assert mirror.follow(folder) == [1]
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 3)
    mirror.upload_files(folder / "step-00000003", ["shard-1.safetensors"])
    store.delete(first)
    assert mirror.follow(folder) == [3, 2], "what is missing or half there, the newest first"
    assert mirror.complete() == [2, 3]
    assert {name.partition("/")[0] for name in names(url)} == {"step-00000002", "step-00000003"}
    assert mirror.follow(folder) == []
    assert mirror.follow(tmp_path / "empty") == []
    assert mirror.complete() == [2, 3], "a folder that was lost takes nothing with it"


def test_another_checkpoint_of_the_same_step_replaces_the_copy(url: str, tmp_path: Path) -> None:
    mirror = mirror_of(url)
    mirror.upload(checkpoint(tmp_path / "a", 3))
    checkpoint(tmp_path / "b", 3, content=b"WEIGHTS")
    assert mirror.follow(tmp_path / "b/checkpoints") == [3]
    assert (mirror.fetch(3, tmp_path / "c") / "shard-1.safetensors").read_bytes() == b"WEIGHTS" * 4


def test_ranks_share_the_work(url: str, tmp_path: Path) -> None:
    mirror, local = mirror_of(url), checkpoint(tmp_path, 5)
    parts = (["shard-1.safetensors"], ["shard-2.safetensors", "config.yaml"])
    threads = [threading.Thread(target=mirror.upload_files, args=(local, part)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mirror.commit(local)
    assert mirror.complete() == [5]


class Unreliable:
    """A file system whose ``put_file`` fails so many times first."""

    def __init__(self, system: Any, failures: int, error: Exception) -> None:
        self.system, self.failures, self.error = system, failures, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)

    def put_file(self, *paths: str) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error
        self.system.put_file(*paths)


@pytest.mark.parametrize(
    ("failures", "error", "left"),
    [(2, OSError("connection reset"), None), (3, OSError("connection reset"), 0), (9, PermissionError("denied"), 8)],
)
def test_what_may_pass_is_tried_again(
    tmp_path: Path, monkeypatch: Any, failures: int, error: Exception, left: int | None
) -> None:
    mirror = mirror_of("memory://unreliable")
    system = Unreliable(mirror._objects._system, failures, error)
    monkeypatch.setattr(mirror._objects, "_system", system)
    local = checkpoint(tmp_path, 1)
    if left is None:
        mirror.upload(local)
        assert mirror.complete() == [1]
        return
    with pytest.raises(CheckpointError) as caught:
        mirror.upload(local)
    assert caught.value.what == (
        f"memory://unreliable: cannot copy {local}/config.yaml ({type(error).__name__}: {error})"
    )
    assert caught.value.fix == "check the network, your credentials and the room there"
    assert system.failures == left, "three attempts, but only one where another would not help"


def test_a_mistake_in_the_url_is_told(s3: str, tmp_path: Path) -> None:
    (tmp_path / "occupied").touch()
    for url, what, fix in (
        ("nowhere://a/b", r"nowhere://a/b: nowhere:// is no storage that is known", "use s3://"),
        ("gs://a/b", r"gs://a/b: gs:// needs a package", "pip install gcsfs$"),
        ("s3://no-such-bucket/x", r"checkpoint\.mirror: s3://no-such-bucket/x: cannot write to it .*bucket", "credentials"),
        (f"file://{tmp_path}/occupied/x", r"cannot write to it \((NotADirectory|FileExists)Error", "checkpoint.mirror to"),
        ("http://127.0.0.1:9/x", r"cannot write to it \(ClientConnectorError", "to null"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{what}(.|\n)*{fix}"):
            mirror_of(url).prove_writable()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://b/runs/x/step-00000100", ("s3://b/runs/x", 100)),
        ("s3://b/runs/x/step-00000100/", ("s3://b/runs/x", 100)),
        ("s3://b/runs/x", None),
        ("s3://b/runs/x/step-00000100.unfinished", None),
    ],
)
def test_the_url_of_a_copy(url: str, expected: tuple[str, int] | None) -> None:
    assert split_url(url) == expected
