"""A report says what the files of a run say, whatever moment they are of, and nothing that is secret."""

from __future__ import annotations

import io
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_dist.cluster.verdict import Verdict
from sft_dist.errors import ConfigError
from sft_dist.report.axes import labels, logarithmic, short, straight
from sft_dist.report.beside import Page, _environment
from sft_dist.report.chart import Chart, Line, draw
from sft_dist.report.charts import cumulative, score_charts, score_name, score_title, told_of
from sft_dist.report.command import REPORT, unfinished_page, write_report
from sft_dist.report.compare import compare, comparison_json, differences, names_of, read_reports
from sft_dist.report.compare_page import comparison_charts, render_comparison
from sft_dist.report.compare_terminal import comparison_table
from sft_dist.report.compare_words import facts
from sft_dist.report.headline import headline
from sft_dist.report.metrics import parse_metrics
from sft_dist.report.model import ReportData
from sft_dist.report.page import ScoreRow, change, render
from sft_dist.report.read import ask_nobody, read_report
from sft_dist.report.redact import HIDDEN, is_secret, redacted, redacted_text
from sft_dist.report.samples import parse_samples
from sft_dist.report.series import curve, evenly, smoothed
from tests.helpers import report_folders, run_folders
from tests.helpers.report_folders import SECRETS, SETTINGS, lines, whole_run, write_metrics
from tests.helpers.run_folders import CLOCK, put

HOSTILE = '</script><script>alert(1)</script>& "quotes" <b>bold</b>'

MAX_BYTES = 2_000_000


def read(folder: Path) -> ReportData:
    return read_report(folder, clock=CLOCK, ask=ask_nobody)


def page(folder: Path) -> str:
    return render(read(folder))


def values_of(html: str, key: str) -> dict[str, Any]:
    """What the chart of this key has for its script."""
    figure = html.partition(f'id="chart-{key}"')[2]
    found: dict[str, Any] = json.loads(re.findall(r'class="values">(.*?)</script>', figure, re.S)[0])
    return found


def text_of(html: str) -> str:
    """Words that a reader sees, without markup."""

    class Words(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []
            self.hidden = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.hidden += tag in ("script", "style")

        def handle_endtag(self, tag: str) -> None:
            self.hidden -= tag in ("script", "style")

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                self.words.append(data)

    parser = Words()
    parser.feed(html)
    return " ".join(" ".join(parser.words).split())


# the page


def test_the_page_has_the_figures_of_the_files(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "support", steps=300)
    html = page(folder)
    written = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in written if "loss" in line]
    for key, column in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "grad_norm"), ("tokens_per_s", "tokens_per_s")):
        drawn = values_of(html, key)["lines"][0]
        assert drawn["x"]["steps"] == [line["step"] for line in trained]
        assert drawn["mean"] == pytest.approx([line[column] for line in trained], rel=1e-6)
    [dots] = values_of(html, "loss")["dots"]
    evaluated = [line for line in written if "eval_loss" in line]
    assert list(zip(dots["x"]["steps"], dots["y"], strict=True)) == [
        (line["step"], pytest.approx(line["eval_loss"])) for line in evaluated
    ]
    words = text_of(html)
    assert "Finished after 300 steps, final/ is proven" in words
    for said in (
        "8 x NVIDIA H100 80GB HBM3, fsdp2", "Step 3.90 s 4.10 s 1.05", "Peak memory of a GPU 63.0 GiB 61.2 GiB 0.97",
        "support.jsonl train 48,210 19.8 M 32%", "rows that are in the set before, word for word", "stopped by SIGTERM, saved",
        "150 skipped left out: a spike (loss 9.1000, median 0.9000, rank 1)", "torch", "2.13.0+cu130", "bleu", "+27",
        "Base, before training", "evaluating 2 min", "Packs are 100% full",
    ):  # fmt: skip
        assert said in words, said
    sessions = json.loads((folder / "receipt.json").read_text())["sessions"]
    spent = sum(each["cost_usd"] for each in sessions)
    assert f"In all {sum(each['elapsed_s'] for each in sessions) / 3600:.2f} ${spent:.2f} ¥{spent * 150:,.0f}" in words
    marks = values_of(html, "loss")["marks"]
    assert [mark["x"]["steps"] for mark in marks] == [100, 200, 300, 100, 150]
    assert [mark["text"][:10] for mark in marks] == ["checkpoint"] * 3 + ["start 2", "skipped: l"]


def test_nothing_on_the_page_has_an_address(tmp_path: Path) -> None:
    html = page(whole_run(tmp_path / "a", steps=60))
    assert not re.findall(r"""(?:src|href)=["'](?!#)|url\(|@import|https?://""", html)
    assert html.count("<script>") == 1
    assert "default-src 'none'" in unescape(html)
    assert '<blockquote lang="ja">' in html
    assert len(re.findall("<h1", html)) == 1
    assert "<main" in html


