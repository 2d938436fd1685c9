"""Keeps what a dry run found out about a model, so that the next one of the same model need not build it again.

Entries are found by content: the model's ``config.json``, the settings that decide the entry, the versions of the
libraries and the project's own code. A file that cannot be read is made anew. Nothing here is needed: without a folder
to write to, plans take a second longer.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from sft_dist.config.schema import LoraMethod, MethodConfig, QloraMethod
from sft_dist.model.hub import model_folder
from sft_dist.model.spec import Dtype, ModelSpec
from sft_dist.plan.activations import keep_short, seq_lens_of, trace
from sft_dist.plan.calibration import cache_root
from sft_dist.plan.tape import Segment, Tape, Work
from sft_dist.run import Run

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")

# Whose code decides what is kept.
PACKAGES = ("model", "sharding", "plan")


def cached_describe(
    path: str, revision: str | None, method: MethodConfig, compute: Dtype, add_tokens: Sequence[str] = ()
) -> ModelSpec:
    """``describe_model``, for ``resolve``: kept where the model's ``config.json`` and these arguments say all of it.

    Raises:
        ConfigError, CheckpointError: as ``describe_model``.
    """
    from sft_dist.model.describe import describe_built, describe_model

    if add_tokens or (isinstance(method, LoraMethod) and (method.train_tokens or method.init_from)):
        return describe_model(path, revision, method, compute, add_tokens)
    if isinstance(method, QloraMethod) and method.quantization.skip == "auto":
        return describe_model(path, revision, method, compute, add_tokens)
    key = ["model", path, revision, _config_digest(path, revision), method.model_dump(mode="json"), compute]
    kept = _read(key)
    adapter = TypeAdapter(ModelSpec)
    if kept is not None:
        return adapter.validate_python(kept)
    spec, model = describe_built(path, revision, method, compute, add_tokens)
    keep_short(spec, model)
    _write(key, adapter.dump_python(spec, mode="json"))
    return spec


def cached_trace(run: Run, *, backward: bool = True) -> Tape:
    """``trace`` of the longest micro-batch, or evaluation batch, of a run."""
    model = run.model
    key = [
        "tape", model.path, model.revision, _config_digest(model.path, model.revision),
        model.method.model_dump(mode="json"), model.compute, asdict(model.tokens),
        run.activation_checkpointing.model_dump(mode="json"), run.compile,
        run.precision.master if run.strategy == "ddp" else None,
        seq_lens_of(run), run.batch.sequence_parallel if backward else 1, backward,
    ]  # fmt: skip
    kept = _read(key)
    if kept is not None:
        return _tape(kept)
    tape = trace(run, backward=backward)
    _write(key, _plain(tape))
    return tape


def _config_digest(path: str, revision: str | None) -> str:
    file = model_folder(path, revision, "config") / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


@cache
def _code_digest() -> str:
    """Of the code that makes the entries, and of the versions under it."""
    digest = hashlib.sha256(json.dumps([version(name) for name in LIBRARIES]).encode())
    root = Path(__file__).parents[1]
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _file_of(key: list[Any]) -> Path:
    text = json.dumps([_code_digest(), *key], sort_keys=True)
    return cache_root() / "plan" / f"{key[0]}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _read(key: list[Any]) -> Any | None:
    with suppress(OSError, ValueError):
        return json.loads(_file_of(key).read_bytes())
    return None


def _write(key: list[Any], value: Any) -> None:
    """Whole or not at all; a folder that cannot be written to is no error."""
    file = _file_of(key)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as unfinished:
            json.dump(value, unfinished, separators=(",", ":"))
        os.replace(unfinished.name, file)


def _plain(tape: Tape) -> dict[str, Any]:
    def segment(s: Segment) -> dict[str, Any]:
        return {"name": s.name, "sizes": s.sizes.tolist(), "parts": s.parts.tolist(), "work": asdict(s.work)}

    plain: dict[str, Any] = {}
    for name, value in vars(tape).items():
        if isinstance(value, Segment):
            plain[name] = segment(value)
        elif name in ("forward", "backward"):
            plain[name] = [segment(s) for s in value]
        else:
            plain[name] = list(value)
    return plain


def _tape(plain: dict[str, Any]) -> Tape:
    def segment(s: dict[str, Any]) -> Segment:
        sizes, parts = (np.array(s[name], np.int64) for name in ("sizes", "parts"))
        return Segment(s["name"], sizes, parts, Work(**s["work"]))

    fields: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            fields[name] = segment(value)
        elif name in ("forward", "backward"):
            fields[name] = tuple(segment(s) for s in value)
        else:
            fields[name] = tuple(value)
    return Tape(**fields)
