"""What sbatch and the nodes make of a job's script: its options as sbatch reads them, and the programs that it starts.

Programs are stood in for by one that writes down what it was called with; the shell that runs the script is real.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Writes its name and its words; as srun it then runs what stands behind its options.
PROGRAM = """#!/bin/sh
name=$(basename "$0")
printf '%s\\0' "$#" "$name" "$@" >> "$CALLS"
case "$name:$*" in
    srun:*) while :; do case $1 in --*) shift ;; *) break ;; esac; done; exec "$@" ;;
    apptainer:*) exit 0 ;;
    *"config get"*) printf '%s\\n' "$RUN" ;;
    *"job begin"*) exit "${BEGIN:-0}" ;;
    *"sft_dist doctor"*) exit "${DOCTOR:-0}" ;;
    *"sft_dist.launch "*) exit "${TRAIN:-0}" ;;
    *"job end"*) exit "${END:-0}" ;;
esac
"""


def sbatch_words(line: str) -> list[str]:
    """The words behind ``#SBATCH`` as sbatch takes them apart: both quotes, a backslash anywhere, comments."""
    words: list[str] = []
    word, quote, escaped, begun = "", "", False, False
    for letter in line:
        if escaped:
            word, escaped, begun = word + letter, False, True
        elif letter == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word) if letter == quote else (quote, word + letter)
        elif letter in "\"'":
            quote, begun = letter, True
        elif letter == "#":
            break
        elif letter.isspace():
            if begun:
                words.append(word)
            word, begun = "", False
        else:
            word, begun = word + letter, True
    assert not quote, f"unbalanced quotes: {line}"
    return [*words, word] if begun else words


def sbatch_options(script: str) -> dict[str, str | None]:
    """Options of a script by their long names; those that sbatch would not see, behind the first command, fail."""
    found: dict[str, str | None] = {}
    commands = False
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            assert not commands, f"sbatch does not see {line!r}: a command stands before it"
            for word in sbatch_words(line.removeprefix("#SBATCH")):
                name, equals, value = word.partition("=")
                assert name.startswith("--"), word
                assert name not in found, f"{name} twice"
                found[name.removeprefix("--")] = value if equals else None
        elif line.strip() and not line.startswith("#"):
            commands = True
    return found


@dataclass(frozen=True)
class Played:
    """What happened when a script was run.

    Args:
        calls: name and words of each program, in order.
    """

    code: int
    calls: list[list[str]]
    output: str

    def of(self, program: str) -> list[list[str]]:
        """The words that one program was called with, each time."""
        return [call[1:] for call in self.calls if call[0] == program]


def programs(folder: Path) -> Path:
    """A folder of programs that write down what they are called with."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("srun", "apptainer", "python", "python3", "module"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    return folder


def play(script: str, folder: Path, *, arguments: tuple[str, ...] = (), **environment: str) -> Played:
    """Runs a script as the first node of a job would.

    Args:
        folder: in which ``programs`` are.
        environment: beside that of a job; e.g. ``TRAIN="75"`` for how training ends.
    """
    file, calls = folder / "script.sh", folder / "calls"
    file.write_text(script, encoding="utf-8")
    calls.unlink(missing_ok=True)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_SUBMIT_DIR": str(folder)}
    done = subprocess.run(
        ["bash", str(file), *arguments],
        env={"PATH": f"{folder}{os.pathsep}/usr/bin:/bin", "CALLS": str(calls), **job, **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    words = calls.read_text(encoding="utf-8").split("\0")[:-1] if calls.exists() else []
    found: list[list[str]] = []
    while words:
        number = int(words[0])
        found.append(words[1 : number + 2])
        words = words[number + 2 :]
    return Played(done.returncode, found, done.stdout + done.stderr)