def test_no_secret_is_on_a_page(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "a", steps=30)
    other = whole_run(
        tmp_path / "b", steps=30, settings={**SETTINGS, "cluster": {"environment": {"MY_VARIABLE": "b-secret"}}}
    )
    comparison = compare([read(folder), read(other)])
    for text in (page(folder), render_comparison(comparison), comparison_json(comparison)):
        assert not [secret for secret in (*SECRETS.values(), "b-secret") if secret in text]
    assert SETTINGS["model"]["revision"] in page(folder)


def test_texts_of_a_run_are_texts(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "<i>name</i>", steps=30)
    report_folders.answers(folder, (0, 30), hostile=HOSTILE)
    write_metrics(folder, [*lines(30), {"step": 4, "event": HOSTILE, "why": HOSTILE},
                           {"step": 30, f"eval_{HOSTILE}": 1.0}, {"step": 31, f"eval_{HOSTILE}": 2.0}])  # fmt: skip
    html = page(folder)
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "<b>bold" not in html
    assert "<i>name" not in html
    for found in re.findall(r'class="values">(.*?)</script>', html, re.S):
        json.loads(found)


# runs of every age


def test_a_run_in_its_first_minute(tmp_path: Path) -> None:
    run_folders.beat(tmp_path, phase="loading", step=0, num_steps=900, step_at=None, step_s=None)
    words = text_of(page(tmp_path))
    assert "Loading the model" in words
    assert "No step has been measured yet." in words
    assert "Nothing is written down yet." in words
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("model: [", encoding="utf-8")
    assert "Config.yaml cannot be read" in text_of(page(tmp_path))


def test_a_run_that_waits_for_somebody_is_marked_as_trouble(tmp_path: Path) -> None:
    run_folders.submitted(tmp_path)
    for reason, style in (("Priority", "plain"), ("JobHeldAdmin", "error")):
        found = read_report(
            tmp_path, clock=CLOCK, ask=lambda _, reason=reason: run_folders.job("PENDING", reason=reason)
        )
        assert found.status.verdict.kind == "waiting"
        assert f'class="panel verdict {style}"' in render(found)


def test_a_killed_run(tmp_path: Path) -> None:
    folder = whole_run(tmp_path, steps=120, finished=False)
    write_metrics(folder, lines(120), cut='{"step": 121, "lo')
    run_folders.beat(folder, ago_s=5000, step=120, num_steps=240)
    html = page(folder)
    words = text_of(html)
    assert "No sign of life" in words
    assert "cut short" in words
    assert "cannot be read" not in words
    assert values_of(html, "loss")["lines"][0]["x"]["steps"][-1] == 120


def test_a_long_error_has_a_short_headline(tmp_path: Path) -> None:
    folder = whole_run(tmp_path, steps=60, finished=False)
    rows = ", ".join(f"/shared/data/support-{n}.jsonl:{n}" for n in range(5))
    error = (
        f"step 60: loss nan, gradient norm nan, seen by rank 3 on node17, first in {rows}; its batch is in diverged/"
    )
    run_folders.beat(folder, phase="failed", step=60, num_steps=120, exit_code=6, what=error)
    html = page(folder)
    title = re.findall("<h1>(.*?)</h1>", html)
    assert title == ["Failed with 6 (diverged) at step 60 of 120: step 60: loss nan"]
    assert unescape(html).count(f'<p class="whole">S{error[1:]}</p>') == 1
    assert headline(Verdict("failed", "failed with 2: no such file")) == ("failed with 2: no such file", "")
    assert headline(Verdict("failed", "failed with 1: " + "a word " * 40))[0].endswith("a word …")
    assert headline(Verdict("working", "training: " + "a, " * 60))[1] == ""


def test_a_run_has_one_speed_on_all_pages(tmp_path: Path) -> None:
    """Also one whose last step is much faster than the others."""
    ended, going = whole_run(tmp_path / "ended", steps=60), whole_run(tmp_path / "going", steps=60, finished=False)
    for folder in (ended, going):
        written = [each for each in lines(60) if "loss" in each]
        written[-1] |= {"num_tokens": 900, "step_time_s": 0.01, "tokens_per_s": 90_000.0}
        write_metrics(folder, written)
    reports = [read(ended), read(going)]
    steady = list(map(json.loads, (going / "metrics.jsonl").read_text().splitlines()))[2:]
    mean = sum(each["num_tokens"] for each in steady) / sum(each["step_time_s"] for each in steady)
    assert [each.tokens_per_s for each in reports] == [15_900.0, pytest.approx(mean)]
    rows = compare(reports).rows
    for report, row in zip(reports, rows, strict=True):
        assert report.tokens_per_s is not None
        assert row.tokens_per_s == report.tokens_per_s
        assert {each.name: each for each in report.compared}["Tokens a second"].actual == report.tokens_per_s
        assert f"{report.tokens_per_s:,.0f} tokens/s, mean" in text_of(render(report))


