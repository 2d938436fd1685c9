"""Cross-checks of the keys of ``eval``. Reads, never changes."""

from __future__ import annotations

from collections.abc import Iterator

from sft_dist.config.control_schema import EVAL_LOSS
from sft_dist.config.eval_schema import AnswersConfig
from sft_dist.config.measured import SCORES, may_measure, measured
from sft_dist.config.schema import Config
from sft_dist.config.scores_schema import SCORE_NAMES
from sft_dist.config.validate_scores import scores_findings

Finding = tuple[str, str]  # (what is wrong, how to fix it), each one line


def has_eval_data(config: Config) -> bool:
    """Whether rows are held out."""
    return bool(config.data.eval) or config.data.eval_split is not None


def eval_findings(config: Config) -> Iterator[Finding]:
    """What does not go together."""
    section = config.eval
    evaluates = has_eval_data(config)
    if section.every_steps is not None and not evaluates:
        yield (
            f"eval.every_steps is {section.every_steps}, but data.eval is empty",
            "add held-out sources to data.eval, set data.eval_split, or remove eval.every_steps",
        )
    # The rows that answers are judged by are held-out ones, and samples come with an evaluation.
    for key in ("scores", "samples", "long_texts"):
        if getattr(section, key) is not None and not evaluates:
            yield (
                f"eval.{key} is set, but there is no evaluation: data.eval is empty",
                f"add held-out sources to data.eval, set data.eval_split, or remove eval.{key}",
            )
    if section.scores is not None:
        yield from scores_findings(section.scores)
    samples = section.samples
    if samples is not None and not (samples.prompts or samples.file or samples.from_eval):
        yield (
            "eval.samples has no prompt",
            "set eval.samples.prompts, eval.samples.file or eval.samples.from_eval, or remove eval.samples",
        )
    if samples is not None and samples.system is not None and not (samples.prompts or samples.file):
        yield (
            "eval.samples.system has no effect on rows of data.eval, which have their own",
            "remove eval.samples.system, or set eval.samples.prompts",
        )
    if section.answers != AnswersConfig() and section.scores is None and samples is None:
        yield (
            "eval.answers has no effect: nothing is answered",
            "set eval.scores or eval.samples, or remove eval.answers",
        )
    yield from _windows(config)
    yield from _wanted(config)


def _wanted(config: Config) -> Iterator[Finding]:
    """Of the metrics that decide something, those that evaluations do not measure, or not all of them."""
    wanted = {}
    if config.early_stopping is not None:
        wanted["early_stopping.metric"] = config.early_stopping.metric
    checkpoint = config.checkpoint
    if checkpoint.best_metric is not None and (checkpoint.keep_best or config.final_state == "best"):
        wanted["checkpoint.best_metric"] = checkpoint.best_metric
    for key, metric in wanted.items() if has_eval_data(config) else ():
        if not may_measure(config.eval, metric):
            name = metric.removeprefix(SCORES)
            add = f", or add {name} to eval.scores.metrics" if metric != name and name in SCORE_NAMES else ""
            yield (
                f"{key} is {metric}, which an evaluation of this run does not measure",
                f"set {key} to one of: {', '.join(measured(config.eval))}{add}",
            )
        elif config.eval.answers.when == "ends" and config.eval.every_steps is not None and metric.startswith(SCORES):
            yield (
                f"{key} is {metric}, but with eval.answers.when ends most evaluations have no answers",
                f"set eval.answers.when to always, or {key} to {EVAL_LOSS}",
            )


def _windows(config: Config) -> Iterator[Finding]:
    texts = config.eval.long_texts
    if texts is None:
        return
    length = texts.length or config.data.max_seq_len
    if texts.stride is not None and texts.stride >= length:
        yield (
            f"eval.long_texts.stride is {texts.stride}, and the window has {length} tokens: some would have no context",
            f"set eval.long_texts.stride to less than {length}",
        )
