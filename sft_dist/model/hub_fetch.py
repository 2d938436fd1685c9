"""A model of the Hugging Face hub, brought into the local hub cache: once, by ``sft-dist model fetch``.

Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from sft_dist.errors import CheckpointError, ConfigError, SftError
from sft_dist.model.hub import CONFIG_FILE, WEIGHTS, named, not_an_id, weight_files

CONFIG_FILES = (CONFIG_FILE, "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
INDEX = f"{WEIGHTS}.index.json"

PARALLEL_FILES = 4
READ_BYTES = 1 << 24
# Between two lines about a fetch in a file.
LINE_EVERY_S = 30.0
GB = 1e9


@dataclass(frozen=True)
class Fetched:
    """What ``fetch`` brought.

    Args:
        folder: the snapshot in the hub cache.
        new_bytes: bytes that were not here before.
    """

    folder: Path
    new_bytes: int


def fetch(path: str, revision: str | None, *, weights: bool = True, say: Callable[[str], None] = print) -> Fetched:
    """Brings what training needs of a hub model into the local hub cache: configuration, tokenizer, safetensors.

    One process at a time; another one waits. What an interrupted fetch left is gone on with, in the middle of a file
    too. The token is huggingface_hub's own: ``HF_TOKEN``, or that of ``hf auth login``; it is sent and never shown.

    Args:
        weights: without them it is enough to check, plan and prepare data.
        say: gets one line for each thing worth telling.

    Raises:
        ConfigError: no such model or revision, a licence to be accepted, a token that is not taken, offline mode.
        CheckpointError: the hub does not answer, the disk is full, a file arrives damaged.
    """
    if is_offline_mode():
        raise ConfigError(
            f"HF_HUB_OFFLINE is set: {path} cannot be fetched", fix="unset HF_HUB_OFFLINE, on a machine that is online"
        )
    with _answers(path, revision), _only_one(path, say):
        info = model_info(path, revision=revision)
        commit, files = info.sha, {file.rfilename for file in info.siblings or ()}
        assert commit is not None
        if weights and WEIGHTS not in files and INDEX not in files:
            raise ConfigError(
                f"model.path: {named(path, revision)} has no {WEIGHTS}, only other formats",
                fix="choose a model in safetensors format, or convert it with save_pretrained",
            )
        # Named by the branch, so that the cache knows which commit the branch is.
        small = [*CONFIG_FILES, *TOKENIZER_FILES, *([INDEX] if weights else [])]
        folder = Path(_quiet_snapshot(path, revision, small))
        if not weights:
            return Fetched(folder, 0)
        names = [WEIGHTS] if WEIGHTS in files else weight_files(folder)
        new_bytes = _fetch_weights(path, commit, names, say)
        _quiet_snapshot(path, commit, names)  # links the files into the snapshot
        return Fetched(folder, new_bytes)


def _quiet_snapshot(path: str, revision: str | None, names: list[str]) -> str:
    disable_progress_bars()  # of files that take a moment
    try:
        return snapshot_download(path, revision=revision, allow_patterns=names)
    finally:
        enable_progress_bars()


@dataclass(frozen=True)
class _Blob:
    """A file of the hub and where the cache keeps it: under its digest, the snapshot links there."""

    name: str
    url: str
    path: Path
    size: int

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def partial_bytes(self) -> int:
        try:
            return self.partial.stat().st_size
        except FileNotFoundError:  # not begun, or whole and renamed
            return 0


def _fetch_weights(path: str, commit: str, names: list[str], say: Callable[[str], None]) -> int:
    """Bytes that came. snapshot_download deletes a file that did not come whole; of 140 GB that would be a day."""
    blobs = [blob for blob in _blobs(path, commit, names) if not blob.path.exists()]
    new_bytes = sum(blob.size - blob.partial_bytes for blob in blobs)
    if not blobs:
        return 0
    cache = blobs[0].path.parent
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if new_bytes > free:
        raise _no_space(path, f"{new_bytes / GB:,.1f} GB are to come, {free / GB:,.1f} GB are free")
    kept = sum(blob.partial_bytes for blob in blobs)
    going_on = f", going on after {kept / GB:,.3f} GB" if kept else ""
    say(f"fetching {len(blobs)} of {len(names)} weight files, {new_bytes / GB:,.3f} GB{going_on}")
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        fetches = [pool.submit(_fetch_blob, blob) for blob in blobs]
        _watch(fetches, blobs, say)
    return new_bytes


def _watch(fetches: list[Future[None]], blobs: list[_Blob], say: Callable[[str], None]) -> None:
    """Waits for all; where no bar of ``http_get`` moves, tells how far they are. Raises what one of them raised."""
    total, started, before = sum(blob.size for blob in blobs), time.monotonic(), _here(blobs)
    silent_s = None if sys.stderr.isatty() else LINE_EVERY_S
    try:
        while True:
            done, left = wait(fetches, silent_s, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
            if not left:
                return
            here, seconds = _here(blobs), time.monotonic() - started
            say(f"{here / GB:,.3f} of {total / GB:,.3f} GB, {(here - before) / seconds / 1e6:,.1f} MB/s")
    finally:
        for each in fetches:
            each.cancel()


def _here(blobs: list[_Blob]) -> int:
    """Bytes of them that have come."""
    return sum(blob.size if blob.path.exists() else blob.partial_bytes for blob in blobs)


def _blobs(path: str, commit: str, names: list[str]) -> Iterator[_Blob]:
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="model") / "blobs"
    for name in names:
        url = hf_hub_url(path, name, revision=commit)
        metadata = get_hf_file_metadata(url, headers=build_hf_headers())
        assert metadata.etag is not None
        assert metadata.size is not None
        yield _Blob(name, url, folder / metadata.etag, metadata.size)


def _fetch_blob(blob: _Blob) -> None:
    with blob.partial.open("ab") as file:
        http_get(
            blob.url, file, resume_size=file.tell(), headers=build_hf_headers(),
            expected_size=blob.size, displayed_filename=blob.name,
        )  # fmt: skip
    # Large files are named by their SHA-256; others by a digest of git's, whose size was compared.
    if len(blob.path.name) == hashlib.sha256().digest_size * 2 and _sha256(blob.partial) != blob.path.name:
        blob.partial.unlink()
        raise CheckpointError(
            f"model.path: {blob.name} arrived damaged (another SHA-256 than the hub's)", fix="fetch it again"
        )
    blob.partial.rename(blob.path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _only_one(path: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of this model's folder in the cache."""
    from filelock import Timeout

    name = repo_folder_name(repo_id=path, repo_type="model")
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / name / "sft-dist-fetch.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(lock, timeout=0.1):
            free = True
    except Timeout:
        free = False
    if not free:
        say(f"another process is fetching {path}: waiting for it")
    with WeakFileLock(lock):
        yield


