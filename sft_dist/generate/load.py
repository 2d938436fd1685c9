"""Loads what is to answer with plain transformers and peft, as it computed in training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from sft_dist.checkpoint import fresh_process
from sft_dist.checkpoint.source import ADAPTER, Source
from sft_dist.config.schema import Config, QloraMethod
from sft_dist.errors import CheckpointError, ConfigError, PlanError
from sft_dist.evaluation.prompt import Prompter, prompter_of
from sft_dist.export.checkpoint_artefact import artefact_of_checkpoint
from sft_dist.generate.engine import Engine, Voice
from sft_dist.model.build import TORCH_DTYPES
from sft_dist.model.hub import ModelNotHere, model_folder

DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16} | {str(n): d for n, d in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Loaded:
    """What answers.

    Args:
        base: the model as it was before training, or None where it was not asked for.
        about: what it is and how it computes, for people.
        notices: lines that the user should see.
    """

    name: str
    engine: Engine
    prompter: Prompter
    tuned: Voice
    base: Voice | None
    about: str
    notices: tuple[str, ...]


def load(source: Source, *, device: DeviceChoice, dtype: DtypeChoice, with_base: bool = False) -> Loaded:
    """
    Args:
        dtype: of products and of weights that are not quantised; auto: what the run computed in, else the files'.
        with_base: the base model answers too. An adapter is switched off for that; a whole model's base is loaded
            beside it.

    Raises:
        CheckpointError: it does not load.
        ConfigError: there is no such device, or no base.
        PlanError: it does not fit the device.
    """
    place = _device(device)
    if source.kind != "checkpoint":
        return _load(source, source.folder, place, dtype, with_base)
    with tempfile.TemporaryDirectory(prefix="sft_dist_chat_") as temporary:
        folder = artefact_of_checkpoint(source, Path(temporary) / "artefact")
        return _load(source, folder, place, dtype, with_base)


def _device(choice: DeviceChoice) -> torch.device:
    there = torch.cuda.is_available()
    if choice == "cuda" and not there:
        raise ConfigError("--device cuda: torch sees no GPU here", fix="take --device cpu, or install torch for CUDA")
    return torch.device("cuda", torch.cuda.current_device()) if there and choice != "cpu" else torch.device("cpu")


def _load(source: Source, folder: Path, device: torch.device, dtype: DtypeChoice, with_base: bool) -> Loaded:
    tokenizer = _tokenizer(folder)
    prompter = prompter_of(tokenizer, source.config)
    is_adapter = (folder / ADAPTER).is_file()
    try:
        loading = _Loading(source.config, device, dtype, tokenizer)
        base = None
        if is_adapter:
            tuned, base, what = loading.adapter(folder)
        else:
            tuned, what = loading.whole(folder), f"model {source.folder}"
            if with_base:
                base = loading.base_of_a_whole_model(source)
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"{source.folder} does not fit the memory of the GPU", fix="take --dtype bf16, or --device cpu"
        ) from error
    stops = _stop_ids(tuned, tokenizer, prompter)
    voice = Voice(tuned.model, nullcontext, stops)
    base_voice = None
    if with_base and base is not None:
        base_voice = Voice(base.model, base.active, tuple(sorted({*stops, *base.eos_ids})))
    engine = Engine(tokenizer, max_positions=_positions(tuned.model), device=device)
    notices = (source.notice, prompter.notice, *loading.notices)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Loaded(
        source.name, engine, prompter, voice, base_voice, f"{what}, {loading.computes} on {where}",
        tuple(notice for notice in notices if notice is not None),
    )  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """A model in eval mode, when it is which, and the ends that its own generation_config names."""

    model: Any
    eos_ids: tuple[int, ...]
    active: Callable[[], AbstractContextManager[object]] = nullcontext


class _Loading:
    """
    Attributes:
        computes: the dtype, and the quantisation, of what was loaded.
        notices: what could not be done as in training.
    """

    def __init__(
        self, config: Config | None, device: torch.device, dtype: DtypeChoice, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._config, self._device, self._tokenizer = config, device, tokenizer
        self._dtype: torch.dtype | Literal["auto"] = "auto" if dtype == "auto" else DTYPES[dtype]
        if dtype == "auto" and config is not None:
            self._dtype = TORCH_DTYPES[config.precision.compute]
        self.computes = ""
        self.notices: list[str] = []

    def whole(self, folder: Path, revision: str | None = None) -> _Model:
        """A model from its own files."""
        return self._finished(self._from_files(str(folder), revision, {}))

    def adapter(self, folder: Path) -> tuple[_Model, _Model, str]:
        """An adapter on its base, the base alone, and what it is."""
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        path, revision = settings["base_model_name_or_path"], settings.get("revision")
        try:
            there = model_folder(path, revision)
        except (ModelNotHere, ConfigError) as error:
            raise CheckpointError(
                f"the base model of the adapter, {path}, is not on this machine",
                fix="run from the folder where it was trained, or correct base_model_name_or_path in "
                f"{folder / ADAPTER}; a hub model: sft-dist model fetch CONFIG",
            ) from error
        base = self._from_files(str(there), None, self._quantization(there))
        self._grow(base)
        loaded = self._finished(base)
        try:
            model = PeftModel.from_pretrained(base, str(folder), torch_device=str(self._device)).eval()
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise _does_not_load(folder, error) from error
        _as_in_training(model)
        tuned = _Model(model, loaded.eos_ids)
        kind = settings["peft_type"].replace("_", " ").lower().replace("lora", "LoRA")
        return tuned, _Model(model, loaded.eos_ids, model.disable_adapter), f"{kind} adapter on {path}"

    def base_of_a_whole_model(self, source: Source) -> _Model:
        if self._config is None:
            raise ConfigError(
                f"--compare-base: {source.folder} does not say which model it was trained from",
                fix="give the run directory, whose config.yaml does",
            )
        base = self._config.model
        if source.folder.resolve() == Path(base.path).resolve():
            raise ConfigError(f"--compare-base: {source.folder} is the base model", fix="give the run directory")
        model = self._from_files(str(model_folder(base.path, base.revision)), None, {})
        self._grow(model)
        return self._finished(model)

    def _quantization(self, base: Path) -> dict[str, Any]:
        """Options that give a base the quantised weights that its adapter was trained on."""
        stored = getattr(AutoConfig.from_pretrained(base), "quantization_config", None)
        method = None if self._config is None else self._config.method
        if stored is not None:
            return {}
        if not isinstance(method, QloraMethod):
            if self._config is None:
                self.notices.append(
                    "config.yaml of the run is not beside the adapter: if it was trained on a quantised base, it "
                    "answers here on the base as it is"
                )
            return {}
        assert self._config is not None
        from sft_dist.model.describe import describe_model

        model = self._config.model
        spec = describe_model(model.path, model.revision, method, self._config.precision.compute, model.add_tokens)
        assert isinstance(spec.method, QloraMethod)
        skip = list(spec.method.quantization.skip)
        # Without a list Transformers leaves out the output layer; a list has to name it.
        skipped = [*skip, fresh_process.output_layer(AutoConfig.from_pretrained(base))] if skip else None
        dtype = TORCH_DTYPES[self._config.precision.compute] if self._dtype == "auto" else self._dtype
        self.computes = f"base in {method.quantization.type}, "
        return {"quantization_config": fresh_process.quantize_as(method.quantization.type, skipped, dtype)}

    def _from_files(self, path: str, revision: str | None, options: dict[str, Any]) -> Any:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, revision=revision or "main", dtype=self._dtype, device_map={"": str(self._device)}, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _does_not_load(Path(path), error) from error
        quantised = any(isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for m in model.modules())
        dtype = model.dtype if self._dtype == "auto" else self._dtype
        if quantised:
            fresh_process.compute_in(model, dtype)
            if self._device.type == "cpu":
                fresh_process.by_whole_blocks(model, dtype)
            self.computes = self.computes or "base as its files quantise it, "
        if not self.computes.endswith(_name(dtype)):
            self.computes += _name(dtype)
        return model

    def _grow(self, base: nn.Module) -> None:
        """Gives a base the rows of tokens that the run added, as training began them: with the mean of the others."""
        embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
        known, needed = embedding.weight.shape[0], max(self._tokenizer.get_vocab().values()) + 1
        if needed <= known:
            return
        base.resize_token_embeddings(needed, mean_resizing=False)  # type: ignore[operator]
        matrices = {id(m.weight): m.weight for m in (base.get_input_embeddings(), base.get_output_embeddings())}  # type: ignore[operator]
        with torch.no_grad():
            for weight in matrices.values():
                weight[known:] = weight[:known].float().mean(dim=0).to(weight.dtype)

    def _finished(self, model: Any) -> _Model:
        own = model.generation_config
        eos = own.eos_token_id
        ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        # What is asked for decides how tokens are drawn: settings in the files would change it unseen.
        model.generation_config = GenerationConfig()
        return _Model(_as_in_training(model.eval()), ends)


def _as_in_training(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            # In eval mode it would quantise the activations too, which training does not.
            module.train()
    return model


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _does_not_load(folder, error) from error
    return tokenizer


def _stop_ids(tuned: _Model, tokenizer: PreTrainedTokenizerBase, prompter: Prompter) -> tuple[int, ...]:
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*tuned.eos_ids, *own, *prompter.end_ids}))


def _positions(model: Any) -> int | None:
    """Tokens that the model was made for, less the virtual ones in front of each prompt."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = 0
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        virtual = int(model.active_peft_config.num_virtual_tokens)
    return None if limit is None else limit - virtual


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _does_not_load(folder: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{folder} does not load: {reason}", fix="give a run, a checkpoint or a model that is whole, with its tokenizer"
    )
