"""``sft-dist eval``: how good a run or a model is on held-out rows, and how much better than its base.

The model is built, sharded and filled as for training, so what fits for training fits here, on any number of processes
and under any strategy. The base is the state before the first step; the trained state comes out of a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.naming import CHECKPOINTS
from sft_dist.checkpoint.restore import restore
from sft_dist.checkpoint.source import LATEST, find_newest_source, find_source
from sft_dist.checkpoint.store import name_of
from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.load import load_config, read_config
from sft_dist.config.schema import Config, LoraMethod, VirtualTokensMethod
from sft_dist.config.validate import validate
from sft_dist.config.validate_eval import has_eval_data
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.errors import ConfigError
from sft_dist.evaluation.prompt import Prompter, trained_on
from sft_dist.export.provenance import read_receipt
from sft_dist.model.weights import check_weights
from sft_dist.run import Run
from sft_dist.runtime.process_group import process_group, run_on_main_first
from sft_dist.scores.answered import Answered
from sft_dist.scores.compare import NUM_RESAMPLES, Compared, compare_judged, notes_on_intervals
from sft_dist.scores.judge import judge
from sft_dist.sharding import registry
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.adapter_alone import settings_of_adapter
from sft_dist.train.eval_record import read_files, record_of
from sft_dist.train.evaluations import Evaluated, Evaluations, evaluations_of
from sft_dist.train.preflight import take_run_directory
from sft_dist.train.ready import Met, Process, make_ready, meet, warn
from sft_dist.train.resume import NEVER
from sft_dist.train.run_files import writing_into
from sft_dist.train.surroundings import versions

if TYPE_CHECKING:
    # lm-eval need not be installed.
    from sft_dist.evaluation.harness import Tasks, TaskScores

BASE, TUNED = "base", "tuned"

# In place of the training rows of a configuration that is read for its model alone.
NO_ROWS = "(no rows)"

# In the folder of the results.
RESULT = "eval.json"


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        config: by which it is built; its ``output_dir`` is where the results go.
        checkpoint: with the trained state; None: the model as it is.
        has_base: whether the state without the checkpoint is the base model.
        adapter: that ``config`` starts from, without its run; None: none.
        has_rows: whether rows are held out; without, it is asked other things.
        trained: the configuration that it was trained by; None: nobody knows it.
    """

    config: Config
    checkpoint: Path | None
    has_base: bool
    adapter: Path | None = None
    has_rows: bool = True
    trained: Config | None = None


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


def subject_of(
    path: str,
    overrides: Sequence[str],
    *,
    data: Sequence[str],
    checkpoint: str | None,
    out: Path | None,
    base: str | None = None,
    needs_rows: bool = True,
) -> Subject:
    """
    Args:
        path: a run directory, a checkpoint, the folder of a whole model or of a LoRA adapter, or a hub id in the
            local cache.
        overrides: of the run's configuration, or of the least one that a model needs.
        data: files of held-out rows, in place of the run's own, whose long texts are then left out too.
        checkpoint: of a run: the number of its steps, or ``latest``; None: that of which its ``final/`` is.
        out: folder of the results; None: ``eval/`` in the run directory, ``NAME.eval`` beside a model.
        base: model that an adapter without its run is for; None: the one that it names.
        needs_rows: whether there is nothing to ask it without held-out rows.

    Raises:
        ConfigError: it is none of these, nothing is held out, or the configuration cannot be used.
    """
    folder = Path(path).expanduser()
    is_part_of_a_run = (folder / CHECKPOINTS).is_dir() or (folder / "manifest.json").is_file()
    if not is_part_of_a_run:
        return _of_artefact(path, overrides, data, out, base, needs_rows=needs_rows)
    if base is not None:
        raise ConfigError("--base-model is for an adapter without its run; a run knows its base", fix="leave it out")
    chosen = checkpoint
    if chosen is None and (folder / CHECKPOINTS).is_dir():
        chosen = _step_of_final(folder)
    source = find_source(folder, checkpoint=chosen)
    config = load_config(source.folder / "config.yaml", overrides)
    output = out or Path(source.run_directory or source.folder) / "eval"
    has_base = not isinstance(config.method, VirtualTokensMethod)
    has_rows = bool(data) or has_eval_data(config)
    if data and not any(given.startswith(("eval=", "eval.long_texts")) for given in overrides):
        config = _without_long_texts(config, data)
    prepared = _prepared(config, data, output, needs_rows=needs_rows)
    return Subject(prepared, source.folder, has_base=has_base, has_rows=has_rows, trained=config)