def test_events_are_told_in_words() -> None:
    written = [
        {"step": 3, "event": "rolled_back", "because": "spike", "of_step": 4, "ranks": [1], "of_loss": 7.5},
        {"step": 4, "event": "skipped", "because": "rolled_back", "of_step": 4},
        {"step": 9, "event": "early_stopping", "early_stopping/fired": 1, "early_stopping/best_step": 6},
    ]
    told = [each.told for each in parse_metrics(json.dumps(line).encode() + b"\n" for line in written).events]
    assert told == [
        "step 4 left out: a spike (loss 7.5000, rank 1); back to step 3",
        "left out: the run had gone back because of it",
        "fired 1, best step 6",
    ]


def test_a_run_that_goes_on_is_compared_by_its_forecast(tmp_path: Path) -> None:
    folder = whole_run(tmp_path, steps=120, finished=False)
    rows = {row.name: row for row in read(folder).compared}
    ahead = read(folder).status.forecast
    assert ahead is not None
    assert rows["Time"].is_forecast
    assert rows["Time"].actual == ahead.total_s
    assert "(forecast of the whole)" in text_of(page(folder))
    assert rows["Step"].actual == statistics.median([line["step_time_s"] for line in lines(120) if "loss" in line][2:])


def test_what_the_page_says_of_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = whole_run(tmp_path, steps=120, finished=False)
    written = [line | {"mfu": 0.2 + 0.1 * (line["step"] > 60)} if "loss" in line else line for line in lines(120)]
    for line in written[1:4]:
        line["step_time_s"] = 90.0
    write_metrics(folder, written)
    receipt = json.loads((folder / "receipt.json").read_text())
    del receipt["planned"]["total_s"]
    put(folder / "receipt.json", json.dumps(receipt | {"planned": receipt["planned"] | {"total_s": 7200}}), ago_s=600)
    found = read(folder)
    rows = {row.name: row for row in found.compared}
    assert found.restarts == [40], "behind the step that was the last before it"
    assert (rows["Peak memory of a GPU"].actual, rows["USD"].planned) == (61.2 * 2**30, 20.0)
    assert rows["Step"].ratio == pytest.approx(rows["Step"].actual / 3.9)  # type: ignore[operator]
    words = text_of(page(folder))
    assert "MFU 25%" in words, "a mean, as the speed"
    assert "32% of them supervised" in words
    assert "goes on" in words
    assert "cut short" not in words
    assert 'class="panel verdict good"' in page(folder)
    assert "Step 0 is the base" in words


def test_the_first_steps_of_a_process_are_no_speed(tmp_path: Path) -> None:
    folder = whole_run(tmp_path, steps=5, finished=False)
    written = [line for line in lines(5) if "loss" in line]
    for line, seconds in zip(written, (90.0, 80.0, 4.0, 4.5, 5.0), strict=True):
        line["step_time_s"] = seconds
    write_metrics(folder, written)
    assert {row.name: row.actual for row in read(folder).compared}["Step"] == 4.5


def test_answers_on_the_page_are_the_first_and_the_last(tmp_path: Path) -> None:
    write_metrics(tmp_path, lines(30))
    said = [
        {"step": step, "sample": 0, "prompt": "질문입니다" * 500, "answer": f"said at {step}"} for step in (10, 20, 30)
    ]
    put(tmp_path / "samples.jsonl", "".join(json.dumps(each) + "\n" for each in said), ago_s=1)
    html = page(tmp_path)
    words = text_of(html)
    assert "Base, before training" not in words
    assert re.search(r"Step 10 said at 10 Step 30 said at 30", words)
    assert '<p class="prompt" lang="ko">' in html
    assert "(500 more characters)" in words


def test_one_step(tmp_path: Path) -> None:
    write_metrics(tmp_path, lines(1, every=9)[1:2])
    drawn = values_of(page(tmp_path), "loss")
    assert drawn["lines"][0]["x"]["steps"] == [1]
    assert drawn["views"]["steps linear"]["x"] == [0, 1]


@pytest.mark.parametrize("which", ["some", "all"])
def test_losses_that_are_not_finite(tmp_path: Path, which: str) -> None:
    written = [line for line in lines(60) if "loss" in line]
    for line in written:
        if which == "all" or line["step"] in (20, 21):
            line |= {"loss": None, "grad_norm": None, "non_finite": ["loss", "grad_norm"]}
    write_metrics(tmp_path, written)
    html = page(tmp_path)
    drawn = values_of(html, "loss")["lines"][0]
    broken = range(1, 61) if which == "all" else (20, 21)
    assert [step for step, v in zip(drawn["x"]["steps"], drawn["mean"], strict=True) if v is None] == list(broken)
    assert f"{len(broken)} not finite" in text_of(html)
    assert 'class="broken"' in html


