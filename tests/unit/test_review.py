"""Blind reviews: which answers are compared, what is kept of a choice, and what it comes to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from sft_dist.cli.app import app
from sft_dist.errors import ConfigError
from sft_dist.pages.answer import NO_VISIBLE_TEXT
from sft_dist.review.pairs import Pair, read_comparison
from sft_dist.review.server import ReviewServer
from sft_dist.review.votes import Tally, Votes
from tests.helpers.browser import browser, needs_browser


def write(file: Path, *lines: tuple[str, str], **more: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    made = [{"prompt": p, "answer": a, "reference": f"right {p}", **more} for p, a in lines]
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in made)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "support"
    write(folder / "eval/answers-base.jsonl", *((f"東京 {n}", f"base {n}") for n in range(6)), ("same", "x"))
    write(folder / "eval/answers-tuned.jsonl", *((f"東京 {n}", f"tuned {n}") for n in range(6)), ("same", "x "))
    return folder


def test_what_is_compared(run: Path, tmp_path: Path) -> None:
    found = read_comparison(run)
    assert found.names == ("base", "support")
    assert [pair.answers for pair in found.pairs] == [(f"base {n}", f"tuned {n}") for n in range(6)]
    assert (found.num_equal, found.pairs[0].reference) == (1, "right 東京 0")
    assert read_comparison(run / "eval").pairs == found.pairs

    for step in (0, 10, 20):
        write(tmp_path / "sampled/samples.jsonl", ("東京 1", f"at {step}"), step=step)
    assert read_comparison(tmp_path / "sampled").pairs[0].answers == ("at 0", "at 20")
    [pair] = read_comparison(run, tmp_path / "sampled").pairs
    assert pair.answers == ("tuned 1", "at 20")


def test_what_cannot_be_compared_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        read_comparison(tmp_path)
    with pytest.raises(ConfigError, match="is no folder here"):
        read_comparison(run, tmp_path / "nowhere")
    (tmp_path / "empty/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "empty/config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="has no answers before and after training"):
        read_comparison(tmp_path / "empty")
    with pytest.raises(ConfigError, match="has no answers"):
        read_comparison(run, tmp_path / "empty")
    write(tmp_path / "other/samples.jsonl", ("another", "x"), step=0)
    with pytest.raises(ConfigError, match="no prompt in common"):
        read_comparison(run, tmp_path / "other")
    (run / "eval/answers-base.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(ConfigError, match=r"answers-base\.jsonl:1 is no answer"):
        read_comparison(run)


def test_ctrl_c_ends_with_the_tally(run: Path) -> None:
    """However often it comes."""
    command = [sys.executable, "-m", "sft_dist", "review", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = [process.stdout.readline(), process.stdout.readline()]
            assert said[1].startswith("open http://127.0.0.1:"), said
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.05)
            rest = process.stdout.read()
            assert process.wait(timeout=20) == 0, rest
            expected = "support better: 0, base better: 0, both good: 0, neither good: 0, not looked at: 6"
            assert rest.split("\n") == ["", expected, ""]
        finally:
            process.kill()


def test_equal_answers_need_no_page(run: Path) -> None:
    (run / "eval/answers-tuned.jsonl").write_bytes((run / "eval/answers-base.jsonl").read_bytes())
    said = CliRunner().invoke(app, ["review", str(run)])
    assert (said.exit_code, said.output) == (0, "all 7 pairs of answers are equal: there is nothing to choose\n")


def test_an_answer_that_shows_nothing_is_named(run: Path, tmp_path: Path) -> None:
    (run / "eval/answers-tuned.jsonl").unlink()
    write(run / "eval/answers-tuned.jsonl", *((f"東京 {n}", " \n\u200b") for n in range(6)))
    comparison = read_comparison(run)
    server = ReviewServer(comparison, Votes(tmp_path / "v.jsonl", seed=0), seed=0, port=0)
    try:
        shown = {text for pair in server.state()["pairs"] for text in (pair["left"], pair["right"])}
    finally:
        server._server._server.server_close()
    assert shown == {NO_VISIBLE_TEXT, *(f"base {n}" for n in range(6))}


def test_the_question_is_shown_and_the_prompt_compared(tmp_path: Path) -> None:
    for step in (0, 10):
        write(tmp_path / "samples.jsonl", ("<user>Why?<assistant>", f"at {step}"), step=step, question="Why?")
    comparison = read_comparison(tmp_path)
    server = ReviewServer(comparison, Votes(tmp_path / "v.jsonl", seed=0), seed=0, port=0)
    server._server._server.server_close()
    assert (comparison.pairs[0].prompt, server.state()["pairs"][0]["prompt"]) == ("<user>Why?<assistant>", "Why?")


def test_sides_are_chance_and_stay(run: Path) -> None:
    many = [Pair(f"{n}", ("a", "b"), None) for n in range(400)]
    swapped = [pair.is_swapped(7) for pair in many]
    assert swapped == [pair.is_swapped(7) for pair in many] != [pair.is_swapped(8) for pair in many]
    assert 150 < sum(swapped) < 250


def test_choices_are_kept_taken_back_and_counted(run: Path, tmp_path: Path) -> None:
    comparison, file = read_comparison(run), tmp_path / "review.jsonl"
    votes = Votes(file, seed=3)
    for number, pair in enumerate(comparison.pairs[:5]):
        second_side = "left" if pair.is_swapped(3) else "right"
        votes.choose(pair, ["tie", "bad", second_side, second_side, "left"][number])  # type: ignore[arg-type]
    votes.choose(comparison.pairs[4], None)
    with file.open("a") as cut:
        cut.write('{"pair": "')
    again = Votes(file, seed=3)
    assert again.by_pair == votes.by_pair
    assert again.tally(comparison) == Tally(first=0, second=2, tie=1, bad=1, open=2)
    again.choose(comparison.pairs[5], "bad")
    assert Votes(file, seed=3).tally(comparison).open == 1, "behind a line that was cut short"
    noted = [json.loads(line) for line in file.read_text().splitlines()[:5]]
    assert [line["better"] for line in noted[:4]] == [None, None, "second", "second"]
    side = "left" if comparison.pairs[2].is_swapped(3) else "right"
    assert noted[2][side] == "tuned 2"


def test_choices_count_for_whom_they_were_with_any_seed(run: Path, tmp_path: Path) -> None:
    comparison, file = read_comparison(run), tmp_path / "review.jsonl"
    votes = Votes(file, seed=0)
    for pair in comparison.pairs:
        votes.choose(pair, "left" if pair.is_swapped(0) else "right")
    assert len({pair.is_swapped(0) == pair.is_swapped(5) for pair in comparison.pairs}) == 2
    assert Votes(file, seed=5).tally(comparison) == votes.tally(comparison) == Tally(0, 6, 0, 0, 0)
    assert Votes(file, seed=5).by_pair != votes.by_pair


def test_texts_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        write(tmp_path / f"answers-{name}.jsonl", ("one\u2028two", f"{name}\x85\u2029"), ("next", name))
    comparison = read_comparison(tmp_path)
    assert comparison.pairs[0].answers == ("base\x85\u2029", "tuned\x85\u2029")
    for pair in comparison.pairs:
        Votes(tmp_path / "review.jsonl", seed=0).choose(pair, "tie")
    assert Votes(tmp_path / "review.jsonl", seed=0).tally(comparison).tie == 2


@pytest.mark.parametrize(("first", "second"), [(3, 9), (0, 5), (40, 60), (7, 7)])
def test_the_figures_are_those_of_scipy(first: int, second: int) -> None:
    tally = Tally(first=first, second=second, tie=4, bad=1, open=0)
    reference = binomtest(second, first + second)
    interval = reference.proportion_ci(method="wilson")
    assert tally.share() == pytest.approx((second / (first + second), interval.low, interval.high), abs=1e-6)
    assert tally.chance() == pytest.approx(reference.pvalue)
    assert Tally(0, 0, 1, 1, 1).share() is Tally(0, 0, 1, 1, 1).chance() is None


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Iterator[ReviewServer]:
    made = ReviewServer(read_comparison(run), Votes(tmp_path / "review.jsonl", seed=0), seed=0, port=0)
    threading.Thread(target=made.serve, daemon=True).start()
    yield made
    made.close()


def ask(server: ReviewServer, path: str, *, body: Any = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}",
        headers=headers,
        data=None if body is None else json.dumps(body).encode(),
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_only_the_page_of_this_start_is_answered(server: ReviewServer) -> None:
    key = {"X-Key": server.key}
    assert ask(server, "/")[0] == ask(server, "/?key=wrong")[0] == ask(server, "/state")[0] == 403
    assert ask(server, "/state", **key, Host="evil.example")[0] == 403
    assert ask(server, f"/?key={server.key}", Host="evil.example")[0] == 403
    assert ask(server, "/choose", body={"pair": "x", "choice": "left"})[0] == 403
    assert ask(server, "/choose", body={"pair": "x", "choice": "left"}, **key)[0] == 400
    status, text = ask(server, "/state", **key)
    assert status == 200
    assert "base" not in {key for pair in json.loads(text)["pairs"] for key in pair}
    assert ask(server, "/result", **key, Host="evil.example")[0] == 403
    with pytest.raises(ConfigError, match="cannot be used"):
        ReviewServer(server._comparison, server._votes, seed=0, port=server.port)


def test_the_page_gets_the_sides_of_the_seed_and_not_whose_they_are(server: ReviewServer, run: Path) -> None:
    key, pairs = {"X-Key": server.key}, read_comparison(run).pairs
    assert len({pair.is_swapped(0) for pair in pairs}) == 2
    seconds = ["left" if pair.is_swapped(0) else "right" for pair in pairs]
    for pair, side in zip(pairs[:5], seconds, strict=False):
        assert ask(server, "/choose", body={"pair": pair.id, "choice": side}, **key)[0] == 200
    state = json.loads(ask(server, "/state", **key)[1])
    assert set(state) == {"pairs", "equal"}
    assert all(set(each) == {"id", "prompt", "reference", "left", "right", "choice"} for each in state["pairs"])
    assert [each["choice"] for each in state["pairs"]] == [*seconds[:5], None]
    assert [each[side] for each, side in zip(state["pairs"], seconds, strict=True)] == [p.answers[1] for p in pairs]
    result = json.loads(ask(server, "/result", **key)[1])
    assert (result["names"], result["first"], result["second"], result["open"]) == (["base", "support"], 0, 5, 1)
    assert "support" not in ask(server, f"/?key={server.key}")[1]


@needs_browser
@pytest.mark.ci
def test_the_page_in_a_browser(server: ReviewServer, run: Path, tmp_path: Path) -> None:
    class Address:
        def as_uri(self) -> str:
            return server.address

    def press(key: str) -> None:
        tab.ask("Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else "")
        tab.ask("Input.dispatchKeyEvent", type="keyUp", key=key)

    def wait_for(expression: str) -> None:
        until = time.monotonic() + 20
        while not tab.run(expression):
            assert time.monotonic() < until, expression

    with browser(tmp_path) as tab:
        tab.open(Address())  # type: ignore[arg-type]
        wait_for("document.getElementById('place').textContent === '1 of 6, 0 looked at'")
        assert tab.run("document.getElementById('prompt').textContent") == "東京 0"
        press("1")
        wait_for("document.getElementById('place').textContent === '2 of 6, 1 looked at'")
        press("ArrowLeft")
        wait_for("document.getElementById('c-left').getAttribute('aria-pressed') === 'true'")
        press("u")
        wait_for("document.getElementById('place').textContent === '1 of 6, 0 looked at'")
        tab.run("document.getElementById('c-tie').click()")
        wait_for("document.getElementById('place').textContent === '2 of 6, 1 looked at'")
        for number in range(2, 7):
            press("4")
            wait_for(f"document.getElementById('bar').value === {number}")
        wait_for("!document.getElementById('result').hidden")
        assert "support" in tab.run("document.getElementById('result').textContent")
        (tmp_path / "light.png").write_bytes(tab.picture())
        tab.open(Address(), width=390, dark=True)  # type: ignore[arg-type]
        wait_for("document.getElementById('place').textContent.endsWith('6 looked at')")
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.complaints == []
        assert {request.split("/")[2] for request in tab.requests} == {f"127.0.0.1:{server.port}"}
        (tmp_path / "phone.png").write_bytes(tab.picture())
    kept = Votes(tmp_path / "review.jsonl", seed=0)
    assert kept.tally(read_comparison(run)).open == 0
    assert list(kept.by_pair.values()).count("tie") == 1
