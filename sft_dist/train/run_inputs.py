"""What a run reads, as short digests that tell whether it is still the same. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.measured import files_of_evaluations
from sft_dist.config.schema import Config, LoraMethod
from sft_dist.config.secrets import without_secrets
from sft_dist.data.cache import cache_path, source_names
from sft_dist.data.files import ending, is_url
from sft_dist.data.fingerprint import Fingerprints
from sft_dist.data.named_templates import read_template
from sft_dist.errors import CheckpointError
from sft_dist.model.hub import is_folder_path, model_folder
from sft_dist.model.hub_fetch import TOKENIZER_FILES

# A large file is known by so many parts of so many bytes, at even distances from its first byte to its last.
PARTS, PART_BYTES = 64, 1 << 16


def inputs_of(config: Config) -> dict[str, str]:
    """By the key that names it and what it is: how many files there are, and a digest of them.

    Weights of large files are read in part (``PARTS``), everything else whole. What the digests of data files were is
    remembered where the run keeps its prepared data.

    Raises:
        ConfigError, CheckpointError, DataError: something is not there, or cannot be read.
    """
    found: dict[str, str] = {}
    data = config.data
    texts = [] if config.eval.long_texts is None else config.eval.long_texts.paths
    long_texts = [SourceConfig(path=path, format="text") for path in texts]
    fingerprints = Fingerprints(cache_path(data, config.output_dir) / "files.json")
    for key, sources in (("data.train", data.train), ("data.eval", data.eval), ("eval.long_texts", long_texts)):
        for number, (source, name) in enumerate(zip(sources, source_names(sources), strict=True)):
            found[f"{key}.{number} ({without_secrets(name)})"] = _source(source, fingerprints)
    if data.chat_template is not None:
        found["data.chat_template"] = xxhash.xxh3_128_hexdigest(read_template(data.chat_template).source.encode())
    model, revision = config.model.path, config.model.revision
    folder = model_folder(model, revision)
    if not Path(model).is_dir() and not is_folder_path(model):
        found["model (commit of the hub)"] = folder.name
    tokenizer = model_folder(model, revision, "tokenizer")
    for what, files in (
        ("weights", folder.glob("*.safetensors")),
        ("config.json", folder.glob("config.json")),
        ("tokenizer and its chat template", (file for name in TOKENIZER_FILES for file in tokenizer.glob(name))),
    ):
        found[f"model ({what})"] = _files(files)
    if isinstance(config.method, LoraMethod) and config.method.init_from is not None:
        found["method.init_from"] = _files(Path(config.method.init_from).glob("adapter_*"))
    for key, name in files_of_evaluations(config.eval):
        found[key] = file_digest(Path(name))
    return found


def file_digest(path: Path) -> str:
    """Of name, size and content. Raises ``CheckpointError``."""
    return _files([path])


def _source(source: SourceConfig, fingerprints: Fingerprints) -> str:
    remembered = None if is_url(source.path) else fingerprints.remembered(source, most_bytes=sys.maxsize)
    if remembered is None:
        files = fingerprints.files_of(source)
        remembered = files, fingerprints.of(files)
    parts = [f"{digest}{ending(name)}" for name, digest in zip(*remembered, strict=True)]
    return _told(len(parts), xxhash.xxh3_128_hexdigest("\n".join(parts).encode()))


def _files(files: Iterable[Path]) -> str:
    """Of names, sizes and contents."""
    digest, count = xxhash.xxh3_128(), 0
    for path in sorted(files):
        try:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for part in _parts(path):
                digest.update(part)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}", fix="make it readable") from error
        count += 1
    return _told(count, digest.hexdigest())


def _parts(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= PARTS * PART_BYTES:
            yield file.read()
            return
        for number in range(PARTS):
            file.seek((size - PART_BYTES) * number // (PARTS - 1))
            yield file.read(PART_BYTES)


def _told(count: int, digest: str) -> str:
    return f"{count} file{'' if count == 1 else 's'}, {digest}"
