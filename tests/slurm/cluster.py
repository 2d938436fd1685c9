"""A SLURM cluster on one machine: each node has its own host name, address, processes and /dev/shm.

A node is a set of Linux namespaces that hang on one process, its init, and a cable to a bridge. Ending that process
ends everything on the node at once, as if its power were cut. The controller, munged and the commands run outside. All
nodes see the same files, as on a cluster with a shared file system. GPUs are files that stand for devices.

All that is started ends with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sft_dist.cluster.slurm import ENDED, parse_record

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "setpriv", "ip")
NODE_PORT = 6818
# What a node claims to have; only what a job asks for is compared with it.
CPUS, MEMORY_MIB, GPUS = 64, 1_000_000, 8
GRACE_S = 20
CREDENTIAL_S = 8
"""A job that was requeued waits for this long, so that nothing of its last start is still believed."""

# As SIGCHLD is ignored, the kernel itself removes processes that lost their parent.
INIT = """
hostname "$1" && mount -t tmpfs tmpfs /dev/shm && mount --bind "$2" /etc/hosts && ip link set lo up || exit 1
trap '' CHLD HUP INT
exec sleep infinity
"""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={controller}({network}.254)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MessageTimeout=5
MinJobAge=3600
InactiveLimit=0
GresTypes=gpu
"""

