"""Who is guilty of a stall, how long nothing may move, and what is told of it; without processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sft_dist.cluster import nodes
from sft_dist.cluster.attempts import Attempt
from sft_dist.config.watchdog_schema import WatchdogConfig
from sft_dist.metrics.heartbeat import Doing
from sft_dist.runtime.exit_codes import exit_code
from sft_dist.watchdog import verdict
from sft_dist.watchdog.judge import Guilty, judge
from sft_dist.watchdog.limits import EVAL_S, EXPORT_S, FIRST_STEP_S, INIT_S, SAVE_S, STEP_S, Limits
from sft_dist.watchdog.record import Record, forget, read_all, write
from sft_dist.watchdog.watch import MOST_OF_A_POLL_S, AwakeClock

HUNG = Record(
    rank=0, beat=9, host="n0", pid=1, born=1.0, phase="training", part="", key="step", step=119, still_s=320.0,
    since="2026-01-02T12:03:11.000+00:00", limit_s=300.0,
)  # fmt: skip


def ranks(*collectives: dict[str, int], **changed: object) -> list[Record]:
    return [replace(HUNG, rank=n, host=f"n{n}", collectives=each) for n, each in enumerate(collectives)]


def judged(records: list[Record | None], unchanged_s: list[float] | None = None) -> Guilty | None:
    return judge(records, unchanged_s or [1.0] * len(records), beat_s=3.0, silent_s=12.0)


def test_the_one_that_has_not_called_what_the_others_wait_in() -> None:
    assert judged([*ranks({"all": 7}, {"all": 7}, {"all": 6}, {"all": 7})]) == Guilty((2,))
    assert judged([*ranks({"all": 7}, {"all": 6}, {"all": 6})]) == Guilty((1, 2))


def test_over_several_groups_the_one_that_waits_for_nobody() -> None:
    """0 waits for 1 in "a", 1 for 2 in "b", and 3 for 2 in "c"."""
    found = ranks({"a": 5}, {"a": 4, "b": 9}, {"b": 8, "c": 2}, {"c": 3})
    assert judged([*found]) == Guilty((2,))
    # A save that is going on in its own group blames nobody who waits in training.
    found = ranks({"all": 7, "save": 3}, {"all": 6, "save": 4}, {"all": 7, "save": 4})
    assert judged([*found]) == Guilty((1,)) or judged([*found]) == Guilty((0, 1))
    # A group in which all are level holds nobody up: 2 does not wait in "c".
    assert judged([*ranks({"a": 5}, {"a": 4, "b": 9}, {"b": 8, "c": 20}, {"c": 20})]) == Guilty((2,))


def test_where_each_waits_for_another_those_that_are_least_far() -> None:
    assert judged([*ranks({"a": 5, "b": 6}, {"a": 4, "b": 9}, {"a": 5, "b": 9})]) == Guilty((0,))


def test_without_collectives_the_place_tells() -> None:
    start = [replace(each, part="rank 0") for each in ranks({}, {}, {})]
    assert judged([replace(start[0], part=""), start[1], start[2]]) == Guilty((0,))
    behind = ranks({}, {}, {})
    assert judged([behind[0], replace(behind[1], step=118), behind[2]]) == Guilty((1,))
    assert judged([behind[0], behind[1], replace(behind[2], part="data")]) == Guilty((2,))
    assert judged([*behind]) == Guilty(()), "all stand at the same place"


def test_one_that_does_not_run_is_told_from_one_that_is_not_heard_of_yet() -> None:
    found: list[Record | None] = [*ranks({"all": 7}, {"all": 7})]
    assert judged(found, [1.0, 12.5]) == Guilty((1,), is_silent=True)
    assert judged(found, [1.0, 7.0]) is None
    assert judged([found[0], None], [1.0, 5.0]) is None
    assert judged([found[0], None], [1.0, 13.0]) == Guilty((1,), is_silent=True)
    gone = replace(HUNG, rank=1, phase="ended")
    assert judged([HUNG, gone]) == Guilty((1,), is_silent=True)


def test_who_is_within_its_own_limit_is_let_be() -> None:
    late = ranks({"all": 7}, {"all": 6})
    for patient in (replace(late[1], limit_s=600.0), replace(late[1], limit_s=None), replace(late[1], still_s=2.0)):
        assert judged([late[0], patient]) is None
    several = ranks({"all": 7}, {"all": 6}, {"all": 6})
    assert judged([several[0], several[1], replace(several[2], limit_s=600.0)]) is None, "not all that are behind"
    same = ranks({"all": 7}, {"all": 7})
    assert judged([same[0], replace(same[1], still_s=299.0)]) is None
    assert judged([replace(each, still_s=299.0) for each in late]) is None


@pytest.mark.parametrize(
    ("phase", "part", "seconds"),
    [
        ("loading", "", INIT_S + 160), ("preparing", "", None), ("training", "", FIRST_STEP_S + 80),
        ("training", "data", FIRST_STEP_S + 80), ("evaluating", "", FIRST_STEP_S + 80), ("saving", "data", SAVE_S + 20),
        ("exporting", "rank 0", EXPORT_S + 320), ("proving", "", EXPORT_S + 320),
    ],
)  # fmt: skip
def test_limits_before_anything_is_measured(phase: Doing, part: str, seconds: float | None) -> None:
    limits = Limits(WatchdogConfig())
    limits.planned(model_bytes=16_000_000_000, saved_bytes=2_000_000_000, step_s=8.0)
    assert limits.of(phase, part) == seconds  # type: ignore[arg-type]


def test_limits_follow_the_steps_and_the_user() -> None:
    limits = Limits(WatchdogConfig(save_s="off", data_s=7.5))
    for _ in range(4):
        limits.stepped(2.0)
    assert limits.of("training", "") == FIRST_STEP_S, "the first ones compile"
    limits.stepped(2.0)
    assert (limits.of("training", ""), limits.of("evaluating", "")) == (STEP_S, EVAL_S)
    for step_s in [818.0] * 60 + [1.0] * 20 + [2000.0] * 20:
        limits.stepped(step_s)
    assert (limits.of("training", ""), limits.of("evaluating", "")) == (8180.0, 8180.0)
    assert (limits.of("training", "data"), limits.of("saving", "")) == (7.5, None)


def test_limits_follow_the_disk() -> None:
    """The slowest save counts; what a small file took says nothing of the speed."""
    limits = Limits(WatchdogConfig())
    limits.planned(model_bytes=16_000_000_000, saved_bytes=2_000_000_000, step_s=None)
    limits.read(1_000_000, 5.0)
    assert limits.of("loading", "") == INIT_S + 160
    limits.read(400_000_000, 10.0)
    assert limits.of("loading", "") == INIT_S + 400
    limits.read(500_000_000, 50.0)
    assert limits.of("loading", "") == INIT_S + 400, "measured again when twice as much is read"
    limits.read(800_000_000, 10.0)
    assert limits.of("loading", "") == INIT_S + 200
    limits.saved(1_000_000, 2.0)
    assert limits.of("saving", "") == SAVE_S + 2
    assert limits.of("exporting", "") == EXPORT_S + 320
    for seconds in (10.0, 40.0, 20.0):
        limits.saved(2_000_000_000, seconds)
    assert limits.of("saving", "") == SAVE_S + 40
    assert limits.of("exporting", "") == EXPORT_S + 640


def test_time_that_was_slept_through_does_not_count() -> None:
    times = iter([0.0, 0.5, 1.0, 3601.0, 3601.5])
    clock = AwakeClock(lambda: next(times))
    assert [clock.look() for _ in range(4)] == [0.5, 1.0, 1.0 + MOST_OF_A_POLL_S, 1.5 + MOST_OF_A_POLL_S]


def test_what_is_told() -> None:
    found = ranks({"all": 7}, {"all": 6})
    slow = [found[0], replace(found[1], part="data", key="data")]
    told = verdict.verdict_of(Guilty((1,)), slow).what
    assert told == (
        "rank 1 on n1 stalls: waiting for its data, after step 119, since 12:03:11 UTC (320 s, more than "
        "watchdog.data_s = 300); the others wait for it"
    )
    told = verdict.verdict_of(Guilty((1,), is_silent=True), found, state="stopped").what
    assert told == (
        "rank 1 on n1 gives no sign of life: its process is stopped; it was training, after step 119, since 12:03:11 UTC"
    )
    assert verdict.verdict_of(Guilty((1,), is_silent=True), [found[0], None]).what.startswith("rank 1 has never said")
    assert verdict.verdict_of(Guilty(()), found).what.startswith("all ranks wait at the same place: none is behind")
    assert verdict.verdict_of(Guilty(()), [HUNG]).what.startswith("this process makes no progress, training")
    longest = verdict.verdict_of(Guilty(()), [found[0], replace(found[1], still_s=400.0)])
    assert (longest.host, longest.still_s) == (None, 400.0), "no node is blamed; the longest stillness is told"
    several = ranks({"all": 7}, {"all": 6}, {"all": 6}, {"all": 6})
    assert "rank 1 on n1 (and ranks 2, 3) stalls" in verdict.verdict_of(Guilty((1, 2, 3)), several).what
    gone = verdict.verdict_of(Guilty((1,), is_silent=True), [found[0], replace(found[1], phase="ended")])
    assert gone.what == "rank 1 on n1 has ended, and the others still wait for it"


def test_one_verdict_and_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    found = verdict.verdict_of(Guilty((1,)), ranks({"all": 7}, {"all": 6}))
    folder = tmp_path / verdict.FOLDER / "20260102T120000Z-abcd"
    assert verdict.read(folder) is None
    assert verdict.write_first(folder, found)
    assert not verdict.write_first(folder, replace(found, ranks=(0,)))
    assert verdict.read(folder) == found
    attempt = Attempt("12", 1, ("n0", "n1"), 0.0, 0)
    assert nodes.stalled_node(tmp_path, attempt, attempt.nodes) == {"n1": f"made no progress: {found.what}"}
    assert nodes.stalled_node(tmp_path, replace(attempt, restart=0), attempt.nodes) == {}
    (folder / verdict.FILE).write_text(json.dumps({"cut": 1})[:-3])
    assert nodes.stalled_node(tmp_path, attempt, attempt.nodes) == {}


def test_where_a_rank_is() -> None:
    assert replace(HUNG, part="rank 0", step=None).where == "waiting for rank 0"
    assert replace(HUNG, part="").where == "training, after step 119"
    for still_s, is_over in ((299.9, False), (300.0, True)):
        assert replace(HUNG, still_s=still_s).is_over == is_over


def test_records(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats" / "start"
    write(folder, replace(HUNG, rank=1, collectives={"all": 3}))
    assert read_all(folder, 2) == [None, replace(HUNG, rank=1, collectives={"all": 3})]
    forget(folder, 1)
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_of_a_stall() -> None:
    assert exit_code({0: 8, 1: -9}) == 8
    assert exit_code({0: 8, 1: 1, 2: -15}) == 8
    assert exit_code({0: 8, 1: 5}) == 5, "the failure of one is why the others wait"
    assert nodes.crashed_node({"n0": 8, "n1": 8}) == {}
