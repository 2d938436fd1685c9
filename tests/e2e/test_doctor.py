"""``sft-dist doctor`` on machines with planted faults: real processes in namespaces of their own, one for each node.

What is planted is real (a mount, a limit, a listener, a file, a load), but for the clock: Linux has no namespace for the
time of day, and setting it would set it for everybody. There one node's doctor is given a clock that is ahead.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist.doctor.place import find_place
from tests.helpers.nodes import ROOT, Ended, Node, Nodes, ended, nodes

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip")),
    reason="needs root, unshare, nsenter and ip for nodes of its own",
)

DOCTOR = ("-m", "sft_dist", "doctor")

Key = tuple[str, str, str]


@dataclass
class Site:
    """A run that is to be, and the nodes for it.

    Args:
        patience_s: that a doctor may take on this machine, which may be busy.
        env, before: of each node's doctor: variables, and Python to run before it.
    """

    nodes: Nodes
    folder: Path
    patience_s: float
    env: dict[str, dict[str, str]] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def output_dir(self) -> Path:
        return self.folder / "runs" / "mine"

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes.all if node.name == name)

    def write_config(self, **sections: Any) -> None:
        (self.folder / "rows.jsonl").write_text("{}")
        content = {
            "model": {"path": str(self.folder)},
            "data": {"train": [{"path": str(self.folder / "rows.jsonl")}]},
            "train": {"global_batch_size": 1, "max_steps": 1},
            "output_dir": str(self.output_dir),
            **sections,
        }
        self.config.write_text(yaml.safe_dump(content))

    def start(self, node: Node, *options: str) -> subprocess.Popen[str]:
        arguments = ["doctor", str(self.config), "--seconds", f"{self.patience_s:.0f}", *options]
        code = f"{self.before.get(node.name, '')}\nfrom sft_dist.cli import main\nmain({arguments!r})"
        return self.nodes.start(node, ["-c", code], env=self.env.get(node.name))

    def doctor(self, *options: str, without: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, Ended]]:
        """What the first node wrote down, and how the doctor of each node ended."""
        file = self.folder / "doctor.json"
        asked = [node for node in self.nodes.all if node.name not in without]
        processes = [self.start(node, "--json", str(file), *options) for node in asked]
        found = dict(zip([node.name for node in asked], ended(processes, within_s=3 * self.patience_s), strict=True))
        assert file.exists(), found
        return json.loads(file.read_text()), found


DISKS = ("output_dir", "data cache", "TMPDIR", "hub cache")


def wrong(verdict: Mapping[str, Any]) -> set[Key]:
    return {(f["node"], f["check"], f["level"]) for f in verdict["findings"] if f["level"] != "ok"}


def finding(verdict: Mapping[str, Any], check: str) -> dict[str, Any]:
    found: dict[str, Any] = next(f for f in verdict["findings"] if f["check"] == check)
    return found


@pytest.fixture(scope="module")
def patience_s() -> float:
    """Twenty times what one of these processes takes to start here now, on several cores at once."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import sft_dist.cli.app"], cwd=ROOT, check=True)
    return max(20.0, 20 * (time.monotonic() - started))


@pytest.fixture
def site(tmp_path: Path, patience_s: float) -> Iterator[Callable[[int], Site]]:
    """``site(n)``: n healthy nodes with a run directory that they share."""
    with ExitStack() as stack:

        def make(count: int) -> Site:
            made = Site(stack.enter_context(nodes(tmp_path, count)), tmp_path, patience_s)
            made.output_dir.mkdir(parents=True)
            (tmp_path / "tmp").mkdir()
            made.write_config()
            return made

        yield make


def left_behind(site: Site) -> list[str]:
    """Files in the run directory, and the doctor's processes that still run."""
    mine = {os.readlink(f"/proc/{node.holder.pid}/ns/net") for node in site.nodes.all}
    running = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                space, command = os.readlink(entry / "ns/net"), (entry / "cmdline").read_text()
            except OSError:
                continue
            if space in mine and not command.startswith("sleep"):
                running.append(command)
    return [*map(str, site.output_dir.iterdir()), *running]


@contextmanager
def listener(site: Site, node: Node, port: int) -> Iterator[None]:
    """A program that listens on a port of a node."""
    code = f"import socket; s = socket.create_server(('', {port})); print('listens', flush=True); s.accept()"
    process = site.nodes.start(node, ["-c", code])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        yield
    finally:
        process.kill()
        process.communicate()


def training_port(site: Site) -> int:
    port = find_place(site.nodes.environment(site.nodes.all[0])).training_port
    assert port is not None
    return port


