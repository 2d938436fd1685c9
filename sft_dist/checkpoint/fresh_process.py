"""Loads an artefact as its users will, with plain transformers and peft, and compares it with what was trained.

    python -P fresh_process.py ARTEFACT EXPECTED

Imports nothing of this project: what it finds, a stranger would find. ``EXPECTED`` is a folder with ``expected.json``
and ``logits.safetensors`` (``artefact.py`` writes them); the findings, one line each, go to ``findings.json`` in it.

Where ``expected.json`` names references, other artefacts, their logits are computed here, in place of that file.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import xxhash
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

EXPECTED, LOGITS, FINDINGS = "expected.json", "logits.safetensors", "findings.json"

# By how much the logits differ from those of each reference, where there are references.
DIFFERENCES = "differences.json"

# Names that PEFT gives to what an adapter holds: low-rank factors, or what virtual tokens are.
ADAPTER = re.compile(r"\.lora_|\.modules_to_save\.|\.trainable_tokens_delta\.|^prompt_encoder\.")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHOWN = 3
DIGEST_ELEMENTS = 1 << 24


def main(artefact: Path, expected_folder: Path) -> None:
    # What transformers and peft would only warn of is found below.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    expected = json.loads((expected_folder / EXPECTED).read_text(encoding="utf-8"))
    findings = [] if expected["template"] is None else list(tokenizer_findings(artefact, expected["template"]))
    is_adapter, dtype = expected["method"] != "full", DTYPES[expected["dtype"]]
    references = None
    if expected["references"] is not None:
        # First, one after the other: two models need twice the memory.
        references = [reference_logits(each, expected["probes"], dtype) for each in expected["references"]]
    if is_adapter:
        stored = DTYPES[expected["stored"]]
        model = load_adapter(artefact, expected["quantization"], dtype, expected["vocabulary"], stored)
    else:
        model, load_findings = load(artefact, dtype)
        findings += load_findings
    if expected["weights"] is not None:
        findings += weight_findings(model, expected["weights"], is_adapter=is_adapter)
    if not findings and references is None:
        findings += logit_findings(model, expected, load_file(expected_folder / LOGITS))
    elif not findings:
        findings += reference_findings(model, expected, references or [], expected_folder / DIFFERENCES)
    (expected_folder / FINDINGS).write_text(json.dumps(findings), encoding="utf-8")


def tokenizer_findings(artefact: Path, sample: dict[str, Any]) -> Iterator[str]:
    """The chat template must be the one that was trained with, and render and tokenise a row as it did then."""
    tokenizer = AutoTokenizer.from_pretrained(artefact)
    try:
        template = tokenizer.get_chat_template(tools=sample["tools"])
    except ValueError:
        yield "the tokenizer has no chat template"
        return
    if template != sample["template"]:
        yield "the chat template is not the one that was trained with"
    elif not sample["changes_with_time"]:
        text = tokenizer.apply_chat_template(sample["messages"], tools=sample["tools"], tokenize=False)
        if text != sample["text"]:
            yield f"the chat template renders the first row differently: {text[:80]!r}"
    if tokenizer(sample["text"], add_special_tokens=False)["input_ids"] != sample["input_ids"]:
        yield "the tokenizer gives the first row other ids"


def load(artefact: Path, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """A whole model on the CPU, and what was missing from or unknown to the files."""
    model, report = AutoModelForCausalLM.from_pretrained(artefact, dtype=dtype, output_loading_info=True)
    kinds = {"missing_keys": "lack", "unexpected_keys": "have an unknown", "mismatched_keys": "have a misshapen"}
    found = [f"the weights {verb} {sorted(map(str, report[kind]))[0]}" for kind, verb in kinds.items() if report[kind]]
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if model.config.get_text_config().tie_word_embeddings != is_tied:
        # transformers believes the weights, other programs the configuration.
        found.append(f"config.json says that the embeddings are {'not ' if is_tied else ''}tied, the weights do not")
    return model.eval(), found


def load_adapter(
    artefact: Path,
    quantization: dict[str, Any] | None,
    dtype: torch.dtype,
    vocabulary: int | None,
    stored: torch.dtype | None = None,
) -> nn.Module:
    """An adapter on its base on the CPU, computing in ``dtype`` with the values that it was trained with.

    Args:
        quantization: of the base, its ``type`` "nf4" or "int8" and the layers that ``skip`` lists; None for 16 or 32
            bits.
        vocabulary: size to which the base is resized, as README.md in the artefact says, or None.
        stored: dtype that the base has before it is quantised and computes; None for ``dtype``.
    """
    adapter = json.loads((artefact / "adapter_config.json").read_text())
    base, revision = adapter["base_model_name_or_path"], adapter["revision"] or "main"
    options: dict[str, Any] = {}
    config = AutoConfig.from_pretrained(base, revision=revision)
    # A base whose files are quantised says itself how.
    if quantization is not None and getattr(config, "quantization_config", None) is None:
        skip = quantization["skip"]
        # Without a list Transformers leaves out the output layer; a list has to name it.
        skip = [*skip, output_layer(config)] if skip else None
        options["quantization_config"] = quantize_as(quantization["type"], skip, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=stored or dtype, **options)
    compute_in(loaded, dtype)
    by_whole_blocks(loaded, dtype)
    if vocabulary is not None:
        loaded.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = PeftModel.from_pretrained(loaded, artefact).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            # In eval mode it would quantise the activations too, which training does not.
            module.train()
    return model


def compute_in(base: nn.Module, dtype: torch.dtype) -> None:
    """Lets a base compute as in training, also where its files are quantised and name another dtype."""
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # On some CPUs bitsandbytes repacks a 4-bit weight in eval mode and computes in bf16 whatever it was told.
            module.support_avx512bf16_for_cpu = False
        elif not isinstance(module, bnb.nn.Linear8bitLt):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def by_whole_blocks(base: nn.Module, dtype: torch.dtype) -> None:
    """Gives 4-bit layers whose rows end within a block their values as dense weights.

    On a CPU bitsandbytes 0.50 begins a block with each row when it dequantises, but not when it quantises.
    """
    for name, module in list(base.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit) or module.in_features % module.weight.quant_state.blocksize == 0:
            continue
        state = copy(module.weight.quant_state)
        state.dtype = dtype
        state.shape = torch.Size((module.in_features * module.out_features // state.blocksize, state.blocksize))
        dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        values = bnb.functional.dequantize_4bit(module.weight.data, state)
        dense.weight = nn.Parameter(values.view(dense.weight.shape), requires_grad=False)
        dense.bias = module.bias
        base.set_submodule(name, dense)


def output_layer(config: PretrainedConfig) -> str:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def quantize_as(kind: str, skip: list[str] | None, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype, llm_int8_skip_modules=skip,
    )  # fmt: skip


def weight_findings(model: nn.Module, expected: dict[str, str], *, is_adapter: bool) -> Iterator[str]:
    """Every trained weight must be there, bit for bit, and no other; adapters must have moved."""
    actual = {name: p.detach() for name, p in model.named_parameters() if not is_adapter or ADAPTER.search(name)}
    lost, strange = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    if lost:
        yield f"{len(lost)} trained weights are not in the loaded model, such as {lost[0]}"
    if strange:
        yield f"{len(strange)} weights of the loaded model were not trained, such as {strange[0]}"
    wrong = [name for name in actual.keys() & expected.keys() if digest(actual[name]) != expected[name]]
    if wrong:
        yield f"{len(wrong)} weights are not those of the trained model, such as {min(wrong)}"
    for name, tensor in actual.items():
        if ".lora_B." in name and not tensor.any():
            yield f"{name} is all zeros: the adapter does nothing there"
        if not torch.isfinite(tensor).all():
            yield f"{name} has values that are not finite"


def digest(tensor: Tensor) -> str:
    """XXH3-128 of the values as fp32, so that a dtype which holds them exactly makes no difference."""
    result = xxhash.xxh3_128()
    for part in tensor.detach().flatten().split(DIGEST_ELEMENTS):
        result.update(part.to("cpu", torch.float32).contiguous().numpy().data)
    return result.hexdigest()


def logit_findings(model: nn.Module, expected: dict[str, Any], logits: dict[str, Tensor]) -> Iterator[str]:
    """Logits must differ no more than two programs that multiply in this dtype do.

    The measure is the root mean square of the difference over that of the logits, both without each position's mean,
    which changes no probability.
    """
    for number, probe in enumerate(expected["probes"]):
        difference = relative_difference(probe_logits(model, probe), logits[str(number)].float())
        if not difference <= expected["tolerance"]:
            yield (
                f"the logits of probe {number} differ by {difference:.1e} of their size from those of the trained "
                f"model, more than {expected['tolerance']:.0e}"
            )


def probe_logits(model: nn.Module, probe: dict[str, Any]) -> Tensor:
    """[positions, V] fp32 of a row."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([probe["input_ids"]])).logits[0].float()
    # PEFT returns logits at virtual tokens too; they come first.
    result: Tensor = output[-len(probe["input_ids"]) :][probe["positions"]]
    return result


