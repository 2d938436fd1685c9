"""Cross-checks of the keys of ``eval.scores``. Reads, never changes."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config.scores_schema import ScoresConfig

Finding = tuple[str, str]  # (what is wrong, how to fix it), each one line


def scores_findings(scores: ScoresConfig) -> Iterator[Finding]:
    """What is wrong with ``eval.scores`` that can be seen in the configuration alone."""
    if "json_schema" in scores.metrics and scores.json_schema is None:
        yield (
            "eval.scores.metrics has json_schema, and eval.scores.json_schema names no file",
            "set eval.scores.json_schema to a file, or score json_valid only",
        )
    if "custom" in scores.metrics and scores.custom is None:
        yield (
            "eval.scores.metrics has custom, and eval.scores.custom names no function",
            "set eval.scores.custom to FILE.py:FUNCTION, or remove custom from the metrics",
        )
    without_effect = {
        "json_schema": scores.json_schema is not None and "json_schema" not in scores.metrics,
        "custom": scores.custom is not None and "custom" not in scores.metrics,
        "labels": scores.labels is not None and not {"accuracy", "macro_f1"} & set(scores.metrics),
        "tokeniser": scores.tokeniser != "auto" and "bleu" not in scores.metrics,
    }
    user = {"labels": "accuracy or macro_f1", "tokeniser": "bleu"}
    for key in (key for key, is_idle in without_effect.items() if is_idle):
        yield (
            f"eval.scores.{key} is set, which has no effect without {user.get(key, key)} in eval.scores.metrics",
            f"remove eval.scores.{key}, or add {user.get(key, key)} to the metrics",
        )