PARTITIONS = f"""\
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 GraceTime={GRACE_S}
PartitionName=high Nodes=ALL DefaultTime=10 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be brought up here; None where one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if os.geteuid() != 0:
        return "namespaces need root"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "--net", "--ipc", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Use as a context; what ``submit`` gives to jobs can be changed in ``job_environment``.

    Args:
        nodes: how many; they are called n1, n2, ...
        job_environment: variables that jobs find beside SLURM's own.
    """

    def __init__(self, nodes: int = 3, *, job_environment: dict[str, str]) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.job_environment = job_environment
        self._network, self._bridge = _free_network()
        self._folder = Path(tempfile.mkdtemp(prefix="sft-dist-slurm-"))
        self.configuration = self._folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._inits: dict[str, tuple[subprocess.Popen[bytes], int]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """For SLURM's commands on this machine, and what jobs inherit."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "PYTEST_"))}
        return kept | self.job_environment | {"SLURM_CONF": str(self.configuration)}

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._begin()
        except BaseException as error:
            error.add_note(self.logs())
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # --- jobs

    def submit(self, script: str | Path, *options: str, arguments: Sequence[str] = ()) -> str:
        """Gives SLURM a script, as a file or as text that begins with #!, and returns the job's id."""
        text, file = (script, []) if isinstance(script, str) else (None, [str(script)])
        # Of sbatch's options the last one counts, and those of the command line before those of the script.
        if "--output" not in (text or Path(file[0]).read_text()):
            options = (f"--output={self._folder}/slurm-%j.out", *options)
        return self.command("sbatch", "--parsable", *options, *file, *arguments, stdin=text).strip().partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by its own names."""
        return parse_record(self.command("scontrol", "-o", "show", "job", job))

    def wait(self, job: str, states: str | Collection[str], timeout_s: float) -> dict[str, str]:
        """Waits until a job is in one of ``states``; fails when it is not in time, or has ended otherwise."""
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout_s
        while (shown := self.show(job))["JobState"] not in wanted:
            if shown["JobState"] in ENDED - {"NODE_FAIL"} or time.monotonic() > deadline:
                raise AssertionError(f"job {job} is {shown['JobState']}, not {wanted}: {shown}\n{_output_of(shown)}")
            time.sleep(0.1)
        return shown

    def wait_for(self, condition: Callable[[], object], timeout_s: float, *, what: str, job: str | None = None) -> None:
        """Waits until something is so.

        Args:
            what: said where it is not in time.
            job: whose output is shown then.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                shown = "" if job is None else f"{self.show(job)}\n{_output_of(self.show(job))}"
                raise AssertionError(f"not in {timeout_s:.0f} s: {what}\n{shown}")
            time.sleep(0.05)

    def cancel_all(self) -> None:
        """Ends all jobs and waits until the nodes are free."""
        jobs = self.command("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.command("scancel", *jobs)
        self.wait_for(
            lambda: not self.command("squeue", "--noheader", "--format=%A").strip(), 60, what="all jobs are gone"
        )

    def command(self, *arguments: str, stdin: str | None = None) -> str:
        """Runs one of SLURM's commands on this machine and returns what it prints."""
        done = self._ask(*arguments, stdin=stdin)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def _ask(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, input=stdin, env=self.environment, capture_output=True, text=True, timeout=30)

    # --- nodes

    def pids(self, node: str) -> dict[int, str]:
        """Command lines of the processes on a node, by the pid that they have on this machine."""
        if node not in self._inits:
            return {}
        init = self._inits[node][1]
        space = os.readlink(f"/proc/{init}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != init:
                try:
                    is_here = os.readlink(entry / "ns/pid") == space
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                except OSError:
                    continue  # it has ended meanwhile
                if is_here and line:  # a process that has ended and was not yet waited for has none
                    found[int(entry.name)] = line
        return found

    def left_running(self) -> list[str]:
        """Processes on all nodes beside SLURM's daemon: of jobs, while there are any."""
        return [
            f"{node}: {pid} {line}"
            for node in self.nodes
            for pid, line in self.pids(node).items()
            if not _is_daemon(line)
        ]

    def cut(self, node: str) -> None:
        """Cuts a node's power: it falls silent, and everything on it ends at once."""
        holder, init = self._inits.pop(node)
        _run("ip", "link", "delete", self._cable(node))  # first, so that no connection is closed in order
        os.kill(init, signal.SIGKILL)
        holder.wait(10)

    def start(self, node: str) -> None:
        """Switches a node on, with its daemon."""
        assert node not in self._inits
        holder = self._spawn(
            "unshare", "--mount", "--propagation", "private", "--uts", "--net", "--ipc", "--pid", "--mount-proc",
            "--fork", "--kill-child=KILL", "sh", "-c", INIT, "init", node, self._folder / "hosts",
            log=f"{node}.log",
        )  # fmt: skip
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        _wait_until(lambda: children.read_text().strip(), f"{node} started; see {self._folder}/{node}.log")
        init = int(children.read_text())
        self._inits[node] = holder, init
        comm = Path(f"/proc/{init}/comm")
        _wait_until(lambda: comm.read_text().strip() == "sleep", f"{node} is up; see {self._folder}/{node}.log")
        _run("ip", "link", "add", self._cable(node), "type", "veth", "peer", "name", "eth0", "netns", str(init))
        _run("ip", "link", "set", self._cable(node), "master", self._bridge, "up")
        _run("nsenter", "-t", str(init), "-n", "ip", "address", "add", f"{self.address(node)}/24", "dev", "eth0")
        _run("nsenter", "-t", str(init), "-n", "ip", "link", "set", "eth0", "up")
        self.start_slurmd(node)

    def start_slurmd(self, node: str) -> None:
        """Starts a node's daemon, and does not wait for it."""
        inside = self._inside(node, "slurmd", "-N", node, "-f", self.configuration)
        self._started.append(self._spawn(*inside, log=f"{node}.log"))

    def kill_slurmd(self, node: str) -> None:
        """Ends a node's daemon by SIGKILL; what runs there stays."""
        for pid, line in self.pids(node).items():
            if _is_daemon(line):
                os.kill(pid, signal.SIGKILL)

    def run_on(self, node: str, *arguments: str) -> str:
        """Runs a command on a node, outside any job, and returns what it prints."""
        done = subprocess.run(
            self._inside(node, *arguments),
            env=self.environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, f"{' '.join(arguments)} on {node}: {done.stdout}{done.stderr}"
        return done.stdout

    def _inside(self, node: str, *arguments: str | Path) -> list[str | Path]:
        return ["nsenter", "-t", str(self._inits[node][1]), "-m", "-u", "-i", "-n", "-p", *arguments]

    def address(self, node: str) -> str:
        return f"{self._network}.{self.nodes.index(node) + 1}"

    @property
    def outside(self) -> str:
        """The address of this machine, where nodes reach what does not run on one of them."""
        return f"{self._network}.254"

    def repair(self) -> None:
        """Brings all nodes back, whatever a test did to them, and waits until they are idle."""
        for node in self.nodes:
            if node not in self._inits:
                self.start(node)
            elif not any(_is_daemon(line) for line in self.pids(node).values()):
                self.start_slurmd(node)
        self._wait_idle()

    def _wait_idle(self) -> None:
        def all_idle() -> bool:
            states = self.command("sinfo", "--noheader", "-N", "-p", "main", "--format=%T").split()
            return states == ["idle"] * len(self.nodes)

        self.wait_for(all_idle, 40, what=f"all nodes are idle; logs are in {self._folder}")

    def logs(self) -> str:
        """The last lines of what SLURM's daemons say."""
        files = sorted([*self._folder.glob("*.log"), *self._folder.glob("*.start")])
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def _cable(self, node: str) -> str:
        return f"{self._bridge}{node}"

    # --- beginning and end

    def _write_files(self) -> None:
        folder, network = self._folder, self._network
        folder.chmod(0o755)
        for name in ("state", "dev", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        for number in range(GPUS):
            (folder / f"dev/nvidia{number}").symlink_to("/dev/null")  # SLURM wants character devices
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        controller = os.uname().nodename
        hosts = ["127.0.0.1 localhost", f"{network}.254 {controller}"]
        (folder / "hosts").write_text("\n".join([*hosts, *(f"{self.address(n)} {n}" for n in self.nodes), ""]))
        settings = CONFIGURATION.format(
            controller=controller, network=network, folder=folder, controller_port=_free_port(),
            node_port=NODE_PORT, credential_s=CREDENTIAL_S,
        )  # fmt: skip
        nodes = "".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={self.address(node)} CPUs={CPUS} RealMemory={MEMORY_MIB} "
            f"Gres=gpu:{GPUS} Feature=fake State=UNKNOWN\n"
            for node in self.nodes
        )
        self.configuration.write_text(settings + nodes + PARTITIONS)
        gpus = f"NodeName={','.join(self.nodes)} Name=gpu File={folder}/dev/nvidia[0-{GPUS - 1}]\n"
        (folder / "gres.conf").write_text("AutoDetect=off\n" + gpus)

    def _begin(self) -> None:
        folder = self._folder
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self._network}.254/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        # --force: it dislikes folders that a group may write, such as /tmp on some machines.
        munged = self._spawn(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", log="munged.log",
        )  # fmt: skip
        self._daemons.append(munged)
        _wait_until((folder / "munge.socket").exists, f"munged listens; see {folder}/munged.log")
        self._daemons.append(self._spawn("slurmctld", "-D", "-f", self.configuration, log="slurmctld.start"))
        for node in self.nodes:
            self.start(node)
        _wait_until(lambda: self._ask("scontrol", "ping").returncode == 0, f"slurmctld answers; see {folder}/*.log")
        self._wait_idle()

    def end(self) -> None:
        """Ends everything and removes the files."""
        for node in list(self._inits):
            self.cut(node)
        for daemon in [*self._started, *reversed(self._daemons)]:
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        self._started.clear()
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, *arguments: str | Path, log: str) -> subprocess.Popen[bytes]:
        with (self._folder / log).open("ab") as file:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *arguments], env=self.environment, cwd="/", stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip


def _output_of(shown: dict[str, str]) -> str:
    output = Path(shown.get("StdOut", ""))
    return output.read_text(errors="replace")[-6000:] if output.is_file() else ""


def _is_daemon(line: str) -> bool:
    return line.startswith("slurmd ") or line.split(maxsplit=1)[0].endswith("/slurmd")


def _free_network() -> tuple[str, str]:
    """Three octets of a network that this machine has no address in, and a name for the bridge; both from the pid."""
    for line in _run("ip", "-o", "link", "show", "type", "bridge").splitlines():
        name = line.split(":")[1].strip()
        if name.startswith("sftd") and not Path(f"/proc/{name[4:]}").exists():
            _run("ip", "link", "delete", name)  # of a process that was killed
    pid, taken = os.getpid(), _run("ip", "-o", "-4", "address")
    candidates = (f"10.{128 + (pid + step) // 256 % 64}.{(pid + step) % 256}" for step in range(64))
    return next(network for network in candidates if f" {network}." not in taken), f"sftd{pid}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout


def _wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"not so: {what}"
        time.sleep(0.01)