@contextmanager
def _answers(path: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line what and one line fix. Nothing of a request is quoted."""
    try:
        yield
    except SftError:
        raise
    except HFValidationError:
        raise not_an_id(path) from None
    except RevisionNotFoundError as e:
        raise ConfigError(
            f"model.revision: {path} has no revision {revision} on {_hub()}", fix="give a branch, a tag or a commit"
        ) from e
    except GatedRepoError as e:
        raise ConfigError(
            f"model.path: {path} is gated: its authors give access to accounts that accepted its licence",
            fix=f"accept it at {constants.ENDPOINT}/{path}, then set HF_TOKEN or run: hf auth login",
        ) from e
    except RepositoryNotFoundError as e:
        raise ConfigError(
            f"model.path: there is no model {path} on {_hub()}, or it is private",
            fix="correct the id (ORGANISATION/NAME), or set HF_TOKEN to a token that may read it",
        ) from e
    except HfHubHTTPError as e:
        _by_status(path, e)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(path, "the disk is full") from e
        if isinstance(e, PermissionError | NotADirectoryError):
            raise CheckpointError(
                f"the hub cache {constants.HF_HUB_CACHE} cannot be written ({e.strerror})",
                fix="set HF_HOME to a folder you may write",
            ) from e
        raise _no_answer(path, e) from e
    except Exception as e:
        # Connections fail with the HTTP library's own exceptions, and which library that is depends on the version.
        if not type(e).__module__.partition(".")[0].startswith(("httpx", "httpcore")):
            raise
        raise _no_answer(path, e) from e


def _by_status(path: str, error: HfHubHTTPError) -> NoReturn:
    status = error.response.status_code
    if status == 401:
        raise ConfigError(
            f"model.path: {_hub()} does not accept the token", fix="correct HF_TOKEN, or run: hf auth login"
        ) from error
    if status == 403:
        raise ConfigError(
            f"model.path: the token may not read {path}", fix="give the token the right to read it, or use another one"
        ) from error
    raise CheckpointError(
        f"model.path: {_hub()} answered {status} while {path} was fetched",
        fix="run the command again later; what has come is kept",
    ) from error


def _no_answer(path: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"model.path: {_hub()} was not reached, or broke off, while {path} was fetched ({type(error).__name__})",
        fix="check the network and run the command again; what has come is kept",
    )


def _no_space(path: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not fit {constants.HF_HUB_CACHE}: {why}", fix="make room, or set HF_HOME to a folder with room"
    )


def _hub() -> str:
    """Host of the hub or its mirror, without what else the address may hold."""
    return urlsplit(constants.ENDPOINT).hostname or "the hub"
