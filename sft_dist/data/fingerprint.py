"""What a file holds, as a short digest; a file that did not change is not read again for it.

What lies behind a URL is remembered too, so that a run on a machine without network finds what was prepared on another
one: with ``HF_HUB_OFFLINE`` set, what was found last counts where a URL does not answer. Without, that is an error.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import xxhash

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.files import file_state, is_url, open_raw
from sft_dist.data.sources import files_here, source_files
from sft_dist.errors import DataError

READ_AT_ONCE = 1 << 22


class Fingerprints:
    """Digests of files, remembered in ``path`` by name, size and time of the last change.

    Several processes may use the file at once; what one of them adds may be lost, and is then found again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[str]] = {}
        if path.exists():
            self._known = json.loads(path.read_text(encoding="utf-8"))

    def files_of(self, source: SourceConfig) -> list[str]:
        """The files of a source. Raises ``ConfigError`` and ``DataError`` as ``source_files``."""
        if not is_url(source.path):
            return source_files(source)
        key = f"files of {source.path}"
        try:
            files = source_files(source)
        except DataError:
            if is_offline() and key in self._known:
                return list(self._known[key])
            raise
        if self._known.get(key) != files:
            self._known[key] = files
            self._save()
        return files

    def of(self, files: Sequence[str]) -> list[str]:
        """XXH3-128 of the content of each file. Raises ``DataError``."""
        digests, is_new = [], False
        for name in files:
            key = name if is_url(name) else os.path.abspath(name)
            known = self._known.get(key)
            try:
                state = file_state(name)
            except DataError:
                if not (is_offline() and known):
                    raise
                state = known[0]
            if state is None or known is None or known[0] != state:
                known = self._known[key] = [state or "", _digest(name)]
                is_new = True
            digests.append(known[1])
        if is_new:
            self._save()
        return digests

    def remembered(self, source: SourceConfig, *, most_bytes: int) -> tuple[list[str], list[str]] | None:
        """Files and digests of a source, as ``files_of`` and ``of`` give them, without network and writing nothing.

        What lies behind a URL counts as it was found last. Files that changed since, or were never seen, are read for
        their digest if they have at most ``most_bytes`` together.

        Returns:
            None where that does not tell: files are missing, or are too large to be read now.
        """
        if is_url(source.path):
            files = self._known.get(f"files of {source.path}")
            if files is None or any(name not in self._known for name in files):
                return None
            return list(files), [self._known[name][1] for name in files]
        files = files_here(source)
        if files is None:
            return None
        known = {name: self._known.get(os.path.abspath(name), ["", ""]) for name in files}
        unread = [name for name in files if known[name][0] != file_state(name)]
        if sum(os.path.getsize(name) for name in unread) > most_bytes:
            return None
        return files, [_digest(name) if name in unread else known[name][1] for name in files]

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self._known, file, indent=0, sort_keys=True)
        os.replace(temporary, self._path)


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is set, as the hub's own library reads it."""
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def _digest(name: str) -> str:
    digest = xxhash.xxh3_128()
    with open_raw(name) as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
