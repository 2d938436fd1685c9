"""``sft-dist export``: writes an artefact or a checkpoint as a folder that others can load, and proves it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sft_dist.checkpoint import store
from sft_dist.checkpoint.fresh_process import digest
from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.source import Source, find_source
from sft_dist.config.schema import FullMethod, QloraMethod
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.export.check import Reference, prove_export, tolerance_of
from sft_dist.export.checkpoint_artefact import write_artefact
from sft_dist.export.provenance import training_section
from sft_dist.export.trained import (
    Whole,
    base_dtype,
    describe_trained,
    identity_of_source,
    merged,
    tokenizer_of,
    trained_with,
    whole_model,
)
from sft_dist.export.wish import Wish, WrittenDtype
from sft_dist.model.card import CARD, card, front_matter, whole_usage
from sft_dist.model.export import UNFINISHED
from sft_dist.model.merge import Merge
from sft_dist.model.safetensors_folder import UnmappedFolder
from sft_dist.model.safetensors_writer import SafetensorsWriter, TensorPlan
from sft_dist.model.served import write_settings

DTYPES: dict[WrittenDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ADAPTER_WEIGHTS = "adapter_model"


@dataclass(frozen=True)
class Written:
    """What an export made.

    Args:
        weights: digests by name; None where what was written is compared by its logits alone.
        told: of the base that an adapter was merged into, for user and card.
        dtype: of the weights, as ``DTYPES`` names it.
    """

    weights: dict[str, str] | None
    told: str | None
    dtype: str


def run_export(path: Path, wish: Wish, *, checkpoint: str | None = None) -> Path:
    """Exports what ``path`` means and tells about it; returns the folder.

    Raises:
        ConfigError: the path is none, the wish cannot be fulfilled, or the folder is taken.
        CheckpointError: the weights are damaged, cannot be written, or failed their proof, which leaves what was
            written under the name of something unfinished.
    """
    console, started = Console(highlight=False), time.perf_counter()
    source = find_source(path, checkpoint=checkpoint)
    if wish.base is not None and not wish.merge:
        raise ConfigError("--base says what an adapter is merged into, without --merge", fix="add --merge")
    if source.kind == "model" and wish.merge:
        raise ConfigError(
            f"{source.folder} is a whole model: there is nothing to merge", fix="export it without --merge"
        )
    trained = trained_with(source)
    is_full = source.kind == "model" or (trained is not None and isinstance(trained.method, FullMethod))
    what = "merged" if wish.merge else "model" if is_full else "adapter"
    around = source.run_directory if source.run_directory is not None else source.folder.resolve().parent
    folder = wish.out if wish.out is not None else around / f"{what}{source.label}"
    _require_free(folder)
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with _writing(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        if wish.merge or is_full:
            whole = merged(source, wish.base) if wish.merge else whole_model(source)
            proven = _export_whole(source, whole, wish, unfinished, console)
        else:
            proven = _export_adapter(source, wish, folder, console)
        _publish(unfinished, folder)
    told = _summary(folder, source, proven, time.perf_counter() - started, is_adapter=what == "adapter")
    console.print(told, soft_wrap=True)
    return folder


def _export_whole(source: Source, whole: Whole, wish: Wish, unfinished: Path, console: Console) -> str:
    """Writes a whole model; returns how it was proven, a line."""
    name = wish.dtype or _name_of(_default_dtype(source, whole))
    dtype = DTYPES[name]
    told = _told_of_base(whole) if wish.merge else None
    if told is not None:
        console.print(f"base      {escape(told)}", soft_wrap=True)
    merge, tokenizer = Merge(whole.model, whole.weights, whole.adapter, dtype), tokenizer_of(source)
    plans = merge.plans
    _require_room(unfinished, sum(plan.num_bytes for plan in plans))
    unfinished.mkdir(parents=True)
    started = time.perf_counter()
    with SafetensorsWriter(unfinished, plans, max_file_bytes=wish.max_file_bytes) as writer:
        with _progress(console, writer.num_bytes) as on_bytes:
            weights = merge.write(writer, on_bytes=on_bytes)
        writer.finish()
        num_bytes = writer.num_bytes
    elapsed = time.perf_counter() - started
    console.print(
        f"wrote     {decimal(num_bytes)} of weights in {elapsed:.1f} s ({decimal(int(num_bytes / elapsed))}/s)"
    )
    write_settings(
        unfinished,
        whole.model,
        tokenizer,
        base=whole.spec.path,
        revision=whole.spec.revision,
        dtype=dtype,
        vocab_size=whole.model.causal_lm.get_input_embeddings().weight.shape[0],
    )
    proven = "not checked (--no-check): no process has loaded it"
    if wish.check:
        with _references(source, whole, wish, name) as references, console.status("checking in a fresh process"):
            differences = prove_export(
                unfinished, references, tokenizer, weights=weights, token_ids=whole.adapter.token_ids
            )
        proven = _proven(source, wish, differences)
    _write_card(unfinished, source, whole, name, told, proven)
    return proven


def _export_adapter(source: Source, wish: Wish, folder: Path, console: Console) -> str:
    """Writes an adapter in PEFT's format; returns how it was proven, a line."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    trained = trained_with(source)
    spec = None if trained is None else describe_trained(trained)
    weights: dict[str, str] | None = None
    if source.kind == "adapter":
        _copy_adapter(source.folder, unfinished, wish)
    else:
        saved: dict[str, str] = {}
        write_artefact(
            source, folder, dtype=None if wish.dtype is None else DTYPES[wish.dtype], about=_about(source),
            on_saved=lambda name, tensor: saved.update({name: digest(tensor)}),
        )  # fmt: skip
        weights = saved
    if not wish.check:
        return "not checked (--no-check): no process has loaded it"
    references = []
    if source.kind == "adapter":
        tolerance = tolerance_of(wish.dtype or "fp32")
        references = [_reference(source.folder, spec, tolerance)]
    with console.status("checking in a fresh process"):
        differences = prove_export(
            unfinished, references, tokenizer_of(source), weights=weights, adapter=_reference(unfinished, spec, None)
        )
    if weights is not None:
        return "loaded by plain peft in a fresh process: every weight is that of the checkpoint, bit for bit"
    return f"loaded by plain peft in a fresh process: equal to its source to {max(differences):.1e} (rms, relative)"


