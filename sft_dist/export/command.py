"""``sft-dist export``: writes an artefact or a checkpoint as a folder that others can load, and proves it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sft_dist.checkpoint.fresh_process import digest
from sft_dist.checkpoint.source import Source, find_source
from sft_dist.config.schema import FullMethod
from sft_dist.errors import ConfigError
from sft_dist.export.check import prove_export, tolerance_of
from sft_dist.export.checkpoint_artefact import write_artefact
from sft_dist.export.dtype import DTYPES, default_dtype, name_of
from sft_dist.export.folder import publish, require_free, require_room, writing
from sft_dist.export.references import NOT_CHECKED, proven_by, reference, references_of
from sft_dist.export.trained import Whole, describe_trained, merged, tokenizer_of, trained_with, whole_model
from sft_dist.export.whole_card import about, told_of_base, write_card
from sft_dist.export.wish import Wish
from sft_dist.model.adapter_values import adapter_settings
from sft_dist.model.export import UNFINISHED
from sft_dist.model.merge import Merge
from sft_dist.model.safetensors_folder import UnmappedFolder
from sft_dist.model.safetensors_writer import SafetensorsWriter, TensorPlan
from sft_dist.model.served import write_settings

ADAPTER_WEIGHTS = "adapter_model"


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
    require_free(folder)
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with writing(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        if wish.merge or is_full:
            whole = merged(source, wish.base) if wish.merge else whole_model(source)
            proven = _export_whole(source, whole, wish, unfinished, console)
        else:
            proven = _export_adapter(source, wish, folder, console)
        publish(unfinished, folder)
    told = _summary(folder, source, proven, time.perf_counter() - started, is_adapter=what == "adapter")
    console.print(told, soft_wrap=True)
    return folder


def _export_whole(source: Source, whole: Whole, wish: Wish, unfinished: Path, console: Console) -> str:
    """Writes a whole model; returns how it was proven, a line."""
    name = wish.dtype or name_of(default_dtype(source, whole))
    dtype = DTYPES[name]
    told = told_of_base(whole) if wish.merge else None
    if told is not None:
        console.print(f"base      {escape(told)}", soft_wrap=True)
    merge, tokenizer = Merge(whole.model, whole.weights, whole.adapter, dtype), tokenizer_of(source)
    plans = merge.plans
    require_room(unfinished, sum(plan.num_bytes for plan in plans))
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
    proven = NOT_CHECKED
    if wish.check:
        with references_of(source, whole, wish, name) as references, console.status("checking in a fresh process"):
            differences = prove_export(
                unfinished, references, tokenizer, weights=weights, token_ids=whole.adapter.token_ids
            )
        proven = proven_by(wish, differences)
    write_card(unfinished, source, whole, name, told, proven)
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
            source, folder, dtype=None if wish.dtype is None else DTYPES[wish.dtype], about=about(source),
            on_saved=lambda name, tensor: saved.update({name: digest(tensor)}),
        )  # fmt: skip
        weights = saved
    if not wish.check:
        return NOT_CHECKED
    references = []
    if source.kind == "adapter":
        tolerance = tolerance_of(wish.dtype or "fp32")
        references = [reference(source.folder, spec, tolerance)]
    with console.status("checking in a fresh process"):
        differences = prove_export(
            unfinished, references, tokenizer_of(source), weights=weights, adapter=reference(unfinished, spec, None)
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
        base = adapter_settings(folder)["base_model_name_or_path"]
        serve = f"vllm serve {base} --enable-lora --lora-modules tuned={folder}"
    lines = [
        f"exported  {folder}: {len(files)} files, {size}, in {seconds:.1f} s, from {source.folder}",
        f"weights   {shown}",
        f"checked   {proven}" if proven != NOT_CHECKED else f"[yellow]{proven}",
        f"serve     {serve}",
        f"talk      sft-dist chat {folder}",
    ]
    return "\n".join(line if line.startswith("[yellow]") else escape(line) for line in lines)
