"""Files below a URL in object storage, or in any other place that fsspec can write. Imports no torch."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sft_dist.data.fields import said
from sft_dist.data.files import PACKAGES
from sft_dist.errors import CheckpointError, ConfigError

T = TypeVar("T")

# The pauses between attempts double: 1 + 2 + 4 + 8 seconds. The libraries below repeat single requests by themselves.
ATTEMPTS = 5
FIRST_PAUSE_S = 1.0

# Said of a place or of rights, which no repetition changes.
LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError)

FILE_SYSTEMS = ("file", "local")


class ObjectStore:
    """What is below a URL, by paths relative to it. What fails and may pass is tried again.

    May be used by several threads, as long as they work on different files.

    Args:
        url: s3://bucket/runs/x, gs://, az://, file:///mnt/...; credentials and endpoint come from where the package of
            the kind of storage looks for them.
        attempts: of each transfer before it fails for good; first_pause_s: after the first, then twice as long.

    Raises:
        ConfigError: no such kind of storage, or its package is not installed.
    """

    def __init__(self, url: str, *, attempts: int = ATTEMPTS, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self.url, self.attempts, self.first_pause_s = url.rstrip("/"), attempts, first_pause_s
        self._system, root = _file_system(self.url)
        self._root = root.rstrip("/")

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine's file systems; None: elsewhere."""
        return Path(self._root) if self.url.partition("://")[0] in FILE_SYSTEMS else None

    def prove_writable(self) -> None:
        """Writes a small object and removes it.

        Raises:
            CheckpointError: that fails.
        """
        probe = f"{self._root}/.probe-{uuid.uuid4().hex}"

        def write() -> None:
            self._make_parent(probe)
            self._system.pipe_file(probe, b"probe")

        self._attempt("write to it", write)
        self._attempt("delete from it", lambda: self._system.rm_file(probe))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is there.

        Raises:
            CheckpointError: the storage does not answer.
        """

        def find() -> dict[str, dict[str, Any]]:
            self._system.invalidate_cache()
            try:
                found: dict[str, dict[str, Any]] = self._system.find(self._root, detail=True)
            except FileNotFoundError:
                return {}  # some kinds of storage say so where there is nothing yet
            return found

        found = self._attempt("list it", find)
        return {path[len(self._root) + 1 :]: int(info["size"]) for path, info in found.items()}

    def read(self, path: str) -> bytes | None:
        """The contents of a small file; None: it was deleted meanwhile. Raises ``CheckpointError``."""

        def read() -> bytes | None:
            try:
                return bytes(self._system.cat_file(self._at(path)))
            except FileNotFoundError:
                return None

        return self._attempt(f"read {self.url}/{path}", read)

    def put(self, local: Path, path: str) -> None:
        """Copies a file there, and looks whether all of it arrived. Raises ``CheckpointError``."""

        def put() -> None:
            self._make_parent(self._at(path))
            self._system.put_file(str(local), self._at(path))
            self._system.invalidate_cache()
            size = self._system.info(self._at(path))["size"]
            if size != local.stat().st_size:
                raise OSError(f"{size} bytes of {local.stat().st_size} arrived")

        self._attempt(f"copy {local}", put)

    def get(self, path: str, local: Path) -> None:
        """Copies a file from there. Raises ``CheckpointError``."""
        self._attempt(f"fetch {self.url}/{path}", lambda: self._system.get_file(self._at(path), str(local)))

    def remove(self, path: str) -> None:
        """Deletes a file or all that is below a path, if there is any. Raises ``CheckpointError``."""

        def remove() -> None:
            if self._system.exists(self._at(path)):
                self._system.rm(self._at(path), recursive=True)

        self._attempt(f"delete {self.url}/{path}", remove)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _make_parent(self, path: str) -> None:
        # Only where folders exist: asked of an object store this may create a bucket.
        if self.folder is not None:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _attempt(self, doing: str, action: Callable[[], T]) -> T:
        """What ``action`` returns, tried again after a failure that may pass.

        Raises:
            CheckpointError: it does not.
        """
        for number in range(self.attempts):
            try:
                return action()
            except Exception as error:  # each kind of storage has its own
                if isinstance(error, LASTING) or number + 1 == self.attempts:
                    raise failed(f"{self.url}: cannot {doing}", f"{type(error).__name__}: {said(error)}") from error
            time.sleep(self.first_pause_s * 2**number)
        raise AssertionError("attempts is less than 1")


def failed(doing: str, why: str) -> CheckpointError:
    return CheckpointError(f"{doing} ({why})", fix="check the network, your credentials and the room there")


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    try:
        # One of its own, without memory of what was listed: others write there too.
        system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as e:
        package = PACKAGES.get(scheme, f"fsspec[{scheme}]")
        raise ConfigError(f"{url}: {scheme}:// needs a package", fix=f"pip install {package}") from e
    except ValueError as e:
        raise ConfigError(
            f"{url}: {scheme}:// is no storage that is known", fix="use s3://, gs://, az:// or file:///"
        ) from e
    return system, root