# One fault each: planted on a node, found there under this name.


def other_version(site: Site, node: Node) -> Key:
    package = site.folder / "other" / "peft-0.99.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.99.0\n")
    site.env.setdefault(node.name, {})["PYTHONPATH"] = str(package.parent)
    return node.name, "versions", "failed"


def full_disk(site: Site, node: Node) -> Key:
    folder = site.folder / "tmp"
    node.run(f"mount -t tmpfs -o size=8m tmpfs {folder}; dd if=/dev/zero of={folder}/filler bs=1M || true")
    site.env.setdefault(node.name, {})["TMPDIR"] = str(folder)
    return node.name, "TMPDIR", "failed"


def read_only_output(site: Site, node: Node) -> Key:
    node.run(f"mount --bind {site.output_dir} {site.output_dir}; mount -o remount,bind,ro {site.output_dir}")
    return node.name, "output_dir", "failed"


def private_output(site: Site, node: Node) -> Key:
    node.run(f"mount -t tmpfs -o size=64g tmpfs {site.output_dir}")
    return node.name, "shared folder", "failed"


def unknown_host(site: Site, node: Node) -> Key:
    node.run(
        "sed -i /n1/d /etc/hosts 2>/dev/null || { grep -v n1 /etc/hosts > /tmp/h.$$; cat /tmp/h.$$ > /etc/hosts; rm /tmp/h.$$; }"
    )
    return node.name, "host names", "failed"


def tiny_shared_memory(site: Site, node: Node) -> Key:
    node.run("mount -t tmpfs -o size=1m tmpfs /dev/shm")
    return node.name, "/dev/shm", "failed"


def low_ulimit(site: Site, node: Node) -> Key:
    node.prefix = ["prlimit", "--nofile=80:80"]
    return node.name, "open files", "failed"


def little_memory(site: Site, node: Node) -> Key:
    site.env.setdefault(node.name, {})["SLURM_MEM_PER_NODE"] = "200"
    return node.name, "memory", "failed"


def fast_clock(site: Site, node: Node) -> Key:
    site.before[node.name] = (
        "import sft_dist.doctor.command as command, time\n"
        "command.doctor.__kwdefaults__['clock'] = lambda: time.time() + 40"
    )
    return node.name, "clock", "failed"


FIXES = {
    "versions": "install peft",
    "TMPDIR": "remove what is no longer needed there, or set TMPDIR",
    "output_dir": "mount it for writing on this node",
    "shared folder": "file system that all nodes mount",
    "host names": "/etc/hosts",
    "/dev/shm": "remount,size=",
    "open files": "ulimit -n",
    "memory": "cluster.memory_gib",
    "clock": "chronyd",
    "port": "ss -ltnp",
}

PLANTS = (
    other_version, full_disk, read_only_output, private_output, unknown_host, tiny_shared_memory, low_ulimit,
    little_memory, fast_clock,
)  # fmt: skip


def test_ten_faults_at_once_are_told_apart(site: Callable[[int], Site]) -> None:
    here = site(3)
    one, two, three = here.nodes.all
    planted = {
        other_version(here, three),
        full_disk(here, two),
        read_only_output(here, one),
        private_output(here, three),
        unknown_host(here, two),
        tiny_shared_memory(here, two),
        low_ulimit(here, three),
        little_memory(here, two),
        fast_clock(here, three),
        ("n1", "port", "failed"),
    }
    with listener(here, one, training_port(here)):
        verdict, found = here.doctor("--no-speed")
    assert wrong(verdict) == planted
    assert verdict["failed_nodes"] == ["n1", "n2", "n3"]
    assert verdict["verdict"] == "failed"
    for fault in verdict["findings"]:
        assert fault["level"] == "ok" or FIXES[fault["check"]] in fault["fix"], fault
    assert [each.code for each in found.values()] == [7, 7, 7]
    # Told once, and whole in a log: failures first, each with its fix below.
    assert found["n2"].out == found["n3"].out == ""
    lines = found["n1"].out.splitlines()
    assert max(map(len, lines)) <= 110
    assert [line.split()[0] for line in lines if line.startswith(("failed", "ok"))][:10] == ["failed"] * 10
    assert sum("fix: " in line for line in lines) == 10
    assert "10 failed; at fault: n1, n2, n3" in lines[-1]
    assert found["n1"].err.splitlines()[-2].startswith("error: training would fail: ")
    assert left_behind(here) == []


