"""``sft-dist chat``: a conversation with a run in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sft_dist.errors import ConfigError
from sft_dist.generate.conversation import COMMANDS, FENCE, Command, Conversation, parse
from sft_dist.generate.display import Comparison, Shown, dim, show, speed_line
from sft_dist.generate.engine import Generation, Sampling
from sft_dist.generate.load import Loaded

YOU = "you"


@dataclass
class Chat:
    """One conversation with one model.

    Args:
        system: the system message that it begins with.
        compares: the base answers too.
        notes: where what is not the model's goes; None: to the same place.
    """

    loaded: Loaded
    sampling: Sampling
    console: Console
    system: str | None = None
    compares: bool = False
    notes: Console | None = None

    def __post_init__(self) -> None:
        self.conversation = Conversation(self.system)

    def ask(self, text: str) -> bool:
        """Answers ``text`` and keeps both; False: the user cut the answer off, and what there is of it is kept.

        Raises:
            ConfigError: it cannot be answered; the conversation is as before.
        """
        prompt = self._prompt(text)
        if self.compares:
            found = Comparison(self.console).show(self._both(prompt))
        else:
            found = [show(self.console, self.loaded.engine.start(self.loaded.tuned, prompt, self.sampling))]
            dim(self.notes or self.console, speed_line(found[0]))
        if self.notes is None:
            self.console.print()
        self._keep(text, found)
        return not found[-1].interrupted

    def _prompt(self, text: str) -> list[int]:
        prompter = self.loaded.prompter
        return prompter.chat(self.conversation.messages(text)) if prompter.chats else prompter.complete(text)

    def _both(self, prompt: list[int]) -> Iterator[Generation]:
        assert self.loaded.base is not None
        for voice in (self.loaded.base, self.loaded.tuned):
            yield self.loaded.engine.start(voice, prompt, self.sampling)

    def _keep(self, text: str, found: list[Shown]) -> None:
        """The tuned model's answer goes on in the conversation, for both; one without any text does not."""
        num_answers = 2 if self.compares else 1
        if len(found) == num_answers and found[-1].answer.text.strip():
            self.conversation.turns.append((text, found[-1].answer.text))

    def obey(self, command: Command) -> bool:
        """Does what a command says; False: leave.

        Raises:
            ConfigError: it cannot be done.
        """
        if command.name == "help":
            self._help()
        elif command.name == "reset":
            self.conversation.turns.clear()
            dim(self.console, "a new conversation")
        elif command.name == "system":
            self._set_system(command.argument)
        elif command.name == "undo":
            self._undo()
        elif command.name == "save":
            if not command.argument:
                raise ConfigError("/save: no file is named", fix="/save FILE")
            self.conversation.save(Path(command.argument), is_chat=self.loaded.prompter.chats)
            dim(self.console, f"added to {command.argument}")
        return command.name != "exit"

    def _help(self) -> None:
        shown = [(f"/{name} {given}", what) for name, (given, what) in COMMANDS.items()]
        shown += [(FENCE, "begins and ends a text of several lines"), ("Ctrl-C", "stops an answer")]
        for usage, what in shown:
            self.console.print(f"  [bold]{escape(usage):<15}[/]{escape(what)}")

    def _set_system(self, text: str) -> None:
        if text and not self.loaded.prompter.chats:
            raise ConfigError("/system: the model knows no system message", fix="put it into the text itself")
        before = self.conversation.system
        self.conversation.system = text or None
        try:
            if text:
                self._prompt(text)
        except ConfigError:
            self.conversation.system = before
            raise
        dim(self.console, "the system message is set" if text else "there is no system message")

    def _undo(self) -> None:
        if not self.conversation.turns:
            raise ConfigError("/undo: nothing has been said yet", fix="ask something first")
        asked, _ = self.conversation.turns.pop()
        dim(self.console, f"taken back: {asked.splitlines()[0]}")


def converse(chat: Chat) -> None:
    """Reads and answers until the user leaves."""
    console = chat.console
    num_interrupts = 0
    while True:
        try:
            text = _read(console)
        except EOFError:
            if console.is_terminal:
                console.print()
            return
        except KeyboardInterrupt:
            num_interrupts += 1
            console.print()
            if num_interrupts > 1:
                return
            dim(console, "Ctrl-C again leaves, and so do Ctrl-D and /exit")
            continue
        if not text.strip():
            continue
        num_interrupts = 0
        try:
            meant = parse(text) if "\n" not in text else text
            if isinstance(meant, str):
                num_interrupts = 0 if chat.ask(meant) else 1
            elif not chat.obey(meant):
                return
        except KeyboardInterrupt:  # just before an answer began, or when it had ended
            chat.loaded.engine.stop()
            num_interrupts = 1
            console.print()
        except ConfigError as error:
            console.print(f"[bold red]error:[/] {escape(error.what)}", soft_wrap=True)
            console.print(f"  [bold green]fix:[/] {escape(error.fix)}", soft_wrap=True)


def _read(console: Console) -> str:
    """A line, or several between fences. Raises EOFError where there is no more."""
    line = _line(console, f"{YOU} > ")
    if not line.startswith(FENCE):
        return line
    lines = [line.removeprefix(FENCE)]
    while not lines[-1].rstrip().endswith(FENCE) or (len(lines) == 1 and not lines[0]):
        lines.append(_line(console, "... > "))
    return "\n".join(lines).rstrip().removesuffix(FENCE).strip("\n")


def _line(console: Console, prompt: str) -> str:
    if not (console.is_terminal and sys.stdin.isatty()):
        return _decoded(sys.stdin.readline())
    # The prompt's colours have no width: readline must not count them, or it breaks lines at the wrong place.
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines with it
    return input(f"\001\033[1;36m\002{prompt}\001\033[0m\002")


def _decoded(line: str) -> str:
    if not line:
        raise EOFError
    return line.rstrip("\n")
