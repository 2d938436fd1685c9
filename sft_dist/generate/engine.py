"""Generates answers, one at a time, in a thread of their own, so that whoever reads them can stop them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from sft_dist.errors import ConfigError, PlanError
from sft_dist.generate.text_stream import CharacterStream, StopStrings

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: the end-of-turn token among them.
        temperature: 0: the most probable token, always.
        top_p: only the most probable tokens that together have this probability.
        seed: of the draws; None: another one each time.
        stop: texts that end an answer and are not part of it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """
    Args:
        num_tokens: that were generated, the end-of-turn token among them.
        seconds: from the start of the generation to its last token.
    """

    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


class PromptTooLong(ConfigError):
    """The prompt leaves no room for an answer."""


@dataclass(frozen=True)
class Voice:
    """A model that answers.

    Args:
        model: what transformers or PEFT generate with, in eval mode.
        active: a context in which ``model`` is what it is to be: its adapter on, or off.
        stop_ids: tokens that end an answer.
    """

    model: Any
    active: Callable[[], AbstractContextManager[object]]
    stop_ids: tuple[int, ...]


class Generation:
    """One answer while it comes: iterate over it for its text, piece by piece; then ``answer`` is there."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    @property
    def answer(self) -> Answer:
        assert self._answer is not None, "the generation has not ended"
        return self._answer

    def cancel(self) -> None:
        """Ends it before its next token, and waits until it has."""
        self._cancelled.set()
        self._done.wait()

    def _run(self, generate: Callable[[Generation], Answer]) -> None:
        try:
            self._answer = generate(self)
            self._pieces.put(None)
        except BaseException as error:
            self._pieces.put(error)
        finally:
            self._done.set()


class Engine:
    """
    Args:
        tokenizer: of the voices.
        max_positions: tokens of prompt and answer together that the model was made for; None: it has no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_positions: int | None, device: torch.device) -> None:
        self.tokenizer, self.max_positions, self.device = tokenizer, max_positions, device
        # One generation at a time: adapters are switched for the whole model, and the seed is the process's.
        self._turn = threading.Lock()
        self._latest: Generation | None = None
        hidden = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._hidden = {id for id in hidden if id is not None}

    def room(self, num_prompt_tokens: int) -> int | None:
        """Tokens that an answer to such a prompt may have; None: any number.

        Raises:
            PromptTooLong: none.
            ConfigError: the prompt has no token.
        """
        if num_prompt_tokens == 0:
            raise ConfigError("the prompt is empty: it has no token", fix="write a text for the model to go on from")
        if self.max_positions is None:
            return None
        if num_prompt_tokens >= self.max_positions:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens:,} tokens and the model was made for {self.max_positions:,}, the "
                "answer's among them",
                fix="shorten the conversation, or begin a new one",
            )
        return self.max_positions - num_prompt_tokens

    def start(self, voice: Voice, prompt: Sequence[int], sampling: Sampling) -> Generation:
        """Begins to answer; what is being generated is waited for.

        Raises:
            PromptTooLong, ConfigError: as ``room``, before anything begins.
        """
        room = self.room(len(prompt))
        limit = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room)
        generation = self._latest = Generation()

        def generate(own: Generation) -> Answer:
            with self._turn, voice.active():
                return self._generate(voice, list(prompt), sampling, limit, own)

        threading.Thread(target=generation._run, args=(generate,), daemon=True).start()
        return generation

    def stop(self) -> None:
        """Ends what is being generated, if anything is."""
        if self._latest is not None:
            self._latest.cancel()

    def answer(self, voice: Voice, prompt: Sequence[int], sampling: Sampling) -> Answer:
        """The whole answer at once. Raises as ``start``."""
        generation = self.start(voice, prompt, sampling)
        try:
            for _ in generation:
                pass
        except KeyboardInterrupt:
            generation.cancel()
            raise
        return generation.answer

    def _generate(self, voice: Voice, prompt: list[int], sampling: Sampling, limit: int, own: Generation) -> Answer:
        watch = _Watch(own, self._decode, frozenset(voice.stop_ids), sampling.stop)
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        started = time.perf_counter()
        if not own._cancelled.is_set():
            ids = torch.tensor([prompt], device=self.device)
            try:
                voice.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._settings(voice, sampling, limit),
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
            except torch.OutOfMemoryError as error:
                raise PlanError(
                    f"a prompt of {len(prompt):,} tokens does not fit the memory of the GPU beside the model",
                    fix="shorten the conversation, or take --dtype bf16 or --device cpu",
                ) from error
        watch.finish()
        return Answer(
            text="".join(watch.shown),
            finish_reason=watch.reason,
            num_prompt_tokens=len(prompt),
            num_tokens=watch.num_tokens,
            seconds=time.perf_counter() - started,
        )

    def _settings(self, voice: Voice, sampling: Sampling, limit: int) -> GenerationConfig:
        draws: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        stops = sorted(voice.stop_ids)
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=limit,
            eos_token_id=stops or None,
            pad_token_id=pad if pad is not None else (stops or [0])[0],
            **draws,
        )

    def _decode(self, ids: list[int]) -> str:
        # Other special tokens stay: a run may have trained them, and what a model says is shown.
        kept = [id for id in ids if id not in self._hidden]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class _Watch:
    """Sees each token as it is chosen, hands its text on, and says when to stop. A stopping criterion of transformers,
    because a streamer is told of a token only after the decision to go on."""

    def __init__(
        self, generation: Generation, decode: Callable[[list[int]], str], stop_ids: frozenset[int], stop: Sequence[str]
    ) -> None:
        self._generation, self._stop_ids = generation, stop_ids
        self._characters, self._stops = CharacterStream(decode), StopStrings(stop)
        self.shown: list[str] = []
        self.num_tokens = 0
        self.reason: FinishReason = "length"

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        token = int(input_ids[0, -1])
        self.num_tokens += 1
        if token in self._stop_ids:
            self.reason = "stop"
        else:
            self._show(self._stops.push(self._characters.push(token)))
            if self._stops.found:
                self.reason = "stop"
            elif self._generation._cancelled.is_set():
                self.reason = "cancelled"
        return torch.full((1,), self.reason != "length", dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        if self.num_tokens == 0:
            self.reason = "cancelled"
        self._show(self._stops.push(self._characters.finish()))
        if self._stops.found:
            self.reason = "stop"
        self._show(self._stops.finish())

    def _show(self, text: str) -> None:
        if text:
            self.shown.append(text)
            self._generation._pieces.put(text)
