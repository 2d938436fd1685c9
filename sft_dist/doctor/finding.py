"""What a check found, and what all of them come to.

``doctor.json`` (``SCHEMA`` 1) is one object:

    schema          1; higher when a field changes its meaning
    verdict         "ok", "warning" or "failed": the worst level of all findings
    exit_code       0, or 7 where the verdict is "failed"
    failed_nodes    names of the nodes that are themselves at fault, in the order of the nodes: those to leave out
                    of the next attempt. Empty where a fault is of all nodes, such as a full disk that they share
    nodes           names of all nodes, in their order; those that did not answer, too
    findings        [{check, node, level, what, fix, value}], worst first. node is "" where a finding is of all nodes;
                    value is a number or a text, null where there is none; its unit stands in ``what``
    facts           {node: {...}}: versions, devices and figures measured; fields may come and go
    started         ISO 8601, UTC
    seconds         that it took
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from sft_dist.errors import MachineError

SCHEMA = 1

Level = Literal["ok", "warning", "failed"]
WORST_FIRST: tuple[Level, ...] = ("failed", "warning", "ok")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        check: what was looked at, one or two words; the same on every node.
        node: its name; empty where it is of all nodes.
        what: one line.
        fix: one line; empty where nothing is wrong.
        value: the figure that decided, in the unit that ``what`` names.
        is_shared: whether what is wrong lies in something that nodes share: no node is to blame then, if all have it.
    """

    check: str
    node: str
    level: Level
    what: str
    fix: str = ""
    value: float | str | None = None
    is_shared: bool = False


@dataclass(frozen=True)
class Verdict:
    """What all findings come to.

    Args:
        nodes: names, in order.
        facts: by node; for the JSON alone.
    """

    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]
    started: str
    seconds: float
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        return next((level for level in WORST_FIRST if any(f.level == level for f in self.findings)), "ok")

    @property
    def exit_code(self) -> int:
        return MachineError.exit_code if self.level == "failed" else 0

    @property
    def failed_nodes(self) -> tuple[str, ...]:
        return blamed(self.findings, self.nodes)

    def to_json(self) -> dict[str, Any]:
        """The document that the module describes."""
        fields = ("check", "node", "level", "what", "fix", "value")
        return {
            "schema": SCHEMA,
            "verdict": self.level,
            "exit_code": self.exit_code,
            "failed_nodes": list(self.failed_nodes),
            "nodes": list(self.nodes),
            "findings": [{k: v for k, v in asdict(f).items() if k in fields} for f in worst_first(self.findings)],
            "facts": {name: dict(facts) for name, facts in self.facts.items()},
            "started": self.started,
            "seconds": round(self.seconds, 2),
        }


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: WORST_FIRST.index(finding.level))


def blamed(findings: Iterable[Finding], nodes: Sequence[str]) -> tuple[str, ...]:
    """The nodes that fail a check which others pass; alone, a node is blamed for what is its own."""
    failed: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.level == "failed" and finding.node:
            failed.setdefault(finding.check, []).append(finding)
    at_fault: set[str] = set()
    for found in failed.values():
        names = {finding.node for finding in found}
        on_all = names == set(nodes)
        if not on_all or (len(nodes) == 1 and not all(finding.is_shared for finding in found)):
            at_fault |= names
    return tuple(name for name in nodes if name in at_fault)


def odd_ones(values: Mapping[str, Value], order: Sequence[str]) -> tuple[Value, list[str]]:
    """What most nodes have, and the nodes that have something else; where it is a tie, the first node is right.

    Args:
        values: by node, at least one.
        order: of the nodes.
    """
    present = [name for name in order if name in values]
    counts = Counter(repr(values[name]) for name in present)
    usual = values[max(present, key=lambda name: (counts[repr(values[name])], -present.index(name)))]
    return usual, [name for name in present if values[name] != usual]
