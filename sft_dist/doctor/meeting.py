"""Where the nodes meet: a small server on the first node, and every node's connection to it.

Lines of JSON over TCP, and no torch: a node on which torch cannot be imported is to be heard, too. Every wait has a
deadline; a node whose connection breaks is known at once, one that falls silent at the deadline.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from sft_dist.doctor.deadline import within
from sft_dist.errors import MachineError

Clock = Callable[[], float]

CONNECT_S, RETRY_S = 2.0, 0.2
# Beyond a deadline, until an answer must have come over the network.
GRACE_S = 2.0
# Exchanges of which the fastest tells the offset between two clocks best (RFC 5905, section 10: the clock filter).
CLOCK_EXCHANGES = 8


class Lost(Exception):
    """The first node no longer answers."""


class Silence(Lost):
    """A node has not said what it was to say."""


class Hall:
    """The first node's side: what every node has said, and who is still there.

    Args:
        name: of this meeting; who asks for another one is sent away.
        size: nodes that are to come.
        ports: the first free one is taken; empty: any, for this machine alone.
        clock: this node's, seconds since 1970.

    Raises:
        MachineError: none of the ports is free.
    """

    def __init__(self, name: str, *, size: int, ports: Sequence[int], clock: Clock = time.time) -> None:
        self.name, self.size, self.clock = name, size, clock
        self.said: dict[tuple[str, int], Any] = {}
        self.connections: dict[int, object] = {}
        self.left: set[int] = set()
        self.broke_off: set[int] = set()
        self.changed = threading.Condition()
        self._server = _listen(self, ports)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="meeting", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def collect(self, key: str, seconds: float) -> dict[int, Any]:
        """What the nodes have said under ``key``: waits for all that may still come, but not longer than that."""

        def is_complete() -> bool:
            return all(node in self.broke_off or (key, node) in self.said for node in range(self.size))

        with self.changed:
            self.changed.wait_for(is_complete, timeout=max(0.0, seconds))
            return {node: self.said[key, node] for node in range(self.size) if (key, node) in self.said}

    def get(self, key: str, node: int, seconds: float) -> list[Any]:
        """What one node has said, in a list; an empty list where nothing came."""
        with self.changed:
            self.changed.wait_for(lambda: (key, node) in self.said or node in self.broke_off, timeout=seconds)
            return [self.said[key, node]] if (key, node) in self.said else []

    def close(self, seconds: float) -> None:
        """Waits until the others have left, but not longer than that, and ends."""
        with self.changed:
            self.changed.wait_for(lambda: self.connections.keys() <= self.left | self.broke_off, timeout=seconds)
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], hall: Hall) -> None:
        super().__init__(address, _Visitor)
        self.hall = hall


class _Visitor(socketserver.StreamRequestHandler):
    """One connection: requests of a node, answered one by one."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        hall = self.server.hall
        with suppress(OSError, ValueError, KeyError, TypeError):  # a broken connection, or somebody else's request
            hello = json.loads(self.rfile.readline())
            if hello["meeting"] != hall.name:
                self._answer({"refused": f"here {hall.name} meet"})
                return
            self._serve(hall, int(hello["node"]))

    def _serve(self, hall: Hall, node: int) -> None:
        with hall.changed:
            # The newest counts: an attempt to connect that its node has given up may arrive late.
            hall.connections[node] = self
            hall.broke_off.discard(node)
        self._answer({"welcome": True})
        try:
            while line := self.rfile.readline():
                request = json.loads(line)
                if request["op"] == "leave":
                    with hall.changed:
                        hall.left.add(node)
                        hall.changed.notify_all()
                    return
                self._answer(_reply(hall, node, request))
        finally:
            with hall.changed:
                if node not in hall.left and hall.connections[node] is self:
                    hall.broke_off.add(node)
                hall.changed.notify_all()

    def _answer(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _reply(hall: Hall, node: int, request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] == "time":
        return {"time": hall.clock()}
    if request["op"] == "say":
        with hall.changed:
            hall.said[request["key"], node] = request["value"]
            hall.changed.notify_all()
        return {}
    return {"said": hall.get(request["key"], int(request["of"]), float(request["seconds"]))}


def _listen(hall: Hall, ports: Sequence[int]) -> _Server:
    if not ports:
        return _Server(("127.0.0.1", 0), hall)
    for port in ports:
        with suppress(OSError):
            return _Server(("", port), hall)
    listed = ", ".join(map(str, ports))
    raise MachineError(
        f"{socket.gethostname()}: none of the ports {listed} is free for the nodes to meet at",
        fix="see what listens there: ss -ltnp; or start the job again, another one has other ports",
    )


class Connection:
    """One node's side.

    Args:
        hosts, ports: every pair of them is tried, over and over.
        seconds: to reach the first node.

    Raises:
        Lost: it was not reached.
    """

    def __init__(
        self, name: str, node: int, *, hosts: Sequence[str], ports: Sequence[int], seconds: float, clock: Clock
    ) -> None:
        self.node, self.clock = node, clock
        self._socket = _reach(name, node, hosts, ports, time.monotonic() + seconds)
        self._lines = self._socket.makefile("rb")

    @property
    def own_address(self) -> str:
        """Of this node, on the way to the first one."""
        return str(self._socket.getsockname()[0])

    @property
    def first_address(self) -> str:
        """Of the first node, as it was reached from here."""
        return str(self._socket.getpeername()[0])

    def say(self, key: str, value: Any) -> None:
        self._ask({"op": "say", "key": key, "value": value}, 0.0)

    def hear(self, key: str, seconds: float, *, of: int = 0) -> Any:
        """What a node has said.

        Raises:
            Silence: nothing in that time, or that node is gone.
            Lost: the first node does not answer.
        """
        said = self._ask({"op": "hear", "key": key, "of": of, "seconds": seconds}, seconds)["said"]
        if not said:
            raise Silence(f"no word within {seconds:.0f} s")
        return said[0]

    def clock_offset_s(self) -> float:
        """Seconds that the first node's clock is ahead of this one's."""
        best = (float("inf"), 0.0)
        for _ in range(CLOCK_EXCHANGES):
            sent, started = self.clock(), time.monotonic()
            there = self._ask({"op": "time"}, 0.0)["time"]
            took = time.monotonic() - started
            best = min(best, (took, there - sent - took / 2))
        return best[1]

    def leave(self) -> None:
        with suppress(OSError):
            self._socket.sendall(b'{"op": "leave"}\n')
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        try:
            self._socket.settimeout(seconds + GRACE_S)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._lines.readline())
        except (OSError, ValueError) as error:
            raise Lost(str(error) or type(error).__name__) from None
        return answer


def _reach(name: str, node: int, hosts: Sequence[str], ports: Sequence[int], deadline: float) -> socket.socket:
    why = "it was not tried"
    hello = json.dumps({"meeting": name, "node": node}).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        for host in hosts:
            for port in ports:
                try:
                    return within(min(CONNECT_S, left), lambda host=host, port=port: _greet(host, port, hello))  # type: ignore[misc]
                except Exception as error:
                    why = f"{host}: {error}"
        time.sleep(RETRY_S)
    raise Lost(why)


def _greet(host: str, port: int, hello: bytes) -> socket.socket:
    made = socket.create_connection((host, port), timeout=CONNECT_S)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.sendall(hello)
        line = b""
        while not line.endswith(b"\n"):
            byte = made.recv(1)  # no more than the line: the rest belongs to who reads the answers
            if not byte:
                break
            line += byte
        answer = json.loads(line)
        if "welcome" not in answer:
            raise OSError(str(answer))
    except BaseException:
        made.close()
        raise
    return made
