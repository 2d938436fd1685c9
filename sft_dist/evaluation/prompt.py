"""From a conversation or a text to the tokens that an answer goes on from, as the model was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sft_dist.config.schema import Config
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.jinja_template import TemplateFailure
from sft_dist.data.messages import Message
from sft_dist.data.sources import files_here, parser_of
from sft_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Trained = Literal["conversations", "documents", "literal"]

_KINDS: dict[str, Trained] = {"text": "documents", "segments": "literal", "tokens": "literal"}


class PromptRefused(ConfigError):
    """The chat template cannot write this conversation."""


class Prompter:
    """How a model is prompted.

    Args:
        renderer: of its chat template; None: it goes on from plain text.
        trained: what it was trained on, where that is known.

    Attributes:
        chats: whether it answers conversations.
        notice: one line for the user about a model that does not, else None.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, renderer: ChatRenderer | None, trained: Trained | None = None
    ) -> None:
        self.tokenizer, self._renderer = tokenizer, renderer
        self._adds_tokens = trained != "literal"
        self.chats = renderer is not None
        why = "the tokenizer has no chat template" if trained is None else "the run was trained without a chat template"
        self.notice = None if self.chats else f"{why}: the model goes on from your text, and knows no turns"

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer, beside the tokenizer's EOS."""
        ends = [] if self._renderer is None else self._renderer.end_tokens
        return [self.tokenizer.convert_tokens_to_ids(end) for end in ends]

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """
        Raises:
            PromptRefused: the template cannot write it, or there is none.
        """
        if self._renderer is None:
            raise PromptRefused(
                "the model has no chat template", fix="give a text to go on from, not messages (/v1/completions)"
            )
        try:
            text = self._renderer.prompt(messages, tools)
        except TemplateFailure as failure:
            raise PromptRefused(
                f"the chat template refuses the conversation: {failure}",
                fix="keep to the roles and the order that the model was trained with",
            ) from failure
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def complete(self, text: str) -> list[int]:
        """``text`` as the beginning of a document, or, after training on literal rows, as it is."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=self._adds_tokens)["input_ids"]
        # Some tokenizers end every text, and nothing comes behind an end.
        if (
            self._adds_tokens
            and ids[-1:] == [self.tokenizer.eos_token_id]
            and not text.endswith(str(self.tokenizer.eos_token))
        ):
            ids = ids[:-1]
        return ids


def prompter_of(tokenizer: PreTrainedTokenizerBase, config: Config | None) -> Prompter:
    """
    Args:
        config: of the run that the tokenizer was saved by, whose template is the one that was trained with; None: it is
            not known.

    Raises:
        DataError: the template is no valid one.
    """
    trained = None if config is None else trained_on(config)
    if tokenizer.chat_template is None or trained in ("documents", "literal"):
        return Prompter(tokenizer, None, trained)
    return Prompter(tokenizer, ChatRenderer(tokenizer), trained)


def trained_on(config: Config) -> Trained | None:
    """What the rows of a run were; None where its files must be looked at and are not here."""
    kinds: set[Trained] = set()
    for source in config.data.train:
        layout: str = source.format
        if layout == "auto":
            files = files_here(source)
            if files is None:
                return None
            try:
                layout = parser_of(source, files, skips_bad_rows=True).layout
            except (DataError, OSError):
                return None  # another file than the one that was trained on
        kinds.add(_KINDS.get(layout, "conversations"))
    return "conversations" if "conversations" in kinds else min(kinds)
