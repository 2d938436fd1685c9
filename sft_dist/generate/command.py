"""What ``sft-dist chat`` does with its options."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sft_dist.checkpoint.identity import files_fingerprint
from sft_dist.checkpoint.source import Source, find_newest_source
from sft_dist.data.files import is_url
from sft_dist.errors import ConfigError, DataError
from sft_dist.generate.batch import answer_file
from sft_dist.generate.chat import Chat, converse
from sft_dist.generate.display import dim
from sft_dist.generate.engine import Sampling
from sft_dist.generate.load import DeviceChoice, DtypeChoice, Loaded, load

# Of a conversation, where nothing is said; comparisons and files are answered with 0, so that they say the same twice.
TEMPERATURE = 0.7

# What differs where other weights answer; a checkpoint's manifest has the digests of its files.
WEIGHT_FILES = ("*.safetensors", "adapter_config.json", "manifest.json")


@dataclass(frozen=True)
class Options:
    """
    Args:
        prompt: the one question to answer; None: a conversation, or a file.
        file, output: rows to answer, and where their answers go.
        temperature: None: ``TEMPERATURE``, or 0 where answers are to be compared.
    """

    system: str | None
    prompt: str | None
    file: str | None
    output: Path | None
    compare_base: bool
    max_new_tokens: int
    temperature: float | None
    top_p: float
    seed: int | None

    def sampling(self) -> Sampling:
        is_compared = self.compare_base or self.file is not None
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if is_compared else TEMPERATURE
        seed = 0 if self.seed is None and is_compared else self.seed
        return Sampling(self.max_new_tokens, temperature, self.top_p, seed)


def chat(path: str, options: Options, *, checkpoint: str | None, device: DeviceChoice, dtype: DtypeChoice) -> None:
    """Answers a file, one prompt, or whoever sits at the terminal.

    Raises:
        ConfigError: the options do not go together, or PATH is nothing that answers.
        CheckpointError, DataError, PlanError: it does not load, cannot be read, does not fit.
    """
    _check(options)
    notes = Console(stderr=True, highlight=False)
    source = find_newest_source(path, checkpoint=checkpoint)
    loaded = load_showing(source, notes, device=device, dtype=dtype, with_base=options.compare_base)
    if options.system is not None and not loaded.prompter.chats:
        raise ConfigError("--system: the model knows no system message", fix="put it into the text itself")
    if options.file is not None and options.output is not None:
        weights = [path for pattern in WEIGHT_FILES for path in source.folder.glob(pattern)]
        done = answer_file(
            loaded, options.sampling(), options.file, options.output,
            identity=files_fingerprint(weights), system=options.system, console=notes,
        )  # fmt: skip
        before = f" ({done.num_before:,} were there)" if done.num_before else ""
        speed = f", {done.num_tokens / done.seconds:,.1f} tokens/s" if done.num_tokens else ""
        notes.print(f"{done.num_rows:,} rows in {escape(str(options.output))}{before}{speed}", soft_wrap=True)
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    session = Chat(loaded, options.sampling(), console, options.system, options.compare_base)
    if options.prompt is not None:
        # What is redirected to a file is the answer alone.
        session.notes = notes
        session.ask(options.prompt)
        return
    if console.is_terminal:
        dim(console, "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    converse(session)


def load_showing(
    source: Source, notes: Console, *, device: DeviceChoice, dtype: DtypeChoice, with_base: bool = False
) -> Loaded:
    """Loads what answers and says what it is. Raises as ``load``."""
    if notes.is_terminal:
        with notes.status(f"loading {escape(str(source.folder))}"):
            loaded = load(source, device=device, dtype=dtype, with_base=with_base)
    else:
        loaded = load(source, device=device, dtype=dtype, with_base=with_base)
    notes.print(f"[bold]{escape(loaded.name)}[/]: {escape(loaded.about)}", soft_wrap=True)
    for notice in loaded.notices:
        notes.print(f"[yellow]{escape(notice)}[/]", soft_wrap=True)
    return loaded


def _check(options: Options) -> None:
    if (options.file is None) != (options.output is None):
        given, missing = ("--file", "--out") if options.output is None else ("--out", "--file")
        raise ConfigError(f"{given} without {missing}", fix="give both: rows to answer, and where their answers go")
    if options.file is not None and options.prompt is not None:
        raise ConfigError("--prompt is one question and --file has many", fix="give one of the two")
    if options.file is not None and not is_url(options.file) and not (path := Path(options.file)).is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"--file: {options.file} {what}", fix="give one file of rows; the path counts from here")