def _copy_adapter(folder: Path, unfinished: Path, wish: Wish) -> None:
    """An adapter as it is, or with its tensors in another dtype."""
    unfinished.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and (wish.dtype is None or not path.name.startswith(ADAPTER_WEIGHTS)):
            shutil.copyfile(path, unfinished / path.name)
    if wish.dtype is None:
        return
    dtype, values = DTYPES[wish.dtype], UnmappedFolder(folder, ADAPTER_WEIGHTS, key="the adapter")
    plans = [TensorPlan(name, dtype, stored.shape) for name, stored in values.tensors.items()]
    # PEFT reads one file.
    with SafetensorsWriter(unfinished, plans, max_file_bytes=1 << 62, name=ADAPTER_WEIGHTS) as writer:
        for plan in plans:
            writer.write(plan.name, values.read(plan.name, 0, plan.numel).to(dtype))
        writer.finish()


@contextmanager
def _references(source: Source, whole: Whole, wish: Wish, name: str) -> Iterator[list[Reference]]:
    """What a whole model is compared with; an adapter that is nowhere in PEFT's format is written for it."""
    if not wish.merge:
        same = tolerance_of(name, _name_of(base_dtype(whole)))
        yield [Reference(str(source.folder), None, None, same)] if source.kind == "model" else []
        return
    spec = whole.trained if whole.trained is not None else whole.spec
    tolerance = tolerance_of(name, spec.compute)
    folder, made = source.folder, None
    if source.kind == "checkpoint":
        made = source.folder.with_name(f"{source.folder.name}.adapter")
        folder = made.with_name(made.name + UNFINISHED)
        write_artefact(source, made)
    try:
        if whole.spec.method == spec.method:
            yield [Reference.adapter(folder, spec, tolerance=tolerance)]
        else:
            # The second is what was trained; how far the merged model is from it is only told.
            merged_into = Reference.adapter(folder, whole.spec, tolerance=tolerance)
            yield [merged_into, Reference.adapter(folder, spec, tolerance=None)]
    finally:
        if made is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _proven(source: Source, wish: Wish, differences: list[float]) -> str:
    how = "loaded by plain transformers in a fresh process: "
    if not wish.merge:
        same = f"equal to its source to {differences[0]:.1e} (rms, relative)" if differences else ""
        return how + (same or "every weight is that of the checkpoint in this dtype, bit for bit")
    trained = f"; the model as it was trained differs by {differences[1]:.1e}" if len(differences) > 1 else ""
    return f"{how}merged = adapter to {differences[0]:.1e} (rms, relative){trained}"


