"""``README.md`` of an artefact: the model card as the hub reads it, with what a user needs to load the artefact.

Keys of the front matter: https://huggingface.co/docs/hub/model-cards. No license is written: it follows from those of
the base and of the data, which nobody here knows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sft_dist.config.schema import Config, MethodConfig, QloraMethod
from sft_dist.config.text import read_yaml, write_yaml
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.spec import Dtype, ModelSpec

CARD = "README.md"

FENCE = "---\n"

# Where the base of an adapter is described for ``export --merge``.
KEY = "sft_dist"


class TrainedWith(BaseModel):
    """What decides which base an adapter was trained on, and how its values are meant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    revision: str | None
    method: MethodConfig
    compute: Dtype
    add_tokens: list[str]
    seed: int

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(
            path=config.model.path,
            revision=config.model.revision,
            method=config.method,
            compute=config.precision.compute,
            add_tokens=config.model.add_tokens,
            seed=config.train.seed,
        )

    @classmethod
    def of_spec(cls, spec: ModelSpec) -> Self:
        """Of what a run trains; the seed matters for nothing that is saved."""
        return cls(
            path=spec.path,
            revision=spec.revision,
            method=spec.method,
            compute=spec.compute,
            add_tokens=list(spec.tokens.added),
            seed=0,
        )

    @classmethod
    def in_card(cls, folder: Path) -> Self | None:
        """As the card of an artefact says; None where it says nothing of it."""
        path = folder / CARD
        if not path.is_file():
            return None
        _, fence, rest = path.read_text(encoding="utf-8").partition(FENCE)
        if not fence:
            return None
        try:
            return cls.model_validate(read_yaml(rest.partition(FENCE)[0])[KEY])
        except (ValidationError, KeyError, TypeError):
            return None  # the card of another program, or of a version that names other settings


@dataclass(frozen=True)
class Usage:
    """How an artefact is loaded: explanations, and Python code."""

    about: tuple[str, ...]
    code: str

    def __str__(self) -> str:
        return "\n\n".join([*self.about, f"```python\n{self.code}\n```"])


def card(front: dict[str, Any], title: str, sections: list[str]) -> str:
    """
    Args:
        front: of the YAML in front.
        sections: Markdown, those that are empty are left out.
    """
    body = "\n\n".join([f"# {title}", *(section.strip() for section in sections if section.strip())])
    return f"{FENCE}{write_yaml(front)}{FENCE}\n{body}\n"


def trained_card(spec: ModelSpec, model: SftModel, *, about: str) -> str:
    """The card of what a run trained: a whole model, or an adapter that is loaded on its base."""
    kind = spec.method.type
    is_whole = kind == "full"
    front = front_matter(spec.path, is_adapter=not is_whole, tags=[kind])
    if not is_whole:
        front[KEY] = TrainedWith.of_spec(spec).model_dump(mode="json")
    usage = whole_usage() if is_whole else adapter_usage(spec, model)
    what = f"{spec.path}, fine-tuned" if is_whole else f"Adapter ({kind}) for {spec.path}"
    return card(front, what, [f"## How to load\n\n{usage}", about])


def front_matter(base_model: str, *, is_adapter: bool, tags: list[str]) -> dict[str, Any]:
    return {
        "base_model": base_model,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "sft-dist", *tags],
    }


def whole_usage() -> Usage:
    return Usage(
        (),
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER", dtype="auto")',
    )


def adapter_usage(spec: ModelSpec, model: SftModel) -> Usage:
    """With what a user must know of a base that is not loaded as it is.

    On a grown vocabulary the base lacks rows that it must get first; one that was quantised in part is the same only if
    the same layers are left out.
    """
    skip = spec.method.quantization.skip if isinstance(spec.method, QloraMethod) else []
    tokens, revision = spec.tokens, "" if spec.revision is None else f", revision={json.dumps(spec.revision)}"
    about, imports, quantization, options, resize = [], "", "", revision, ""
    if tokens.new_rows:
        about.append(
            f"The tokenizer here has {len(tokens.added)} special tokens more than the base model's: "
            f"{', '.join(f'`{token}`' for token in tokens.added)}. The base model gets rows for them before the "
            "adapter is put on it; the adapter brings their values."
        )
        resize = f"\nmodel.resize_token_embeddings({spec.vocab_size}, mean_resizing=False)"
    if skip:
        assert isinstance(spec.method, QloraMethod)
        kind = spec.method.quantization.type
        head = next(name for name, module in model.causal_lm.named_modules() if module is model.head)
        bits = (
            'load_in_4bit=True,\n    bnb_4bit_quant_type="nf4",\n    bnb_4bit_use_double_quant=True,\n    '
            f"bnb_4bit_compute_dtype={TORCH_DTYPES[spec.compute]}"
            if kind == "nf4"
            else "load_in_8bit=True"
        )
        layers = "".join(f"        {json.dumps(name)},\n" for name in [*skip, head])
        about.append(
            f"The adapter was trained on a base whose linear layers are stored in {kind}, but for {len(skip)} of them "
            "and the output layer. Loaded as here the base is the same; it may be loaded in 16 bits as well."
        )
        imports = "import torch\n" if kind == "nf4" else ""
        quantization = (
            f"quantization = BitsAndBytesConfig(\n    {bits},\n    llm_int8_skip_modules=[\n{layers}    ],\n)\n"
        )
        options += ", quantization_config=quantization"
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantization else "")
    return Usage(
        tuple(about),
        f"""{imports}from peft import PeftModel
from transformers import {names}

{quantization}tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained({json.dumps(spec.path)}{options}){resize}
model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")""",
    )
