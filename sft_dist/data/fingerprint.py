"""What a file holds, as a short digest; a file that did not change is not read again for it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import xxhash

from sft_dist.data.files import file_state, open_raw

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

    def of(self, files: Sequence[str]) -> list[str]:
        """XXH3-128 of the content of each file. Raises ``DataError``."""
        digests, is_new = [], False
        for name in files:
            key = name if "://" in name else os.path.abspath(name)
            state = file_state(name)
            known = self._known.get(key)
            if state is None or known is None or known[0] != state:
                known = self._known[key] = [state or "", _digest(name)]
                is_new = True
            digests.append(known[1])
        if is_new:
            self._save()
        return digests

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self._known, file, indent=0, sort_keys=True)
        os.replace(temporary, self._path)


def _digest(name: str) -> str:
    digest = xxhash.xxh3_128()
    with open_raw(name) as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