@pytest.mark.parametrize("steps", [10_000, pytest.param(100_000, marks=pytest.mark.ci)])
def test_many_steps_make_a_small_page_that_hides_no_spike(tmp_path: Path, steps: int) -> None:
    trained = [line for line in lines(2000, every=500) if "loss" in line]
    written = [{**trained[i % 2000], "step": i + 1} for i in range(steps)]
    written[7_777] = {**written[7_777], "loss": 25.0}
    write_metrics(tmp_path, written)
    started = time.process_time()
    html = page(tmp_path)
    print(f"{steps:,} steps: {time.process_time() - started:.2f} s, {len(html.encode()):,} bytes")
    assert len(html.encode()) < MAX_BYTES
    drawn = values_of(html, "loss")["lines"][0]
    each = steps // 500
    assert drawn["of"] == each
    assert max(drawn["high"]) == 25.0
    first = [line["loss"] for line in written[:each]]
    assert (drawn["mean"][0], drawn["low"][0], drawn["high"][0]) == pytest.approx(
        (statistics.fmean(first), min(first), max(first)), rel=1e-6
    )


def test_a_full_run_of_any_kind_is_below_the_limit(tmp_path: Path) -> None:
    folder = whole_run(tmp_path, steps=1200)
    many = [{"step": step, "sample": n, "prompt": "質問" * 4000, "answer": "答え" * 4000, "reference": None}
            for step in range(8) for n in range(30)]  # fmt: skip
    put(folder / "samples.jsonl", "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in many), ago_s=1)
    html = page(folder)
    assert "The first 24 of 30 prompts." in text_of(html)
    assert "more characters" in html
    assert len(html.encode()) < MAX_BYTES


# reading


def parsed(*written: dict[str, Any]) -> Any:
    return parse_metrics([json.dumps(each).encode() + b"\n" for each in written])


def test_a_step_that_was_trained_again_counts_once() -> None:
    found = parsed(*({"step": s, "loss": s / 10} for s in (1, 2, 3, 4)), {"step": 2, "event": "rolled_back"},
                   {"step": 3, "loss": 9.0})  # fmt: skip
    assert found.steps == (1, 2, 3)
    assert found.column("loss") == (0.1, 0.2, 9.0)
    assert [(event.step, event.name) for event in found.events] == [(2, "rolled_back")]


def test_a_held_out_loss_that_is_no_number_is_a_warning(tmp_path: Path) -> None:
    run_folders.training(tmp_path)
    assert "not finite" not in text_of(page(tmp_path))
    broken = {"step": 110, "eval_loss": None, "eval_perplexity": None, "non_finite": ["eval_loss", "eval_perplexity"]}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(broken) + "\n")
        file.write(json.dumps({"step": 110, "event": "non_finite_evaluation", "of_metrics": "eval_loss"}) + "\n")
    shown = text_of(page(tmp_path))
    assert (
        "The loss on held-out rows is not finite in 1 of 3 evaluations, that of step 110; none of them counts as an "
        "improvement." in shown
    )
    assert "non finite evaluation" in shown, "among the events"


def test_time_never_goes_back_and_scores_of_a_step_belong_together() -> None:
    found = parsed(*({"step": s, "loss": 1.0, "elapsed_s": 3600.0 * h} for s, h in ((1, 1), (2, 5), (3, 4))),
                   {"step": 3, "eval_loss": 2.0}, {"step": 3, "eval_scores/bleu": 9.0})  # fmt: skip
    assert cumulative(found)["hours"] == (1, 5, 5)
    assert [(each.step, each.scores) for each in found.evaluations] == [
        (3, {"eval_loss": 2.0, "eval_scores/bleu": 9.0})
    ]
    assert score_charts(found) == [], "one value is no curve"


def test_lines_that_nobody_understands() -> None:
    whole = b'{"step": 1, "loss": 2.0}\n'
    found = parse_metrics([whole, b"{\n", b"[]\n", b'{"loss": 1}\n', b"\n", b'{"step": 2, "loss": 1'])
    assert (found.steps, found.unread) == ((1,), 3)
    assert math.isnan(parsed({"step": 1, "loss": None, "non_finite": ["loss"]}).column("loss")[0])
    assert parsed({"step": 1, "loss": 1}).column("lr") == (None,)


def test_samples_are_gathered_by_prompt() -> None:
    written = [{"step": step, "sample": n, "prompt": f"p{n}", "answer": f"a{step}", "reference": "r", "finish_reason": end}
               for step, n, end in ((0, 1, "length"), (10, 1, "stop"), (0, 0, "stop"), (10, 1, "length"))]  # fmt: skip
    found, unread = parse_samples([*(json.dumps(each).encode() + b"\n" for each in written), b'{"step": 1}\n', b"{"])
    assert unread == 1
    assert [(s.number, s.prompt, [(a.step, a.is_cut) for a in s.answers]) for s in found] == [
        (0, "p0", [(0, False)]), (1, "p1", [(0, True), (10, True)])
    ]  # fmt: skip


# pictures


