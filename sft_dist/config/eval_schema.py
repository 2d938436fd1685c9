"""``eval``: when a run is evaluated, and what beside the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sft_dist.config.scores_schema import ScoresConfig
from sft_dist.config.section import Section

NonEmpty = Annotated[str, Field(min_length=1)]


class AnswersConfig(Section):
    """How answers are generated: the most probable token, always."""

    max_new_tokens: int = Field(256, ge=1, description="Most tokens of an answer.")
    max_examples: int | None = Field(
        200, ge=1, description="Rows of data.eval that are answered for eval.scores, chosen by the seed; null: all."
    )
    rows_at_once: int = Field(
        8, ge=1, description="Answers that a rank generates at a time; another number may round otherwise."
    )
    when: Literal["always", "ends"] = Field(
        "always",
        description="always: at every evaluation; ends: before training and after its last step, an early one too.",
    )


class SamplesConfig(Section):
    """Prompts that are answered at every evaluation, for people to look at: samples.jsonl, W&B and the report."""

    prompts: list[NonEmpty] = Field([], description="What a user says; without a chat template, texts to go on from.")
    file: str | None = Field(
        None, min_length=1, description="Rows in any format of training data; the last answer of each is asked for."
    )
    from_eval: int = Field(0, ge=0, description="So many rows of data.eval, chosen by the seed.")
    system: str | None = Field(None, min_length=1, description="System message of prompts, and of rows without one.")


class LongTextsConfig(Section):
    """Perplexity of long texts, by a window that slides over them: eval_long_perplexity."""

    paths: list[NonEmpty] = Field(min_length=1, description="Files of texts: .txt, .md, or rows with a text.")
    length: int | None = Field(None, ge=2, description="Tokens of a window; null: data.max_seq_len.")
    stride: int | None = Field(None, ge=1, description="Tokens that it moves on by; null: half of its length.")


class EvalConfig(Section):
    every_steps: int | None = Field(None, ge=1, description="Evaluate after this many steps; always at the end.")
    before_training: bool = Field(True, description="Evaluate the untrained model too.")
    warn_after_rises: int | None = Field(
        3,
        ge=1,
        description="Warn of overfitting when eval_loss has risen this many times in a row while the training loss "
        "fell; null: never.",
    )
    scores: ScoresConfig | None = Field(
        None, description="Answer rows of data.eval at evaluations, and judge the answers; {} for the usual scores."
    )
    samples: SamplesConfig | None = None
    answers: AnswersConfig = AnswersConfig()
    long_texts: LongTextsConfig | None = None
