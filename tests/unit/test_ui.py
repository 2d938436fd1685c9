"""``sft-dist ui`` without a browser: what is found, what may be named, who is answered, what is read again, what runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sft_dist.cluster import status as status_module
from sft_dist.cluster.file_clock import Clock
from sft_dist.cluster.slurm import JobState
from sft_dist.cluster.status import later, read_status
from sft_dist.errors import ConfigError, MachineError
from sft_dist.ui import tasks as tasks_module
from sft_dist.ui import watched
from sft_dist.ui.commands import wanted
from sft_dist.ui.discovery import Finder, discover
from sft_dist.ui.places import Places, Refused
from sft_dist.ui.server import UiServer
from sft_dist.ui.tasks import HTML, Busy, Task, Tasks
from sft_dist.ui.watched import Reports, SlowAsk, Statuses
from tests.helpers.report_folders import whole_run
from tests.helpers.run_folders import CLOCK, attempt, beat, job, metrics, put, receipt, submitted, training

CONFIG = "model: {path: x}\ndata:\n  train: [{path: a.jsonl}]\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two runs, a sweep with one point that has begun, and a configuration beside files that are none."""
    folder = tmp_path / "project"
    whole_run(folder / "runs/one", steps=20)
    training(folder / "runs/deeper/two")
    put(folder / "support.yaml", CONFIG, ago_s=60)
    put(folder / "configs/accelerate.yml", "distributed_type: FSDP\n", ago_s=60)
    put(folder / "site/config.yaml", "title: no run\n", ago_s=60)
    sweep = folder / "sweep"
    put(sweep / "slurm/submission-001/submission.json", '{"jobs": {}}', ago_s=60)
    put(sweep / "slurm/submission-001/sweep.json", '{"points": [{"name": "lr=1"}, {"name": "lr=2"}]}', ago_s=60)
    training(sweep / "lr=1")
    return folder


# What is found


def test_runs_and_configurations_are_found(project: Path) -> None:
    for left_out in (".git/run", "node_modules/run", "runs/one/data/run", "runs/one/checkpoints/step-00000006"):
        put(project / left_out / "metrics.jsonl", "", ago_s=1)
        put(project / left_out / "config.yaml", CONFIG, ago_s=1)
    (project / "circle").symlink_to(project, target_is_directory=True)
    submitted(project / "runs/waits")
    found = discover(project)
    names = [path.relative_to(project).as_posix() for path in found.runs]
    assert sorted(names) == ["runs/deeper/two", "runs/one", "runs/waits", "sweep/lr=1"]
    assert [path.name for path in found.configs] == ["support.yaml"]
    assert not found.is_cut


def test_the_walk_is_bounded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = project / "/".join("abcdefghijk")
    training(deep)
    assert deep not in discover(project).runs
    monkeypatch.setattr("sft_dist.ui.discovery.MAX_FOLDERS", 2)
    assert discover(project).is_cut


def test_a_new_run_is_found_after_a_while(project: Path) -> None:
    finder = Finder(project, every_s=0.2)
    before = finder.found()
    training(project / "runs/new")
    assert finder.found() is before
    time.sleep(0.3 + 11 * 0.05)
    assert project / "runs/new" in finder.found().runs


# What may be named


def test_only_what_is_in_the_folder_may_be_named(project: Path, tmp_path: Path) -> None:
    put(tmp_path / "secret.yaml", CONFIG, ago_s=1)
    (project / "out.yaml").symlink_to(tmp_path / "secret.yaml")
    (project / "in.yaml").symlink_to(project / "support.yaml")
    (project / "loop").symlink_to(project / "loop")
    places = Places(project)
    assert places.find("in.yaml") == places.root / "support.yaml"
    assert places.name_of(places.find("runs/one/../one")) == "runs/one"
    for name, status in (("out.yaml", 403), ("../secret.yaml", 403), ("/etc/passwd", 403), ("runs/../../secret.yaml", 403),
                         ("nothing", 404), ("a\0b", 404), ("loop", 404)):  # fmt: skip
        with pytest.raises(Refused) as refused:
            places.find(name)
        assert refused.value.status == status, name
    with pytest.raises(ConfigError, match="is no folder here"):
        Places(project / "support.yaml")


