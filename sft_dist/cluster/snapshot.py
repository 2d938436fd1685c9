"""What a submission keeps in ``OUTPUT_DIR/slurm/submission-NNN``: what the job runs, and what it was submitted from.

The code itself stays where it is: a job runs the checkout as it is when the job starts.
"""

from __future__ import annotations

import getpass
import json
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_dist.config.load import dump_config
from sft_dist.config.schema import Config
from sft_dist.runtime.code import Code
from sft_dist.train.run_files import keep_file, writing_into

# In the run directory.
FOLDER = "slurm"
# In a submission.
CONFIG, RECORD, LOCK, CHANGES = "config.yaml", "submission.json", "packages.txt", "uncommitted.diff"
NUMBER_DIGITS = 3


def installed_packages() -> str:
    """``name==version``, a line each, of everything that this Python can import."""
    found = {f"{each.metadata['Name']}=={each.version}" for each in metadata.distributions()}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def submission_folder(run: Path, number: int) -> Path:
    return run / FOLDER / f"submission-{number:0{NUMBER_DIGITS}}"


def last_submission(run: Path) -> int:
    """The highest number; 0 where there is none."""
    found = (folder.name.partition("-")[2] for folder in (run / FOLDER).glob("submission-*"))
    return max((int(number) for number in found if number.isdecimal()), default=0)


@contextmanager
def empty_folders_removed(runs: Sequence[Path]) -> Iterator[None]:
    """Removes what is made of these folders and those above them within, and is empty at the end."""
    wanted = [folder for run in runs for folder in (run / FOLDER, run, *run.parents)]
    made = [folder for folder in dict.fromkeys(wanted) if not folder.exists()]
    try:
        yield
    finally:
        for folder in sorted(made, key=lambda folder: len(folder.parts), reverse=True):
            with suppress(OSError):  # it is not there, or not empty
                folder.rmdir()


def new_submission(run: Path) -> Path:
    """Makes the folder of the next submission; two at a time get two.

    Raises:
        ConfigError: the run directory cannot be written.
    """
    with writing_into(run):
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        while True:
            folder = submission_folder(run, last_submission(run) + 1)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder


def write_submission(folder: Path, config: Config | None, scripts: Mapping[str, str], code: Code) -> None:
    """Writes everything but the record.

    Args:
        folder: as ``new_submission`` made it.
        config: None: those of a sweep's points are written apart.
        scripts: by the names of their files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    files = {LOCK: installed_packages(), **scripts}
    if config is not None:
        files[CONFIG] = dump_config(config)
    if code.difference:
        files[CHANGES] = code.difference
    with writing_into(folder):
        for name, text in files.items():
            keep_file(folder / name, text)
        for name in scripts:
            (folder / name).chmod(0o755)


def record(
    folder: Path, *, code: Code, source: Path, overrides: Sequence[str], jobs: Mapping[str, str], **further: Any
) -> None:
    """Writes ``submission.json``.

    Args:
        source: the file that was submitted; overrides: of it on the command line.
        jobs: SLURM's ids by the name of the script without its ending, e.g. ``train``.
        further: what else is to be known.

    Raises:
        ConfigError: the folder cannot be written.
    """
    said = {name: value for name, value in asdict(code).items() if name != "difference"}
    content = {
        "submission": int(folder.name.partition("-")[2]),
        "jobs": dict(jobs),
        "submitted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "directory": str(Path.cwd()),
        "config": str(source),
        "overrides": list(overrides),
        "python": f"{sys.executable} {sys.version.split()[0]}",
        "code": said,
        **further,
    }
    with writing_into(folder):
        keep_file(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
