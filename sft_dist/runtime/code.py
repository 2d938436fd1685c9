"""Which code of this project runs: its version, its commit, and a digest of its files. Imports no torch."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import sft_dist
from sft_dist import __version__

GIT_TIMEOUT_S = 60


@dataclass(frozen=True)
class Code:
    """The code of this project that runs.

    Args:
        version: of this package.
        checkout: its folder; None: the package is installed elsewhere.
        commit: None where the checkout is no git repository, or git is not there.
        changed: whether files differ from the commit; new_files: that are in no commit.
        difference: of the files that the commit has, as git tells it.
    """

    version: str
    checkout: str | None
    commit: str | None
    changed: bool
    new_files: tuple[str, ...] = ()
    difference: str = ""


def checkout() -> Path | None:
    """The folder of this project's code; None where it is installed like any other package."""
    folder = Path(sft_dist.__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


def code_here() -> Code:
    """The code that runs now."""
    folder = checkout()
    if folder is None:
        return Code(__version__, None, None, False)
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        difference = _git(folder, "diff", "HEAD", "--binary")
        new = tuple(_git(folder, "ls-files", "--others", "--exclude-standard").splitlines())
    except (OSError, subprocess.SubprocessError):
        return Code(__version__, str(folder), None, False)
    return Code(__version__, str(folder), commit, bool(difference or new), new, difference)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "core.quotepath=false", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S).stdout


def code_digest() -> str:
    """Twelve digits of the SHA-256 of this package's Python files, names and contents."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
