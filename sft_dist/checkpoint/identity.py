"""Who a run is: what decides what its steps learn, in values that can be compared and shown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from sft_dist.checkpoint.manifest import Identity
from sft_dist.data.prepared import PreparedData
from sft_dist.run import Run

# Of each end of a weight file: enough to tell two models of one shape apart without reading hundreds of GB.
FINGERPRINT_BYTES = 1 << 16

# Keys of an identity.
BASE_WEIGHTS, TRAINING_DATA = "model.weights", "data.train"


def identity_of(run: Run, data: PreparedData) -> Identity:
    """The identity of a run over its prepared training data; the same on every rank.

    A model in a folder is known by its weights, which may be moved; one of the hub by its name and revision.
    """
    weights = weights_fingerprint(Path(run.model.path))
    method = run.model.method.model_dump(mode="json")
    # Absent where they are off, as in checkpoints from before they were there.
    noise = {"train.neftune_alpha": run.neftune_alpha, "train.label_smoothing": run.label_smoothing}
    return Identity(
        values={
            "model.path": run.model.path if weights is None else "a folder",
            "model.revision": run.model.revision,
            "model.add_tokens": list(run.model.tokens.added) or None,
            BASE_WEIGHTS: weights,
            **{f"method.{key}": value for key, value in method.items()},
            "optim.type": run.optim.type,
            **{key: value for key, value in noise.items() if value},
            "train.seed": run.seed,
            "train.global_batch_size": run.batch.global_batch_size,
            TRAINING_DATA: f"{data.num_rows} rows in {data.num_sequences} sequences, {data.digest}",
        }
    )


def weights_fingerprint(folder: Path) -> str | None:
    """Of names, sizes and both ends of a folder's weight files; None for a hub id, which its revision identifies."""
    return files_fingerprint(folder.glob("*.safetensors")) if folder.is_dir() else None


def files_fingerprint(files: Iterable[Path]) -> str:
    """Of names, sizes and both ends of the files of one folder, wherever that lies."""
    digest = xxhash.xxh3_128()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()
