"""``sft-dist eval``: how good a run or a model is on held-out rows, and how much better than its base.

The model is built, sharded and filled as for training, so what fits for training fits here, on any number of processes
and under any strategy. The base is the state before the first step; the trained state comes out of a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.console import Console

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.restore import restore
from sft_dist.config.schema import Config, LoraMethod
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.evaluation.prompt import Prompter, trained_on
from sft_dist.model.weights import check_weights
from sft_dist.run import Run
from sft_dist.runtime.process_group import process_group, run_on_main_first
from sft_dist.sharding import registry
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train import eval_results
from sft_dist.train.asked import NEVER
from sft_dist.train.eval_record import read_files, record_of
from sft_dist.train.eval_results import BASE, RESULT, TUNED, Results
from sft_dist.train.eval_subject import Subject
from sft_dist.train.evaluations import Evaluated, Evaluations, evaluations_of
from sft_dist.train.preflight import take_run_directory
from sft_dist.train.ready import Met, Process, make_ready, meet, warn
from sft_dist.train.run_files import writing_into
from sft_dist.train.surroundings import versions

if TYPE_CHECKING:
    # lm-eval need not be installed.
    from sft_dist.evaluation.harness_tasks import Tasks, TaskScores


@dataclass(frozen=True)
class AskedTasks:
    """Tasks of lm-eval that a subject is asked.

    Args:
        names: of tasks, groups or tags, or YAML files.
        folder: with more of them.
        limit: most examples of a task; None: all.
        chat_template: whether prompts go through it; None: as the model was trained.
    """

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    chat_template: bool | None = None


@dataclass(frozen=True)
class _Asked:
    """What is asked of each state, and what it found.

    Args:
        evaluations: None: no rows are held out.
        tasks: None: none were asked for.
    """

    evaluations: Evaluations | None
    tasks: _TasksHere | None
    results: Results = field(default_factory=Results)

    def state(self, name: str, strategy: Strategy, step: int) -> None:
        """The state that the model has now; every rank must call it."""
        evaluated = Evaluated(step, {}, None)
        if self.evaluations is not None:
            evaluated = self.evaluations.evaluate(strategy, step, is_end=True)
        if self.tasks is not None:
            self.results.of_tasks[name] = scores = self.tasks.ask(strategy)
            evaluated = replace(evaluated, metrics={**evaluated.metrics, **scores.metrics})
        self.results.found[name] = evaluated


@dataclass(frozen=True)
class _TasksHere:
    """Tasks, loaded on this rank.

    Args:
        prompter: by which the model is asked.
        eot_id: token that ends a text.
    """

    tasks: Tasks
    prompter: Prompter
    eot_id: int
    met: Met

    def ask(self, strategy: Strategy) -> TaskScores:
        from sft_dist.evaluation.harness import HarnessModel
        from sft_dist.evaluation.harness_tasks import ask

        process = self.met.process
        model = HarnessModel(
            strategy, self.prompter, eot_id=self.eot_id, rows_at_once=self.met.run.eval.answers.rows_at_once,
            seed=self.met.run.seed, rank=process.world.rank, world_size=process.world.size, device=process.device,
        )  # fmt: skip
        return ask(model, self.tasks, chats=self.prompter.chats, is_main=process.world.is_main)


def evaluate_subject(subject: Subject, *, with_base: bool, tasks: AskedTasks | None = None) -> None:
    """Evaluates, shows and writes; every rank of a launch must call it.

    Args:
        with_base: the base, too, where there is one.
        tasks: of lm-eval; None: none.

    Raises:
        SftError: as ``run_training``.
    """
    if subject.has_rows:
        ready = make_ready(subject.config, resume=NEVER)
        met, inputs = (
            Met(ready.config, ready.run, ready.process, ready.store, lambda: ready.inputs.renderer),
            ready.inputs,
        )
    else:
        met, inputs = _meet_without_rows(subject.config), None
    run, process = met.run, met.process
    console = Console(highlight=False, quiet=not process.world.is_main)
    folder = Path(run.output_dir)
    read: dict[str, Any] = {}
    if inputs is not None:
        read = json.loads(
            run_on_main_first(process.world, process.store, "files", lambda: json.dumps(read_files(met.config))) or "{}"
        )
    # Before the model is built: a task that is not there is told at once.
    here = None if tasks is None else _load_tasks(tasks, subject, met, console)
    with process_group(process.world, process.device, met.store):
        evaluations = None
        if inputs is not None:
            evaluations = evaluations_of(run, met.config, process, inputs, say=console.print)
        asked = _Asked(evaluations, here)
        for name, what, strategy, step in _states(subject, run, process, with_base=with_base):
            console.print(f"evaluating {what}", markup=False, soft_wrap=True)
            asked.state(name, strategy, step)

        def write() -> None:
            results = asked.results
            compared, notes = eval_results.compared(results.found, met.config)
            record = {"versions": versions()}
            if subject.has_rows:
                record = read | record_of(met.config, results.found, notes)
            with writing_into(folder):
                eval_results.write(folder, subject, results, compared, record)
            eval_results.show(console, results, compared)
            for note in notes:
                console.print(f"compared: {note}", markup=False, soft_wrap=True)
            console.print(f"results in {folder / RESULT}", markup=False, soft_wrap=True)

        run_on_main_first(process.world, process.store, "eval", write)
        dist.barrier()


def _states(
    subject: Subject, run: Run, process: Process, *, with_base: bool
) -> Iterator[tuple[str, str, Strategy, int]]:
    """What is asked, one after the other: its name, what it is, where it is, and the steps behind it."""
    wants_base = with_base and subject.has_base
    if subject.adapter is not None:
        # Parts of the base that the adapter replaces are not there any more when it is: the model is built twice.
        if wants_base:
            with _built(_without_adapter(run), process) as strategy:
                yield BASE, run.model.path, strategy, 0
        with _built(run, process) as strategy:
            yield TUNED, str(subject.adapter), strategy, 0
        return
    with _built(run, process) as strategy:
        if subject.checkpoint is None or wants_base:
            yield BASE, run.model.path, strategy, 0
        if subject.checkpoint is not None:
            restore(subject.checkpoint, strategy, group=dist.new_group(backend="gloo"))
            yield TUNED, str(subject.checkpoint), strategy, Manifest.read(subject.checkpoint).completed_steps


@contextmanager
def _built(run: Run, process: Process) -> Iterator[Strategy]:
    strategy = registry.apply(run, process.device)
    verify_sharding(strategy, registry.describe(run, process.world.rank))
    yield strategy
    strategy.close()


def _without_adapter(run: Run) -> Run:
    """Its layers are there and add nothing."""
    assert isinstance(run.model.method, LoraMethod)
    method = run.model.method.model_copy(update={"init_from": None})
    return replace(run, model=replace(run.model, method=method))


def _meet_without_rows(config: Config) -> Met:
    """As ``make_ready``, of a model whose rows nobody asks for."""
    met = meet(config)

    def look() -> None:
        take_run_directory(Path(met.run.output_dir), may_hold_a_run=False, say=warn)
        check_weights(met.run.model)

    run_on_main_first(met.process.world, met.process.store, "look", look)
    return met


def _load_tasks(asked: AskedTasks, subject: Subject, met: Met, console: Console) -> _TasksHere:
    from sft_dist.evaluation.harness_tasks import Tasks, told

    loaded: list[Tasks] = []

    def load() -> None:
        loaded.append(Tasks(asked.names, folder=asked.folder, limit=asked.limit))

    # The others find in the cache what rank 0 has fetched.
    run_on_main_first(met.process.world, met.process.store, "tasks", load)
    if not loaded:
        load()
    renderer = met.load()
    chats, why = _chats(subject, renderer)
    if asked.chat_template is not None:
        chats, why = asked.chat_template, "as asked for"
    console.print(told(chats, why), markup=False, soft_wrap=True)
    trained = None if subject.trained is None else trained_on(subject.trained)
    tokenizer = renderer.tokenizer
    own_end = renderer.document_eos_id
    eot_id = tokenizer.eos_token_id if chats or own_end is None else own_end
    assert eot_id is not None, "a renderer has seen to it that answers end"
    return _TasksHere(loaded[0], Prompter(tokenizer, renderer if chats else None, trained), eot_id, met)


def _chats(subject: Subject, renderer: ChatRenderer) -> tuple[bool, str]:
    """Whether the subject answers conversations, and how that is known."""
    if subject.trained is None:
        # Where it has none, the renderer has built one.
        has_own = renderer.notice is None
        return has_own, f"the model has {'a' if has_own else 'no'} chat template"
    chats = trained_on(subject.trained) not in ("documents", "literal")
    return chats, f"the run was trained {'on conversations' if chats else 'without one'}"