def test_a_folder_may_be_named_by_a_link(project: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(project, target_is_directory=True)
    places = Places(tmp_path / "link")
    assert places.find("support.yaml") == project.resolve() / "support.yaml"


# Who is answered


@pytest.fixture
def server(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UiServer]:
    monkeypatch.chdir(project)
    made = UiServer(project, port=0)
    Thread(target=made.serve, daemon=True).start()
    yield made
    made.close()


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def ask(server: UiServer, path: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, str, Any]:
    body = None if form is None else urllib.parse.urlencode(form).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers, data=body)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def cookie(server: UiServer) -> str:
    return f"sft-dist-{server.port}={server.key}"


PAGES = ("/", "/runs.json", "/run?run=runs/one", "/run.json?run=runs/one", "/report?run=runs/one", "/compare", "/plan",
         "/audit", "/compare?run=runs/one&run=sweep/lr%3D1", "/compared?run=runs/one&run=sweep/lr%3D1")  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_who_does_not_know_the_key_gets_nothing(server: UiServer, page: str) -> None:
    joined = "&" if "?" in page else "?"
    own = f"127.0.0.1:{server.port}"
    refused: list[tuple[str, dict[str, str]]] = [
        (page, {}), (f"{page}{joined}key=wrong", {}), (page, {"Cookie": "sft-dist-1=" + server.key}),
        (page, {"Cookie": f"sft-dist-{server.port}=wrong"}), (page, {"Cookie": cookie(server), "Host": "evil.example"}),
        (f"{page}{joined}key={server.key}", {"Host": f"evil.example:{server.port}"}),
        (f"{page}{joined}key=%C3%A9", {}), (page, {"X-Key": "\xe9"}),
    ]  # fmt: skip
    for path, headers in refused:
        assert ask(server, path, **headers)[:2] == (403, "open the address that the program has printed\n"), headers
    status, text, headers = ask(server, page, Cookie=cookie(server), Host=own)
    assert status == 200
    assert text
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith(("default-src 'none'", "sandbox"))
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "*" not in policy


def test_the_first_visit_leaves_a_cookie(server: UiServer) -> None:
    status, _, headers = ask(server, f"/?key={server.key}")
    assert status == 200
    assert headers["Set-Cookie"] == f"{cookie(server)}; HttpOnly; SameSite=Strict; Path=/"
    assert ask(server, "/", Cookie=cookie(server))[2]["Set-Cookie"] is None


def test_what_starts_something_has_to_come_from_a_page_of_it(server: UiServer) -> None:
    form, own = {"config": "support.yaml"}, f"http://127.0.0.1:{server.port}"
    for headers in ({}, {"Cookie": cookie(server)}, {"Cookie": cookie(server), "Origin": "null"}, {"Origin": own},
                    {"Cookie": cookie(server), "Origin": "http://127.0.0.1:1"}):  # fmt: skip
        for page in ("/plan", "/audit", "/cancel", f"/plan?key={server.key}"):
            assert ask(server, page, form, **headers)[0] == 403, (page, headers)
    assert server.tasks.of_kinds("plan", "audit", "show") == []
    assert ask(server, "/plan", {"overrides": "x" * 200_000}, Cookie=cookie(server), Origin=own)[0] == 413


def test_what_is_not_there_is_a_plain_page(server: UiServer, project: Path, tmp_path: Path) -> None:
    put(tmp_path / "secret.log", "secret\n", ago_s=1)
    logs = project / "runs/one/logs/a"
    logs.mkdir(parents=True)
    (logs / "rank-0.log").symlink_to(tmp_path / "secret.log")
    for page, status in (("/run?run=../secret.log", 403), ("/run?run=none", 404), ("/run?run=configs", 422),
                         ("/nothing", 404), ("/task?id=7", 404), ("/result?id=x", 404), ("/report?run=/etc", 403),
                         ("/compare?run=runs/one", 422), ("/plan?config=../secret.log", 403),
                         ("/run?run=runs/one", 403), ("/compared?run=runs/one&run=../x", 403)):  # fmt: skip
        found, text, _ = ask(server, page, Cookie=cookie(server))
        assert found == status, page
        assert "secret\n" not in text
        assert "<h1>This is not shown</h1>" in text


