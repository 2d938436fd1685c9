"""Ways between machines: addresses, the interface that leads to a machine, ports. Imports no torch."""

from __future__ import annotations

import socket
import time

import psutil

from sft_dist.errors import MachineError

CONNECT_S = 2.0  # for one attempt
POLL_S = 0.2


def own_address_towards(host: str, port: int = 1) -> str:
    """This machine's own address on the way to ``host``; sends nothing.

    Raises:
        OSError: the name has no address, or no way leads there.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: chooses the way
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The name of this machine's network interface that has ``address``.

    Raises:
        MachineError: none has.
    """
    wanted = address.partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == wanted for each in addresses):
            return str(name)
    raise MachineError(
        f"no network interface of {socket.gethostname()} has the address {address}",
        fix="set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface to be used",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a server can listen on ``port`` of this machine now."""
    with socket.socket() as probe:
        # As servers do: connections that have ended do not keep a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def answers(host: str, port: int, *, within_s: float) -> bool:
    """Whether something listens there before the time is over."""
    deadline = time.monotonic() + within_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(CONNECT_S, left)):
                return True
        except OSError:
            time.sleep(POLL_S)
    return False
