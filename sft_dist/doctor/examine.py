"""The doctor of one node, from its start to the verdict; the first node leads.

    meet        every node comes to the first one's hall, or is missing
    look        each looks at itself, while its workers import torch
    measure     the workers of all nodes at the same time
    judge       the first node, from what all have said

Each part ends at a share of the time that the whole may take; what is missing then is a finding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sft_dist.doctor.deadline import Overdue, within
from sft_dist.doctor.disks import token_in, tokens_seen
from sft_dist.doctor.finding import Verdict
from sft_dist.doctor.gpus import DriverState, DriverTrouble, driver_by_torch, driver_is_loaded, read_driver
from sft_dist.doctor.judge import Heard, judge
from sft_dist.doctor.look import look
from sft_dist.doctor.meeting import Clock, Connection, Hall, Lost, Silence
from sft_dist.doctor.place import Place
from sft_dist.doctor.wanted import Wanted
from sft_dist.doctor.workers import Workers
from sft_dist.errors import MachineError
from sft_dist.runtime.network import interface_of

SECONDS = 20.0

# Shares of the time by whose end a part is over.
MEET, LOOK, MEASURE = 0.4, 0.7, 0.92
# Until a new file of another node must be seen.
SEEN_S = 1.0
# Until the driver of the GPUs must have answered.
DRIVER_S = 5.0
# Beyond the end, until the verdict must have come.
VERDICT_S = 3.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """What is done, and for how long.

    Args:
        seconds: of all of it, at most.
        measure: speeds, too.
    """

    seconds: float = SECONDS
    measure: bool = True


def examine(
    place: Place, wanted: Wanted, *, effort: Effort, say: Say, clock: Clock = time.time
) -> tuple[int, Verdict | None]:
    """The exit code, on every node, and the verdict, on the first.

    Args:
        say: what goes on, in a few words.
        clock: this node's, seconds since 1970: what is compared with the others'.

    Raises:
        MachineError: the first node was not reached, or is gone.
    """
    started, began = datetime.now(UTC), time.monotonic()
    with ExitStack() as stack:
        # Before there are workers: they would be found on the GPUs.
        driver = _driver() if place.speaks else None
        num_workers = 0 if not (effort.measure and place.speaks) else max(1, _num_gpus(driver))
        workers = stack.enter_context(Workers(num_workers))
        hall = None
        if place.is_first:
            hall = Hall(place.meeting_name, size=place.size, ports=place.meeting_ports, clock=clock)
            stack.callback(hall.close, VERDICT_S)
        try:
            connection = _connect(place, hall, effort, clock)
            stack.callback(connection.leave)
            if not place.speaks:
                return int(connection.hear("verdict", effort.seconds + VERDICT_S)), None
            visit = _Visit(place, wanted, effort, driver, workers, connection, hall, began, say)
            heard = visit.run()
            if hall is None:
                return int(connection.hear("verdict", visit.left(1.0) + VERDICT_S)), None
            assert heard is not None
            verdict = judge(heard, wanted, started=started.isoformat(), seconds=time.monotonic() - began)
            connection.say("verdict", verdict.exit_code)
            return verdict.exit_code, verdict
        except Lost as error:
            raise MachineError(
                f"{place.name}: the first node, {place.first_hosts[0]}, was not reached or is gone: {error}",
                fix="see what its doctor says; else look at names, routes and firewalls between the two nodes",
            ) from None


def _connect(place: Place, hall: Hall | None, effort: Effort, clock: Clock) -> Connection:
    hosts, ports = place.first_hosts, place.meeting_ports
    if hall is not None:
        hosts, ports = ("127.0.0.1",), (hall.port,)
    # Those that only listen are not counted as nodes.
    node = place.index if place.speaks else -1
    return Connection(place.meeting_name, node, hosts=hosts, ports=ports, seconds=MEET * effort.seconds, clock=clock)


@dataclass
class _Visit:
    """One node among the others; ``hall`` on the first one only."""

    place: Place
    wanted: Wanted
    effort: Effort
    driver: DriverState | Overdue | DriverTrouble | None
    workers: Workers
    connection: Connection
    hall: Hall | None
    began: float
    say: Say

    def left(self, share: float) -> float:
        """Seconds until that share of the time is over."""
        return max(0.0, self.began + share * self.effort.seconds - time.monotonic())

    def run(self) -> Heard | None:
        """All parts but the last; on the first node, what it has heard."""
        roll = self._meet()
        with ExitStack() as stack:
            token = None
            if self.wanted.output_dir is not None and self.place.size > 1:
                token = stack.enter_context(token_in(self.wanted.output_dir))
            self._look(roll, token)
            group = self._group(roll)
            seen = self._tokens(group["tokens"])
            measured = self._measure(group)
            self.connection.say("measured", {"by_worker": measured, "tokens_seen": seen})
            if self.hall is None:
                self.connection.hear("all measured", self.left(1.0) + VERDICT_S)
                return None
            last = self.hall.collect("measured", self.left(1.0))
            self.connection.say("all measured", True)
        heard = {key: self.hall.collect(key, 0.0) for key in ("hello", "looked", "ready")}
        return Heard(
            nodes=roll["nodes"],
            came=tuple(roll["present"]),
            broke_off=frozenset(self.hall.broke_off),
            waited_s=roll["waited_s"],
            hello=heard["hello"],
            looked=heard["looked"],
            ready=heard["ready"],
            group=group,
            measured=last,
            output_dir=self.wanted.output_dir,
            measures=self.effort.measure,
        )

    def _meet(self) -> dict[str, Any]:
        hello: dict[str, Any] = {
            "name": self.place.name,
            "own_address": self.connection.own_address,
            "first_address": self.connection.first_address,
        }
        hello["offset_s"] = self.connection.clock_offset_s()
        self.connection.say("hello", hello)
        if self.hall is not None:
            if self.place.size > 1:
                self.say(f"waiting for {self.place.size} nodes")
            came = self.hall.collect("hello", self.left(MEET))
            names = [came[index]["name"] if index in came else self._name_of(index) for index in range(self.place.size)]
            waited = time.monotonic() - self.began
            self.connection.say("roll", {"nodes": names, "present": sorted(came), "waited_s": waited})
        roll: dict[str, Any] = self.connection.hear("roll", self.left(MEET) + VERDICT_S)
        if self.place.index not in roll["present"]:
            raise Lost("it came too late: the others have begun without it")
        return roll

    def _name_of(self, index: int) -> str:
        return self.place.hosts[index] if self.place.hosts else f"node {index}"

    def _look(self, roll: Mapping[str, Any], token: str | None) -> None:
        """Says what this node finds, and then what its workers are ready for."""
        if self.hall is not None:
            self.say("looking at disks, memory, versions")
        deadline = time.monotonic() + self.left(LOOK)
        if self.driver is None and driver_is_loaded() and self.workers.all:
            first = self.workers.ready(deadline)[0]
            if first is not None and first["devices"]:
                self.driver = driver_by_torch(first)
                self.workers.grow(first["devices"])
        found = look(self.place, self.wanted, self.driver, hosts=tuple(roll["nodes"]), deadline=deadline)
        self.connection.say("looked", found | {"token": token})
        facts = self.workers.ready(deadline)
        failures = [worker.failure() for worker, said in zip(self.workers.all, facts, strict=True) if said is None]
        on_gpus = _num_gpus(self.driver) > 0
        self.connection.say("ready", {"workers": facts, "failures": failures, "on_gpus": on_gpus})

    def _group(self, roll: Mapping[str, Any]) -> dict[str, Any]:
        """Who measures with whom: the nodes whose workers are all ready. Every node hears the same."""
        if self.hall is not None:
            ready = self.hall.collect("ready", self.left(LOOK) + 1)
            hello = self.hall.collect("hello", 0.0)
            fit = {node: said for node, said in ready.items() if said["workers"] and not said["failures"]}
            # GPUs and CPUs share no backend.
            kinds = [said["on_gpus"] for said in fit.values()]
            members = {node: len(said["workers"]) for node, said in fit.items() if said["on_gpus"] == (True in kinds)}
            self.connection.say(
                "group",
                {
                    "members": sorted(members),
                    "workers": [members[node] for node in sorted(members)],
                    "on_gpus": True in kinds,
                    "tokens": [said["token"] for said in self.hall.collect("looked", 0.0).values() if said["token"]],
                    "address": self._address_of(min(members, default=0), hello),
                },
            )
        group: dict[str, Any] = self.connection.hear("group", self.left(LOOK) + 1 + VERDICT_S)
        return group

    def _address_of(self, node: int, hello: Mapping[int, Any]) -> str:
        """Of a node, by which the others reach it."""
        others = [hello[index]["first_address"] for index in hello if index != 0]
        if node == 0:
            return others[0] if others else "127.0.0.1"
        return str(hello[node]["own_address"])

    def _tokens(self, written: Sequence[str]) -> list[str]:
        """Those of ``written`` that this node sees; a network file system may need a moment."""
        if self.wanted.output_dir is None:
            return []
        until = time.monotonic() + SEEN_S
        while len(seen := tokens_seen(self.wanted.output_dir, written)) < len(written) and time.monotonic() < until:
            time.sleep(SEEN_S / 10)
        return seen

    def _measure(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        members: list[int] = group["members"]
        if self.place.index not in members:
            return []
        if self.hall is not None:
            self.say(f"measuring {'GPUs' if group['on_gpus'] else 'cores'} and links")
        position = members.index(self.place.index)
        leaders = [sum(group["workers"][:number]) for number in range(len(members))]
        size, deadline = sum(group["workers"]), time.monotonic() + self.left(MEASURE)
        address = group["address"] if len(members) > 1 else "127.0.0.1"
        own = self._own_address(group, address)
        orders: dict[str, Any] = {
            "size": size,
            "leaders": leaders,
            "address": address,
            "interface": interface_of(own),
            "seconds": max(1.0, deadline - time.monotonic()),
        }
        port = 0
        for number, worker in enumerate(self.workers.all[: group["workers"][position]]):
            rank = leaders[position] + number
            if rank > 0 and port == 0:
                heard = self._port_of_store(members, deadline)
                if heard is None:
                    return self.workers.measured(time.monotonic())
                port = heard
            worker.order(orders | {"rank": rank, "port": port, "device": number if group["on_gpus"] else None})
            if rank == 0:
                store = worker.wait_for("store", deadline)
                self.connection.say("store", None if store is None else store["port"])
        return self.workers.measured(deadline)

    def _port_of_store(self, members: list[int], deadline: float) -> int | None:
        try:
            found = self.connection.hear("store", max(0.0, deadline - time.monotonic()), of=members[0])
        except Silence:
            return None
        return None if found is None else int(found)

    def _own_address(self, group: Mapping[str, Any], address: str) -> str:
        if len(group["members"]) == 1:
            return "127.0.0.1"
        return address if self.place.index == group["members"][0] else self.connection.own_address


def _driver() -> DriverState | Overdue | DriverTrouble | None:
    try:
        return within(DRIVER_S, read_driver)
    except (Overdue, DriverTrouble) as error:
        return error


def _num_gpus(driver: object) -> int:
    return len(driver.gpus) if isinstance(driver, DriverState) else 0
