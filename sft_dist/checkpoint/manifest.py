"""``manifest.json``: what a checkpoint holds, where the run was, and what a run must share with it to go on."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from sft_dist.config.control_schema import EVAL_LOSS
from sft_dist.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"

# The resolved configuration of the run, beside the manifest and in the run directory.
SETTINGS = "config.yaml"

# What the file ends with: the digest of all before it. One bit of a range or of a step would be a wrong resume.
_SEAL = ',"digest":"{}"}}'

# Of a checkpoint that cannot be resumed from.
MOVE_AWAY = "move it away: --resume auto then goes on from the checkpoint before it"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorRecord(_Record):
    """One tensor of the state, whole; the shards may have any cut."""

    shape: tuple[int, ...]
    dtype: str


class FileRecord(_Record):
    """One file of the checkpoint.

    Args:
        digest: XXH3-128 of its bytes.
        ranges: by tensor, the first element that is in it of the flattened whole, and the one behind its last.
    """

    num_bytes: int
    digest: str
    ranges: dict[str, tuple[int, int]] = {}


class Identity(_Record):
    """What a run and the checkpoint that it goes on from must have in common: all of it decides what a step learns.

    Keys are those of the configuration, where the value is one. The number of processes, the strategy, the
    micro-batch, the precision of products and the learning rate are not here: they may change.
    """

    values: dict[str, Any]

    def differences(self, run: Identity) -> list[str]:
        """Names of the values that ``run`` has otherwise."""
        names = sorted(self.values.keys() | run.values.keys())
        return [name for name in names if run.values.get(name) != self.values.get(name)]

    def told(self, name: str, run: Identity) -> str:
        """One difference, with both values."""
        return f"{name} is {run.values.get(name)} here and {self.values.get(name)} in the checkpoint"

    def require_same(self, run: Identity, *, checkpoint: Path, allowed: Collection[str] = ()) -> None:
        """
        Args:
            allowed: names that may differ, because the user said so.

        Raises:
            ConfigError: ``run`` differs, with both values of every difference; or a name is none.
        """
        unknown = sorted(set(allowed) - (self.values.keys() | run.values.keys()))
        if unknown:
            raise ConfigError(
                f"--allow-change {unknown[0]}: nothing of this name has to stay as it is",
                fix="what has to is: " + ", ".join(sorted(self.values.keys() | run.values.keys())),
            )
        differences = [name for name in self.differences(run) if name not in allowed]
        if differences:
            anyway = " ".join(f"--allow-change {name}" for name in differences)
            raise ConfigError(
                "\n".join([f"{checkpoint} belongs to another run:", *(self.told(name, run) for name in differences)]),
                fix="put the old values back, or start a new run in another output_dir, or go on all the same: "
                + anyway,
            )


class Waiting(_Record):
    """How far early stopping is from ending a run.

    Args:
        best, best_step: of its metric, the last value that was an improvement; None before the first one.
        evaluations: without an improvement, since then.
    """

    best: float | None = None
    best_step: int | None = None
    evaluations: int = 0


class Position(_Record):
    """Where a run is.

    Args:
        completed_steps: steps behind the state, those among them that were skipped.
        next_sequences: numbers of the sequences that the next step trains, empty at the end of the run.
        next_lr: of the next step; None at the end.
        next_rng: digest of what rank 0's generators draw in the next step.
        trained_s: seconds that the run has taken so far, all starts of it together, by a clock that never goes back.
        eval_loss: of this very state, where it was evaluated.
        evaluation: what else that evaluation measured, by its key in ``metrics.jsonl``; finite values.
        waiting: None in a run without early stopping.
        skipped_steps: 1-based numbers of steps whose update is not in the state; those behind ``completed_steps`` are
            left out when they come.
        roll_backs: how often the run has gone back to a checkpoint.
        recent_losses: of the last steps, by which a spike is told.
    """

    completed_steps: int
    next_sequences: tuple[int, ...] = ()
    next_lr: float | None = None
    next_rng: str | None = None
    trained_s: float = 0.0
    eval_loss: float | None = None
    evaluation: dict[str, float] = {}
    waiting: Waiting | None = None
    skipped_steps: tuple[int, ...] = ()
    roll_backs: int = 0
    recent_losses: tuple[float, ...] = ()

    def value_of(self, metric: str) -> float | None:
        """Of this very state; None where it was not evaluated, or the value is not finite."""
        value = self.eval_loss if metric == EVAL_LOSS else self.evaluation.get(metric)
        return value if value is not None and math.isfinite(value) else None

    @property
    def updates(self) -> int:
        """Updates that are in the state; an optimizer counts them."""
        return self.completed_steps - sum(step <= self.completed_steps for step in self.skipped_steps)


class Manifest(_Record):
    """
    Args:
        position: where the run was.
        strategy, world_size: under which the shards were cut.
        tensors: by name in the state, see ``Strategy.state``.
        files: by name; each rank wrote its own.
    """

    format: Literal[2] = 2
    position: Position
    strategy: str
    world_size: int
    identity: Identity
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]

    @property
    def completed_steps(self) -> int:
        return self.position.completed_steps

    def text(self) -> str:
        """The file: JSON with ``digest`` behind the rest, the XXH3-128 of the same without it."""
        content = self.model_dump_json()
        return content[:-1] + _seal(content.encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            CheckpointError: the folder is no checkpoint, or a damaged one, or one of another version of this format.
        """
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
            end = raw.rfind(b',"digest":')
            content = raw if end < 0 else raw[:end] + b"}"
            manifest = cls.model_validate_json(content)
            if end < 0 or raw[end:] != _seal(content).encode():
                raise _unusable(f"{path} cannot be read: it is not as it was written")
            return manifest
        except FileNotFoundError:
            raise _unusable(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
        except OSError as error:
            raise _unusable(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise _unusable(f"{path} cannot be read: {where}: {first['msg']}") from error


def _seal(content: bytes) -> str:
    return _SEAL.format(xxhash.xxh3_128_hexdigest(content))


def _unusable(what: str) -> CheckpointError:
    return CheckpointError(what, fix=MOVE_AWAY).everywhere()
