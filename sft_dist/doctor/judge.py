"""What the first node makes of what all nodes have said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.doctor.disks import check_shared
from sft_dist.doctor.finding import Finding, Verdict
from sft_dist.doctor.gpus import DriverState, GpuState, check_torch
from sft_dist.doctor.names import check_clocks, check_names
from sft_dist.doctor.speeds import Pair, check_all_reduce, check_cores, check_gpu_products, check_pairs
from sft_dist.doctor.versions import check_versions
from sft_dist.doctor.wanted import Wanted

# Every worker is asked for these; GPUs and links only where there are some.
CORE, GPU, PAIRS, ALL_REDUCE, DONE = "core", "gpu", "pairs", "all_reduce", "done"


@dataclass(frozen=True)
class Heard:
    """What came to the first node, by the number of the node that said it.

    Args:
        nodes: names. came: numbers of those that were at the meeting. broke_off: of those that left it early.
        waited_s: for those that did not come.
        group: ``members``, numbers of the nodes that measured, and ``on_gpus``.
    """

    nodes: Sequence[str]
    came: Sequence[int]
    broke_off: frozenset[int]
    waited_s: float
    hello: Mapping[int, Any]
    looked: Mapping[int, Any]
    ready: Mapping[int, Any]
    group: Mapping[str, Any]
    measured: Mapping[int, Any]
    output_dir: Path | None
    measures: bool

    def by_name(self, said: Mapping[int, Any]) -> dict[str, Any]:
        return {self.nodes[node]: said[node] for node in sorted(said)}


def judge(heard: Heard, wanted: Wanted, *, started: str, seconds: float) -> Verdict:
    """The verdict on all nodes."""
    findings = [*_absent(heard)]
    for said in heard.looked.values():
        findings += [Finding(**finding) for finding in said["findings"]]
    findings += _compared(heard)
    if heard.measures:
        findings += [*_torch(heard), *_speeds(heard, wanted)]
    if wanted.nodes is not None and wanted.nodes > len(heard.nodes) > 1:
        what = f"{len(heard.nodes)} nodes, and hardware.nodes is {wanted.nodes}"
        findings.append(Finding("nodes", "", "warning", what, "plan again with hardware.nodes, or ask for as many"))
    return Verdict(tuple(heard.nodes), tuple(findings), started, seconds, _facts(heard))


def _absent(heard: Heard) -> Iterator[Finding]:
    """Nodes that did not come, or fell silent."""
    for node, name in enumerate(heard.nodes):
        if node not in heard.came:
            what = f"did not come to the meeting within {heard.waited_s:.0f} s"
            fix = "see what its own doctor says; is it up, does it reach the first node (names, routes, firewall)?"
            yield Finding("answers", name, "failed", what, fix)
        elif node in heard.broke_off or node not in heard.measured:
            when = "measuring" if node in heard.ready else "looking at itself"
            how = "its connection broke" if node in heard.broke_off else "it has not answered since"
            fix = "is the node up (sinfo, dmesg)? leave it out, or start again"
            yield Finding("answers", name, "failed", f"gone while {when}: {how}", fix)


def _compared(heard: Heard) -> Iterator[Finding]:
    """What has to be the same on all nodes."""
    order = heard.nodes
    facts = {name: said["facts"] for name, said in heard.by_name(heard.looked).items()}
    versions = {name: dict(found.get("versions", {})) for name, found in facts.items()}
    for name, said in heard.by_name(heard.ready).items():
        worker = next((facts for facts in said["workers"] if facts is not None), None)
        if worker is not None and worker["cuda"] is not None:
            versions[name] |= {"CUDA": worker["cuda"], "NCCL": worker["nccl"]}
    yield from check_versions({name: found for name, found in versions.items() if found}, order)
    if len(order) > 1:
        yield from check_names({name: found["names"] for name, found in facts.items() if "names" in found}, order)
    yield from check_clocks({name: hello["offset_s"] for name, hello in heard.by_name(heard.hello).items()}, order)
    if heard.output_dir is not None:
        tokens = {name: said["token"] for name, said in heard.by_name(heard.looked).items()}
        seen = {name: said["tokens_seen"] for name, said in heard.by_name(heard.measured).items()}
        yield from check_shared(tokens, seen, heard.output_dir, order)


def _torch(heard: Heard) -> Iterator[Finding]:
    """Whether torch can be imported, and goes with the driver."""
    for name, said in heard.by_name(heard.ready).items():
        for failure in dict.fromkeys(said["failures"]):
            if failure == "it does not answer":
                fix = "put the environment on a faster disk; speeds were not measured there"
                yield Finding("torch", name, "warning", "torch was not imported in time", fix)
            else:
                fix = 'python -c "import torch" there says more; install it again'
                yield Finding("torch", name, "failed", f"torch cannot be used: {failure}", fix)
        driver = _driver(heard.by_name(heard.looked)[name]["facts"].get("gpus"))
        worker = next((facts for facts in said["workers"] if facts is not None), None)
        if worker is not None:
            yield from check_torch(name, worker, driver)


def _driver(facts: Mapping[str, Any] | None) -> DriverState | None:
    if facts is None:
        return None
    gpus = tuple(GpuState(**(gpu | {"processes": tuple(gpu["processes"])})) for gpu in facts["gpus"])
    return DriverState(facts["version"], tuple(facts["cuda"]), gpus)


def _speeds(heard: Heard, wanted: Wanted) -> Iterator[Finding]:
    members = {
        heard.nodes[node]: heard.measured[node]["by_worker"]
        for node in heard.group["members"]
        if node in heard.measured
    }
    yield from _unfinished(heard, members)
    first = {name: workers[0] for name, workers in members.items() if workers}
    yield from check_cores({name: said[CORE]["windows"] for name, said in first.items() if CORE in said})
    products = {
        (name, said[GPU]["device"]): said[GPU]["flops_per_s"]
        for name, workers in members.items()
        for said in workers
        if GPU in said
    }
    gpu_names = _gpu_names(heard)
    yield from check_gpu_products(products, gpu_names)
    yield from check_pairs(_pairs(heard, first), network=wanted.network)
    reduced = {name: said[ALL_REDUCE] for name, said in first.items() if ALL_REDUCE in said}
    yield from check_all_reduce(
        reduced,
        gpu=next(iter(gpu_names.values()), ""),
        gpus_per_node=max((len(workers) for workers in members.values()), default=1),
        nodes=len(members),
        network=wanted.network,
    )


def _unfinished(heard: Heard, members: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Finding]:
    """Where the processes of several nodes could not work together, and no node that is gone is the reason."""
    stuck = [name for name, workers in members.items() if not workers or any(DONE not in said for said in workers)]
    if not stuck or heard.broke_off:
        return
    joined = all("joined" in said for workers in members.values() for said in workers)
    reasons = [said["failure"]["why"] for workers in members.values() for said in workers if "failure" in said]
    why = f": {reasons[0]}" if reasons else ""
    backend = "NCCL or gloo" if heard.group["on_gpus"] else "gloo"
    if joined:
        what = f"the processes met, but did not end what they were to measure{why}"
        yield Finding("processes", "", "warning", what, "see the links and nodes named beside this; try again")
        return
    what = f"the processes of {len(members)} nodes could not join over {backend}{why}"
    fix = (
        "open all ports between the nodes; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network that joins them"
    )
    yield Finding("processes", "", "failed", what, fix)


def _pairs(heard: Heard, first: Mapping[str, Mapping[str, Any]]) -> list[Pair]:
    members = heard.group["members"]
    found: dict[tuple[int, int], Pair] = {}
    for position, node in enumerate(members):
        for met in first.get(heard.nodes[node], {}).get(PAIRS, {"pairs": []})["pairs"]:
            if position < met["other"]:
                other = heard.nodes[members[met["other"]]]
                pair = Pair(heard.nodes[node], other, met["latency_s"], met["bytes_per_s"])
                before = found.get((position, met["other"]), pair)
                found[position, met["other"]] = max(before, pair, key=lambda each: each.bytes_per_s)
    return list(found.values())


def _gpu_names(heard: Heard) -> dict[str, str]:
    found = {}
    for name, said in heard.by_name(heard.looked).items():
        gpus = said["facts"].get("gpus")
        if gpus and gpus["gpus"]:
            found[name] = gpus["gpus"][0]["name"]
    return found


def _facts(heard: Heard) -> dict[str, dict[str, Any]]:
    """By node, for the JSON."""
    found: dict[str, dict[str, Any]] = {}
    for name, said in heard.by_name(heard.looked).items():
        found[name] = dict(said["facts"])
    for name, said in heard.by_name(heard.ready).items():
        found.setdefault(name, {})["torch"] = next((facts for facts in said["workers"] if facts is not None), None)
    for name, said in heard.by_name(heard.measured).items():
        kept = [{event: facts for event, facts in worker.items() if event != "ready"} for worker in said["by_worker"]]
        found.setdefault(name, {})["speeds"] = kept
    return found