def test_the_question_is_shown_without_its_template() -> None:
    line = {"step": 0, "sample": 0, "prompt": "<user>Why?<assistant>", "answer": "So.", "question": "Why?"}
    (sample,), _ = parse_samples([json.dumps(line).encode() + b"\n"])
    assert sample.prompt == "Why?"


def test_a_smoothed_curve_is_not_above_a_falling_one() -> None:
    falling = [100.0 - i for i in range(100)]
    assert smoothed(falling)[:50] == pytest.approx(falling[:50])
    assert smoothed([1.0] * 19) == []
    with_hole = smoothed([1.0] * 10 + [math.nan, None] + [1.0] * 10)
    assert with_hole == [1.0] * 10 + [None, None] + [1.0] * 10
    assert smoothed([math.nan] * 30) == [None] * 30


def test_curves_are_exact_where_they_can_be() -> None:
    few = curve({"steps": range(5)}, [1.0, None, math.nan, 4.0, 5.0])
    assert few.is_exact
    assert few.mean == (1.0, None, None, 4.0, 5.0)
    assert few.broken == {"steps": (2,)}
    many = curve({"steps": range(10)}, list(map(float, range(10))), max_points=4)
    assert (many.of_steps, many.low, many.high) == (3, (0, 3, 6, 9), (2, 5, 8, 9))
    assert many.x == {"steps": (2, 5, 8, 9)}


@pytest.mark.parametrize(
    "figures", [[1.0, 2.6], [0.0], [5.0, 5.0], [1e-9, 3e4], [-3.0, 2.0], [2e-4, 2.01e-4], [1e9, 1e9 + 1], []]
)
def test_axes_have_room_for_their_figures(figures: list[float]) -> None:
    for axis in filter(None, (straight(figures), logarithmic(figures))):
        assert axis.low < axis.high
        assert all(0 <= axis.share(figure) <= 1 for figure in figures if axis.can_show(figure))
        assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in axis.ticks)
        assert len(axis.ticks) <= 12
    assert logarithmic([0.0, -1.0]) is None


def test_places_on_an_axis() -> None:
    line, log = straight([0.0, 10.0], tight=True), logarithmic([1.0, 100.0])
    assert (line.at(2.5), line.at(2.5, upwards=True)) == (250, 750)
    assert log is not None
    assert (log.share(log.low), log.share(log.high)) == (0, 1)
    assert log.share(10.0) == pytest.approx(0.5)
    assert straight([0, 3], whole=True, tight=True).ticks == (0, 1, 2, 3)


def test_what_is_drawn_lies_where_its_figures_say() -> None:
    falling = [math.exp(-i / 20) for i in range(100)]
    made = curve({"steps": range(1, 101)}, falling, max_points=50)
    html = str(draw(Chart("loss", "Loss", "", {"steps": (0.0, 100.0)}, [Line("loss", made)])))
    assert re.findall(r'data-view="([^"]+)"( hidden)?', html) == [("steps linear", ""), ("steps log", " hidden")]
    [line] = values_of(html, "loss")["lines"]
    assert line["smooth"] == pytest.approx(smoothed(falling)[1::2], rel=1e-6)
    assert line["x"]["steps"] == list(range(2, 101, 2))
    for name, share in (("linear", lambda v, a, b: (v - a) / (b - a)),
                        ("log", lambda v, a, b: math.log(v / a) / math.log(b / a))):  # fmt: skip
        view = re.findall(rf'<div class="view" data-view="steps {name}".*?</div>', html, re.S)[0]
        low, high = values_of(html, "loss")["views"][f"steps {name}"]["y"]

        def places(figures: Sequence[float | None], share: Any = share, low: float = low, high: float = high) -> Any:
            return [pytest.approx(1000 * (1 - share(figure, low, high)), abs=0.1) for figure in figures]

        for style, figures in (("raw h0 faint", made.mean), ("smooth h0", made.smooth)):
            [path] = re.findall(rf'class="{style}" d="M(.*?)"', view)
            points = [tuple(map(float, point.split())) for point in path.split("L")]
            assert points == list(zip(range(20, 1001, 20), places(figures), strict=True))
        [band] = re.findall(r'class="band h0" d="M(.*?)Z"', view)
        assert [float(point.split()[1]) for point in band.split("L")] == places([*made.high, *made.low[::-1]])
        ticks = re.findall(r'class="y" style="top:(.*?)%">(.*?)<', view)
        assert len(ticks) > 2
        assert [10 * float(top) for top, _ in ticks] == places([float(figure) for _, figure in ticks])
    few = Chart("few", "Few", "", {"steps": (0.0, 2.0)}, [Line("few", curve({"steps": (1, 2)}, [1.0, 2.0]))])
    assert re.findall(r'class="x.*?>(.*?)<', str(draw(few)))[:3] == ["0", "1", "2"], "no half step"


