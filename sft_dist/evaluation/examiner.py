"""What an evaluation finds beside the loss: scores of generated answers, samples, the perplexity of long texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sft_dist.config.eval_schema import EvalConfig, SamplesConfig
from sft_dist.config.measured import score_key
from sft_dist.data.messages import Message
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import ConfigError, SftError
from sft_dist.evaluation.decode import Generated, gather, generate
from sft_dist.evaluation.file_questions import read_questions
from sft_dist.evaluation.long_texts import read_long_texts
from sft_dist.evaluation.prompt import Prompter
from sft_dist.evaluation.questions import RowQuestion, questions_of
from sft_dist.evaluation.user_turn import UserTurn, user_turn
from sft_dist.evaluation.windows import windowed_loss
from sft_dist.scores.answered import Answered
from sft_dist.scores.judge import Scores, score
from sft_dist.sharding.strategy import Strategy

Metrics = dict[str, int | float]


@dataclass(frozen=True)
class _Asked:
    """
    Args:
        prompt: token ids that an answer goes on from.
        shown, reference: the prompt and the row's own answer for people; None: it has none.
        question: as of ``Reply``.
    """

    prompt: Sequence[int]
    shown: str
    reference: str | None
    source: str
    question: str | None


@dataclass(frozen=True)
class Reply:
    """One question with what the model said.

    Args:
        prompt: all that the answer goes on from, through the chat template; of ``samples.prompts`` as it is configured.
        finish_reason: as ``decode.Generated``.
        question: what the user said last; None: that is not known, or there are no turns.
    """

    prompt: str
    answer: str
    reference: str | None
    source: str
    finish_reason: str
    question: str | None = None


@dataclass(frozen=True)
class Findings:
    """Of one evaluation.

    Args:
        metrics: by the names of ``metrics.jsonl``, on every rank; all else is on rank 0.
        samples: replies to the fixed prompts, in their order.
        judged: replies that ``scores`` are of.
        notes: what a reader of the figures must know, a line each.
    """

    metrics: Metrics
    samples: tuple[Reply, ...] = ()
    judged: tuple[Reply, ...] = ()
    scores: Scores | None = None
    notes: tuple[str, ...] = ()


class Examiner:
    """Asks the same at every evaluation; every rank has one, made with the same arguments.

    Args:
        data: held-out rows.
        tokenizer: of the model; prompter: how it is prompted.
        max_seq_len: of training: what a window of long texts has where nothing else is said.
        say: gets notes and progress, on rank 0.

    Raises:
        ConfigError: there is no question, or a file cannot be used.
        DataError: a file cannot be read.
    """

    def __init__(
        self,
        settings: EvalConfig,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerBase,
        prompter: Prompter,
        *,
        max_seq_len: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings, self._tokenizer, self._prompter, self._say = settings, tokenizer, prompter, say
        self._rank, self._world_size, self._device = rank, world_size, device
        self._max_seq_len = max_seq_len
        self._has_judged = False
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._hidden = frozenset(id for id in ends if id is not None)
        turn = user_turn(lambda messages: self._text(prompter.chat(messages))) if prompter.chats else None
        self._turn: UserTurn | None = turn
        self._judged: list[_Asked] = []
        self._samples: list[_Asked] = []
        self._long_texts: list[NDArray[np.int64]] = []
        if settings.scores is not None:
            rows = questions_of(data, most=settings.answers.max_examples, seed=seed)
            if not rows:
                raise ConfigError(
                    "eval.scores: data.eval has no row with a question; its rows are texts without a prompt",
                    fix="give rows with prompts and answers, or remove eval.scores",
                )
            self._judged = [self._of_row(row) for row in rows]
        if settings.samples is not None:
            self._samples = self._sample(settings.samples, data, seed)
        if settings.long_texts is not None:
            self._long_texts = read_long_texts(settings.long_texts.paths, prompter)

    def examine(self, strategy: Strategy, *, is_end: bool) -> Findings:
        """Every rank must call it.

        Args:
            is_end: whether this is the evaluation before training or after its last step.

        Raises:
            SftError: what the answers are judged by cannot be used; later on that is a note.
        """
        findings = Findings(self._long(strategy))
        return self.answer(strategy, findings) if self.answers_at(is_end=is_end) else findings

    def answers_at(self, *, is_end: bool) -> bool:
        """Whether ``examine`` has the questions answered."""
        return is_end or self._settings.answers.when == "always"

    def answer(self, strategy: Strategy, findings: Findings) -> Findings:
        """``findings`` of the state as it is, with the questions answered too; otherwise as ``examine``."""
        metrics = dict(findings.metrics)
        questions = [*self._samples, *self._judged]
        if not questions:
            return findings
        answers = self._answers(strategy, questions)
        if answers is None:
            return Findings(self._of_main(None))
        replies = [self._reply(question, answer) for question, answer in zip(questions, answers, strict=True)]
        samples, judged = replies[: len(self._samples)], replies[len(self._samples) :]
        scores, notes = self._score(judged)
        if scores is not None:
            metrics |= {score_key(name): value for name, value in scores.values.items()}
            if len(scores.by_source) > 1:
                for source, values in scores.by_source.items():
                    metrics |= {f"{score_key(name)}/{source}": value for name, value in values.items()}
        cut = sum(reply.finish_reason == "length" for reply in judged)
        if cut:
            notes.append(f"{cut:,} of {len(judged):,} answers were cut at eval.answers.max_new_tokens")
        return Findings(self._of_main(metrics), tuple(samples), tuple(judged), scores, tuple(notes))

    def _of_main(self, metrics: Metrics | None) -> Metrics:
        """What rank 0 has found, on every rank: what follows from it must be the same everywhere."""
        told = [metrics]
        dist.broadcast_object_list(told, src=0)
        found = told[0]
        assert found is not None
        return found

    def _long(self, strategy: Strategy) -> Metrics:
        settings = self._settings.long_texts
        if settings is None:
            return {}
        length = settings.length or self._max_seq_len
        found = windowed_loss(
            strategy, self._long_texts, length=length,
            stride=settings.stride or max(1, length // 2), windows_at_once=1, rank=self._rank,
            world_size=self._world_size, device=self._device,
        )  # fmt: skip
        return {"eval_long_loss": found.loss, "eval_long_perplexity": found.perplexity}

    def _answers(self, strategy: Strategy, questions: Sequence[_Asked]) -> list[Generated] | None:
        """In the order of the questions, on rank 0; None elsewhere."""
        settings = self._settings.answers
        # Answers of one length end together; the order is the same on every rank.
        order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt))
        own = generate(
            strategy, [questions[number].prompt for number in order], max_new_tokens=settings.max_new_tokens,
            stop_ids=stop_ids(strategy, self._tokenizer, self._prompter), rank=self._rank,
            world_size=self._world_size, device=self._device, rows_at_once=settings.rows_at_once,
            on_note=self._note,
        )  # fmt: skip
        sorted_answers = gather(own, rank=self._rank, world_size=self._world_size)
        if sorted_answers is None:
            return None
        return [answer for _, answer in sorted(zip(order, sorted_answers, strict=True), key=lambda each: each[0])]

    def _note(self, line: str) -> None:
        if self._rank == 0:
            self._say(line)

    def _sample(self, settings: SamplesConfig, data: PreparedData, seed: int) -> list[_Asked]:
        prompter, found = self._prompter, []
        for prompt in settings.prompts:
            if prompter.chats:
                system = [] if settings.system is None else [Message("system", settings.system)]
                tokens = prompter.chat([*system, Message("user", prompt)])
            else:
                tokens = prompter.complete(prompt)
            found.append(_Asked(tokens, prompt, None, "prompts", prompt))
        if settings.file is not None:
            for asked in read_questions(settings.file, prompter, system=settings.system):
                shown = self._text(asked.prompt)
                source = Path(settings.file).name
                found.append(_Asked(asked.prompt, shown, asked.reference, source, asked.question))
        rows = questions_of(data, most=settings.from_eval, seed=seed)
        return [*found, *map(self._of_row, rows)]

    def _of_row(self, row: RowQuestion) -> _Asked:
        # Behind the answer stands what ends it, and in some templates a line break.
        last, ends = len(row.reference), self._hidden | frozenset(self._prompter.end_ids)
        while last and (row.reference[last - 1] in ends or not self._text(row.reference[last - 1 : last]).strip()):
            last -= 1
        reference = self._text(row.reference[:last]).strip()
        shown = self._text(row.prompt)
        return _Asked(row.prompt, shown, reference, row.source, None if self._turn is None else self._turn.said(shown))

    def _reply(self, asked: _Asked, answer: Generated) -> Reply:
        tokens = answer.tokens[:-1] if answer.finish_reason == "stop" else answer.tokens
        return Reply(
            asked.shown, self._text(tokens).strip(), asked.reference, asked.source, answer.finish_reason, asked.question
        )

    def _text(self, tokens: Sequence[int]) -> str:
        # Other special tokens stay: a run may have trained them.
        kept = [token for token in tokens if token not in self._hidden]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _score(self, judged: Sequence[Reply]) -> tuple[Scores | None, list[str]]:
        if self._settings.scores is None:
            return None, []
        answered = [Answered(r.prompt, r.answer, r.reference or "", r.source) for r in judged]
        try:
            scores = score(answered, self._settings.scores)
        except SftError as error:
            if not self._has_judged:
                raise
            return None, [f"no scores: {error.what}; {error.fix}"]
        self._has_judged = True
        return scores, list(scores.notes)


def stop_ids(strategy: Strategy, tokenizer: PreTrainedTokenizerBase, prompter: Prompter) -> frozenset[int]:
    """Tokens that end an answer: of the tokenizer, of the chat template, and of the model's generation settings."""
    settings: Any = strategy.model.causal_lm.generation_config
    named = None if settings is None else settings.eos_token_id
    of_model = named if isinstance(named, list) else [] if named is None else [named]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*of_model, *own, *prompter.end_ids])
