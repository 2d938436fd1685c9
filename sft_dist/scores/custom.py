"""A score of the user's own: a function of a Python file."""

from __future__ import annotations

import hashlib
import math
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType

from sft_dist.errors import ConfigError
from sft_dist.scores.answered import Answered

KEY = "eval.scores.custom"


class CustomScore:
    """The function that ``FILE.py:FUNCTION`` names. Loading it runs the file.

    Raises:
        ConfigError: the file cannot be read or run, or has no such function.
    """

    def __init__(self, wanted: str) -> None:
        file, _, self._name = wanted.rpartition(":")
        self._path = Path(file).resolve()
        self._shown = file
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{KEY}: {file} cannot be read: {error.strerror}", fix="correct the path") from error
        digest = hashlib.sha256(content).hexdigest()[:16]
        self._function = self._load(f"sft_dist_custom_score_{digest}", content)
        self.signature = f"{self._path.name}:{self._name}|sha256:{digest}"

    def of(self, example: Answered, *, number: int) -> float:
        """The score of one example.

        Args:
            number: of the example, from 1, for messages.

        Raises:
            ConfigError: the function fails, or returns no finite number.
        """
        try:
            found = self._function(example.prompt, example.answer, example.reference)
        except Exception as error:
            raise ConfigError(
                f"{KEY}: {self._place(error)}: {_one_line(error)}, at example {number:,} "
                f"(answer {example.answer[:40]!r})",
                fix=f"correct {self._name}; it must judge every answer, an empty one too",
            ) from error
        # A numpy scalar is a Real as well; what is none of them (None, text, a tensor) would be guessed at.
        if not isinstance(found, Real) or not math.isfinite(found):
            raise ConfigError(
                f"{KEY}: {self._shown}:{self._line()}: {self._name} returned {_shown(found)} for example {number:,}",
                fix="return a finite float, e.g. float(x) or x.item()",
            )
        return float(found)

    def _load(self, module_name: str, content: bytes) -> Callable[[str, str, str], object]:
        # Not by Python's importer: it would take the bytecode of a file of the same size and second for this one's.
        module = ModuleType(module_name)
        module.__file__ = str(self._path)
        sys.modules[module_name] = module  # where dataclasses and pickle look for it
        try:
            exec(compile(content, str(self._path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise ConfigError(
                f"{KEY}: {self._place(error)}: {_one_line(error)}", fix="correct the file; running it must end well"
            ) from error
        function = getattr(module, self._name, None)
        if not callable(function):
            there = sorted(
                name for name, value in vars(module).items() if getattr(value, "__module__", None) == module_name
            )
            raise ConfigError(
                f"{KEY}: {self._shown} has no function {self._name}",
                fix=f"name one that it has: {', '.join(there)}" if there else f"define {self._name} in it",
            )
        return function  # type: ignore[no-any-return]

    def _place(self, error: BaseException) -> str:
        """``file:line`` of the last line of the user's file that took part in an error."""
        if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename) == self._path:
            return f"{self._shown}:{error.lineno}"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == self._path]
        return f"{self._shown}:{lines[-1]}" if lines else self._shown

    def _line(self) -> int:
        code = getattr(self._function, "__code__", None)
        return 1 if code is None else int(code.co_firstlineno)


def _one_line(error: BaseException) -> str:
    """The error as Python names it, in one line."""
    return " ".join(traceback.format_exception_only(type(error), error)[-1].split())


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:60]} ({type(value).__name__})"
