"""Datasets of the Hugging Face hub: the files of one split, fetched once into the local hub cache and read from there.

Which files a split has is decided by ``datasets``' own rules: the ``configs`` in the dataset's README, else the names
of its files and folders. What is in the cache is used without asking the hub, as models are; a dataset that changed is
read anew by naming its ``revision``.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.files import COMPRESSED, DOCUMENTS, ENDINGS, ending
from sft_dist.errors import DataError, SftError

if TYPE_CHECKING:
    from datasets import BuilderConfig
    from huggingface_hub.errors import HfHubHTTPError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# Where a dataset says which files its splits have.
CARDS = ["README.md", ".huggingface.yaml"]
DEFAULT_SPLIT = "train"


def is_dataset_id(path: str) -> bool:
    """Whether ``path`` can only be a dataset's id: OWNER/NAME, not the name of a data file, and nothing here has it."""
    is_data_file = ending(path) in ENDINGS + DOCUMENTS or path.lower().endswith(COMPRESSED)
    return _ID.fullmatch(path) is not None and not is_data_file and not os.path.exists(path)


def check_in_cache(source: SourceConfig) -> None:
    """Raises ``DataError`` if nothing of the dataset is in the local hub cache and the hub must not be asked."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode() and _snapshot(source) is None:
        raise _not_here(source)


def dataset_files(source: SourceConfig) -> list[str]:
    """Paths of the files of the dataset's split, in ``datasets``' order; fetched if one is not in the local hub cache.

    Raises:
        DataError: it is not in the cache and the hub does not give it; it has no such subset or split, or its files
            are not of a kind that rows are read from.
    """
    from huggingface_hub import is_offline_mode

    found = files_in_cache(source)
    if found is not None:
        return found
    if is_offline_mode():
        raise _not_here(source)
    folder = _fetch(source)
    return [str(folder / name) for name in data_files(_names(source, folder), folder, source)]


def files_in_cache(source: SourceConfig) -> list[str] | None:
    """The same where all of them are in the local hub cache, else None; asks no network. Raises ``DataError``."""
    folder = _snapshot(source)
    if folder is None:
        return None
    found = [folder / name for name in data_files(_names(source, folder), folder, source)]
    return [str(path) for path in found] if all(path.is_file() for path in found) else None


def data_files(names: Iterable[str], cards: Path, source: SourceConfig) -> list[str]:
    """Those of a dataset's files that the split of ``source`` has.

    ``datasets`` looks at a folder: it is shown one with empty files of these names and the dataset's own README.

    Args:
        names: of all files of the dataset, relative to its root.
        cards: folder with its README, where it has one.

    Raises:
        DataError: as ``dataset_files``.
    """
    import yaml
    from datasets.load import LocalDatasetModuleFactory

    with tempfile.TemporaryDirectory(prefix="sft_dist_names_") as temporary:
        root = Path(temporary).resolve()
        for name in names:
            # It would look into archives, which hold no rows that we read.
            if name not in CARDS and not name.lower().endswith(".zip") and ".." not in PurePosixPath(name).parts:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
        for name in CARDS:
            if (cards / name).is_file():
                shutil.copyfile(cards / name, root / name)
        try:
            module = LocalDatasetModuleFactory(str(root)).get_module()
            found = _files_of_split(module.builder_configs_parameters.builder_configs or [],
                                    module.builder_configs_parameters.default_config_name, root, source)  # fmt: skip
        except (FileNotFoundError, ValueError, TypeError, yaml.YAMLError) as e:
            said = str(e).strip().partition("\n")[0].partition(" with any supported")[0].replace(str(root), source.path)
            raise DataError(
                f"{named(source)}: no data files are found in it ({said})",
                fix=f"name its files as sources: hf://datasets/{source.path}/FILE",
            ) from e
    endings = ENDINGS + DOCUMENTS if source.format == "text" else ENDINGS
    other = next((name for name in found if ending(name) not in endings), None)
    if other is not None:
        raise DataError(
            f"{named(source)}: {other} is no file of rows",
            fix=f"use a dataset of files that end in {', '.join(endings)}",
        )
    return found


def _files_of_split(configs: list[BuilderConfig], default: str | None, root: Path, source: SourceConfig) -> list[str]:
    from datasets.data_files import DataFilesPatternsDict
    from datasets.download import DownloadConfig

    by_name = {config.name: config for config in configs}
    chosen = source.subset or default or (next(iter(by_name)) if len(by_name) == 1 else None)
    if chosen is None:
        raise DataError(
            f"{named(source)} has the subsets {', '.join(by_name)}", fix="choose one with `subset` of the source"
        )
    if chosen not in by_name:
        raise _no_such(source, "subset", chosen, by_name)
    files = by_name[chosen].data_files
    if isinstance(files, DataFilesPatternsDict):
        files = files.resolve(str(root), DownloadConfig())
    split = source.split or DEFAULT_SPLIT
    if split not in (files or {}):
        raise _no_such(source, "split", split, files or {})
    return [os.path.relpath(path, root) for path in files[split]]


def _no_such(source: SourceConfig, what: str, given: str, there: Iterable[str]) -> DataError:
    names = list(map(str, there))
    near = get_close_matches(given, names, n=1)
    return DataError(
        f"{named(source)} has no {what} {given}, but {', '.join(names) or 'none'}",
        fix=f"set `{what}` of the source to {(near or names or ['what it has'])[0]}",
    )


def _snapshot(source: SourceConfig) -> Path | None:
    """The folder of the cache that has the revision, or a part of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source.path, repo_type="dataset", revision=source.revision, local_files_only=True, allow_patterns=CARDS
            )
        )
    except LocalEntryNotFoundError:
        return None


