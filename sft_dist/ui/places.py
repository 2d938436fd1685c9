"""What a page may name: files under one folder, wherever links lead."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from sft_dist.errors import ConfigError


class Refused(Exception):
    """What was asked for is not given.

    Args:
        line: why, for people.
    """

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


class Places:
    """The folder whose files may be named.

    Raises:
        ConfigError: it is no folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder here", fix="give a folder with runs or configurations")
        self.root = folder.resolve()

    def find(self, name: str) -> Path:
        """The file or folder of a name, free of links.

        Args:
            name: a path from the folder on.

        Raises:
            Refused: it is elsewhere, or there is none.
        """
        try:
            path = (self.root / name).resolve()
        except (OSError, RuntimeError, ValueError):  # a circle of links, a zero byte
            raise Refused(HTTPStatus.NOT_FOUND, f"{name!r} is no path") from None
        self.require(path)
        if not path.exists():
            raise Refused(HTTPStatus.NOT_FOUND, f"{name} is not in {self.root}")
        return path

    def require(self, path: Path) -> None:
        """
        Raises:
            Refused: a file is not in the folder, or a link leads out of it.
        """
        if not path.resolve().is_relative_to(self.root):
            raise Refused(HTTPStatus.FORBIDDEN, f"only what is in {self.root} is shown here")

    def name_of(self, path: Path) -> str:
        """The name under which ``find`` finds it."""
        return path.relative_to(self.root).as_posix()