def test_words() -> None:
    assert [short(v) for v in (0, 0.25, 12_000, 1_500_000, 2e-5, 1.5e-4, 2.5)] == [
        "0", "0.25", "12,000", "1.5 M", "2e-5", "1.5e-4", "2.5"
    ]  # fmt: skip
    assert told_of([1, 2, 3, 4], [2.0, 9.0, 1.0, math.nan]) == (
        "First 2, least 1 at step 3, most 9 at step 2, last 1, 1 not finite."
    )
    names = ["eval_loss", "eval_loss/my_rows", "eval_scores/exact_match", "eval_long_loss", "eval_scores/bleu/my_rows"]
    assert list(map(score_name, names)) == ["loss", "loss: my_rows", "exact_match", "long loss", "bleu/my_rows"]
    assert list(map(score_title, names)) == ["loss", "loss: my_rows", "exact match", "long loss", "bleu: my_rows"]
    changes = [(42_377.0, 2_217.0), (3.0, 2_598.4), (0.25, 0.5), (1.0, 1.0)]
    assert [change(ScoreRow("x", [], *each)) for each in changes] == ["-40,160", "+2,595", "+0.25", "0"]
    assert evenly(3, 10) == [0, 1, 2]
    assert (evenly(100, 5)[0], evenly(100, 5)[-1], len(evenly(100, 5))) == (0, 99, 5)


@pytest.mark.parametrize("figures", [[0.61681, 0.61684], [1e9, 1e9 + 1], [42_377.1, 42_377.4], [2e-5, 2.0001e-5]])
def test_ticks_have_labels_that_differ(figures: list[float]) -> None:
    for axis in filter(None, (straight(figures), logarithmic(figures))):
        said = [label for label in labels(axis.ticks) if label]
        assert said, "one at least"
        assert len(set(said)) == len(said)
    assert labels([0.61681, 0.61682]) == ["0.61681", "0.61682"]
    assert labels([1e9, 1e9 + 1]) == ["1 B", ""]


def test_a_share_that_never_changes_is_drawn_between_its_ends() -> None:
    assert [(axis.low, axis.high) for axis in (straight([0.0, 0.0]), straight([1.0], of_share=True))] == [(0, 1)] * 2
    assert straight([5.0, 5.0], of_share=True).low == 4.5
    metrics = parse_metrics(
        json.dumps({"step": n, "eval_scores/exact_match": 1.0, "eval_scores/bleu": 1.0}).encode() + b"\n"
        for n in (0, 9)
    )
    assert [chart.is_share for chart in score_charts(metrics)] == [True, False]


# secrets


def test_names_of_secrets() -> None:
    secret = (
        "HF_TOKEN",
        "token",
        "WANDB_API_KEY",
        "api_key",
        "apiKey",
        "password",
        "AWS_SECRET_ACCESS_KEY",
        "clientSecret",
        "DB_PWD",
        "ssh_passphrase",
    )
    open_ = (
        "max_tokens",
        "train_tokens",
        "tokens_per_s",
        "keep_last",
        "key_frame",
        "monkey",
        "author",
        "tokenizer",
        "path",
    )
    assert [name for name in secret if not is_secret(name)] == []
    assert [name for name in open_ if is_secret(name)] == []


def test_what_is_hidden_and_what_is_not() -> None:
    key = SECRETS["wandb"]
    settings = {"environment": {"A": "x"}, "a": {"token": "t", "password": 5, "foreign_token": 0.0}, "list": [{"api_key": "k"}],
                "setup": [f"export NAME={key}; wandb login {key}", "curl https://me:pw@host"], "revision": key, "n": 3}  # fmt: skip
    assert redacted(settings) == {
        "environment": {"A": HIDDEN}, "a": {"token": HIDDEN, "password": HIDDEN, "foreign_token": 0.0},
        "list": [{"api_key": HIDDEN}],
        "setup": [f"export NAME={HIDDEN}; wandb login {HIDDEN}", f"curl https://{HIDDEN}@host"], "revision": key, "n": 3,
    }  # fmt: skip
    assert redacted_text(f"failed: {SECRETS['token']} is no token") == f"failed: {HIDDEN} is no token"
    for known in ("xoxb-1234567890-abc", "github_pat_" + "a" * 22, "sk-" + "a" * 20, "wandb_v1_" + "a" * 30):
        assert redacted_text(f"with {known} it failed") == f"with {HIDDEN} it failed"
    assert redacted_text("""PASSWORD="two words" x='y'""") == f"PASSWORD={HIDDEN} x='y'"


def test_messages_names_and_facts_of_a_run_show_no_secret(tmp_path: Path) -> None:
    folder, key = whole_run(tmp_path, steps=30, finished=False), SECRETS["token"]
    run_folders.beat(folder, phase="failed", during="training", what=f"{key} is refused", exit_code=3)
    for name in ("audit.json", "receipt.json"):
        text = (folder / name).read_text().replace('"support.jsonl"', f'"https://me:{key}@host/support.jsonl"')
        (folder / name).write_text(text.replace('"train.seed"', '"hub_token"').replace('"60,000 rows', f'"{key} rows'))
    words = text_of(page(folder))
    assert "is refused" in words
    assert "@host/support.jsonl" in words
    assert "hub_token" in words
    assert key not in page(folder)
    other = whole_run(tmp_path / "other", steps=30)
    assert key not in render_comparison(compare([read(folder), read(other)]))