def _without_long_texts(config: Config, data: Sequence[str]) -> Config:
    """Those of the run are no part of other rows, unless they are among them."""
    texts = config.eval.long_texts
    paths = [] if texts is None else [path for path in texts.paths if path in data]
    kept = texts.model_copy(update={"paths": paths}) if texts is not None and paths else None
    return config.model_copy(update={"eval": config.eval.model_copy(update={"long_texts": kept})})


def _step_of_final(run: Path) -> str:
    """The checkpoint that ``final/`` was made of, where it is still there; else the newest."""
    step = (read_receipt(run).get("final") or {}).get("step")
    return str(step) if isinstance(step, int) and (run / CHECKPOINTS / name_of(step)).is_dir() else LATEST


def _of_artefact(
    path: str, overrides: Sequence[str], data: Sequence[str], out: Path | None, base: str | None, *, needs_rows: bool
) -> Subject:
    source = find_newest_source(path)
    is_adapter = source.kind == "adapter"
    kind = "an adapter without its run" if is_adapter else "a model"
    if base is not None and not is_adapter:
        raise ConfigError(f"--base-model is for an adapter, and {path} is {kind}", fix="leave it out")
    if not data and needs_rows:
        raise ConfigError(f"{path} is {kind}, and no rows are given to evaluate it on", fix="add --data FILE")
    sections = settings_of_adapter(source.folder, base) if is_adapter else {"model": {"path": path}}
    output = out or Path(f"{source.name.replace('/', '--')}.eval")
    settings: dict[str, Any] = {
        **sections, "output_dir": str(output), "train": {"global_batch_size": 1, "max_steps": 1},
        "data": {**sections.get("data", {}), "train": [{"path": data[0] if data else NO_ROWS}]},
        "logging": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    config = _prepared(read_config(settings, source=path, overrides=overrides), data, output, needs_rows=needs_rows)
    adapter = source.folder if is_adapter else None
    return Subject(config, None, has_base=is_adapter, adapter=adapter, has_rows=bool(data))


def _prepared(config: Config, data: Sequence[str], output: Path, *, needs_rows: bool) -> Config:
    held_out = [SourceConfig(path=path) for path in data] or list(config.data.eval)
    section = config.data
    if held_out:
        # The rows that were trained on need not be here any more; so nothing is said of rows that are on both sides.
        limits = section.audit.max_share.model_copy(update={"leak_exact": 1.0, "leak_near": None})
        audit = section.audit.model_copy(update={"max_share": limits})
        sides = {"train": held_out, "eval": held_out, "eval_split": None}
        section = section.model_copy(update={**sides, "audit": audit})
    # It decides nothing; other scores may be asked for than those that the run was ended by.
    nothing = {"keep_best": False, "final": "last", "best_metric": None, "best_mode": None, "mirror": None}
    checkpoint = config.checkpoint.model_copy(update=nothing)
    updates = {"data": section, "checkpoint": checkpoint, "output_dir": str(output), "early_stopping": None}
    config = config.model_copy(update=updates)
    if not has_eval_data(config) and needs_rows:
        raise ConfigError("data.eval: the run has held out no rows", fix="give some: --data FILE")
    validate(config)
    return config


@dataclass(frozen=True)
class _Asked:
    """What is asked of each state, and what it found.

    Args:
        evaluations: None: no rows are held out.
        tasks: None: none were asked for.
    """

    evaluations: Evaluations | None
    tasks: _TasksHere | None
    found: dict[str, Evaluated] = field(default_factory=dict)
    of_tasks: dict[str, TaskScores] = field(default_factory=dict)

    def state(self, name: str, strategy: Strategy, step: int) -> None:
        """The state that the model has now; every rank must call it."""
        evaluated = Evaluated(step, {}, None)
        if self.evaluations is not None:
            evaluated = self.evaluations.evaluate(strategy, step, is_end=True)
        if self.tasks is not None:
            self.of_tasks[name] = scores = self.tasks.ask(strategy)
            evaluated = replace(evaluated, metrics={**evaluated.metrics, **scores.metrics})
        self.found[name] = evaluated


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
        from sft_dist.evaluation.harness import HarnessModel, ask

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
            compared, notes = _compared(asked.found, met.config)
            record = read | record_of(met.config, asked.found, notes) if subject.has_rows else {"versions": versions()}
            with writing_into(folder):
                _write(folder, subject, asked, compared, record)
            _show(console, asked, compared)
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
    from sft_dist.evaluation.harness import Tasks, told

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


def _compared(found: dict[str, Evaluated], config: Config) -> tuple[dict[str, Compared], list[str]]:
    """Scores of the base and of what became of it, with their intervals; and what a reader of these must know."""
    scores = config.eval.scores
    if scores is None or len(found) < 2 or any(each.findings is None for each in found.values()):
        return {}, []
    base, tuned = (judge(_answered(found[name]), scores) for name in (BASE, TUNED))
    return compare_judged(base, tuned, seed=config.train.seed), notes_on_intervals(base)


def _answered(evaluated: Evaluated) -> list[Answered]:
    assert evaluated.findings is not None
    return [Answered(r.prompt, r.answer, r.reference or "", r.source) for r in evaluated.findings.judged]


def _write(
    folder: Path, subject: Subject, asked: _Asked, compared: dict[str, Compared], record: Mapping[str, Any]
) -> None:
    found = asked.found
    signature = {
        name: value
        for each in found.values()
        if each.findings is not None and each.findings.scores is not None
        for name, value in each.findings.scores.signature.items()
    }
    document = {
        "model": subject.config.model.path,
        "checkpoint": None if subject.checkpoint is None else str(subject.checkpoint),
        "adapter": None if subject.adapter is None else str(subject.adapter),
        "metrics": {name: each.metrics for name, each in found.items()},
        "compared": {name: asdict(each) for name, each in compared.items()},
        "signature": signature,
        **record,
    }
    if asked.of_tasks:
        document["lm_eval"] = {
            "standard_errors": {name: scores.standard_errors for name, scores in asked.of_tasks.items()},
            **next(iter(asked.of_tasks.values())).about,
        }
    (folder / RESULT).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, each in found.items():
        findings = each.findings
        replies = () if findings is None else (*findings.samples, *findings.judged)
        if replies:
            lines = (json.dumps(asdict(reply), ensure_ascii=False) + "\n" for reply in replies)
            (folder / f"answers-{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _show(console: Console, asked: _Asked, compared: dict[str, Compared]) -> None:
    found = asked.found
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for name in found:
        table.add_column(name, justify="right", no_wrap=True)
    if compared:
        table.add_column("difference, 95 % interval", justify="right", no_wrap=True)
        table.add_column("better in", justify="right", no_wrap=True)
    keys = dict.fromkeys(key for each in found.values() for key in each.metrics)
    for key in keys:
        cells = [_cell(name, key, asked) for name in found]
        one = compared.get(key.removeprefix("eval_scores/"))
        if one is not None:
            low, high = one.difference_interval
            cells += [f"{one.difference:+,.4f}  ({low:+,.4f} to {high:+,.4f})", f"{one.tuned_better:.0%}"]
        table.add_row(key.removeprefix("eval_").removeprefix("scores/"), *cells)
    console.print(table)
    if compared:
        console.print(
            f"better in: share of {NUM_RESAMPLES:,} resamples in which the run has the higher score", style="dim"
        )
    for name, each in found.items():
        for note in () if each.findings is None else each.findings.notes:
            console.print(f"{name}: {note}", markup=False, soft_wrap=True)
    for name, scores in asked.of_tasks.items():
        for note in scores.notes:
            console.print(f"{name}: lm-eval: {note}", markup=False, soft_wrap=True)


def _cell(name: str, key: str, asked: _Asked) -> str:
    """A metric of a state, with lm-eval's standard error where it has one."""
    metrics = asked.found[name].metrics
    if key not in metrics:
        return ""
    error = asked.of_tasks[name].standard_errors.get(key) if name in asked.of_tasks else None
    return _shown(metrics[key]) + ("" if error is None else f" ± {_shown(error)}")


def _shown(value: float) -> str:
    if abs(value) >= 1e9:
        return f"{value:.4e}"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
