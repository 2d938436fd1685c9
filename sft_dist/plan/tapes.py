"""Tapes of many runs that differ in what a tape does not depend on."""

from __future__ import annotations

from dataclasses import replace

from sft_dist.config.schema import ActivationCheckpointingConfig
from sft_dist.model.spec import ModelSpec
from sft_dist.plan.activations import seq_lens_of
from sft_dist.plan.cache import cached_trace
from sft_dist.plan.tape import Tape
from sft_dist.run import Run


class Tapes:
    """Each is made, or read from the cache, once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Tape] = {}
        self._models: list[ModelSpec] = []  # kept, so that an id stays theirs

    def of(self, run: Run, *, backward: bool = True) -> Tape:
        """``cached_trace``; an evaluation recomputes nothing, whatever the mode."""
        if not backward:
            run = replace(run, activation_checkpointing=ActivationCheckpointingConfig(mode="none"))
        key = (
            id(run.model),
            run.activation_checkpointing.model_dump_json(),
            run.precision.master if run.strategy == "ddp" else None,
            seq_lens_of(run),
            run.batch.sequence_parallel if backward else 1,
            backward,
        )
        if key not in self._known:
            self._models.append(run.model)
            self._known[key] = cached_trace(run, backward=backward)
        return self._known[key]