# side by side


def sweep(folder: Path) -> list[Path]:
    found = []
    for number, steps in enumerate((60, 90)):
        settings = {**SETTINGS, "optim": {"lr": 1e-4 * (number + 1)}, "output_dir": f"runs/{number}"}
        run = whole_run(folder / f"lr-{number}", steps=steps, settings=settings)
        write_metrics(run, lines(steps, seed=number))
        found.append(run)
    return found


def test_a_comparison_has_the_figures_of_each_run(tmp_path: Path) -> None:
    folders = sweep(tmp_path)
    comparison = compare(read_reports(folders, read))
    document = json.loads(comparison_json(comparison))
    for run, folder, steps in zip(document["runs"], folders, (60, 90), strict=True):
        trained = [line for line in lines(steps, seed=folders.index(folder)) if "loss" in line]
        assert run["name"] == folder.name
        assert (run["step"], run["state"], run["strategy"]) == (steps, "finished", "fsdp2")
        assert run["train_loss"] == pytest.approx(statistics.fmean(line["loss"] for line in trained[-10:]))
        assert run["tokens"] == sum(line["num_tokens"] for line in trained)
        assert run["usd"] == pytest.approx((120 + 4.2 * steps) / 360)
        assert run["jpy"] == pytest.approx(run["usd"] * 150)
        assert run["scores"]["bleu"] == 31
        assert run["tokens_per_s"] == 15_900.0, "the receipt's"
        assert run["peak_memory_gib"] == 61.2
        assert run["hours"] == pytest.approx((120 + 4.2 * steps) / 3600)
    assert document["differences"] == {"optim.lr": {"lr-0": "0.0001", "lr-1": "0.0002"}}
    html = render_comparison(comparison)
    drawn = values_of(html, "loss")
    assert [line["hue"] for line in drawn["lines"]] == [0, 1]
    assert list(drawn["counts"]) == ["steps", "tokens", "hours"]
    for line, steps in zip(drawn["lines"], (60, 90), strict=True):
        assert line["x"]["steps"][-1] == steps
        assert line["x"]["tokens"][-1] == document["runs"][drawn["lines"].index(line)]["tokens"]
        assert line["x"]["hours"][-1] == pytest.approx((120 + 4.2 * steps) / 3600, rel=1e-5)
    assert drawn["views"]["steps linear"]["x"] == [0, 90]
    assert not re.findall(r"""(?:src|href)=["'](?!#)|https?://""", html)


def test_the_best_and_the_last_evaluation_are_told_apart(tmp_path: Path) -> None:
    folders = sweep(tmp_path)
    written = [line for line in lines(60) if "loss" in line]
    evaluated = [{"step": step, "eval_loss": loss} for step, loss in ((20, 1.5), (40, 1.0), (60, 1.25))]
    write_metrics(folders[0], sorted([*written, *evaluated], key=lambda line: line["step"]))
    del written[-1]["elapsed_s"]
    write_metrics(folders[1], written)
    comparison = compare(read_reports(folders, read))
    assert (comparison.rows[0].best_eval_loss, comparison.rows[0].last_eval_loss) == (1.0, 1.25)
    told = dict(facts(comparison.rows))
    assert (told["best eval"], told["last eval"]) == (["1.0000", "-"], ["1.2500", "-"])
    assert told["USD"][0] != told["JPY"][0] == f"¥{comparison.rows[0].jpy:,.0f}"
    charts = {chart.key: chart for chart in comparison_charts(comparison.reports, ["a", "b"])}
    assert list(charts["loss"].ends) == ["steps", "tokens"], "not by what one of them did not measure"
    [dots] = charts["eval-loss"].dots
    assert dots.x["steps"] == (20, 40, 60)
    assert dots.x["tokens"][0] == sum(line["num_tokens"] for line in written[:20])
    words = text_of(page(folders[0]))
    assert "1.0000 best evaluation, at step 40" in words
    assert "The base was not evaluated" in words
    assert "-0.25" in words


