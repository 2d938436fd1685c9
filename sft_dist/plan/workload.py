"""What a run has to do, whichever GPU does it: its passes, what travels, what is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sft_dist.plan.answers import AnswersPlan, answering, planned_answers, read_bytes
from sft_dist.plan.disk import final_bytes, num_checkpoints, saved_state_bytes
from sft_dist.plan.offload import host_transfers
from sft_dist.plan.result import DataPlan
from sft_dist.plan.schedule import Transfer
from sft_dist.plan.tape import Tape
from sft_dist.plan.typical import Content, as_content
from sft_dist.run import Run
from sft_dist.sharding.collectives import Collective, collectives, of_evaluation


@dataclass(frozen=True)
class Evaluation:
    """One pass over the evaluation set: ``batches`` of every rank, forward alone; the rest as of ``Workload``."""

    tape: Tape
    collectives: tuple[Collective, ...]
    copies: tuple[Transfer, ...]
    batches: float


@dataclass(frozen=True)
class Answers:
    """The questions of an evaluation.

    Args:
        prompts: one pass over the prompts of a group; tokens: one over a token of each of its rows.
        read_bytes: of such a pass, least that is read of memory.
    """

    planned: AnswersPlan
    prompts: Evaluation
    tokens: Evaluation
    read_bytes: float


@dataclass(frozen=True)
class Workload:
    """What a run has to do, whichever GPU does it.

    Args:
        content: of the busiest rank's mean micro-batch; tape: of such a micro-batch.
        collectives: of a step.
        copies: to and from host memory, their bytes in place of seconds.
        step_tokens: of all ranks, in a full step.
        written_bytes: checkpoints and the final model.
        evaluation: None where nothing is evaluated; answers: None where nothing is answered.
    """

    run: Run
    data: DataPlan
    content: Content
    tape: Tape
    collectives: tuple[Collective, ...]
    copies: tuple[Transfer, ...]
    step_tokens: float
    written_bytes: int
    evaluation: Evaluation | None
    answers: Answers | None = None


def workload(
    run: Run, tape: Tape, *, data: DataPlan, eval_tape: Tape | None = None, answer_tape: Tape | None = None
) -> Workload:
    """
    Args:
        tape: of the run's longest micro-batch (``activations.trace``).
        eval_tape: of the longest evaluation batch; None where nothing is evaluated.
        answer_tape: of the longest prompts that are read together; None where nothing is answered.
    """
    content = busiest_content(run, data)
    return Workload(
        run=run,
        data=data,
        content=content,
        tape=as_content(run, tape, content),
        collectives=collectives(run, tokens=round(content.tokens)),
        copies=host_transfers(run, tokens=content.tokens / run.batch.sequence_parallel),
        step_tokens=full_step_tokens(run, data),
        written_bytes=num_checkpoints(run, data) * saved_state_bytes(run) + final_bytes(run),
        evaluation=None if eval_tape is None else _evaluation(run, data, eval_tape),
        answers=None if answer_tape is None else _answers(run, data, answer_tape),
    )


def busiest_content(run: Run, data: DataPlan) -> Content:
    """Of a mean micro-batch of the rank with most sequences: the others wait for it.

    A step's sequences are dealt round-robin, and every rank runs as many micro-batches.
    """
    sequences = -(-_sequences_per_step(run, data) // run.batch.world_size) / data.micro_batches_per_step
    tokens = data.tokens.value / data.sequences * sequences
    supervised = tokens * data.supervised_tokens / data.tokens.value
    return Content(tokens, supervised, data.sum_squared_lengths / data.tokens.value)


def full_step_tokens(run: Run, data: DataPlan) -> float:
    """Of all ranks."""
    return data.tokens.value / data.sequences * _sequences_per_step(run, data)


def _sequences_per_step(run: Run, data: DataPlan) -> int:
    return min(run.batch.global_batch_size, max(1, round(data.sequences)))


def _answers(run: Run, data: DataPlan, tape: Tape) -> Answers | None:
    """Questions are as long as rows without what is supervised of them."""
    planned = planned_answers(run, data)
    if planned is None:
        return None
    alone = answering(run)
    prompt = max(1.0, data.tokens.value / data.rows * (1 - data.supervised_tokens / data.tokens.value))
    last = prompt + planned.max_new_tokens / 2  # of a row, half way
    copies = tuple(
        t for t in host_transfers(alone, tokens=planned.rows * prompt) if t.of == "forward" and t.when == "before"
    )
    links = of_evaluation(collectives(alone))
    prompts = as_content(alone, tape, Content(planned.rows * prompt, planned.rows, prompt))
    tokens = as_content(alone, tape, Content(planned.rows, planned.rows, last))
    return Answers(
        planned=planned,
        prompts=Evaluation(prompts, links, copies, 1),
        tokens=Evaluation(tokens, links, copies, 1),
        read_bytes=read_bytes(run, row_tokens=last, rows=planned.rows),
    )


def _evaluation(run: Run, data: DataPlan, tape: Tape) -> Evaluation:
    """Rows that are not packed and as long as those of training."""
    row = data.tokens.value / data.rows
    tokens = row * run.batch.micro_batch_size
    supervised = data.supervised_tokens / data.tokens.value
    alone = replace(run, batch=replace(run.batch, sequence_parallel=1))
    content = Content(tokens, tokens * supervised, data.sum_squared_lengths / data.tokens.value)
    copies = host_transfers(alone, tokens=tokens)
    return Evaluation(
        tape=as_content(alone, tape, content),
        collectives=of_evaluation(collectives(run)),
        copies=tuple(t for t in copies if t.of == "forward" and t.when == "before"),
        batches=max(1.0, -(-data.eval_tokens // (tokens * run.batch.world_size))),
    )