def _told_of_base(whole: Whole) -> str:
    """Which base an adapter is merged into, and what the other one would mean."""
    trained = whole.trained
    if trained is None:
        return (
            f"merged into the weights in the files of {whole.spec.path}; nothing says whether training quantised them"
        )
    if not isinstance(trained.method, QloraMethod):
        return f"merged into the weights in the files of {trained.path}"
    kind = trained.method.quantization.type
    if isinstance(whole.spec.method, QloraMethod):
        return (
            f"merged into the dequantised {kind} weights, on which the adapter was trained; --base original would take "
            "those before quantisation, which the adapter never saw"
        )
    return (
        f"merged into the original weights of {trained.path}, and not into their {kind} form, on which the adapter was "
        "trained; --base dequantized is exactly the model that was trained"
    )


def _write_card(folder: Path, source: Source, whole: Whole, dtype: str, told: str | None, proven: str) -> None:
    spec = whole.trained if whole.trained is not None else whole.spec
    base = spec.path if source.kind != "model" or source.config is None else source.config.model.path
    tags = [spec.method.type if told is not None else "full", *(["merged"] if told is not None else [])]
    made = [f"- weights in {dtype}", *([f"- {told}"] if told is not None else []), f"- {proven}"]
    text = card(
        front_matter(base, is_adapter=False, tags=tags),
        f"{base}, fine-tuned",
        [
            f"## How to load\n\n{whole_usage()}\n\n```\nvllm serve PATH_OF_THIS_FOLDER\n```",
            "## How it was made\n\n" + "\n".join(made),
            _about(source),
        ],
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _about(source: Source) -> str:
    if source.config is None:
        return ""
    identity = identity_of_source(source)
    steps = Manifest.read(source.folder).position.completed_steps if source.kind == "checkpoint" else None
    return training_section(source.config, source.run_directory, identity=identity, steps=steps)


def _reference(folder: Path, spec: object, tolerance: float | None) -> Reference:
    from sft_dist.model.spec import ModelSpec

    if isinstance(spec, ModelSpec):
        return Reference.adapter(folder, spec, tolerance=tolerance)
    return Reference(str(folder), None, None, tolerance)


def _default_dtype(source: Source, whole: Whole) -> torch.dtype:
    """What the run computed in; without a run, that of the base."""
    known = whole.trained.compute if whole.trained is not None else None
    if source.kind == "model" and source.config is not None:
        known = source.config.precision.compute
    return base_dtype(whole) if known is None else DTYPES[known]


def _name_of(dtype: torch.dtype) -> WrittenDtype:
    for name, each in DTYPES.items():
        if each == dtype:
            return name
    raise ConfigError(f"the base is stored in {dtype}, which is not written", fix="say --dtype bf16, fp16 or fp32")


def _require_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty", fix="give another folder by --out, or remove it")


def _require_room(unfinished: Path, num_bytes: int) -> None:
    around = next(path for path in unfinished.resolve().parents if path.exists())
    free = shutil.disk_usage(around).free
    if free < num_bytes:
        raise CheckpointError(
            f"{decimal(num_bytes)} are to be written, and {around} has {decimal(free)} left",
            fix="make room, or give a folder on another disk by --out",
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: the disk refuses something.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder} ({error.strerror or error})", fix="make room, or give another folder by --out"
        ) from error


def _publish(unfinished: Path, folder: Path) -> None:
    """Puts what was written on the disk and gives it its name."""
    for path in unfinished.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    store.sync(unfinished)
    if folder.exists():
        folder.rmdir()  # empty, as was seen before
    unfinished.rename(folder)
    store.sync(folder.resolve().parent)


@contextmanager
def _progress(console: Console, num_bytes: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("writing weights"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=num_bytes)
        yield lambda count: progress.advance(task, count)


def _summary(folder: Path, source: Source, proven: str, seconds: float, *, is_adapter: bool) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path.name for path in files if path.suffix == ".safetensors"]
    size = decimal(sum(path.stat().st_size for path in files))
    shown = weights[0] if len(weights) == 1 else f"{weights[0]} to {weights[-1]}, and their index"
    serve = f"vllm serve {folder}"
    if is_adapter:
        serve = f"vllm serve {_base_of(folder)} --enable-lora --lora-modules tuned={folder}"
    lines = [
        f"exported  {folder}: {len(files)} files, {size}, in {seconds:.1f} s, from {source.folder}",
        f"weights   {shown}",
        f"checked   {proven}" if not proven.startswith("not") else f"[yellow]{proven}",
        f"serve     {serve}",
        f"talk      sft-dist chat {folder}",
    ]
    return "\n".join(line if line.startswith("[yellow]") else escape(line) for line in lines)


def _base_of(folder: Path) -> str:
    from sft_dist.model.adapter_values import adapter_settings

    return str(adapter_settings(folder)["base_model_name_or_path"])
