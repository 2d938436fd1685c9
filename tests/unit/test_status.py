"""What ``sft-dist status`` says of a folder: in every state, with torn files, and with clocks that differ."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from sft_dist.cli import main
from sft_dist.cluster.file_clock import clock_of
from sft_dist.cluster.slurm import JobState
from sft_dist.cluster.status import Status, read_status, status_json
from sft_dist.cluster.status_view import details, headline, sparkline
from sft_dist.cluster.watch import watch_status
from sft_dist.errors import ConfigError, MachineError
from sft_dist.metrics.heartbeat import HEARTBEAT
from sft_dist.plan.to_json import plan_json
from tests.helpers import run_folders as folders
from tests.helpers import sample_plans
from tests.helpers.disks import read_only
from tests.helpers.run_folders import CLOCK
from tests.helpers.terminal import Terminal

VIEWS = Path(__file__).parent.parent / "golden_views" / "status"


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run directory with a name that fits into a line."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/llama")
    folder.mkdir(parents=True)
    return folder


def status(folder: Path, job: JobState | Exception | None = None, *, silent_s: float = 120) -> Status:
    def ask(job_id: str) -> JobState | None:
        if isinstance(job, Exception):
            raise job
        assert job is None or job.job_id == job_id
        return job

    return read_status(folder, clock=CLOCK, ask=ask, silent_s=silent_s)


def line(folder: Path, job: JobState | Exception | None = None) -> str:
    return status(folder, job).verdict.line


def test_a_run_in_progress(run: Path) -> None:
    found = status(folders.training(run))
    assert found.verdict.line == "training, step 120 of 900 (13%), about 3 h 15 min left, $9.99 of $42.49"
    assert not found.verdict.is_trouble
    assert found.forecast is not None
    assert found.forecast.left_s == 780 * folders.STEP_S
    assert found.forecast.total_usd == pytest.approx((3598 + 780 * 15) / 360)
    assert found.found.bill is not None
    # 2 s before now was the last sign of life of a process that was started an hour ago.
    assert found.found.bill.spent_usd == pytest.approx(3598 / 360)
    assert found.found.measured is not None
    assert found.found.measured.eval_last == (100, 1.05)
    assert (found.found.saved.newest, found.found.saved.age_s) == (100, 300)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("phase", "fields"), [("failed", {"exit_code": 6}), ("exporting", {}), ("proving", {}), ("done", {})]
)
def test_nothing_is_left_of_what_has_ended(run: Path, phase: str, fields: dict[str, int]) -> None:
    """Steps that an early end or a failure has left are not to come."""
    found = status(folders.training(run, phase=phase, **fields))
    assert found.forecast is None
    console = Console(file=io.StringIO(), width=120)
    console.print(details(found, console))
    assert isinstance(console.file, io.StringIO)
    assert " left" not in console.file.getvalue()


EVENTS: tuple[dict[str, object], ...] = (
    {
        "step": 40,
        "event": "spike",
        "because": "spike",
        "of_step": 40,
        "ranks": [3],
        "of_loss": 9.5,
        "median_loss": 1.25,
    },
    {"step": 61, "event": "spike", "because": "spike", "of_step": 61, "ranks": [1, 2], "of_loss": 7.5},
    {"step": 50, "event": "rolled_back", "because": "non_finite", "of_step": 55, "ranks": [0], "of_loss": None},
    {"step": 55, "event": "skipped", "because": "rolled_back", "of_step": 55},
    {"step": 100, "event": "non_finite_evaluation", "of_metrics": "eval_loss, eval_loss/chat"},
    {"step": 110, "event": "early_stopping", "early_stopping/fired": 1},
)


def test_what_went_wrong_is_shown_with_its_step(run: Path) -> None:
    """The last of each kind; a step that is passed over after a return has been told of."""
    folders.training(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in EVENTS)
        file.write('{"step": 120, "event": "spi')
    for start, step in (("20260304T110000Z-aaaa", 70), ("20260304T120000Z-bbbb", 90)):
        verdict = {"step": step, "what": f"rank 2 on gpu-4 stalls: saving, after step {step}", "more": 1}
        folders.put(run / "stalls" / start / "verdict.json", json.dumps(verdict), ago_s=1800)
    found = status(run)
    told = [(each.kind, each.step, each.times) for each in found.found.happened]
    assert told == [("rolled_back", 55, 1), ("spike", 61, 2), ("stalled", 90, 2), ("non_finite_evaluation", 100, 1)]
    assert status_json(found)["happened"][1]["told"] == "a spike, trained all the same (loss 7.5000, ranks 1, 2)"
    console = Console(file=io.StringIO(), width=120)
    console.print(details(found, console))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for line in (
        "Events     step 55: left out: not finite (loss not finite, rank 0); back to step 50",
        "step 61: a spike, trained all the same (loss 7.5000, ranks 1, 2) (2 of these, this is the last)",
        "rank 2 on gpu-4 stalls: saving, after step 90 (2 of these, this is the last)",
        "step 100: its evaluation is not finite (eval_loss, eval_loss/chat)",
    ):
        assert line in shown


def test_a_run_in_which_nothing_went_wrong_has_no_events(run: Path) -> None:
    assert status(folders.training(run)).found.happened == ()


@pytest.mark.parametrize("skew_s", [-7200.0, 7200.0])
def test_ages_do_not_follow_the_clock_of_the_node(run: Path, skew_s: float) -> None:
    """Neither its own nor that of the machine that looks, which is years behind."""
    found = status(folders.training(run, skew_s=skew_s, step_ago_s=40))
    assert found.found.pulse is not None
    assert found.found.pulse.age_s == pytest.approx(2)
    assert found.found.pulse.step_age_s == pytest.approx(40)
    assert found.verdict.kind == "working"


def test_the_clock_is_that_of_the_file_system(run: Path) -> None:
    before = time.time()
    clock = clock_of(run)
    assert not clock.is_local
    assert before - 1 < clock.now < time.time() + 1
    assert list(run.iterdir()) == [], "nothing of it stays"


def test_a_folder_that_cannot_be_written(run: Path) -> None:
    folders.training(run)
    with read_only(run):
        found = read_status(run, ask=lambda _: None)
    assert found.clock.is_local
    assert "the folder cannot be written: ages are by the clock of this machine" in found.notes


def test_no_sign_of_life(run: Path) -> None:
    found = status(folders.training(run, ago_s=14 * 60, phase="evaluating"))
    assert found.verdict.line == (
        "no sign of life for 14 min: the last heartbeat is from node gpu-3 at 12:16, while evaluating at step 120 of "
        "900; it was killed or its machine is lost"
    )
    assert (found.verdict.kind, found.verdict.is_trouble) == ("silent", True)


def test_one_that_beats_and_makes_no_step(run: Path) -> None:
    found = status(folders.training(run, step_ago_s=20 * 60))
    assert found.verdict.line == "hangs? It lives, but has made no step for 20 min at step 120 of 900, on gpu-3"
    assert (found.verdict.kind, found.verdict.is_trouble) == ("stuck", True)
    slow = status(folders.training(run, step_ago_s=20 * 60, step_s=300.0))
    assert slow.verdict.kind == "working", "four steps' time is no hang"
    saving = status(folders.training(run, step_ago_s=20 * 60, phase="saving", phase_since=folders.iso(1200)))
    assert saving.verdict.line.startswith("saving for 20 min, step 120 of 900"), "nobody expects a step meanwhile"


def test_ends(run: Path) -> None:
    folders.training(run, phase="failed", during="training", exit_code=4, what="train.jsonl:7 is no row")
    assert line(run) == "failed with 4 (data) at step 120 of 900: train.jsonl:7 is no row"
    assert status(run).verdict.is_trouble
    what = "preempted by SIGTERM at step 120: saved runs/llama/checkpoints/step-00000120"
    folders.beat(run, phase="stopped", during="training", exit_code=75, what=what)
    assert line(run) == what + "; it goes on with --resume auto"
    assert not status(run).verdict.is_trouble
    folders.beat(run, ago_s=5000, phase="done", step=900, exit_code=0)
    folders.receipt(run, finished=True)
    (run / "final").mkdir()
    assert line(run) == "finished after 900 steps, final/ is proven, $1.67"
    (run / "config.yaml").write_text("checkpoint:\n  prove_final: false\n")
    assert "final/ is there, not proven" in line(run)


@pytest.mark.parametrize(
    ("job", "expected", "is_trouble"),
    [
        (folders.job("PENDING", reason="Resources"), "waiting in the queue (Resources)", False),
        (
            folders.job("PENDING", reason="Priority", StartTime="2026-03-04T14:05:00"),
            "waiting in the queue (Priority), expected to start at 14:05",
            False,
        ),
        (folders.job("PENDING", reason="Dependency"), "waiting for the job before it (Dependency)", False),
        (
            folders.job("PENDING", reason="DependencyNeverSatisfied"),
            "will not start (DependencyNeverSatisfied): see `scontrol show job 4711`",
            True,
        ),
        (
            folders.job("PENDING", reason="JobHeldUser"),
            "held in the queue (JobHeldUser): `scontrol release 4711` lets it go",
            False,
        ),
        (folders.job("RUNNING"), "starting on gpu-3, gpu-4: the job has its nodes, training has not begun", False),
        (folders.job("CANCELLED"), "cancelled: job 4711 does not start again by itself", False),
        (folders.job("FAILED", ExitCode="2:0"), "failed with 2 (configuration)", True),
        (folders.job("NODE_FAIL"), "a node failed: job 4711 does not start again by itself", True),
    ],
)
def test_a_job_that_has_not_begun_to_train(run: Path, job: JobState, expected: str, is_trouble: bool) -> None:
    folders.submitted(run)
    assert line(run, job) == expected
    assert status(run, job).verdict.is_trouble == is_trouble


def test_a_job_between_two_starts(run: Path) -> None:
    folders.training(run, ago_s=600, phase="stopped", during="training", exit_code=75, job_id="4711")
    folders.submitted(run)
    waits = folders.job("PENDING", reason="Resources", restarts=1)
    assert line(run, waits) == "interrupted at step 120 of 900, waiting to start again (Resources)"
    again = folders.job("RUNNING", restarts=1)
    assert line(run, again).startswith("starting on gpu-3, gpu-4"), "the heartbeat is of the start before"
    folders.beat(run, job_id="4711", restart=1, phase="loading", phase_since=folders.iso(62), step=None, step_at=None)
    assert line(run, again) == "loading the model for 1 min"


PREEMPTED = "preempted: its nodes are wanted by another job"


def test_why_a_job_is_started_again_or_not(run: Path) -> None:
    folders.training(run, ago_s=600, phase="stopped", during="training", exit_code=75, job_id="4711")
    folders.attempt(run, 0, ago_s=3000, step=0, decision="requeue", reason=PREEMPTED)
    waits = folders.job("PENDING", reason="Resources", restarts=1)
    assert line(run, waits) == "preempted at step 120 of 900, waiting to start again (Resources)"
    folders.attempt(run, 1, ago_s=1000, step=100, decision="requeue", reason="exit code 1: unexpected")
    again = folders.job("PENDING", reason="BeginTime", restarts=2)
    assert line(run, again) == "waiting to start again (BeginTime) at step 120 of 900: exit code 1: unexpected"
    nobody = MachineError("x", fix="y")
    folders.beat(run, ago_s=600, restart=1, job_id="4711", phase="failed", exit_code=1, what="ValueError: x")
    assert line(run, nobody) == (
        "asked for another start at step 120 of 900, nothing has come of it yet: exit code 1: unexpected"
    )
    folders.beat(run, restart=2, job_id="4711")
    assert line(run, nobody).startswith("training, step 120"), "it has come"
    reason = "4 starts in a row got no further than the last checkpoint"
    folders.attempt(run, 2, ago_s=900, step=100, decision="give up", code=1, reason=reason)
    for job in (folders.job("FAILED", restarts=2, ExitCode="1:0"), None):
        assert line(run, job) == f"gave up at step 120 of 900: {reason}"
        assert status(run, job).verdict.is_trouble
    folders.attempt(run, 2, ago_s=900, step=100, decision="give up", code=4, reason="exit code 4 (data): ...")
    folders.beat(run, restart=2, job_id="4711", phase="failed", during="training", exit_code=4, what="row 7")
    assert line(run) == "failed with 4 (data) at step 120 of 900: row 7", "which says more"


def test_slurm_that_does_not_answer(run: Path) -> None:
    folders.training(run, job_id="4711")
    found = status(run, MachineError("SLURM's controller does not answer: x", fix="y"))
    assert found.verdict.kind == "working", "the files are enough"
    assert found.notes == ("what SLURM says of job 4711 is not known: SLURM's controller does not answer: x",)


def test_the_newest_job_counts(run: Path) -> None:
    """One that was submitted again, or a script that was submitted by hand, which leaves no record."""
    asked = []

    def ask(job_id: str) -> JobState | None:
        asked.append(job_id)
        return None

    folders.submitted(run, 99)
    folders.training(run, job_id="100")
    found = read_status(run, clock=CLOCK, ask=ask)
    assert asked == ["100"]
    assert found.notes == ("SLURM does not know job 100 any more",)


def test_files_that_are_cut_or_missing(run: Path) -> None:
    folders.metrics(run, cut='{"step": 121, "lo')
    assert status(run).step == 120
    assert line(run) == "not finished at step 120: the last line of metrics is 4.0 s old"
    folders.put(run / HEARTBEAT, '{"phase": "training"', ago_s=1)
    (run / "receipt.json").write_text("{")
    (run / "plan.json").write_text('{"schema_version": 0}')
    newest = folders.checkpoint(run, 100, ago_s=50)
    folders.checkpoint(run, 50, ago_s=500)
    (newest / "manifest.json").write_text("{}")
    (run / "checkpoints" / "step-00000120.unfinished").mkdir()
    found = status(run)
    assert (found.found.saved.newest, found.found.saved.writing) == (50, (120,))
    said = "\n".join(found.notes)
    assert "heartbeat.json cannot be read: " in said
    assert "no receipt.json that can be read" in said
    assert "plan.json cannot be read: the plan has schema_version 0" in said
    assert "step-00000100/manifest.json cannot be read" in said
    assert found.found.pulse is None


def test_a_loss_that_is_not_finite(run: Path) -> None:
    folders.training(run)
    folders.metrics(run, loss=None, non_finite=["loss"])
    found = status(run)
    assert found.found.measured is not None
    assert found.found.measured.loss is None
    json.dumps(status_json(found), allow_nan=False)
    assert "not finite" in shown(found, 80)


def test_lines_that_a_checkpoint_will_cut(run: Path) -> None:
    """A run that loads has its position from the checkpoint; what was trained behind it is trained again."""
    folders.training(run, phase="loading", step=100)
    assert status(run).step == 100


def test_a_folder_without_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="runs/llama holds no run"):
        status(run)
    with pytest.raises(ConfigError, match="is no folder here"):
        status(run / "none")
    with pytest.raises(SystemExit) as ended:
        main(["status", str(run)])
    assert ended.value.code == 2
    assert "fix: give the output_dir of a run" in capsys.readouterr().err


def test_json_names_all(run: Path) -> None:
    folders.submitted(run)
    document = status_json(status(folders.training(run, job_id="4711"), folders.job("RUNNING")))
    assert document["state"] == "working"
    assert document["job"]["state"]["state"] == "RUNNING"
    assert document["pulse"]["beat"]["step"] == document["step"] == 120
    assert document["bill"]["spent_usd"] == pytest.approx(9.994, abs=1e-3)


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_exit_codes_for_cron(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.training(run)
    now = time.time()
    for name in (HEARTBEAT, "metrics.jsonl"):
        os.utime(run / name, (now, now))
    assert code_of("status", str(run), "--check", "15m") == 0
    assert (
        capsys.readouterr().out
        == "runs/llama: training, step 120 of 900 (13%), about 3 h 15 min left, $9.99 of $42.49\n"
    )
    os.utime(run / HEARTBEAT, (now - 1000,) * 2)
    assert code_of("status", str(run), "--check", "15m") == 1
    assert code_of("status", str(run), "--check", "20m") == 0
    assert code_of("status", str(run)) == 0, "it could be read"
    assert code_of("status", str(run), "--check", "soon") == 2
    assert code_of("status", str(run), "--check", "1h", "--json") == 2


def test_watching_without_a_terminal(run: Path) -> None:
    folders.training(run, phase="failed", exit_code=3, what="too large")
    out = io.StringIO()
    watch_status(run, console=Console(file=out, width=80), every_s=0)
    assert out.getvalue() == "failed with 3 (memory) at step 120 of 900: too large\n"


def test_the_first_line_is_whole_in_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = "a long story " * 20
    folders.training(run, phase="failed", exit_code=1, what=what)
    assert code_of("status", str(run)) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(what)


def test_a_sweep(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.submitted(run)
    points = {"format": 1, "keys": ["optim.lr"], "points": [{"name": f"lr-{n}"} for n in (1, 2, 3)]}
    folders.put(run / "slurm" / "submission-001" / "sweep.json", json.dumps(points), ago_s=0)
    folders.training(run / "lr-1", phase="failed", exit_code=6, what="step 120: loss nan")
    folders.training(run / "lr-3", phase="stopped", exit_code=75, what="preempted by SIGTERM at step 120")
    assert code_of("status", str(run)) == 0
    assert [" ".join(text.split()) for text in capsys.readouterr().out.splitlines()] == [
        "lr-1 failed with 6 (diverged) at step 120 of 900: step 120: loss nan",
        "lr-2 not begun",
        "lr-3 preempted by SIGTERM at step 120; it goes on with --resume auto",
    ]
    assert code_of("status", str(run), "--check", "10m") == 1
    assert capsys.readouterr().out == "runs/llama: 3 points: 1 failed, 1 stopped, 1 not begun\n"
    assert code_of("status", str(run), "--json") == 0
    assert json.loads(capsys.readouterr().out)["points"]["lr-3"]["state"] == "stopped"


def test_watching_in_a_terminal(run: Path) -> None:
    folders.training(run)
    os.utime(run / HEARTBEAT)
    with Terminal([sys.executable, "-m", "sft_dist", "status", str(run), "--watch"], columns=90, rows=30) as terminal:
        shown = terminal.wait_for("training, step 120 of 900")
        terminal.wait_for("fsdp2 on 16 processes", after=shown)
        folders.beat(run, step=121)
        os.utime(run / HEARTBEAT)
        terminal.wait_for("training, step 121 of 900", after=shown)
        terminal.type("\x03")
        assert terminal.wait_for_exit() == 128 + signal.SIGINT
    assert "Traceback" not in terminal.text
    assert "interrupted" not in terminal.text


def test_sparkline() -> None:
    assert sparkline([1.0, 4.5, 8.0]) == "▁▅█"
    assert sparkline([2.0, None, 2.0]) == "▁×▁"
    assert sparkline([None]) == "×"


def shown(found: Status, columns: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=columns, highlight=False)
    console.print(headline(found))
    console.print(details(found, console))
    return "".join(f"{each.rstrip()}\n" for each in out.getvalue().splitlines())


def in_the_queue(run: Path) -> Status:
    folders.submitted(run)
    return status(run, folders.job("PENDING", reason="Priority", StartTime="2026-03-05T02:05:00"))


def in_training(run: Path) -> Status:
    folders.submitted(run)
    (run / "checkpoints" / "step-00000120.unfinished").mkdir(parents=True)
    folders.put(run / "plan.json", json.dumps(plan_json(sample_plans.lora_70b())), ago_s=5000)
    return status(folders.training(run, job_id="4711"), folders.job("RUNNING", ExcNodeList="gpu-7"))


def silent(run: Path) -> Status:
    folders.submitted(run)
    folders.attempt(run, 0, ago_s=10_000, step=0, decision="requeue", reason=PREEMPTED)
    folders.attempt(
        run,
        1,
        ago_s=5000,
        step=50,
        decision="lost",
        code=None,
        at=None,
        blamed=["gpu-4"],
        reason="it never told of its end",
    )
    folders.attempt(run, 2, ago_s=3600, step=100)
    refused = ConfigError("SLURM is not installed here: there is no program scontrol", fix="x")
    return status(folders.training(run, ago_s=14 * 60, job_id="4711", restart=2), refused)


def finished(run: Path) -> Status:
    folders.training(run, ago_s=90_000, phase="done", step=900, exit_code=0, strategy="ddp", world_size=1)
    folders.metrics(run, steps=900, ago_s=90_100)
    folders.receipt(run, finished=True, elapsed_s=14_200.0, cost_usd=39.44)
    (run / "final").mkdir()
    return status(run)


def failed(run: Path) -> Status:
    what = "the file data/conversations-of-all-kinds.jsonl, row 123,456: messages.3.content is no text but a number"
    folders.training(run, ago_s=500, phase="failed", during="preparing", exit_code=4, what=what)
    folders.receipt(run, priced=False)
    folders.metrics(run, priced=False)
    return status(run)


SHOWN: dict[str, Callable[[Path], Status]] = {
    each.__name__: each for each in (in_the_queue, in_training, silent, finished, failed)
}


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", SHOWN)
def test_views(run: Path, name: str, columns: int) -> None:
    """Written anew where SFT_DIST_REGENERATE is set: to be read before they are committed."""
    text = shown(SHOWN[name](run), columns)
    path = VIEWS / f"{name}-{columns}.txt"
    if "SFT_DIST_REGENERATE" in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= columns
