"""PyTorch's elastic launcher, on which torchrun and ``accelerate launch`` are built."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from sft_dist.errors import ConfigError
from sft_dist.launch.agent import watching_agent
from sft_dist.launch.children import Children, watched_children
from sft_dist.launch.outcome import NAMED_EXIT_CODES, PREEMPTED_EXIT_CODE, exit_code, report_killed
from sft_dist.runtime.failure import LAUNCH_FOLDER, noted_exit_codes

LOOPBACK = "127.0.0.1"
DEFAULT_RENDEZVOUS_PORT = 29400  # torchrun's own

# They say "failed (exitcode: ...)", "Sending process ... closing signal" and "Received 2 death signal" before anyone
# can know whether it matters.
LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")

# The node whose launcher kept the rendezvous may end first, and the others warn that they cannot leave what is gone.
RENDEZVOUS_LOGGER = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
CANNOT_LEAVE = "has failed to shutdown the rendezvous"


def run_elastic(run: Callable[[str], None]) -> int:
    """Runs a launch and returns its exit code, leaving out what the launcher says about a failure that is told already.

    Signals to this process are sent on to those that train, and it waits for them: saving takes as long as it takes.

    Args:
        run: gets a temporary folder for the launcher's own files, which it would otherwise leave behind.
    """
    logging.getLogger(RENDEZVOUS_LOGGER).addFilter(_is_no_farewell)
    temporary = tempfile.TemporaryDirectory(prefix="sft_dist_launch_")
    with temporary as folder, _held_back(LOGGERS) as held, watched_children() as children:
        os.environ[LAUNCH_FOLDER] = folder
        try:
            with watching_agent(children, Path(folder)) as ended:
                run(folder)
        except ChildFailedError as error:
            # What the launcher did to the others afterwards is no cause.
            failures = {rank: code for rank, code in ended.items() if code} or {
                rank: failure.exitcode for rank, failure in error.failures.items()
            }
            code = exit_code(failures | noted_exit_codes(Path(folder)))
            if _is_told(code, failures, children):
                held.clear()
            else:
                print(error, file=sys.stderr)
            return code
        except subprocess.CalledProcessError as error:
            # Accelerate starts one process alone without torchrun, and DeepSpeed's launcher for several machines.
            if error.returncode < 0 and not children.signals:
                report_killed(-error.returncode)
            return exit_code({0: error.returncode})
        except SignalException as error:
            held.clear()
            return 128 + int(error.sigval)
        finally:
            del os.environ[LAUNCH_FOLDER]
        if ended:
            held.clear()  # of an attempt that was followed by another
    return 0


def _is_told(code: int, failures: dict[int, int], children: Children) -> bool:
    """Whether the user knows why the launch failed; of a process that was killed, which could not say it, now."""
    if code in NAMED_EXIT_CODES or code == PREEMPTED_EXIT_CODE or children.signals:
        return True
    killed = {rank: -code for rank, code in failures.items() if code < 0 and code != -signal.SIGTERM}
    if killed:
        report_killed(killed[min(killed)], rank=min(killed))
    return bool(killed)


def address_of_this_node(endpoint: str) -> str | None:
    """This machine's own address on the way to the rendezvous, under which the other nodes can reach it.

    Left alone, each node gives its own host name, which the others cannot always resolve.

    Args:
        endpoint: HOST or HOST:PORT.

    Returns:
        None where the endpoint is a name that stands for the loopback on this machine: others could not use that.

    Raises:
        ConfigError: the endpoint has no such form, or no address, or no way leads to it.
    """
    fix = "give the first node's name or address and a free port, the same on every node: HOST:29400"
    try:
        host, port = parse_rendezvous_endpoint(endpoint, default_port=DEFAULT_RENDEZVOUS_PORT)
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: chooses the way, sends nothing
            own = str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the rendezvous endpoint {endpoint}: {reason}", fix=fix) from error
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback and not _is_loopback(host):
        return None
    return own


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_no_farewell(record: logging.LogRecord) -> bool:
    return CANNOT_LEAVE not in record.getMessage()


@contextmanager
def _held_back(names: Sequence[str]) -> Iterator[list[logging.LogRecord]]:
    """Keeps loggers' records until the end, when those still in the yielded list are logged."""
    loggers = [logging.getLogger(name) for name in names]
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    for logger in loggers:
        logger.addFilter(hold)
    try:
        yield held
    finally:
        for logger in loggers:
            logger.removeFilter(hold)
        for record in held:
            logging.getLogger(record.name).handle(record)
