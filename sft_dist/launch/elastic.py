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

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from sft_dist.errors import ConfigError
from sft_dist.launch.agent import NodePlace, watching_agent
from sft_dist.launch.children import Children, watched_children
from sft_dist.launch.meeting import Meeting
from sft_dist.launch.outcome import NAMED_EXIT_CODES, PREEMPTED_EXIT_CODE, exit_code, report_killed
from sft_dist.runtime.failure import LAUNCH_FOLDER, noted_exit_codes
from sft_dist.runtime.meeting import lost_each_other, no_answer, not_all_came, patience_s
from sft_dist.runtime.network import answers, own_address_towards

LOOPBACK = "127.0.0.1"
DEFAULT_RENDEZVOUS_PORT = 29400  # torchrun's own

# They say "failed (exitcode: ...)", "Sending process ... closing signal" and "Received 2 death signal" before anyone
# can know whether it matters.
LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")

# The node whose launcher kept the rendezvous may end first, and the others warn that they cannot leave what is gone.
RENDEZVOUS_LOGGER = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
CANNOT_LEAVE = "has failed to shutdown the rendezvous"

# Accelerate says the node's rank in any case, and its agent here takes it from where this script does.
OPTIONS_LOGGER, RANK_IS_IGNORED = "torch.distributed.run", "node_rank is only used for static rdzv_backend"


def run_elastic(
    run: Callable[[str], None], *, program: str, place: NodePlace | None = None, num_nodes: str = "1"
) -> int:
    """Runs a launch and returns its exit code, leaving out what the launcher says about a failure that is told already.

    Signals to this process are sent on to those that train, and it waits for them: saving takes as long as it takes.

    Args:
        run: gets a temporary folder for the launcher's own files, which it would otherwise leave behind.
        program: the script, for messages.
        place: of this node, where that is known.
        num_nodes: that the run is to have, in torchrun's words.

    Raises:
        MachineError: the nodes did not meet.
    """
    logging.getLogger(RENDEZVOUS_LOGGER).addFilter(_is_no_farewell)
    logging.getLogger(OPTIONS_LOGGER).addFilter(_is_no_word_about_ranks)
    temporary = tempfile.TemporaryDirectory(prefix="sft_dist_launch_")
    with temporary as folder, _held_back(LOGGERS) as held, watched_children() as children:
        os.environ[LAUNCH_FOLDER] = folder
        try:
            with watching_agent(children, Path(folder), place) as ended:
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
        except RendezvousTimeoutError as error:
            held.clear()
            raise not_all_came(program, num_nodes=num_nodes) from error
        except (RendezvousError, dist.DistError) as error:
            held.clear()
            raise lost_each_other(program, reason=" ".join(str(error.__cause__ or error).split())) from error
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
        own = own_address_towards(host, port)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the rendezvous endpoint {endpoint}: {reason}", fix=fix) from error
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback and not _is_loopback(host):
        return None
    return own


def rendezvous_settings(given: str, meeting: Meeting) -> str:
    """``--rdzv-conf`` for the nodes of a SLURM step, which start together; what is ``given`` stays.

    Which node keeps the rendezvous is known: left alone, each compares its own names with that of the endpoint.
    """
    chosen = {"is_host": str(meeting.step.node_rank == 0).lower(), "join_timeout": str(patience_s())}
    said = {word.partition("=")[0].strip() for word in given.split(",")}
    return ",".join([*([given] if given else []), *(f"{key}={chosen[key]}" for key in chosen if key not in said)])


def await_rendezvous(program: str, endpoint: str) -> None:
    """Waits until the machine of a rendezvous that the user gave listens; that machine itself begins at once.

    Raises:
        MachineError: it does not listen within the time that nodes are given.
    """
    host, port = parse_rendezvous_endpoint(endpoint, default_port=DEFAULT_RENDEZVOUS_PORT)
    own = own_address_towards(host, port)
    is_here = _is_loopback(own) or own == socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    if not is_here and not answers(host, port, within_s=patience_s()):
        raise no_answer(program, host, port, within_s=patience_s())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_no_farewell(record: logging.LogRecord) -> bool:
    return CANNOT_LEAVE not in record.getMessage()


def _is_no_word_about_ranks(record: logging.LogRecord) -> bool:
    return RANK_IS_IGNORED not in record.getMessage()


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
