"""What a process does with signals before, while and after it trains; each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_dist.errors import Preempted
from sft_dist.runtime.failure import forget, noted_exit_codes, report

PROLOGUE = """
import signal, sys, time
from sft_dist.errors import Preempted
from sft_dist.runtime.signals import Signals

def wait(signals):
    print("ready", flush=True)
    while not signals.noted:
        time.sleep(0.01)
    print("noted", signals.noted, flush=True)
"""
TRAINING = "with Signals(is_main=True) as s, s.while_training(): wait(s)"
PREEMPTED = """
with Signals(is_main=True) as s, s.while_training():
    wait(s)
    raise Preempted("stopped", fix="go on")
"""


@contextmanager
def python(program: str) -> Iterator[subprocess.Popen[str]]:
    """Runs until it has said "ready"."""
    command = [sys.executable, "-c", PROLOGUE + program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, -signal.SIGTERM, ""),
        (signal.SIGINT, -signal.SIGINT, "KeyboardInterrupt"),
        (signal.SIGUSR1, 75, "ended by SIGUSR1 while not training: there is nothing to save; go on with --resume auto"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
@pytest.mark.parametrize("before", ["", "\n    with s.while_training(): pass"], ids=["before", "after"])
def test_while_nothing_is_trained_a_signal_ends_the_process(
    number: signal.Signals, code: int, told: str, before: str
) -> None:
    with python(f"with Signals(is_main=True) as s:{before}\n    wait(s)") as process:
        process.send_signal(number)
        out, errors = process.communicate(timeout=10)
    assert (process.returncode, out) == (code, "")
    assert errors.endswith(told + "\n" if told else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_while_it_trains_a_signal_is_noted(number: signal.Signals) -> None:
    with python(PREEMPTED + "\nfinally_ = None") as process:
        process.send_signal(number)
        out, errors = process.communicate(timeout=10)
    assert (process.returncode, out) == (1, f"noted {number.value}\n")
    assert errors.count("press Ctrl-C again") == (number == signal.SIGINT)
    assert "Preempted: stopped" in errors


def test_a_signal_that_nobody_acted_on_is_not_lost() -> None:
    with python(TRAINING + "\nprint('went on')") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (-signal.SIGTERM, f"noted {signal.SIGTERM.value}\n")


def test_a_process_that_leaves_heeds_no_launcher() -> None:
    """Launchers send SIGTERM to the others as soon as one process has ended."""
    leaving = "try:\n" + "\n".join(f"    {line}" for line in PREEMPTED.strip().splitlines())
    with python(leaving + "\nexcept Preempted: print('leaving', flush=True); time.sleep(1); sys.exit(75)") as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [f"noted {signal.SIGUSR1.value}\n", "leaving\n"]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            process.send_signal(number)
        assert process.wait(timeout=10) == 75


def test_a_second_interrupt_counts_when_it_is_a_second_one() -> None:
    """Also where Python itself cannot get to its handlers: this system call does not come back."""
    hanging = "import ctypes\nwith Signals(is_main=True) as s, s.while_training():\n    print('ready', flush=True)\n"
    with python(hanging + "    while True: ctypes.CDLL(None).sleep(60)") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130


def test_a_process_without_signals_is_as_before() -> None:
    program = """
before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
for _ in range(2):
    with Signals(is_main=True) as s, s.while_training(): pass
assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
assert signal.set_wakeup_fd(-1) == -1
print("ready", flush=True)
"""
    with python(program) as process:
        assert process.wait(timeout=10) == 0


def test_preempted_is_told_in_one_line_by_rank_0_and_noted_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFT_DIST_LAUNCH_FOLDER", str(tmp_path))
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        report(Preempted("preempted by SIGTERM at step 3: saved there", fix="go on with --resume auto"), debug=False)
    said = capsys.readouterr()
    assert said.err == "preempted by SIGTERM at step 3: saved there; go on with --resume auto\n"
    assert noted_exit_codes(tmp_path) == {0: 75, 1: 75}
    forget(tmp_path)
    assert noted_exit_codes(tmp_path) == {}
