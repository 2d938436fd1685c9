"""From an artefact or a checkpoint to the parts of the model that it is of: base, changes, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sft_dist.checkpoint.identity import BASE_WEIGHTS, weights_fingerprint
from sft_dist.checkpoint.manifest import MOVE_AWAY
from sft_dist.checkpoint.proof import verify_files
from sft_dist.checkpoint.reader import CheckpointReader
from sft_dist.checkpoint.source import Source
from sft_dist.config.schema import FullMethod, LoraMethod, QloraMethod, VirtualTokensMethod
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.export.provenance import read_receipt
from sft_dist.export.wish import Base
from sft_dist.model.adapter_values import (
    NOTHING,
    VIRTUAL_TOKENS,
    Adapter,
    adapter_settings,
    cannot_merge_tokens,
    saved_adapter,
    trained_adapter,
    trained_whole,
)
from sft_dist.model.build import SftModel, build_model
from sft_dist.model.card import TrainedWith
from sft_dist.model.describe import describe_dense, describe_model
from sft_dist.model.hub import model_folder
from sft_dist.model.prequantized import stored_quantization
from sft_dist.model.renderer import renderer_of
from sft_dist.model.spec import ModelSpec, Tokens
from sft_dist.model.support import load_model_config
from sft_dist.model.weights import Weights

# What Strategy.state puts in front of the master weights.
MASTER = "model."

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Whole:
    """A whole model that can be written: a base, and what changes in it.

    Args:
        spec: of the base as it is read; its method is full where the base's own weights are taken.
        trained: the model as it was trained; None where nobody knows.
    """

    spec: ModelSpec
    model: SftModel
    weights: Weights
    adapter: Adapter
    trained: ModelSpec | None

    @classmethod
    def of(cls, spec: ModelSpec, adapter: Callable[[SftModel, Weights], Adapter], **more: Any) -> Whole:
        model = build_model(spec)
        weights = Weights(model, spec, seed=more.pop("seed", 0), mapped=False)
        return cls(spec, model, weights, adapter(model, weights), **more)


def trained_with(source: Source) -> TrainedWith | None:
    """How the weights came about: by the configuration, else by the card beside an adapter; None where neither is."""
    return TrainedWith.of(source.config) if source.config is not None else TrainedWith.in_card(source.folder)


def describe_trained(trained: TrainedWith) -> ModelSpec:
    """The model as it was trained. An adapter that it went on from plays no part any more."""
    method = trained.method
    if isinstance(method, LoraMethod):
        method = method.model_copy(update={"init_from": None})
    return describe_model(trained.path, trained.revision, method, trained.compute, trained.add_tokens)


def identity_of_source(source: Source) -> Mapping[str, Any]:
    """Of the run; empty where nobody knows."""
    if source.kind == "checkpoint":
        return CheckpointReader(source.folder).manifest.identity.values
    return read_receipt(source.run_directory).get("identity") or {}


def require_same_base(source: Source, path: str) -> None:
    """
    Raises:
        ConfigError: the weights in the folder ``path`` are no longer those that the run began with.
    """
    trained_on = identity_of_source(source).get(BASE_WEIGHTS)
    if trained_on is not None and Path(path).is_dir() and weights_fingerprint(Path(path)) != trained_on:
        raise ConfigError(
            f"{path} holds other weights than those that {source.folder} was trained on",
            fix="put the base model back where it was",
        )


def open_checkpoint(folder: Path, spec: ModelSpec) -> CheckpointReader:
    """
    Args:
        spec: of the model as it was trained.

    Raises:
        CheckpointError: a file is missing or is not what was written, or a parameter is in none.
    """
    reader = CheckpointReader(folder)
    problems = verify_files(folder, reader.manifest, part=0, parts=1)
    if problems:
        raise CheckpointError(f"{folder} is damaged: {problems[0]}", fix=MOVE_AWAY)
    there = set(reader.names)
    absent = [p.name for p in spec.parameters if p.trainable and f"{MASTER}{p.name}" not in there]
    if absent:
        raise CheckpointError(f"{folder} does not hold {absent[0]}, which its config.yaml trains", fix=MOVE_AWAY)
    return reader


def _read_and_release(reader: CheckpointReader, name: str) -> Tensor:
    value = reader.read(name)
    reader.release()
    return value


def merged(source: Source, base: Base | None) -> Whole:
    """The model that an adapter makes of its base.

    Args:
        base: which weights a base gets that was quantised for training; None: those that it was trained with.

    Raises:
        ConfigError: it is no adapter that can be merged, or ``base`` is not to be had.
    """
    trained = trained_with(source)
    if trained is not None and isinstance(trained.method, FullMethod):
        raise ConfigError(
            f"{source.folder} is of a full run, which trained the weights themselves: there is nothing to merge",
            fix="export without --merge",
        )
    if trained is not None and isinstance(trained.method, VirtualTokensMethod):
        raise cannot_merge_tokens(str(source.folder), trained.method.type)
    if trained is None:
        return _merged_alone(source.folder, base)
    assert isinstance(trained.method, LoraMethod)
    spec = describe_trained(trained)
    require_same_base(source, spec.path)
    is_quantized = isinstance(spec.method, QloraMethod)
    if base == "dequantized" and not is_quantized:
        raise _not_quantized(source.folder)
    if base == "original" and is_quantized:
        _require_original(spec)
        read_from = replace(spec, method=FullMethod())
    else:
        read_from = spec

    def adapter(model: SftModel, weights: Weights) -> Adapter:
        if source.kind == "adapter":
            return saved_adapter(source.folder)
        assert isinstance(spec.method, LoraMethod)
        reader = open_checkpoint(source.folder, spec)
        return trained_adapter(
            spec.method,
            [name.removeprefix(MASTER) for name in reader.names if name.startswith(MASTER)],
            lambda name: _read_and_release(reader, f"{MASTER}{name}"),
            token_ids=spec.tokens.trained_ids,
            started_from=weights.factors,
        )

    return Whole.of(read_from, adapter, seed=trained.seed, trained=spec)


def _merged_alone(folder: Path, base: Base | None) -> Whole:
    """An adapter of which nothing is known but what PEFT keeps: it goes into the weights of the base's files."""
    settings, adapter = adapter_settings(folder), saved_adapter(folder)
    path, revision = settings["base_model_name_or_path"], settings.get("revision")
    if base == "dequantized":
        raise _not_quantized(folder)
    spec = describe_dense(path, revision, "fp32")
    if stored_quantization(load_model_config(path, revision), path) is not None:
        raise ConfigError(
            f"{folder}: nothing says how its base {path} was quantised in training",
            fix="give the run directory, or an adapter with the README.md that this project writes",
        )
    new_rows = _rows_of(adapter, build_model(spec)) - spec.vocab_size
    if new_rows > 0:
        spec = replace(spec, tokens=Tokens(new_rows=new_rows), vocab_size=spec.vocab_size + new_rows)
    return Whole.of(spec, lambda model, weights: adapter, trained=None)


