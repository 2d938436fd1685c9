"""Tasks of lm-evaluation-harness, and what it finds when it asks them.

Every rank loads the same tasks and builds the same requests; a rank computes its share of each kind
(``evaluation/harness.py``), and all get the numbers and texts that come of them, so that lm-eval's own filters, metrics
and standard errors follow.

Imports lm-eval, which need not be installed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jinja2
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from sft_dist.errors import ConfigError
from sft_dist.evaluation.harness import HarnessModel

# Before the name of a task in what is measured.
PREFIX = "lm_eval/"

# The seeds of lm-eval's command line: of Python, of all else.
PYTHON_SEED, SEED = 0, 1234

# Resamples of a metric whose standard error has no formula. lm-eval's 100,000 want a pool of forked processes, which
# a process with threads of a GPU and of its peers must not have.
BOOTSTRAP_ITERATIONS = 1000


@dataclass(frozen=True)
class TaskScores:
    """Of one state of the model.

    Args:
        metrics: ``lm_eval/TASK/METRIC``, with ``,FILTER`` where a task has one.
        standard_errors: lm-eval's own, by the same names, of those that have one.
        notes: what a reader of the figures must know, a line each.
        about: what it takes to compute them again, for a file.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    notes: tuple[str, ...]
    about: dict[str, Any]


class Tasks:
    """What is asked; every rank has the same.

    Args:
        names: of tasks, groups or tags, or YAML files.
        folder: with more of them; None: lm-eval's own.
        limit: most examples of a task; None: all.

    Raises:
        ConfigError: there is no such task, its data cannot be had, or it is none that can be asked here.
    """

    def __init__(self, names: Sequence[str], *, folder: str | None, limit: int | None) -> None:
        self.names, self.limit = tuple(names), limit
        manager = TaskManager(include_path=folder)
        for name in names:
            if name not in manager.task_index and not os.path.isfile(name):
                raise ConfigError(
                    f"--lm-eval: lm-eval {version('lm-eval')} has no task {name}",
                    fix="list them: lm-eval ls tasks; give a folder with your own: --lm-eval-tasks FOLDER",
                )
        try:
            self.loaded: Any = manager.load(list(names))
        except Exception as error:  # of lm-eval, of the data set's library, of a task's own code
            raise ConfigError(
                f"--lm-eval: the tasks cannot be loaded: {_in_a_line(error)}",
                fix="bring their data here before (those of lm-eval are on the hub), or correct the YAML of the task",
            ) from error
        for name, task in self.loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"--lm-eval: {name} runs code that the model writes, which is not done here",
                    fix="leave it out, or run lm-eval itself on an export",
                )
            if getattr(task, "MULTIMODAL", False):
                raise ConfigError(f"--lm-eval: {name} asks for images or sound", fix="choose tasks of texts")
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)


def ask(
    model: HarnessModel,
    tasks: Tasks,
    *,
    chats: bool,
    is_main: bool,
) -> TaskScores:
    """What lm-eval finds; every rank must call it.

    Args:
        chats: whether prompts go through the chat template.
        is_main: whether standard errors are wanted, which take time.

    Raises:
        ConfigError: a task asks for what cannot be done here.
    """
    with _seeded():
        try:
            found: Any = evaluator.evaluate(
                model, tasks.loaded, limit=tasks.limit, bootstrap_iters=BOOTSTRAP_ITERATIONS if is_main else 0,
                log_samples=False, apply_chat_template=chats, fewshot_as_multiturn=chats,
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"--lm-eval: a template of a task fails: {_in_a_line(error)}", fix="correct the YAML of the task"
            ) from error
    metrics, errors = dict(_numbers(found, is_error=False)), dict(_numbers(found, is_error=True))
    about = {
        "lm_eval_version": version("lm-eval"),
        "limit": tasks.limit,
        "apply_chat_template": chats,
        "chat_template": model.chat_template(True) if chats else None,
        "bootstrap_iterations": BOOTSTRAP_ITERATIONS,
        "versions": found["versions"],
        "num_fewshot": found["n-shot"],
        "num_examples": found["n-samples"],
        "higher_is_better": found["higher_is_better"],
    }
    return TaskScores(metrics, errors, tuple(model.notes), about)


def _numbers(found: Any, *, is_error: bool) -> Iterator[tuple[str, float]]:
    """lm-eval names a metric ``acc,none`` and its standard error ``acc_stderr,none``."""
    for name, of_task in {**found["results"], **found.get("groups", {})}.items():
        for key, value in of_task.items():
            metric, comma, applied = key.partition(",")
            if not comma or metric.endswith("_stderr") != is_error or not isinstance(value, int | float):
                continue
            filtered = "" if applied == "none" else f",{applied}"
            yield f"{PREFIX}{name}/{metric.removesuffix('_stderr')}{filtered}", float(value)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _seeded() -> Iterator[None]:
    """The seeds of lm-eval's command line, which some tasks draw by; and no forked processes."""
    random.seed(PYTHON_SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def told(chats: bool, why: str) -> str:
    """How prompts are made, in a line."""
    how = "go through the chat template" if chats else "are plain texts"
    return f"lm-eval: prompts {how} ({why}); --{'no-' if chats else ''}chat-template for the other way"
