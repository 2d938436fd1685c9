"""``eval.scores``: how generated answers are judged. See docs/evaluation.md for what each score is."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from sft_dist.config.section import Section

ScoreName = Literal[
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "exact_match",
    "accuracy",
    "macro_f1",
    "json_valid",
    "json_schema",
    "custom",
]
SCORE_NAMES: tuple[ScoreName, ...] = get_args(ScoreName)


def _each_once(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands there more than once")
    return names


class ScoresConfig(Section):
    """What generated answers are judged by."""

    metrics: Annotated[list[ScoreName], Field(min_length=1), AfterValidator(_each_once)] = Field(
        default=["bleu", "chrf", "rougeL", "exact_match"], description="Scores, each at most once."
    )
    labels: Annotated[list[str], Field(min_length=1), AfterValidator(_each_once)] | None = Field(
        None, description="For accuracy and macro_f1: the answers that are allowed; null: those of the references."
    )
    normalise: bool = Field(
        True,
        description="Before exact_match, accuracy and macro_f1 compare: NFKC (full-width = half-width), case folded, "
        "trimmed, one full stop at the end (. or 。) removed.",
    )
    json_schema: str | None = Field(
        None, min_length=1, description="For the score json_schema: a file with the JSON Schema of an answer."
    )
    custom: str | None = Field(
        None,
        pattern=r"^.+\.py:[A-Za-z_]\w*$",
        description="For the score custom: FILE.py:FUNCTION, called as function(prompt, answer, reference) -> float.",
    )
    tokeniser: Literal["auto", "13a", "intl", "char", "zh", "ja-mecab", "none"] = Field(
        "auto",
        description="sacrebleu's, for bleu. auto: by the script of the references; Japanese: ja-mecab where MeCab is "
        "installed, else char; Chinese: zh; else 13a. none: answers and references have spaces between tokens.",
    )