def _rows_of(adapter: Adapter, model: SftModel) -> int:
    """Rows that the vocabulary must have for an adapter."""
    causal_lm = model.causal_lm
    matrices = {id(m.weight) for m in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()) if m}
    names = {name for name, parameter in causal_lm.named_parameters() if id(parameter) in matrices}
    whole = [adapter.read(key).shape[0] for name, key in adapter.whole.items() if name in names]
    return max([*whole, *(id + 1 for id in adapter.token_ids)], default=0)


def whole_model(source: Source) -> Whole:
    """The model of a full run: an artefact as it is, or a checkpoint, whose frozen parameters come from the base."""
    if source.kind == "model":
        compute = TrainedWith.of(source.config).compute if source.config is not None else "fp32"
        spec = describe_dense(str(source.folder), None, compute)
        return Whole.of(spec, lambda model, weights: NOTHING, trained=None)
    trained = trained_with(source)
    assert trained is not None
    spec = describe_trained(trained)
    require_same_base(source, spec.path)
    reader = open_checkpoint(source.folder, spec)

    def changes(model: SftModel, weights: Weights) -> Adapter:
        names = {
            hf_name: f"{MASTER}{name}"
            for name, tensor in model.base.items()
            if f"{MASTER}{name}" in reader.names
            for hf_name in tensor.names
        }
        return trained_whole(names, partial(_read_and_release, reader))

    return Whole.of(spec, changes, trained=spec)


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """With the template that the run trained with; an artefact's own, or its base's where it has none."""
    if source.kind == "checkpoint":
        assert source.config is not None
        return renderer_of(source.config.model, source.config.data)().tokenizer
    if any((source.folder / name).is_file() for name in TOKENIZER_FILES) or source.kind == "model":
        return load_tokenizer(str(source.folder))
    settings = adapter_settings(source.folder)
    return load_tokenizer(str(model_folder(settings["base_model_name_or_path"], settings.get("revision"), "tokenizer")))


def is_virtual(source: Source) -> bool:
    """Whether an adapter is one of virtual tokens."""
    return source.kind == "adapter" and adapter_settings(source.folder)["peft_type"] in VIRTUAL_TOKENS


def _not_quantized(folder: Path) -> ConfigError:
    return ConfigError(
        f"--base dequantized: the base of {folder} was not quantised in training, as far as is known",
        fix="leave --base out",
    )


def _require_original(spec: ModelSpec) -> None:
    if stored_quantization(load_model_config(spec.path, spec.revision), spec.path) is not None:
        raise ConfigError(
            f"--base original: {spec.path} is quantised in its files, and its 16-bit weights are not there",
            fix="leave --base out: the adapter goes into the dequantised weights, on which it was trained",
        )
