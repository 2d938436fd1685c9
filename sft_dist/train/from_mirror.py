"""What the copies in object storage mean for the start of a run: which of them is fetched, and when one is in the way.

Imports no torch. Rank 0 fetches before there is a process group, so nothing can time out meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.filesize import decimal

from sft_dist.checkpoint import store
from sft_dist.checkpoint.mirror import DamagedCopy, Mirror, split_url
from sft_dist.config.schema import Config
from sft_dist.data.files import is_url
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.train.asked import AUTO, NEVER
from sft_dist.train.resume import checkpoints_folder, holds_a_run


def needs_storage(config: Config, resume: str) -> bool:
    """Whether object storage has a say in where a run begins."""
    return config.checkpoint.mirror is not None or is_url(resume)


def may_fetch(config: Config, resume: str) -> bool:
    """Whether the checkpoint to go on from may be one that the run directory does not have yet."""
    return is_url(resume) or (resume == AUTO and config.checkpoint.mirror is not None)


def check_mirror(config: Config, resume: str) -> None:
    """Proves that the mirror can be written and stands in nobody's way; fetches nothing.

    Raises:
        ConfigError: it cannot, or holds what ``resume`` would contradict, or the URL to resume from is no checkpoint.
        CheckpointError: the storage does not answer.
    """
    mirror = mirror_of(config)
    if mirror is not None:
        mirror.prove_writable()
    _wanted(resume, config.output_dir, mirror)


def bring(config: Config, resume: str, *, say: Callable[[str], None]) -> str:
    """Fetches the checkpoint to go on from into the run directory, if it is a copy.

    Args:
        say: told what is fetched, and which copy is damaged.

    Returns:
        ``resume`` for the run directory as it now is: ``never``, ``auto`` or a path.

    Raises:
        ConfigError: as ``check_mirror``.
        CheckpointError: a transfer failed for good, or the copy that was asked for is damaged.
    """
    mirror, folder = mirror_of(config), checkpoints_folder(config.output_dir)
    for source, step in _wanted(resume, config.output_dir, mirror):
        path = folder / store.name_of(step)
        if is_url(resume) and path.exists():
            return str(path)
        say(f"fetching  {source.url}/{path.name}, {decimal(source.num_bytes(step))}")
        try:
            source.fetch(step, folder)
        except DamagedCopy as error:
            if is_url(resume):
                raise CheckpointError(error.what, fix=error.fix) from error
            say(f"{error.what}; it is skipped")
            continue
        return str(path) if is_url(resume) else resume
    return resume


def replace_damaged(config: Config, checkpoint: Path, *, say: Callable[[str], None]) -> bool:
    """Puts the copy of a damaged checkpoint of the run directory in its place, which is kept under another name.

    Returns:
        False: there is no copy, or it is damaged too.

    Raises:
        CheckpointError: a transfer failed for good.
    """
    mirror, step = mirror_of(config), store.step_of(checkpoint.name)
    if mirror is None or step is None or step not in mirror.complete():
        return False
    kept = store.set_aside(checkpoint)
    say(f"{checkpoint} is damaged, it is kept as {kept.name}; fetching its copy, {decimal(mirror.num_bytes(step))}")
    try:
        mirror.fetch(step, checkpoint.parent)
    except CheckpointError as error:
        kept.rename(checkpoint)
        if not isinstance(error, DamagedCopy):
            raise
        say(f"{error.what}; it is skipped")
        return False
    return True


def mirror_of(config: Config) -> Mirror | None:
    """
    Raises:
        ConfigError: there is no such kind of storage, or it is a part of the run directory.
    """
    url, output = config.checkpoint.mirror, Path(config.output_dir).resolve()
    if url is None:
        return None
    mirror = Mirror(url)
    if mirror.folder is not None and mirror.folder.resolve().is_relative_to(output):
        raise ConfigError(
            f"checkpoint.mirror: {url} is in output_dir", fix="give a place that stays when the run directory is lost"
        )
    return mirror


def _wanted(resume: str, output_dir: str, mirror: Mirror | None) -> list[tuple[Mirror, int]]:
    """The copies of which the first that is whole has to be fetched; none: what the run directory has is newer."""
    own = store.complete_checkpoints(checkpoints_folder(output_dir))
    copies = [] if mirror is None else mirror.complete()
    if is_url(resume):
        return [_by_url(resume, output_dir, mirror, own, copies)]
    if mirror is None:
        return []
    if resume == AUTO:
        return [(mirror, step) for step in reversed(copies) if step > _newest(own)]
    if not copies:
        return []
    if resume == NEVER:
        raise ConfigError(
            f"checkpoint.mirror: {mirror.url} already holds a run (the newest is {store.name_of(copies[-1])})",
            fix=f"go on with it by --resume {AUTO}, or set another checkpoint.mirror",
        )
    step = store.step_of(Path(resume).resolve().name)
    if Path(resume).resolve().parent != checkpoints_folder(output_dir).resolve():
        raise _other_run(resume, f"checkpoint.mirror {mirror.url} holds")
    if step is not None and copies[-1] > step:
        raise _newer(resume, f"checkpoint.mirror {mirror.url}", copies[-1])
    return []


def _by_url(
    resume: str, output_dir: str, mirror: Mirror | None, own: list[Path], copies: list[int]
) -> tuple[Mirror, int]:
    split = split_url(resume)
    if split is None:
        raise ConfigError(
            f"--resume {resume}: no such checkpoint", fix="give the URL of one, which ends in step- and its number"
        )
    source, step = Mirror(split[0]), split[1]
    if step not in source.complete():
        there = ", ".join(map(store.name_of, source.complete())) or "none"
        raise ConfigError(
            f"--resume {resume}: no complete checkpoint", fix=f"choose one of those in {source.url}: {there}"
        )
    is_here = any(store.step_of(path.name) == step and source.is_copy_of(path) for path in own)
    if mirror is None or mirror.url != source.url:
        if holds_a_run(Path(output_dir)) and not is_here:
            raise _other_run(resume, f"output_dir {output_dir} holds")
        if mirror is not None and copies and not is_here:
            raise _other_run(resume, f"checkpoint.mirror {mirror.url} holds")
    if _newest(own) > step:
        raise _newer(resume, f"output_dir {output_dir}", _newest(own))
    if mirror is not None and copies and copies[-1] > step:
        raise _newer(resume, f"checkpoint.mirror {mirror.url}", copies[-1])
    return source, step


def _newest(own: list[Path]) -> int:
    """Its step; 0 where there is none."""
    return max((store.step_of(path.name) or 0 for path in own), default=0)


def _other_run(resume: str, where: str) -> ConfigError:
    return ConfigError(
        f"--resume {resume} is of another run than the one that {where}",
        fix="set another output_dir and checkpoint.mirror, where the run goes on from that checkpoint",
    )


def _newer(resume: str, where: str, newest: int) -> ConfigError:
    return ConfigError(
        f"--resume {resume}: {where} has a newer checkpoint, {store.name_of(newest)}, which this run would contradict",
        fix=f"set another output_dir and checkpoint.mirror, or say --resume {AUTO}, or move the newer checkpoints away",
    )