def _names(source: SourceConfig, folder: Path) -> list[str]:
    """Of all files of the dataset; where the cache was filled without a listing, of those that are there."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return [entry.path for entry in get_cached_repo_tree(source.path, repo_type="dataset", revision=folder.name)]
    except LocalEntryNotFoundError:
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _fetch(source: SourceConfig) -> Path:
    """Brings the split into the cache: first what says which files it has, then these."""
    from huggingface_hub import snapshot_download

    with _answers(source):
        folder = Path(
            snapshot_download(source.path, repo_type="dataset", revision=source.revision, allow_patterns=CARDS)
        )
        wanted = data_files(_names(source, folder), folder, source)
        # By its commit: the branch may have moved since.
        patterns = [glob.escape(name) for name in wanted]
        return Path(snapshot_download(source.path, repo_type="dataset", revision=folder.name, allow_patterns=patterns))


@contextmanager
def _answers(source: SourceConfig) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line what and one line fix. Nothing of a request is quoted."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except SftError:
        raise
    except RevisionNotFoundError as e:
        raise DataError(f"{named(source)}: there is no such revision", fix="give a branch, a tag or a commit") from e
    except GatedRepoError as e:
        raise DataError(
            f"{named(source)} is gated: its authors give access to accounts that accepted its terms",
            fix=f"accept them at {constants.ENDPOINT}/datasets/{source.path}, then set HF_TOKEN or run: hf auth login",
        ) from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise DataError(
            f"there is no file or folder {source.path} here, and no such dataset on the hub, or it is private",
            fix="correct the path, or set HF_TOKEN to a token that may read the dataset",
        ) from e
    except LocalEntryNotFoundError as e:  # with what hindered it to fetch as its cause
        if isinstance(e.__cause__, HfHubHTTPError):
            raise _refused(source, e.__cause__) from e
        raise _not_reached(source, e.__cause__ or e) from e
    except HfHubHTTPError as e:
        raise _refused(source, e) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise DataError(
                f"the hub cache {constants.HF_HUB_CACHE} cannot be written ({e.strerror})",
                fix="make room, or set HF_HOME to a folder with room that you may write",
            ) from e
        if not isinstance(e, ConnectionError | TimeoutError):
            raise
        raise _not_reached(source, e) from e
    except Exception as e:
        # Connections fail with the HTTP library's own exceptions, and which library that is depends on the version.
        if not type(e).__module__.partition(".")[0].startswith(("httpx", "httpcore")):
            raise
        raise _not_reached(source, e) from e


def _refused(source: SourceConfig, error: HfHubHTTPError) -> DataError:
    status = error.response.status_code
    if status in (401, 403):
        return DataError(
            f"{named(source)}: the hub does not accept the token, or it may not read the dataset ({status})",
            fix="correct HF_TOKEN, or run: hf auth login",
        )
    return DataError(
        f"{named(source)}: the hub answered {status} while the dataset was fetched",
        fix="run the command again later; what has come is kept",
    )


def _not_reached(source: SourceConfig, error: BaseException) -> DataError:
    return DataError(
        f"there is no file or folder {source.path} here, and the hub was not reached, or broke off, while the dataset "
        f"was fetched ({type(error).__name__})",
        fix=f"correct the path, or check the network; {_ELSEWHERE}",
    )


def _not_here(source: SourceConfig) -> DataError:
    from huggingface_hub import constants

    return DataError(
        f"there is no file or folder {source.path} here, and the dataset {named(source)} is not in the local hub cache "
        f"{constants.HF_HUB_CACHE}, or not all of its split {source.split or DEFAULT_SPLIT}; HF_HUB_OFFLINE is set",
        fix=f"correct the path, or {_ELSEWHERE}",
    )


_ELSEWHERE = (
    "run `sft-dist data prepare` on a machine with network and the same cache (HF_HOME); a gated dataset needs HF_TOKEN"
)


def named(source: SourceConfig) -> str:
    """The dataset as messages call it."""
    return source.path if source.revision is None else f"{source.path} (revision {source.revision})"
