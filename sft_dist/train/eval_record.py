"""What ``eval.json`` has beside the figures: what it takes to compute a score again, and to know what it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_dist.config.measured import files_of_evaluations
from sft_dist.config.schema import Config
from sft_dist.config.secrets import without_secrets
from sft_dist.data.cache import cache_path
from sft_dist.data.fingerprint import Fingerprints
from sft_dist.train.evaluations import Evaluated
from sft_dist.train.run_inputs import file_digest
from sft_dist.train.surroundings import LIBRARIES, versions

# That have a part in scores alone.
OF_SCORES = ("sacrebleu", "mecab-python3", "ipadic", "jsonschema")


def read_files(config: Config) -> dict[str, Any]:
    """Keys of what is read, to be asked for before hours of answers.

    Raises:
        ConfigError, DataError, CheckpointError: a file is not there, or cannot be read.
    """
    return {
        "data": [{"path": path, "xxh3_128": digest} for path, digest in _held_out(config)],
        "files": {f"{key} ({file})": file_digest(Path(file)) for key, file in files_of_evaluations(config.eval)},
    }


def record_of(config: Config, found: Mapping[str, Evaluated], notes: list[str]) -> dict[str, Any]:
    """Keys of how it was asked, and of what came of it.

    Args:
        config: by which the states were evaluated.
        found: by the name of the state.
        notes: on their comparison.
    """
    asked = config.eval.model_dump(mode="json")
    texts = config.eval.long_texts
    if texts is not None:
        length = texts.length or config.data.max_seq_len
        asked["long_texts"] |= {"length": length, "stride": texts.stride or max(1, length // 2)}
    return {
        "eval": asked,
        "seed": config.train.seed,
        "max_seq_len": config.data.max_seq_len,
        "precision": config.precision.compute,
        "answers": {name: _answers(each) for name, each in found.items()},
        "notes": {name: list(each.findings.notes) for name, each in found.items() if each.findings is not None}
        | ({"compared": notes} if notes else {}),
        "versions": versions((*LIBRARIES, *OF_SCORES)),
    }


def _held_out(config: Config) -> Iterator[tuple[str, str]]:
    """Files that the rows are of, with their digests; where rows of training were split off, those of training."""
    fingerprints = Fingerprints(cache_path(config.data, config.output_dir) / "files.json")
    for source in config.data.eval or config.data.train:
        files = fingerprints.files_of(source)
        yield from zip(map(without_secrets, files), fingerprints.of(files), strict=True)


def _answers(evaluated: Evaluated) -> dict[str, int]:
    """How many answers were judged, how many of them were cut at ``max_new_tokens``, and how many are empty."""
    judged = () if evaluated.findings is None else evaluated.findings.judged
    return {
        "examples": len(judged),
        "cut": sum(reply.finish_reason == "length" for reply in judged),
        "empty": sum(not reply.answer.strip() for reply in judged),
    }
