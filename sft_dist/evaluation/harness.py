"""The model as lm-evaluation-harness asks it, where its shards are: on all ranks, under every strategy.

What a text is as tokens, what precedes a first token and where a long request is cut are those of lm-eval's own ``hf``
model.

Imports lm-eval, which need not be installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from sft_dist.errors import ConfigError
from sft_dist.evaluation.decode import generate
from sft_dist.evaluation.examiner import stop_ids
from sft_dist.evaluation.likelihood import Likelihood, Span, log_likelihoods
from sft_dist.evaluation.prompt import Prompter
from sft_dist.evaluation.room import most_tokens
from sft_dist.runtime.process_group import gathered
from sft_dist.sharding.strategy import Strategy

# Most tokens of an answer where a task says nothing.
MAX_NEW_TOKENS = 256

# Settings of a task's generation that are heeded, and those that say nothing where the most probable token is taken.
HEEDED = {"until", "max_gen_toks", "do_sample", "temperature"}
OF_DRAWS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}
NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}


class HarnessModel(TemplateLM):
    """The model as lm-eval asks it. To lm-eval it is one process: the requests are shared out in here.

    Args:
        prompter: of a model that chats, where prompts go through its template; else of one that goes on from texts.
        eot_id: token that ends a text.
        rows_at_once: most rows of a forward pass.

    Attributes:
        notes: of what was asked so far.
    """

    backend = "causal"

    def __init__(
        self,
        strategy: Strategy,
        prompter: Prompter,
        *,
        eot_id: int,
        rows_at_once: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = prompter.tokenizer
        self.notes: list[str] = []
        self._strategy, self._prompter, self._eot_id = strategy, prompter, eot_id
        self._rows_at_once, self._seed = rows_at_once, seed
        # Not ``_rank``: lm-eval would share out the examples once more.
        self._share: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": device}
        most = most_tokens(strategy.model)
        self.max_length = most or resolve_max_length(strategy.model.causal_lm.config, self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self._eot_id

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self._eot_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # A chat template writes the beginning itself.
        if add_special_tokens is None and self._prompter.chats:
            add_special_tokens = False
        if add_special_tokens is None and not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            return self._prompter.complete(string)
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return self._templated(chat_history, add_generation_prompt)
        except jinja2.TemplateError:
            without = [message for message in chat_history if message["role"] != "system"]
            text = self._templated(without, add_generation_prompt)
            self._note("the chat template has no place for a system message: descriptions of tasks were left out")
            return text

    def _templated(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return str(text)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        spans = [self._cut(context, continuation) for _, context, continuation in requests]
        found = self._log_likelihoods(spans, with_greedy=True)
        return [(each.log_likelihood, bool(each.is_greedy)) for each in found]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        owners: list[int] = []
        spans: list[Span] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for context, continuation in map(make_disjoint_window, windows):
                owners.append(number)
                spans.append(Span(tuple(context), tuple(continuation)))
        sums = [0.0] * len(requests)
        for owner, each in zip(owners, self._log_likelihoods(spans, with_greedy=False), strict=True):
            sums[owner] += each.log_likelihood
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        # Prompts with other settings are generated apart, in the order in which lm-eval first asks for them.
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in alike.values():
            answers = self._generate([requests[n].args[0] for n in numbers], requests[numbers[0]].args[1])
            for number, text in zip(numbers, answers, strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, MAX_NEW_TOKENS))
        _check_generation(settings)
        most = int(settings["max_gen_toks"])
        stops = handle_stop_sequences(settings["until"], eos=str(self.tokenizer.decode([self._eot_id])))
        room = self.max_length - most
        if room < 1:
            raise ConfigError(
                f"--lm-eval: a task asks for answers of {most:,} tokens, and the model has {self.max_length:,} "
                "positions, the prompt's among them",
                fix="set generation_kwargs.max_gen_toks of the task to less",
            )
        whole = [self.tok_encode(context) for context in contexts]
        self._note_cut(sum(len(tokens) > room for tokens in whole), len(whole))
        prompts = [tokens[-room:] for tokens in whole]
        # Answers to prompts of one length are computed together; the order is the same on every rank.
        order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), prompts[number]))
        own = generate(
            self._strategy, [prompts[number] for number in order], max_new_tokens=most,
            stop_ids=stop_ids(self._strategy, self.tokenizer, self._prompter) | {self._eot_id},
            rows_at_once=self._rows_at_once, temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            seed=self._seed, ends=lambda tokens: _has_any(self._text(tokens), stops), on_note=self._note, **self._share,
        )  # fmt: skip
        answers = {number: answer for part in gathered(own) for number, answer in part.items()}
        texts = [""] * len(contexts)
        for place, number in enumerate(order):
            answer = answers[place]
            tokens = answer.tokens[:-1] if answer.finish_reason == "stop" else answer.tokens
            texts[number] = postprocess_generated_text(self._text(tokens), stops, None)
        return texts

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _log_likelihoods(self, spans: Sequence[Span], *, with_greedy: bool) -> list[Likelihood]:
        return log_likelihoods(
            self._strategy, spans, rows_at_once=self._rows_at_once, with_greedy=with_greedy, **self._share
        )

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> Span:
        """As ``hf`` of lm-eval: a context that is too long loses its beginning."""
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"--lm-eval: a continuation has {len(continuation):,} tokens, and the model has {self.max_length:,} "
                "positions",
                fix="choose a task with shorter choices",
            )
        # The last token of a continuation is no input.
        kept = tuple(context[-(self.max_length + 1 - len(continuation)) :])
        self._note_cut(int(len(kept) < len(context)), 1)
        return Span(kept, tuple(continuation))

    def _note_cut(self, cut: int, of: int) -> None:
        if cut:
            self._note(f"requests longer than the model's {self.max_length:,} positions lost their beginning")

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def _check_generation(settings: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: a task wants its answers generated in a way that is not there.
    """
    allowed = NEUTRAL | (OF_DRAWS if settings["do_sample"] else {})
    for key, value in settings.items():
        if key in HEEDED or (key in OF_DRAWS and not settings["do_sample"]):
            continue
        if value is not None and (key not in allowed or value != allowed[key]):
            raise ConfigError(
                f"--lm-eval: a task sets generation_kwargs.{key} to {value}, which is not done here",
                fix="remove it in a copy of the task (--lm-eval-tasks), or run lm-eval itself on an export",
            )


def _has_any(text: str, stops: Sequence[str]) -> bool:
    return any(stop and stop in text for stop in stops)
