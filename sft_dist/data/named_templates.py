"""Where a chat template comes from: a file, the setting itself, this package, or built for a base model without one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sft_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["inline", "name", "file"]

# Each built-in template with the special tokens that it writes by their text. It writes the tokenizer's own BOS and EOS
# by their variables.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (
        "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "deepseek": (
        "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
        "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ),
    "plain": (),
    "alpaca_ja": (),
}  # fmt: skip

# What an answer ends in, where that is not the tokenizer's EOS. It becomes the EOS: programs that generate stop there,
# and a base model's own is the end of a document.
END_OF_TURN = {
    "chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>",
}  # fmt: skip

_BOS = "{{- bos_token }}\n"


@dataclass(frozen=True)
class ChatTemplate:
    """A template to render with.

    Args:
        source: the Jinja text.
        name: what messages call it.
        eos: the token that is to be the tokenizer's EOS; None: its own remains.
        notice: one line for the user about a template that nobody asked for, else None.
    """

    source: str
    name: str
    eos: str | None = None
    notice: str | None = None


def form_of(given: str) -> Form:
    """What a value of ``data.chat_template`` is. A file that is called like a built-in template is ``./chatml``."""
    if "{{" in given or "{%" in given:
        return "inline"
    return "name" if given in BUILT_IN else "file"


def read_template(given: str) -> ChatTemplate:
    """The template that ``data.chat_template`` says, without regard to any tokenizer.

    Raises:
        ConfigError: it is neither Jinja, nor the name of a built-in template, nor a file that exists.
        DataError: the file cannot be read.
    """
    form = form_of(given)
    if form == "inline":
        return ChatTemplate(given, "the template in data.chat_template")
    if form == "name":
        return ChatTemplate(built_in_source(given), f"the built-in chat template {given}", END_OF_TURN.get(given))
    path = Path(given).expanduser()
    if not path.is_file():
        raise _missing(given)
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), given)
    except OSError as error:
        raise DataError(f"{given}: {error.strerror}", fix="set data.chat_template to a file you may read") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{given}: the chat template is not UTF-8", fix="save it as UTF-8") from error


def built_in_source(name: str) -> str:
    """The Jinja text of a built-in template."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def template_for(given: str | None, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The template that replaces the tokenizer's, or None: its own remains.

    A built-in template writes BOS at the start where the tokenizer puts it before every text. A tokenizer without any
    template gets ChatML if it knows ChatML's tokens, else role words and its EOS.

    Args:
        given: the value of ``data.chat_template``.

    Raises:
        ConfigError: as ``read_template``.
        DataError: as ``read_template``; the tokenizer lacks tokens that a built-in template writes.
    """
    if given is None:
        return None if tokenizer.chat_template else _built(tokenizer)
    template = read_template(given)
    return template if form_of(given) != "name" else _fitted(template, given, tokenizer)


def _built(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    name = "plain" if _unknown(BUILT_IN["chatml"], tokenizer) else "chatml"
    whose = tokenizer.name_or_path or "the tokenizer"
    reasons = {
        "chatml": "it knows <|im_start|> and <|im_end|>, which becomes its EOS",
        "plain": f"it does not know <|im_start|> and <|im_end|>, so roles are words and {tokenizer.eos_token} ends an "
        "answer",
    }
    template = _fitted(read_template(name), name, tokenizer)
    notice = (
        f"{whose} has no chat template: the rows are written, and the model is saved, with the built-in {name} "
        f"({reasons[name]}); data.chat_template sets another"
    )
    return replace(template, name=f"the chat template {name}, built for {whose}", notice=notice)


def _fitted(template: ChatTemplate, name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    unknown = _unknown(BUILT_IN[name], tokenizer)
    if unknown:
        listed = ", ".join(f'"{token}"' for token in unknown)
        raise DataError(
            f"data.chat_template: {name} writes {', '.join(unknown)}, which the tokenizer of "
            f"{tokenizer.name_or_path or 'the model'} does not know as {'a token' if len(unknown) == 1 else 'tokens'}",
            fix=f"set model.add_tokens to [{listed}], and method.train_tokens to the same with an adapter, or take "
            "another template",
        )
    if tokenizer.eos_token is None and "eos_token" in template.source:
        raise DataError(
            f"data.chat_template: {name} ends an answer with EOS, and the tokenizer of "
            f"{tokenizer.name_or_path or 'the model'} has none",
            fix="give the tokenizer an eos_token, or set data.chat_template to a template with a token of its own",
        )
    if "bos_token" in template.source or not _begins_with_bos(tokenizer):
        return template
    return replace(template, source=_BOS + template.source)


def _unknown(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return [token for token in tokens if token not in vocabulary]


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by itself, as the base model has seen all its texts."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _missing(given: str) -> ConfigError:
    if near := difflib.get_close_matches(given.lower(), BUILT_IN, n=1):
        return ConfigError(
            f"data.chat_template: {given} is neither a file nor a built-in template", fix=f"did you mean {near[0]}?"
        )
    return ConfigError(
        f"data.chat_template: {given} is neither a file that exists, nor Jinja, nor a built-in template",
        fix=f"give the path of a Jinja file, the Jinja text, or one of {', '.join(BUILT_IN)}",
    )