@pytest.mark.ci
@pytest.mark.parametrize("plant", PLANTS)
def test_each_fault_alone(site: Callable[[int], Site], plant: Callable[[Site, Node], Key]) -> None:
    here = site(2)
    expected = plant(here, here.nodes.all[1])
    verdict, found = here.doctor("--no-speed")
    assert wrong(verdict) == {expected}
    assert verdict["failed_nodes"] == ["n2"]
    assert [each.code for each in found.values()] == [7, 7]


def test_what_all_nodes_have_is_no_nodes_fault(site: Callable[[int], Site]) -> None:
    here = site(2)
    here.write_config(hardware={"gpu": "h100", "gpus_per_node": 2, "nodes": 2})
    for node in here.nodes.all:
        read_only_output(here, node)
    verdict, found = here.doctor("--no-speed")
    assert wrong(verdict) == {(n, check, "failed") for n in ("n1", "n2") for check in ("GPUs", "output_dir")}
    assert verdict["failed_nodes"] == []
    assert "0 of 2 GPUs" in finding(verdict, "GPUs")["what"]
    assert [each.code for each in found.values()] == [7, 7]


@pytest.mark.ci
def test_a_node_that_does_not_come(site: Callable[[int], Site]) -> None:
    here = site(3)
    here.patience_s = here.patience_s / 4  # of which it waits for 0.4
    verdict, found = here.doctor("--no-speed", without=("n3",))
    assert wrong(verdict) == {("n3", "answers", "failed")}
    assert "did not come" in finding(verdict, "answers")["what"]
    assert verdict["failed_nodes"] == ["n3"]
    assert [each.code for each in found.values()] == [7, 7]


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.ci)])
def test_a_node_that_dies_or_hangs_in_the_middle(site: Callable[[int], Site], how: str) -> None:
    here = site(2)
    here.patience_s = here.patience_s / 2
    here.before["n2"] = (
        "import os, signal\nimport sft_dist.doctor.examine as examine\n"
        f"examine.look = lambda *a, **k: os.kill(os.getpid(), signal.{how})"
    )
    file = here.folder / "doctor.json"
    processes = [here.start(node, "--no-speed", "--json", str(file)) for node in here.nodes.all]
    try:
        (first,) = ended(processes[:1], within_s=2 * here.patience_s)
    finally:
        ended([_killed(processes[1])], within_s=10)
    verdict = json.loads(file.read_text())
    assert wrong(verdict) == {("n2", "answers", "failed")}
    assert ("connection broke" if how == "SIGKILL" else "not answered") in finding(verdict, "answers")["what"]
    assert verdict["failed_nodes"] == ["n2"]
    assert first.code == 7
    if how == "SIGKILL":
        assert first.seconds < 0.7 * here.patience_s, "it waited for a node that is known to be gone"


