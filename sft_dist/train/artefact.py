"""``final/``: exported, proven, and only then given its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash
from torch import Tensor

from sft_dist.checkpoint.artefact import prove_artefact, take_probes
from sft_dist.checkpoint.fresh_process import digest
from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError
from sft_dist.export.provenance import training_section
from sft_dist.model.export import UNFINISHED, export, publish
from sft_dist.run import Run
from sft_dist.runtime import progress
from sft_dist.runtime.process_group import run_on_main_first
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.final_state import FinalState
from sft_dist.train.ready import Inputs, Process


def proven(run: Run) -> str:
    return ", proven in a fresh process" if run.checkpoint.prove_final else ", not proven (checkpoint.prove_final)"


def write_artefact(
    final: Path,
    run: Run,
    config: Config,
    process: Process,
    inputs: Inputs,
    strategy: Strategy,
    *,
    state: FinalState | None = None,
) -> str:
    """Exports the trained model, which is called ``final`` when a fresh process has found it in the files.

    Args:
        state: what ``strategy`` holds, for the card.

    Returns:
        on rank 0, the XXH3-128 of names and values of all that is in the files.

    Raises:
        CheckpointError: it cannot be written, or is not the trained model; it then stays as ``final.unfinished``.
    """
    probes = take_probes(strategy, inputs.train_data, process.device) if run.checkpoint.prove_final else []
    parameters = _counted(strategy.full_parameters(trainable_only=run.model.method.type != "full"))
    tokenizer, is_main = inputs.renderer.tokenizer, process.world.is_main
    about = ""
    if is_main:
        steps, told = (None, None) if state is None else (state.step, state.told())
        about = training_section(config, final.parent, steps=steps, state=told)
    weights: dict[str, str] = {}
    failure = None
    try:
        export(
            final, run.model, strategy.model, parameters, tokenizer, is_main=is_main, seed=run.seed, about=about,
            on_saved=lambda name, tensor: weights.update({name: digest(tensor)}),
        )  # fmt: skip
    except CheckpointError as error:
        failure = error  # rank 0's; the others, which have gathered with it, hear of it below

    def prove_and_publish() -> None:
        if failure is not None:
            raise failure
        if run.checkpoint.prove_final:
            with process.heartbeat.phase("proving"):
                prove_artefact(final.with_name(final.name + UNFINISHED), run.model, weights, probes, inputs.sample)
        publish(final)

    run_on_main_first(process.world, process.store, f"prove {final}", prove_and_publish)
    return xxhash.xxh3_128_hexdigest("".join(f"{name} {weights[name]}\n" for name in sorted(weights)).encode())


def _counted(parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each one gathered and taken is progress."""
    for parameter in parameters:
        yield parameter
        progress.tick()
