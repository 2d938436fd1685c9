"""Writes what a run made in Hugging Face layout: a whole model, or an adapter, with tokenizer and chat template."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sft_dist.config.schema import FullMethod, LoraMethod, VirtualTokensMethod
from sft_dist.errors import CheckpointError
from sft_dist.model.adapters import lora_config
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.card import trained_card
from sft_dist.model.safetensors_writer import SafetensorsWriter, TensorPlan
from sft_dist.model.served import write_settings
from sft_dist.model.spec import ModelSpec
from sft_dist.model.token_rows import TOKEN_ROWS
from sft_dist.model.virtual_tokens import LOADED_NAME, SAVED_NAME, peft_config, to_save
from sft_dist.model.weights import Weights

# SftModel's own attribute, in front of every name that Transformers and PEFT know.
PREFIX = "hf."

# PEFT's wrapper, in front of the names of Transformers.
ADAPTED = "base_model.model."


UNFINISHED, REPLACED = ".unfinished", ".replaced"

# Of a file of a whole model, as others cut them.
MAX_FILE_BYTES = 5_000_000_000


def export(
    folder: Path,
    spec: ModelSpec,
    model: SftModel,
    parameters: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_main: bool,
    seed: int,
    about: str = "",
    on_saved: Callable[[str, Tensor], None] = lambda *_: None,
) -> None:
    """Writes an artefact as ``folder`` with ``.unfinished`` behind its name. Every rank must call it; rank 0 writes.

    A whole model is saved in the dtype it computed in, tensor by tensor as they come; an adapter in the dtype of its
    master weights. Virtual tokens are saved without the encoder that made them.

    Args:
        parameters: (name, full tensor) of every trainable parameter, of the others too when the method is full.
        seed: that the adapter started from.
        about: Markdown for the model card: what was trained, on what, with what result.
        on_saved: called on rank 0 with every tensor that was saved, by its name in transformers or peft.

    Raises:
        CheckpointError: on rank 0; the folder cannot be written.
    """
    parameters = iter(parameters)
    try:
        if is_main:
            _write(
                folder.with_name(folder.name + UNFINISHED), spec, model, parameters, tokenizer, seed, about, on_saved
            )
    except Exception as e:
        if not _is_of_the_disk(e):
            raise
        raise CheckpointError(
            f"cannot write {folder} ({e})", fix="make room on the disk, then go on with --resume auto"
        ) from e
    finally:
        for _ in parameters:  # the ranks gather together, to the end
            pass


def _write(
    unfinished: Path,
    spec: ModelSpec,
    model: SftModel,
    parameters: Iterator[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    about: str,
    on_saved: Callable[[str, Tensor], None],
) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    named = ((name.removeprefix(PREFIX), tensor) for name, tensor in parameters)
    if isinstance(spec.method, FullMethod):
        _save_model(unfinished, spec, model, named, tokenizer, on_saved)
    else:
        # What an adapter is made of is small, and saved together.
        gathered = {name: tensor.to("cpu", copy=True) for name, tensor in named}
        if isinstance(spec.method, LoraMethod):
            _save_adapter(unfinished, spec, model, gathered, seed)
        else:
            gathered = _save_virtual_tokens(unfinished, spec, model, gathered)
        for name, tensor in gathered.items():
            on_saved(name, tensor)
        tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_text(trained_card(spec, model, about=about), encoding="utf-8")


def _is_of_the_disk(error: Exception) -> bool:
    """safetensors and tokenizers, written in Rust, pass on what the system says in exceptions of their own."""
    return isinstance(error, OSError) or "(os error " in str(error)


def publish(folder: Path) -> None:
    """Gives an exported artefact its name; one that a longer run replaces goes when the new one is there."""
    replaced = folder.with_name(folder.name + REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    folder.with_name(folder.name + UNFINISHED).rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _save_model(
    folder: Path,
    spec: ModelSpec,
    model: SftModel,
    named: Iterator[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    on_saved: Callable[[str, Tensor], None],
) -> None:
    dtype = TORCH_DTYPES[spec.compute]
    plans = [TensorPlan(p.name.removeprefix(PREFIX), dtype, p.shape) for p in spec.parameters]
    with SafetensorsWriter(folder, plans, max_file_bytes=MAX_FILE_BYTES) as writer:
        for name, tensor in named:
            saved = tensor.to(dtype).cpu()
            writer.write(name, saved)
            on_saved(name, saved)
        writer.finish()
    write_settings(
        folder, model, tokenizer, base=spec.path, revision=spec.revision, dtype=dtype, vocab_size=spec.vocab_size
    )


def _save_adapter(folder: Path, spec: ModelSpec, model: SftModel, state: dict[str, Tensor], seed: int) -> None:
    """Writes an adapter, and adds to ``state`` nothing that is not in its files."""
    assert isinstance(spec.method, LoraMethod)
    assert isinstance(model.hf, PeftModel)
    config = lora_config(spec.method, base_model=spec.path, revision=spec.revision)
    # The names that `all-linear` stood for: the adapter must load on its base without guessing.
    names = model.hf.peft_config["default"].target_modules
    # PEFT keeps a set, whose order would be another one in each process.
    config.target_modules = names if isinstance(names, str) or names is None else sorted(names)
    config.use_dora = spec.method.dora
    config.inference_mode = True
    rows = sorted(name for name in state if name.endswith(TOKEN_ROWS))
    whole = sorted(name for name in state if ".lora_" not in name and name not in rows)
    # PEFT says which modules it replaces, and each of them has one parameter or two.
    modules = sorted({name.removeprefix(ADAPTED).rpartition(".")[0] for name in whole})
    config.modules_to_save = modules or None
    if rows:
        owners = (name.removeprefix(ADAPTED).removesuffix(TOKEN_ROWS) for name in rows)
        config.trainable_token_indices = {owner: list(spec.tokens.trained_ids) for owner in owners}
    if spec.method.init == "pissa":
        _from_the_base_as_it_was(state, config, Weights(model, spec, seed=seed))
    adapter = get_peft_model_state_dict(model.hf, state_dict=state, save_embedding_layers=False)
    adapter |= {name: state[name] for name in whole}
    adapter |= {name.removesuffix(".default"): state[name] for name in rows}
    save_file({n: t.contiguous() for n, t in adapter.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    for name in whole:
        module, _, parameter = name.rpartition(".")
        state[f"{module}.modules_to_save.default.{parameter}"] = state.pop(name)


def _from_the_base_as_it_was(state: dict[str, Tensor], config: LoraConfig, weights: Weights) -> None:
    """Makes of a PiSSA adapter one that counts from the base model's own weights.

    W - s B0 A0 + s B A = W + s [B B0] [A; -A0]: twice the rank (Meng et al. 2024, arXiv 2404.02948, appendix C), with
    the scaling kept by a greater alpha.
    """
    for name in [name for name in state if ".lora_A." in name]:
        layer, _, _ = name.partition(".lora_A.")
        a, b = weights.factors(PREFIX + layer)
        other = name.replace(".lora_A.", ".lora_B.")
        state[name] = torch.cat([state[name], -a.to(state[name])])
        state[other] = torch.cat([state[other], b.to(state[other])], dim=1)
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # type: ignore[assignment]


def _save_virtual_tokens(folder: Path, spec: ModelSpec, model: SftModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns what was saved, by the name that PEFT loads it under."""
    assert isinstance(spec.method, VirtualTokensMethod)
    base = model.causal_lm.config
    state = {name.removeprefix("prompt."): tensor for name, tensor in state.items()}
    tokens = to_save(spec.method, base, state, TORCH_DTYPES[spec.compute])
    save_file({SAVED_NAME: tokens}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = peft_config(spec.method, base, base_model=spec.path, revision=spec.revision)
    config.inference_mode = True
    config.save_pretrained(folder)
    return {LOADED_NAME: tokens}