def _killed(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    process.kill()
    return process


@pytest.mark.ci
def test_without_the_first_node(site: Callable[[int], Site]) -> None:
    here = site(2)
    here.patience_s = 10
    (other,) = ended([here.start(here.nodes.all[1], "--no-speed")], within_s=60)
    assert other.code == 7
    assert "error: n2: the first node, n1, was not reached" in other.err
    assert other.seconds < 5 + here.patience_s


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.ci)])
def test_interrupted_it_leaves_nothing_behind(site: Callable[[int], Site], number: signal.Signals) -> None:
    here = site(2)
    for name in ("n1", "n2"):  # a file system that does not answer
        here.before[name] = (
            "import sft_dist.doctor.examine as examine, time\nexamine.look = lambda *a, **k: time.sleep(60)"
        )
    processes = [here.start(node) for node in here.nodes.all]
    try:
        deadline = time.monotonic() + here.patience_s
        while len(list(here.output_dir.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(left_behind(here)) == 6  # a token, a doctor and its worker each
        for process in processes:
            process.send_signal(number)
    finally:
        found = ended(processes, within_s=here.patience_s)
    assert [each.code for each in found] == [143 if number == signal.SIGTERM else 130] * 2
    deadline = time.monotonic() + 10
    while left_behind(here):
        assert time.monotonic() < deadline, left_behind(here)
        time.sleep(0.05)


def test_into_the_notes_of_a_job_and_on_one_machine(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {
        "SFT_DIST_JOB_NOTES": str(tmp_path / "7-0")
    }
    done = subprocess.run([sys.executable, *DOCTOR, "--no-speed"], cwd=ROOT, env=env, capture_output=True, text=True)
    verdict = json.loads((tmp_path / "7-0" / "doctor.json").read_text())
    assert (done.returncode, verdict["exit_code"], verdict["failed_nodes"]) == (0, 0, [])
    assert verdict["nodes"] == [os.uname().nodename]


@contextmanager
def cpu_quota(node: Node, share: float) -> Iterator[None]:
    """The node's processes together get this share of one core."""
    group = Path("/sys/fs/cgroup/cpu") / f"doctor-test-{os.getpid()}"
    if not group.parent.is_dir():
        pytest.skip("needs the cpu controller of cgroup v1 at /sys/fs/cgroup/cpu")
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text(str(int(share * 100000)))
        node.prefix = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        yield
    finally:
        deadline = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.rmdir()


@pytest.mark.full  # what a node has of a core is measured against cores that other tests leave alone
def test_speeds_name_the_node_with_a_quota(site: Callable[[int], Site]) -> None:
    here = site(3)
    with cpu_quota(here.node("n2"), 0.2):
        here.patience_s *= 3
        verdict, _ = here.doctor()
    straggler = finding(verdict, "straggler")
    assert (straggler["node"], straggler["level"]) == ("n2", "failed"), verdict
    assert straggler["value"] > 3
    assert "of a core" in straggler["what"]
    assert "CPU limit" in straggler["fix"]
    assert verdict["failed_nodes"] == ["n2"]


# Beside other tests a node may really get a third of a core, which is an alarm: many runs only where it has them alone.
@pytest.mark.parametrize(
    ("load", "runs"),
    [pytest.param(0, 1, marks=pytest.mark.ci), *(pytest.param(n, 3, marks=pytest.mark.full) for n in (0, 4))],
)
def test_healthy_nodes_get_no_alarm(site: Callable[[int], Site], load: int, runs: int) -> None:
    here = site(2)
    here.patience_s *= 5  # torch is imported twice on cores that are busy
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
    try:
        for _ in range(runs):
            verdict, found = here.doctor()
            # Other tests may write to the same disk meanwhile, and a slow disk is told.
            disks = {key for key in wrong(verdict) if key[1] in DISKS and key[2] == "warning"}
            assert wrong(verdict) - disks == set()
            assert verdict["failed_nodes"] == []
            assert [each.code for each in found.values()] == [0, 0]
            assert verdict["facts"]["n2"]["speeds"][0]["all_reduce"]["bytes_per_s"] > 0
            level = "warning" if disks else "ok"
            assert found["n1"].out.splitlines()[-1].startswith(f"verdict: {level}  2 nodes")
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert left_behind(here) == []


@pytest.mark.ci
def test_a_node_whose_torch_cannot_be_imported(site: Callable[[int], Site]) -> None:
    here = site(2)
    here.patience_s *= 5
    package = here.folder / "broken" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    here.env["n2"] = {"PYTHONPATH": str(package.parent)}
    verdict, _ = here.doctor()
    assert wrong(verdict) == {("n2", "torch", "failed")}
    assert "libcudart.so.13" in finding(verdict, "torch")["what"]
    assert verdict["failed_nodes"] == ["n2"]
    assert finding(verdict, "straggler")["level"] == "ok", "the others measure without it"


@pytest.mark.ci
def test_a_memory_limit_of_the_nodes_control_group(site: Callable[[int], Site]) -> None:
    here = site(2)
    group = Path("/sys/fs/cgroup/memory") / f"doctor-test-{os.getpid()}"
    if not group.parent.is_dir():
        pytest.skip("needs the memory controller of cgroup v1 at /sys/fs/cgroup/memory")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(400 * 2**20))
        here.node("n2").prefix = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        verdict, _ = here.doctor("--no-speed")
    finally:
        group.rmdir()
    assert wrong(verdict) == {("n2", "memory", "failed")}
    assert f"limit of the control group {group}" in finding(verdict, "memory")["what"]


@pytest.mark.ci
def test_several_processes_a_node_and_a_slow_cable(site: Callable[[int], Site]) -> None:
    """As with two GPUs a node; the third node's cable carries 40 Mbit/s."""
    here = site(3)
    here.patience_s *= 6
    here.node("n3").run("tc qdisc add dev eth0 root tbf rate 40mbit burst 64kb latency 200ms")
    for name in ("n1", "n2", "n3"):
        here.before[name] = (
            "import sft_dist.doctor.examine as examine\nWorkers = examine.Workers\n"
            "examine.Workers = lambda count: Workers(2)"
        )
    verdict, _ = here.doctor()
    speeds = {name: facts["speeds"] for name, facts in verdict["facts"].items()}
    assert [len(each) for each in speeds.values()] == [2, 2, 2]
    assert all("all_reduce" in worker for each in speeds.values() for worker in each)
    slow = finding(verdict, "slow link")
    assert (slow["node"], slow["level"]) == ("n3", "failed"), verdict["findings"]
    assert 1 < slow["value"] < 10
    assert verdict["failed_nodes"] == ["n3"]
