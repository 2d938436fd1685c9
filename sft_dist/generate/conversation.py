"""A conversation in the terminal: what has been said, and what a line that is typed means. Knows no model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sft_dist.data.messages import Message
from sft_dist.errors import ConfigError

CommandName = Literal["help", "reset", "system", "undo", "save", "exit"]

# Each with what may stand behind it and what it does.
COMMANDS: dict[CommandName, tuple[str, str]] = {
    "reset": ("", "begin anew; the system message stays"),
    "system": ("[TEXT]", "set the system message, or have none"),
    "undo": ("", "take back the last question and its answer"),
    "save": ("FILE", "add the conversation to FILE, a row of JSONL"),
    "help": ("", "this list"),
    "exit": ("", "leave; so do Ctrl-D, and Ctrl-C twice"),
}
# A question of several lines stands between two of these.
FENCE = '"""'


@dataclass(frozen=True)
class Command:
    name: CommandName
    argument: str


class UnknownCommand(ConfigError):
    """A line that begins with a slash and is no command."""


def parse(line: str) -> Command | str:
    """A command, or the text to answer; ``//`` at the beginning is a slash of the text.

    Raises:
        UnknownCommand: it begins with a slash and is neither.
    """
    if line.startswith("//"):
        return line[1:]
    if not line.startswith("/"):
        return line
    word, _, argument = line[1:].partition(" ")
    for name in COMMANDS:
        if word == name or (name == "exit" and word == "quit"):
            return Command(name, argument.strip())
    raise UnknownCommand(f"/{word} is no command", fix="/help lists them; // begins a text with a slash")


@dataclass
class Conversation:
    """
    Args:
        system: the system message, or None.
        turns: questions with their answers, the oldest first.
    """

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, question: str | None = None) -> list[Message]:
        """All of it, and ``question`` behind it."""
        found = [] if self.system is None else [Message("system", self.system)]
        for asked, answered in self.turns:
            found += [Message("user", asked), Message("assistant", answered)]
        return found if question is None else [*found, Message("user", question)]

    def save(self, file: Path, *, is_chat: bool) -> None:
        """Adds it to ``file`` as a row: ``messages``, or of a model without turns ``prompt`` and ``completion``.

        Raises:
            ConfigError: there is nothing to save, or the file cannot be written.
        """
        if not self.turns:
            raise ConfigError("nothing has been said yet", fix="ask something first")
        rows: list[dict[str, object]] = [{"prompt": asked, "completion": answered} for asked, answered in self.turns]
        if is_chat:
            rows = [{"messages": [{"role": m.role, "content": m.content} for m in self.messages()]}]
        try:
            with file.expanduser().open("a", encoding="utf-8") as opened:
                opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror}", fix="name another file") from error