def test_no_key_is_broken_in_a_narrow_terminal(tmp_path: Path) -> None:
    key = "max_new_tokens_of_every_answer"
    runs = []
    for number in (1, 2):
        settings = {
            **SETTINGS,
            "eval": {"answers": {key: number}},
            "checkpoint": {"mirror": "s3://bucket/" + 30 * str(number)},
        }
        runs.append(read(whole_run(tmp_path / f"support-8b-{number}", steps=9, settings=settings)))
    out = io.StringIO()
    Console(file=out, width=80).print(comparison_table(compare(runs)))
    shown = [line.split()[0] for line in out.getvalue().splitlines() if line.strip()]
    assert {"eval.answers.", key, "checkpoint.mirror"} <= set(shown)
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_runs_without_a_step_are_compared_too(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    run_folders.beat(empty, phase="loading", step=0, step_at=None, step_s=None)
    html = render_comparison(compare([read(empty), read(sweep(tmp_path)[0])]))
    assert "empty" in text_of(html)
    both = tmp_path / "other" / "empty"
    run_folders.beat(both, phase="loading", step=0, step_at=None, step_s=None)
    assert "Curves" not in text_of(render_comparison(compare([read(empty), read(both)])))


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    folder = sweep(tmp_path)[0]
    with pytest.raises(ConfigError, match="given twice"):
        read_reports([folder, tmp_path / "x" / ".." / folder.name], read)
    with pytest.raises(ConfigError, match="compared with none"):
        read_reports([folder], read)
    assert names_of([Path("/a/b/run"), Path("/a/c/run")]) == ["b/run", "c/run"]
    assert differences([{"a": 1, "b": {"c": [1]}}, None, {"b": {"c": [2]}, "a": 1}]) == {"b.c": ("[1]", None, "[2]")}


# beside a run


def test_the_page_is_written_beside_the_run_and_at_its_end(tmp_path: Path) -> None:
    told: list[str] = []
    run_folders.training(tmp_path)
    beside = Page(tmp_path, told.append)
    started = time.perf_counter()
    beside.refresh()
    took_s = time.perf_counter() - started
    assert beside._process is not None
    pid = beside._process.pid
    beside.refresh()  # while the first is at work
    assert beside._process.pid == pid
    beside._process.wait(60)
    first = (tmp_path / REPORT).stat()
    assert first.st_mode & 0o044 == (tmp_path / "metrics.jsonl").stat().st_mode & 0o044
    beside.close()
    assert (tmp_path / REPORT).stat().st_mtime_ns > first.st_mtime_ns
    assert told == []
    assert took_s < 1.0  # a process begins; the rest is beside
    assert not list(tmp_path.glob(".report*"))


def test_what_writes_it_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OF_NO_RANK"):
        monkeypatch.setenv(name, "1")
    kept = _environment()
    assert [name for name in kept if name.startswith(("RANK", "LOCAL", "WORLD", "MASTER", "TORCHELASTIC"))] == []
    assert kept["OF_NO_RANK"] == "1"


def test_a_run_that_has_not_begun_gets_no_page(tmp_path: Path) -> None:
    run_folders.training(tmp_path)
    Page(tmp_path, print).close()
    assert not (tmp_path / REPORT).exists()


@pytest.mark.parametrize("command", [("false",), ("/nowhere/python",)])
def test_a_failure_is_told_once(tmp_path: Path, command: tuple[str, ...]) -> None:
    told: list[str] = []
    beside = Page(tmp_path / "missing", told.append, command=command)
    for _ in range(3):
        beside.refresh()
        if beside._process is not None:
            beside._process.wait(60)
    beside.close()
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path / 'missing' / REPORT} cannot be written")


def test_the_end_does_not_wait_for_one_that_is_at_work(tmp_path: Path) -> None:
    told: list[str] = []
    run_folders.training(tmp_path)
    beside = Page(tmp_path, told.append, command=("sleep", "600"))
    beside.refresh()
    process = beside._process
    assert process is not None
    left = unfinished_page(tmp_path / REPORT, process.pid)
    left.touch()
    beside.close()
    assert process.poll() is not None
    assert (tmp_path / REPORT).exists()
    assert not left.exists()
    assert told == []


def test_a_machine_without_room_for_a_process_ends_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    run_folders.training(tmp_path)
    beside = Page(tmp_path, told.append, command=("true",))
    beside.refresh()
    assert beside._process is not None
    beside._process.wait(60)
    beside._command = ("/nowhere/python",)
    for _ in range(3):
        beside.refresh()
    beside.close()
    assert len(told) == 1
    assert (tmp_path / REPORT).exists()


def test_one_that_hangs_is_ended_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.report.beside.PATIENCE_S", 0.0)
    told: list[str] = []
    run_folders.training(tmp_path)
    beside = Page(tmp_path, told.append, command=("sleep", "600"))
    beside.refresh()
    first = beside._process
    beside.refresh()
    assert first is not None
    assert first.poll() is not None
    assert beside._process is not first
    beside.close()
    assert len(told) == 1
    assert "nothing came of it within 0 s" in told[0]


def test_quick_evaluations_do_not_each_get_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    beside = Page(tmp_path, print, command=(sys.executable, "-S", "-c", busy))
    clock = time.monotonic()
    monkeypatch.setattr("sft_dist.report.beside.time.monotonic", lambda: clock)
    beside.refresh()
    first = beside._process
    assert first is not None
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    clock += 49
    beside.refresh()
    assert beside._process is None, "1 % of a core"
    assert 0.5 <= beside._cpu_s < 0.7
    clock += 31
    beside.refresh()
    assert beside._process is not None
    beside._has_begun = False
    beside.close()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)
