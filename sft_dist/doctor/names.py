"""Names, addresses, ports and clocks: what nodes need to find and to understand each other."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

from sft_dist.doctor.deadline import Overdue, all_within
from sft_dist.doctor.finding import Finding, odd_ones
from sft_dist.runtime.network import is_free

RESOLVE_S = 4.0

# Torchrun's nodes write the time of their heartbeat, and take one for dead whose last is older than three intervals of
# 5 s (torch.distributed.elastic.rendezvous.dynamic_rendezvous). Files of other nodes look as if from the future long
# before.
BAD_SKEW_S, ODD_SKEW_S = 10.0, 1.0


def resolve(hosts: Sequence[str], *, seconds: float = RESOLVE_S) -> dict[str, list[str] | str]:
    """Addresses of each host as this node sees it, or in a text why there are none."""
    asked = {host: lambda host=host: _addresses(host) for host in hosts}
    answers = all_within(seconds, asked)
    return {host: _why(answer) if isinstance(answer, Exception) else answer for host, answer in answers.items()}


def _addresses(host: str) -> list[str]:
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})


def _why(error: Exception) -> str:
    if isinstance(error, Overdue):
        return f"the name server gave {error}"
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)


def check_names(answers: Mapping[str, Mapping[str, list[str] | str]], order: Sequence[str]) -> list[Finding]:
    """Whether every node knows every other.

    Args:
        answers: by node, what ``resolve`` gave there.
    """
    found = []
    unknown: dict[str, list[str]] = {}
    for node in order:
        for host, answer in answers.get(node, {}).items():
            if isinstance(answer, str):
                unknown.setdefault(host, []).append(node)
            elif host != node and _is_loopback(answer):  # its own name may: the launchers know
                what = f"{host} is {', '.join(answer)} here, which is this machine itself"
                fix = f"mend {host} in /etc/hosts of {node}"
                found.append(Finding("host names", node, "failed", what, fix, host))
    for host, askers in unknown.items():
        # One that hardly anybody knows is wrong itself; else those are that do not know it.
        why = answers[askers[0]][host]
        everywhere = len(askers) == len(answers) and len(answers) > 1
        for node in [host] if everywhere else askers:
            who = "no node knows its name" if everywhere else f"{host} is not known here"
            fix = f"add {host} to the name server, or to /etc/hosts of every node"
            found.append(Finding("host names", node, "failed", f"{who}: {why}", fix, host))
    return found or [Finding("host names", "", "ok", "every node knows every other by name")]


def _is_loopback(addresses: Sequence[str]) -> bool:
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def check_port(node: str, port: int | None) -> list[Finding]:
    """Whether training can listen on its port; on the first node."""
    if port is None:
        return []
    if is_free(port):
        return [Finding("port", node, "ok", f"{port} is free", value=port)]
    fix = f"end what listens there (ss -ltnp 'sport = :{port}'), or give the launcher another port"
    return [
        Finding("port", node, "failed", f"{port}, which training is to use, is taken by another program", fix, port)
    ]


def check_clocks(offsets: Mapping[str, float], order: Sequence[str]) -> list[Finding]:
    """Whether the nodes agree on the time.

    Args:
        offsets: by node, seconds that the first node's clock is ahead of it.
    """
    if len(offsets) < 2:
        return []
    # Most nodes are right: to the second, so that they can be counted.
    usual, _ = odd_ones({name: round(offset / ODD_SKEW_S) for name, offset in offsets.items()}, order)
    right = [offset for offset in offsets.values() if round(offset / ODD_SKEW_S) == usual]
    middle = sorted(right)[len(right) // 2]
    found = []
    for name in order:
        skew = middle - offsets.get(name, middle)
        if abs(skew) > ODD_SKEW_S:
            what = f"its clock is {abs(skew):,.1f} s {'ahead of' if skew > 0 else 'behind'} the others'"
            level, fix = ("failed", _NTP) if abs(skew) > BAD_SKEW_S else ("warning", _NTP)
            found.append(Finding("clock", name, level, what, fix, round(skew, 3)))  # type: ignore[arg-type]
    most = max(offsets.values()) - min(offsets.values())
    return found or [Finding("clock", "", "ok", f"the nodes agree to {most * 1000:.2f} ms", value=round(most, 6))]


_NTP = "start a time service on it (chronyd or systemd-timesyncd); torchrun takes such a node for dead"
