"""What PyTorch's elastic agent does otherwise here: when it waits for its processes, and when it starts them again."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.launcher import api as launcher

from sft_dist.launch.children import FORWARDED, Children, Process
from sft_dist.launch.outcome import (
    ENDED_BY_USR1,
    NAMED_EXIT_CODES,
    PREEMPTED_EXIT_CODE,
    STALLED_EXIT_CODE,
    code_of_signal,
)
from sft_dist.runtime.failure import INTERRUPTED_EXIT_CODE, SIBLING_GRACE_S, forget, noted_exit_codes
from sft_dist.runtime.world import ATTEMPT

# Processes that were preempted have met before they end. One that is not there was not training, or is stuck.
LEAVING_S = 60.0

# Processes that found that one stalls leave one after the other, and write their stacks before. The one may be stopped.
STALLED_S = 15.0

POLL_S = 0.05

# The agent's own list of the signals at which it ends its processes, within 30 s.
HANDLED = "TORCHELASTIC_SIGNALS_TO_HANDLE"

PREEMPTED_CODES = frozenset({PREEMPTED_EXIT_CODE, ENDED_BY_USR1})
# The same would happen again, or the user wanted the end.
FINAL_CODES = (NAMED_EXIT_CODES - {STALLED_EXIT_CODE}) | PREEMPTED_CODES | {INTERRUPTED_EXIT_CODE, -signal.SIGINT}

Ended = dict[int, int | None]


@dataclass(frozen=True)
class NodePlace:
    """Of a node among those of a run.

    Args:
        rank: 0 .. num_nodes-1; all nodes know theirs.
        num_nodes: all of them.
    """

    rank: int
    num_nodes: int


def _take_place(handler: RendezvousHandler, place: NodePlace) -> None:
    """Numbers the nodes as the scheduler does, when all are there.

    Left alone, a c10d rendezvous sorts them by their addresses as text, so that neighbours in the network are none in
    the order of ranks.
    """
    meet = handler.next_rendezvous

    def in_order() -> RendezvousInfo:
        met = meet()
        if met.world_size != place.num_nodes:
            return met
        assert met.bootstrap_store_info is not None
        return RendezvousInfo(met.store, place.rank, met.world_size, met.bootstrap_store_info)

    handler.next_rendezvous = in_order  # type: ignore[method-assign]


class Agent(LocalElasticAgent):
    """Sends signals on and waits; starts the processes again only after what may go well the next time.

    Args:
        children: gets the processes, and with them the signals.
        folder: of this launch.
        ended: gets the exit codes by rank as they were when the end was noticed; None for those still alive.
        place: of this node among the nodes, where that is known.
    """

    def __init__(
        self,
        *arguments: Any,
        children: Children,
        folder: Path,
        ended: Ended,
        place: NodePlace | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        if place is not None:
            _take_place(self._worker_group.spec.rdzv_handler, place)
        self._children, self._folder, self._ended = children, folder, ended
        self._started: list[Process] = []
        self._rounds = 0
        forwarded = {number.name for number in FORWARDED}
        others = [name for name in os.environ[HANDLED].split(",") if name.strip() not in forwarded]
        os.environ[HANDLED] = ",".join(others or [signal.SIGHUP.name])

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self._children.signals:
            sys.exit(code_of_signal(self._children.signals[0]))
        self._children.processes.clear()
        super()._rendezvous(worker_group)
        self._rounds += 1
        handler, store = worker_group.spec.rdzv_handler, cast(dist.Store, worker_group.store)
        # The store of a static rendezvous is the same in every round; its launchers all take part in every round.
        key = f"{ATTEMPT}/{self._rounds}" if isinstance(handler, StaticTCPRendezvous) else ATTEMPT
        if worker_group.group_rank == 0:
            store.set(key, f"{self._rounds - 1}-{uuid.uuid4().hex}")
        os.environ[ATTEMPT] = store.get(key).decode()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        forget(self._folder)
        with self._children.starting():
            pids: dict[int, Any] = super()._start_workers(worker_group)
            assert isinstance(self._pcontext, SubprocessContext)
            handlers = self._pcontext.subprocess_handlers
            self._started = [handlers[local_rank].proc for local_rank in sorted(handlers)]
            self._children.processes[:] = self._started
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._settled(worker_group)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in {WorkerState.UNHEALTHY, WorkerState.FAILED}:
            self._ended.clear()
            self._ended.update(codes)
            if self._is_final(codes):
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                self._tell_of_restart(codes, worker_group.spec.max_restarts)
        return result

    def _settled(self, worker_group: WorkerGroup) -> Ended:
        """Exit codes by rank. Once a process has failed, others get the time to end by themselves that they need.

        Those that leave in order are waited for. Before a restart, so are those that may be about to say why a peer
        lost them.
        """
        first: float | None = None
        while True:
            codes = {
                worker.global_rank: process.poll()
                for worker, process in zip(worker_group.workers, self._started, strict=True)
            }
            failed = [code for code in codes.values() if code]
            if not failed or None not in codes.values():
                return codes
            first = time.monotonic() if first is None else first
            if time.monotonic() - first > self._patience_s(codes):
                if STALLED_EXIT_CODE in failed:
                    self._kill()  # what does not run does not hear SIGTERM either, for which 30 s are given
                return codes
            time.sleep(POLL_S)

    def _kill(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()

    def _patience_s(self, codes: Ended) -> float:
        if STALLED_EXIT_CODE in codes.values():
            return STALLED_S
        if all(code in PREEMPTED_CODES for code in codes.values() if code):
            return LEAVING_S
        return SIBLING_GRACE_S if self._remaining_restarts > 0 and not self._is_final(codes) else 0.0

    def _is_final(self, codes: Ended) -> bool:
        known = {*codes.values(), *noted_exit_codes(self._folder).values()}
        return bool(self._children.signals) or bool(known & FINAL_CODES)

    def _tell_of_restart(self, codes: Ended, max_restarts: int) -> None:
        rank, code = min(
            ((rank, code) for rank, code in codes.items() if code), key=lambda item: (item[1] > 0, item[0])
        )
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        number = max_restarts - self._remaining_restarts + 1
        print(f"rank {rank} {how}: starting all again, restart {number} of {max_restarts}", file=sys.stderr, flush=True)


@contextmanager
def watching_agent(children: Children, folder: Path, place: NodePlace | None) -> Iterator[Ended]:
    """Lets PyTorch's launch function use ``Agent``; yields what that fills in ``ended``."""
    ended: Ended = {}
    original = launcher.LocalElasticAgent
    launcher.LocalElasticAgent = functools.partial(  # type: ignore[misc, assignment]
        Agent, children=children, folder=folder, ended=ended, place=place
    )
    try:
        yield ended
    finally:
        os.environ.pop(ATTEMPT, None)
        launcher.LocalElasticAgent = original  # type: ignore[misc]
