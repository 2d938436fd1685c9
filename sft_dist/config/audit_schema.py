"""``data.audit``: how much of what is wrong with a data set a run accepts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sft_dist.config.section import Section

MaxShare = Annotated[float | None, Field(ge=0, le=1)]
"""Largest share that is accepted, 0: not a single one; null: reported only."""


class AuditLimits(Section):
    """The largest accepted share of each check, of the rows of a source unless said otherwise. null: reported only.

    What makes a run worthless without a sign of it is refused from the first row on; what may be meant is reported.
    """

    masked_source: MaxShare = Field(0.0, description="Sources of which no row has a token to train on.")
    no_supervised_token: MaxShare = Field(0.0, description="Rows without a token to train on.")
    unsupervised_end: MaxShare = Field(
        0.01, description="Rows whose last answer does not end in a trained end-of-turn token; raw text does not count."
    )
    double_bos: MaxShare = Field(0.0, description="Rows that begin with two BOS tokens.")
    rejected_row: MaxShare = Field(None, description="Rows that were left out (data.on_bad_row: skip).")
    over_length: MaxShare = Field(None, description="Rows longer than max_seq_len.")
    answer_cut: MaxShare = Field(None, description="Rows whose last answer is cut, or lost, at max_seq_len.")
    exact_duplicate: MaxShare = Field(None, description="Rows that are the same as an earlier one.")
    near_duplicate: MaxShare = Field(None, description="Rows that are nearly the same as an earlier one.")
    leak_exact: MaxShare = Field(0.0, description="Held-out rows whose prompt, or whole text, is trained on.")
    leak_near: MaxShare = Field(None, description="Held-out rows whose prompt or whole text is nearly one trained on.")
    contradiction: MaxShare = Field(None, description="Rows with the prompt of another row and a different answer.")
    empty_answer: MaxShare = Field(0.01, description="Rows with an answer without text or tool call.")
    short_answer: MaxShare = Field(None, description="Rows whose answer is one word.")
    answer_is_question: MaxShare = Field(None, description="Rows whose answer repeats the question.")
    mojibake: MaxShare = Field(0.05, description="Rows with text that was read in a wrong encoding.")
    language_mismatch: MaxShare = Field(
        None, description="Rows that answer in another language than asked, where the source rarely does."
    )
    inconsistent_format: MaxShare = Field(
        None, description="Rows whose answer has another form than nearly all of the source."
    )
    role_marker: MaxShare = Field(None, description="Rows with a role's name (### Response:, User:) in an answer.")
    foreign_token: MaxShare = Field(
        None, description="Rows with another model's special tokens (</s>, <|im_end|>) typed into the text."
    )
    special_token_in_text: MaxShare = Field(
        None, description="Rows whose text holds special tokens of this model, which it reads as the template's own."
    )
    untrained_token: MaxShare = Field(
        0.0, description="Rows that train the model to produce a token whose embedding was never trained."
    )
    placeholder: MaxShare = Field(None, description="Rows with a placeholder that was not filled in.")
    markup_remains: MaxShare = Field(None, description="Rows with remains of HTML.")
    boilerplate: MaxShare = Field(None, description="Rows that refuse, or that speak as an AI language model.")
    role_order: MaxShare = Field(None, description="Rows that end with a question or have two turns of one role.")
    dominant_source: MaxShare = Field(None, description="Tokens of one source, of those of its set.")
    render_diff: MaxShare = Field(
        None, description="Answers, of those compared, whose prompt is another one at inference."
    )


class AuditConfig(Section):
    near_duplicate_similarity: float = Field(
        0.8, ge=0.5, le=1, description="Estimated Jaccard similarity from which two texts are near-duplicates."
    )
    num_permutations: int = Field(
        64, ge=16, le=1024, description="Places of a MinHash signature; 4 bytes each for every training row."
    )
    dominant_share: float = Field(
        0.9, gt=0, le=1, description="Share of a set's tokens from which a source is said to dominate it."
    )
    max_share: AuditLimits = Field(AuditLimits(), description="What is accepted; more than that is a data error.")