def relative_difference(logits: Tensor, others: Tensor) -> float:
    """See ``logit_findings``."""
    return _rms(logits - others) / max(_rms(others), 1e-30)


def reference_logits(reference: dict[str, Any], probes: list[dict[str, Any]], dtype: torch.dtype) -> list[Tensor]:
    """Logits of another artefact on each probe: an adapter on its base, or a whole model."""
    folder = Path(reference["folder"])
    if (folder / "adapter_config.json").is_file():
        # NF4 of weights that were rounded before has other bytes.
        stored = DTYPES[reference["stored"]]
        model = load_adapter(folder, reference["quantization"], dtype, reference["vocabulary"], stored)
    else:
        model, _ = load(folder, dtype)
    return [probe_logits(model, probe) for probe in probes]


def reference_findings(
    model: nn.Module, expected: dict[str, Any], references: list[list[Tensor]], told: Path
) -> Iterator[str]:
    """Logits must be those of every reference that has a tolerance; all differences are written to ``told``."""
    logits = [probe_logits(model, probe) for probe in expected["probes"]]
    if not all(bool(torch.isfinite(each).all()) for each in logits):
        yield "its logits are not finite"
    differences = [
        max(relative_difference(mine, theirs) for mine, theirs in zip(logits, each, strict=True)) for each in references
    ]
    told.write_text(json.dumps(differences), encoding="utf-8")
    for reference, difference in zip(expected["references"], differences, strict=True):
        if reference["tolerance"] is not None and not difference <= reference["tolerance"]:
            yield (
                f"the logits differ by {difference:.1e} of their size from those of {reference['folder']}, more than "
                f"{reference['tolerance']:.0e}"
            )


def _rms(logits: Tensor) -> float:
    return float((logits - logits.mean(dim=-1, keepdim=True)).double().square().mean().sqrt())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    assert not any(name.startswith("sft_dist") for name in sys.modules)