# What was filled in


def test_forms_become_the_commands_that_one_would_type(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    places, support = Places(project), {"config": "support.yaml"}
    overrides = " train.max_steps=20 \n\ndata.eval=[{path: x y.jsonl}]\n"
    plan = wanted(
        "plan",
        support | {"overrides": overrides, "gpu": "a100-80gb", "gpus": "2", "nodes": "", "search": "yes"},
        places,
    )
    assert plan.with_result_in(Path("/r")) == [
        "plan", "support.yaml", "train.max_steps=20", "data.eval=[{path: x y.jsonl}]", "--gpu", "a100-80gb", "--gpus", "2",
        "--search", "--html", f"/r/{HTML}"]  # fmt: skip
    audit = wanted("audit", support, places).with_result_in(Path("/r"))
    assert audit == ["data", "audit", "support.yaml", "--html", "/r/result.html", "--json", "/r/result.json"]
    rows = support | {"set": "eval", "choice": "least-supervised", "rows": "7", "tokens": "yes"}
    assert wanted("show", rows, places).arguments[2:] == (
        "support.yaml",
        "--set",
        "eval",
        "--least-supervised",
        "7",
        "--tokens",
    )
    assert wanted("show", support | {"rows": "5"}, places).arguments[3:] == ("--set", "train", "--row", "0-4")
    monkeypatch.chdir(project / "runs")
    assert wanted("plan", support, places).arguments[1] == str(places.root / "support.yaml")


@pytest.mark.parametrize(
    ("field", "value"),
    [("overrides", "--html=/etc/x"), ("overrides", "--probe"), ("overrides", "steps"), ("gpus", "0"), ("gpus", "-1"),
     ("nodes", "two"), ("gpu", "--json"), ("config", ""), ("config", "runs")],
)  # fmt: skip
def test_a_field_is_no_way_to_other_options(project: Path, field: str, value: str) -> None:
    with pytest.raises(ConfigError):
        wanted("plan", {"config": "support.yaml", field: value}, Places(project))


# What is read again


@pytest.mark.parametrize("by_s", [1.0, 90.0, 400.0, 4000.0])
@pytest.mark.parametrize("step_ago_s", [None, 100.0])
def test_a_status_grows_old_as_if_it_was_read_again(tmp_path: Path, by_s: float, step_ago_s: float | None) -> None:
    run = training(tmp_path / "run", step_ago_s=step_ago_s)
    at = Clock(CLOCK.now + by_s)
    aged, read = later(read_status(run, clock=CLOCK), at), read_status(run, clock=at)
    assert aged.verdict == read.verdict
    assert aged.found.pulse is not None
    assert read.found.pulse is not None
    assert aged.found.pulse.age_s == pytest.approx(read.found.pulse.age_s)
    assert aged.found.pulse.step_age_s == pytest.approx(read.found.pulse.step_age_s)
    assert aged.found.saved.age_s == pytest.approx(read.found.saved.age_s)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose files were read, in their order."""
    found: list[Path] = []
    read = status_module.read_evidence

    def noted(folder: Path, clock: Clock) -> Any:
        found.append(folder)
        return read(folder, clock)

    monkeypatch.setattr(status_module, "read_evidence", noted)
    return found


def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading may take all of the time."""
    monkeypatch.setattr(watched, "MAX_SHARE", 1e9)


def nobody(_: str) -> JobState | None:
    raise MachineError("nobody answers", fix="wait")


def test_files_are_read_when_they_have_changed(
    project: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    unhurried(monkeypatch)
    run = project / "runs/deeper/two"
    statuses = Statuses(ask=nobody)
    first = statuses.of([run])[run]
    assert first is not None
    again = statuses.of([run])[run]
    assert again is not None
    assert again.step == first.step == 120
    assert reads == [run]
    metrics(run, steps=130)
    after = statuses.of([run])[run]
    assert after is not None
    assert after.step == 130
    assert reads == [run, run]


def test_large_files_are_not_read_at_every_look(
    project: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "MAX_SHARE", 1e-9)
    run = project / "runs/deeper/two"
    statuses, reports = Statuses(ask=nobody), Reports(ask=nobody)
    statuses.of([run])
    version, _ = reports.of(run)
    count = len(reads)
    metrics(run, steps=140)
    assert statuses.of([run])[run].step == 120  # type: ignore[union-attr]
    assert reports.of(run)[0] == version
    assert len(reads) == count


def test_a_report_changes_with_what_was_measured_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unhurried(monkeypatch)
    run, reports = project / "runs/deeper/two", Reports(ask=nobody)
    version, data = reports.of(run)
    beat(run, step=125)
    assert reports.of(run) == (version, data)
    metrics(run, steps=125)
    newer, data = reports.of(run)
    assert newer != version
    assert data.metrics.steps[-1] == 125
    receipt(run, finished=True)
    assert reports.of(run)[0] != newer
    with pytest.raises(ConfigError, match="holds no run"):
        reports.of(project / "configs")


def test_many_runs_are_shown_before_all_are_read(project: Path, reads: list[Path]) -> None:
    runs = discover(project).runs
    statuses = Statuses(ask=nobody)
    assert set(statuses.of(runs, budget_s=-1).values()) == {None}
    assert all(status is not None for status in statuses.of(runs, budget_s=60).values())
    assert len(reads) == len(runs) == 3


def test_slurm_is_asked_seldom(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def tell(job_id: str) -> JobState:
        asked.append(job_id)
        return job("RUNNING", job_id=job_id)

    slow = SlowAsk(tell)
    assert [slow("7").state, slow("7").state, slow("8").state] == ["RUNNING"] * 3  # type: ignore[union-attr]
    assert asked == ["7", "8"]
    monkeypatch.setattr(watched, "ASK_S", 0.0)
    slow("7")
    assert asked == ["7", "8", "7"]

    def refuse(job_id: str) -> JobState:
        asked.append(job_id)
        raise MachineError("its controller does not answer", fix="wait")

    monkeypatch.setattr(watched, "ASK_S", 60.0)
    silent = SlowAsk(refuse)
    for job_id in ("1", "2", "1"):
        with pytest.raises(MachineError, match="does not answer"):
            silent(job_id)
    assert asked == ["7", "8", "7", "1"]

    attempt(project / "runs/deeper/two", 0, ago_s=600, step=0)
    statuses = Statuses(ask=slow)
    run = project / "runs/deeper/two"
    statuses.of([run])
    statuses.of([run])
    assert asked.count("4711") == 1


# What runs

PRINTS = "import time; print('one', flush=True); time.sleep(600)"
HAS_A_CHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\n"
)


def started(folder: Path, program: str) -> Task:
    return Task(1, "plan", "a plan", [sys.executable, "-c", program], folder=folder, again="/plan")


def until(condition: Callable[[], Any], *, within_s: float = 30) -> None:
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """A process that has ended and is not waited for lives no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_command_prints_is_there_while_it_runs(tmp_path: Path) -> None:
    task = started(tmp_path, PRINTS)
    try:
        until(lambda: task.text == "one\n")
        assert (task.state, task.exit_code, lives(task.pid)) == ("running", None, True)
    finally:
        task.cancel()
    assert task.wait(30)
    assert (task.state, task.exit_code, lives(task.pid)) == ("cancelled", 143, False)


def test_cancel_ends_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "GRACE_S", 0.5)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    task = started(tmp_path, stubborn + HAS_A_CHILD + "time.sleep(600)")
    until(lambda: task.text.endswith("\n"))
    child = int(task.text)
    task.cancel()
    assert task.wait(30)
    assert task.exit_code == 128 + signal.SIGKILL
    until(lambda: not lives(child))


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    quiet = "600)'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"
    program = HAS_A_CHILD.replace("600)'])", quiet)
    task = started(tmp_path, program)
    assert task.wait(30)
    assert task.exit_code == 0
    until(lambda: not lives(int(task.text)))


def test_of_a_failure_its_own_two_lines_are_told(tmp_path: Path) -> None:
    task = started(
        tmp_path,
        "import sys; print('begins'); sys.stderr.write('error: what\\n       more\\n  fix: so\\n'); sys.exit(4)",
    )
    assert task.wait(30)
    assert (task.exit_code, task.state, task.error) == (4, "ended", "error: what\n       more\n  fix: so")
    assert task.file(HTML) is None


def test_two_run_at_a_time_and_all_end_with_the_page(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks()
    monkeypatch.setattr(tasks_module.subprocess, "Popen", _sleeping(subprocess.Popen))
    first, second = (tasks.start("plan", "t", lambda folder: ["x"], again="/plan") for _ in range(2))
    with pytest.raises(Busy):
        tasks.start("plan", "t", lambda folder: ["x"], again="/plan")
    first.cancel()
    assert first.wait(30)
    third = tasks.start("audit", "t", lambda folder: ["x"], again="/audit")
    folder = third.folder.parent
    assert [task.number for task in tasks.of_kinds("plan")] == [second.number, first.number]
    tasks.close()
    assert not any(lives(task.pid) for task in (first, second, third))
    assert not folder.exists()
    with pytest.raises(Busy):
        tasks.start("plan", "t", lambda folder: ["x"], again="/plan")


def _sleeping(popen: Any) -> Any:
    def start(command: Any, **options: Any) -> Any:
        return popen(["sleep", "600"], **options)

    return start


def test_it_says_its_address_and_ends_what_it_started(project: Path) -> None:
    """The command itself, without torch, ended by SIGTERM while a child of it works."""
    program = (
        "import sys, signal, threading\n"
        "from sft_dist.cli import main\n"
        "import sft_dist.ui.tasks as tasks, sft_dist.ui.server as server\n"
        "start = server.UiServer.serve\n"
        "def serve(self):\n"
        "    task = tasks.Task(1, 'plan', 't', ['sleep', '600'], folder=self.places.root, again='/')\n"
        "    self.tasks._tasks[1] = task\n"
        "    print('child', task.pid, 'torch' in sys.modules, 'numpy' in sys.modules, flush=True)\n"
        "    start(self)\n"
        "server.UiServer.serve = serve\n"
        "main(['ui', '.'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        [said] = [line for line in lines if line.startswith("open ")]
        [child] = [line.split() for line in lines if line.startswith("child ")]
        assert said.startswith("open http://127.0.0.1:")
        assert said.endswith("(Ctrl-C ends)\n")
        assert child[2] == "False"
        assert lives(int(child[1]))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not lives(int(child[1]))
    finally:
        process.kill()
        process.wait()


def test_runs_are_told_in_the_words_of_status(server: UiServer, project: Path) -> None:
    _, text, _ = ask(server, "/runs.json", Cookie=cookie(server))
    rows = {row["path"]: row for row in json.loads(text)["rows"]}
    assert set(rows) == {"runs/one", "runs/deeper/two", "sweep/lr=1"}
    one = rows["runs/one"]
    assert (one["state"], one["style"], one["step"]) == ("finished", "good", "20 / 20")
    assert one["cost"].startswith("$")
    _, text, _ = ask(server, "/run.json?run=runs/one", Cookie=cookie(server))
    found = json.loads(text)
    assert "chart-loss" in found["measured"]
    again = json.loads(ask(server, f"/run.json?run=runs/one&version={found['version']}", Cookie=cookie(server))[1])
    assert "measured" not in again
    assert again["kind"] == "finished"
