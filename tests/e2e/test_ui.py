"""``sft-dist ui`` in a browser: by keyboard alone, live, with real plans and audits, and for those who hear the page."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from sft_dist.config.text import write_yaml
from sft_dist.ui.server import UiServer
from tests.helpers import run_folders
from tests.helpers.browser import Browser, browser, needs_browser
from tests.helpers.report_folders import whole_run
from tests.helpers.taught import PAIRS, conversation, write_rows

pytestmark = needs_browser

KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}

# Roles of what one operates, which nobody can without a name.
CONTROLS = ("button", "link", "checkbox", "combobox", "ComboBoxMenu", "textbox", "searchbox", "spinbutton", "Iframe")

# Of all texts on the page with less contrast than WCAG 2.2 AA asks of small letters: colour, background, text.
FAINT = """(() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
  const light = ({ r, g, b }) => [r, g, b].map((each) => each / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (each) => {
    for (let place = each; place; place = place.parentElement) {
      const found = parse(getComputedStyle(place).backgroundColor);
      if (found.a === 1) return found;
    }
    return { r: 255, g: 255, b: 255, a: 1 };
  };
  const faint = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].filter((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own.length || !each.checkVisibility() || each.closest("script, option, :disabled")) continue;
    const [one, other] = [light(parse(getComputedStyle(each).color)), light(behind(each))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (other + 0.05);
    if (contrast < 4.5) faint.push(`${contrast.toFixed(2)} ${own[0].textContent.trim().slice(0, 40)}`);
  }
  return faint;
})()"""

TOO_WIDE = """[...document.querySelectorAll('body *')].filter(each => !each.closest('.scroll, .skip, .hidden, svg, pre, template')
    && each.getBoundingClientRect().right > innerWidth + 0.5).map(each => each.outerHTML.slice(0, 90))"""


@dataclass
class Ui:
    """The page of a server, in a tab."""

    tab: Browser
    server: UiServer
    folder: Path

    def open(self, path: str, **window: Any) -> None:
        address = f"http://127.0.0.1:{self.server.port}{path}"

        class Address:
            def as_uri(self) -> str:
                return address

        self.tab.open(Address(), **window)  # type: ignore[arg-type]

    def press(self, key: str, times: int = 1) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        pressed = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        for _ in range(times):
            self.tab.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
            self.tab.ask("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def type(self, text: str) -> None:
        self.tab.ask("Input.insertText", text=text)

    def tab_to(self, selector: str) -> None:
        """With the Tab key, through whatever comes before; each has to be seen to have the focus."""
        for _ in range(120):
            self.press("Tab")
            if self.tab.run(f"document.activeElement.matches({json.dumps(selector)})"):
                ring = self.tab.run("getComputedStyle(document.activeElement).outlineStyle")
                assert ring != "none" or selector == ".skip"
                return
        raise AssertionError(f"the Tab key never comes to {selector}")

    def wait_for(self, expression: str, *, within_s: float = 60) -> Any:
        """While a page comes, what it is asked about is not there yet."""
        ends = time.monotonic() + within_s
        told = f"const found = {expression}; return found && typeof found === 'object' ? true : found"
        while not (found := self.tab.run(f"(() => {{ try {{ {told}; }} catch {{ return null; }} }})()")):
            if time.monotonic() > ends:
                page = self.tab.run("location.href + '\\n' + document.body.innerText.slice(0, 1500)")
                raise AssertionError(f"{expression} is not so: {page}")
            time.sleep(0.05)
        return found

    def text(self, selector: str) -> str:
        return str(self.tab.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Path]:
    """Two runs that are over, one that trains, and configurations: one that can be trained, one with a mistake."""
    root = tmp_path_factory.mktemp("project")
    patched = pytest.MonkeyPatch()
    patched.setattr(run_folders, "NOW", datetime.now(UTC))
    whole_run(root / "runs/support", steps=60)
    whole_run(root / "runs/other", steps=40)
    run_folders.training(root / "runs/live")
    logs = root / "runs/live/logs/first"
    logs.mkdir(parents=True)
    for rank in (0, 1):
        (logs / f"rank-{rank}.log").write_text(f"学習 of rank {rank}\n")
    rows = write_rows(root / "train.jsonl", [conversation(*pair) for pair in PAIRS])
    settings: dict[str, Any] = {
        "model": {"path": str(tiny_base)},
        "data": {"train": [{"path": str(rows)}], "max_seq_len": 128, "cache_dir": str(root / "cache")},
        "train": {"global_batch_size": 3, "micro_batch_size": 1, "max_steps": 5},
        "sharding": {"strategy": "ddp"}, "precision": {"compute": "bf16"}, "hardware": {"gpu": "a100-40gb"},
        "output_dir": str(root / "planned"),
    }  # fmt: skip
    (root / "good.yaml").write_text(write_yaml(settings))
    (root / "wrong.yaml").write_text(write_yaml(settings | {"trian": {"seed": 1}}))
    before = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(before)
    patched.undo()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Ui]:
    server = UiServer(folder, port=0)
    Thread(target=server.serve, daemon=True).start()
    try:
        with browser(tmp_path_factory.mktemp("browser")) as tab:
            ui = Ui(tab, server, folder)
            ui.open(f"/?key={server.key}")
            assert tab.run("location.search") == ""
            yield ui
            own = f"http://127.0.0.1:{server.port}/"
            assert [asked for asked in tab.requests if not asked.startswith((own, "data:"))] == []
    finally:
        server.close()


@pytest.fixture
def ui(page: Ui) -> Iterator[Ui]:
    """Whose console stays empty."""
    page.tab.complaints.clear()
    yield page
    assert page.tab.complaints == []


PAGES = {
    "runs": "/", "run": "/run?run=runs/support", "plan": "/plan", "audit": "/audit", "choose": "/compare",
    "compare": "/compare?run=runs/support&run=runs/other",
}  # fmt: skip


@pytest.mark.parametrize("name", list(PAGES))
def test_a_page_can_be_heard_seen_and_held(ui: Ui, name: str) -> None:
    for window in ({}, {"dark": True}, {"width": 390}):
        ui.open(PAGES[name], **window)
        assert ui.tab.run(FAINT) == [], window
        assert ui.tab.run(TOO_WIDE) == [], window
        assert ui.tab.run("document.documentElement.scrollWidth <= innerWidth")
    nodes = [node for node in ui.tab.ask("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = [node["role"]["value"] for node in nodes]
    for landmark in ("main", "navigation", "banner"):
        assert roles.count(landmark) == 1, landmark
    nameless = [node for node in nodes if node["role"]["value"] in CONTROLS and not node["name"]["value"].strip()]
    assert nameless == []
    levels = [prop["value"]["value"] for node in nodes if node["role"]["value"] == "heading"
              for prop in node["properties"] if prop["name"] == "level"]  # fmt: skip
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels)), levels
    here = ui.tab.run("[...document.querySelectorAll('[aria-current]')].map(each => each.textContent)")
    assert here == [{"run": "Runs", "choose": "Compare"}.get(name, name.capitalize())]
    unnamed = ui.tab.run(
        "[...document.querySelectorAll('table')].filter(each => !each.caption || [...each.querySelectorAll('th')].some(cell => !cell.scope)).length"
    )
    assert unnamed == 0


def test_two_runs_are_compared_by_keyboard_alone(ui: Ui) -> None:
    ui.open("/")
    ui.press("Tab")
    assert ui.tab.run("document.activeElement.className") == "skip"
    ui.press("Enter")
    assert ui.tab.run("document.activeElement.id") == "main"
    for name in ("support", "other"):
        ui.tab.run("document.getElementById('filter').focus()")
        ui.tab_to(f'input[value="runs/{name}"]')
        ui.press(" ")
    ui.tab_to("button.main")
    ui.press("Enter")
    ui.wait_for(
        "document.querySelector('h1').textContent === '2 runs side by side' && document.readyState === 'complete'"
    )
    assert "equal to the bit in the first" in ui.text("main")
    frame = ui.wait_for("document.querySelector('iframe').src")
    assert sorted(parse_qs(urlsplit(frame).query)["run"]) == ["runs/other", "runs/support"]
    ui.open("/compared?run=runs/support&run=runs/other")
    assert ui.tab.run("document.querySelectorAll('figure.chart .switch:not([hidden])').length") > 0
    assert ui.tab.run("origin") == "null"  # a page of a run has no share in what the key opens


def appended(run: Path, *lines: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_run_is_watched_live(ui: Ui) -> None:
    """Without loading anything again: the marker stays."""
    live = ui.folder / "runs/live"
    ui.open("/")
    ui.tab.run("window.marker = 1")
    row = "document.querySelector('tr[data-path=\"runs/live\"]')"
    assert ui.tab.run(f"{row}.querySelector('[data-cell=step]').textContent") == "120 / 900"
    appended(live, {"step": 121, "loss": 0.5, "step_time_s": 14.2, "elapsed_s": 2400})
    ui.wait_for(f"{row}.querySelector('[data-cell=step]').textContent === '121 / 900'")
    assert ui.tab.run(f"{row}.querySelector('[data-cell=loss]').textContent") == "0.5000"
    assert ui.text("#changes") == ""
    assert ui.tab.run("window.marker") == 1

    ui.open("/run?run=runs/live")
    ui.tab.run("window.marker = 1")
    curve = "document.querySelector('#chart-loss .view path.smooth, #chart-loss .view path.raw').getAttribute('d')"
    before = ui.tab.run(curve)
    ui.tab.run("document.querySelector('#chart-loss [data-scale=log]').click()")
    ui.tab.run("document.activeElement.blur()")
    appended(live, {"step": 122, "loss": 0.4, "step_time_s": 14.2, "elapsed_s": 2414}, {"step": 122, "eval_loss": 0.91})
    ui.wait_for(
        f"document.getElementById('chart-loss').textContent.includes('least 0.4 at step 122') && {curve} !== {json.dumps(before)}"
    )
    assert ui.tab.run("document.querySelector('#chart-loss [data-scale=log]').getAttribute('aria-pressed')") == "true"
    ui.wait_for("document.getElementById('changes').textContent.includes('evaluation at step 122: loss 0.9100')")

    # Who reads values keeps the place until the focus goes on.
    ui.tab.run("document.querySelector('#chart-loss .area').focus()")
    appended(live, {"step": 123, "loss": 0.3, "step_time_s": 14.2, "elapsed_s": 2428})
    ui.wait_for("document.getElementById('standing').textContent.includes('123')")
    assert "step 123" not in ui.text("#chart-loss .told")
    ui.tab.run("document.activeElement.blur()")
    ui.wait_for("document.querySelector('#chart-loss .told').textContent.includes('step 123')")

    assert ui.text("#log").strip() == "学習 of rank 0"
    with (live / "logs/first/rank-1.log").open("a") as log:
        log.write("more\n")
    ui.tab.run("document.getElementById('rank').focus()")
    ui.press("ArrowDown")
    ui.wait_for("document.getElementById('log').textContent.includes('of rank 1\\nmore')")
    assert ui.tab.run("window.marker") == 1

    ui.open("/")
    run_folders.beat(live, phase="failed", exit_code=6, what="the loss is not finite", step=123)
    ui.wait_for("document.getElementById('changes').textContent.includes('live: failed')")


@pytest.mark.ci
def test_a_page_that_cannot_be_seen_asks_for_nothing(ui: Ui) -> None:
    ui.open("/")
    asked = len(ui.tab.requests)
    ui.tab.run("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    time.sleep(2.6)
    ui.tab.run("0")
    assert len(ui.tab.requests) == asked
    ui.tab.run("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    time.sleep(0.3)
    ui.tab.run("0")
    assert len(ui.tab.requests) == asked + 1


def chosen(ui: Ui, name: str) -> None:
    ui.tab.run(f"document.getElementById('config').value = {json.dumps(name)}")


def test_a_plan_comes_to_its_verdict(ui: Ui) -> None:
    ui.open("/plan")
    chosen(ui, "good.yaml")
    ui.tab_to("#overrides")
    ui.type("train.max_steps=7\n")
    ui.tab_to("#gpus")
    ui.type("2")
    ui.tab_to("button.main")
    ui.press("Enter")
    ui.wait_for("location.pathname === '/task' && document.readyState === 'complete'")
    command = ui.text("#command + .command code")
    assert re.search(
        r"python\S* -m sft_dist plan good.yaml train.max_steps=7 --gpus 2 --html \S+/result.html$", command
    )
    ui.wait_for("document.querySelector('.outcome')", within_s=120)
    assert ui.text(".outcome .badge") == "done"
    assert "done" in ui.text("#changes")
    assert "Fits on 2 x A100" in ui.text("#output")
    ui.wait_for("document.querySelector('iframe').contentDocument?.querySelector('h1')")
    assert "Fits on 2 x A100" in ui.tab.run(
        "document.querySelector('iframe').contentDocument.querySelector('h1').textContent"
    )
    # As high as what it shows: one scrollbar, and no empty room.
    rest = "(f => f.clientHeight - f.contentDocument.body.scrollHeight)(document.querySelector('iframe'))"
    ui.wait_for(f"Math.abs({rest}) < 8")
    ui.open("/plan")
    assert "Plan of good.yaml" in ui.text("main table")


def test_a_mistake_is_told_in_the_two_lines_of_the_command(ui: Ui) -> None:
    ui.open("/plan?config=wrong.yaml")
    ui.tab_to("button.main")
    ui.press("Enter")
    ui.wait_for("document.querySelector('.outcome')", within_s=120)
    assert ui.text("pre.problem").startswith("error: wrong.yaml: trian is not a key\n  fix: did you mean train")
    assert "exit code 2" in ui.text(".outcome")
    assert ui.tab.run(FAINT) == []
    assert ui.tab.run(TOO_WIDE) == []
    ui.tab.run("document.getElementById('again').click()")
    ui.wait_for("location.pathname === '/plan' && document.getElementById('config')?.value === 'wrong.yaml'")


@pytest.mark.ci
def test_a_command_is_cancelled(ui: Ui) -> None:
    ui.open("/plan?config=good.yaml")
    ui.tab_to("button.main")
    ui.press("Enter")
    ui.wait_for("location.pathname === '/task' && document.readyState === 'complete'")
    task = ui.server.tasks.of_kinds("plan")[0]
    assert Path(f"/proc/{task.pid}").exists()
    ui.tab_to("#cancel button")
    ui.press("Enter")
    ui.wait_for("document.querySelector('.outcome')")
    assert ui.text(".outcome .badge") == "cancelled"
    assert not Path(f"/proc/{task.pid}").exists()


@pytest.mark.ci
def test_data_is_audited_and_shown(ui: Ui) -> None:
    ui.open("/audit?config=good.yaml")
    ui.tab_to("button.main")
    ui.press("Enter")
    ui.wait_for("document.querySelector('.outcome')", within_s=180)
    assert "data audit good.yaml --html" in ui.text("#command + .command code")
    ui.wait_for("document.querySelector('iframe').contentDocument?.querySelector('h1')")
    assert json.loads(
        ui.tab.run(
            "(r => { r.open('GET', document.querySelector('a[download]').href, false); r.send(); return r.responseText; })(new XMLHttpRequest())"
        )
    )["version"]
    ui.open("/audit?config=good.yaml&choice=longest&rows=2&tokens=yes")
    ui.tab_to("button[value=show]")
    ui.press("Enter")
    ui.wait_for("document.querySelector('.outcome')", within_s=180)
    assert ui.text(".outcome .badge") == "done", ui.text("#output")
    assert "--longest 2 --tokens" in ui.text("#command + .command code")
    ui.wait_for("document.querySelector('iframe').contentDocument?.body.textContent.length > 200")


def test_a_command_line_is_copied(ui: Ui) -> None:
    ui.open("/run?run=runs/support")
    ui.tab_to("[data-copy]")
    ui.press("Enter")
    ui.wait_for("/^(Copied|Selected)/.test(document.activeElement.textContent)")


def test_a_report_is_served_apart_from_the_rest(ui: Ui) -> None:
    ui.open("/report?run=runs/support")
    assert "Finished after 60 steps" in ui.text("h1")
    assert ui.tab.run("origin") == "null"
    assert ui.tab.run("document.querySelectorAll('figure.chart').length") > 3


@pytest.mark.ci
def test_it_says_when_the_program_has_gone(page: Ui, tmp_path: Path) -> None:
    """Of a server of its own; what the console says of it then is right."""
    server = UiServer(page.folder, port=0)
    Thread(target=server.serve, daemon=True).start()
    other = Ui(page.tab, server, page.folder)
    asked = len(page.tab.requests)
    other.open(f"/?key={server.key}")
    assert page.tab.run("document.getElementById('lost').hidden")
    server.close()
    other.wait_for("!document.getElementById('lost').hidden")
    assert "has ended, or cannot be reached" in other.text("#lost")
    del page.tab.requests[asked:]
    page.tab.complaints.clear()
