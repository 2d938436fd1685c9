"""The pages of runs in a browser: they ask for nothing, complain of nothing, fit, and do what their buttons say."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_dist.report.compare import compare
from sft_dist.report.compare_page import render_comparison
from sft_dist.report.page import render
from sft_dist.report.read import ask_nobody, read_report
from tests.helpers.browser import Browser, browser, needs_browser
from tests.helpers.report_folders import lines, whole_run, write_metrics
from tests.helpers.run_folders import CLOCK

pytestmark = [needs_browser, pytest.mark.ci]

SHOWN = "[...document.querySelectorAll('.view:not([hidden])')].map(each => each.dataset.view)"

# Things that are wider than the window, but for what scrolls in a panel of its own.
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(each => !each.closest('.scroll, .skip, svg')
    && each.getBoundingClientRect().right > innerWidth + 0.5).map(each => each.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: of a run, of one that diverged, and of two side by side."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [whole_run(folder / name, steps=steps) for name, steps in (("one", 700), ("two", 90))]
    broken = whole_run(folder / "broken", steps=60, finished=False)
    write_metrics(broken, [each | ({"loss": None, "non_finite": ["loss"]} if each["step"] > 50 and "loss" in each else {})
                           for each in lines(60)])  # fmt: skip
    data = [read_report(run, clock=CLOCK, ask=ask_nobody) for run in (*runs, broken)]
    texts = {"run": render(data[0]), "broken": render(data[2]), "compare": render_comparison(compare(data[:2]))}
    found = {}
    for name, text in texts.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(text, encoding="utf-8")
    return found


@pytest.mark.parametrize("name", ["run", "broken", "compare"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_page_fits_and_asks_for_nothing(tab: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    tab.requests.clear()
    tab.open(pages[name], width=width)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run(TOO_WIDE) == []
    assert tab.requests == [pages[name].as_uri()]
    assert tab.complaints == []


def brightness(png: bytes) -> float:
    """Mean of the first row of pixels, from 0 to 255; a page has nothing there."""
    header = png.index(b"IHDR") + 4
    width, channels = struct.unpack(">I", png[header : header + 4])[0], {2: 3, 6: 4}[png[header + 9]]
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    row = zlib.decompress(data)[1 : 1 + width * channels]
    return row[0]  # what the filters of PNG leave as it is


def test_light_and_dark_differ(tab: Browser, pages: dict[str, Path]) -> None:
    seen = {}
    for dark in (False, True):
        tab.open(pages["run"], dark=dark)
        seen[dark] = brightness(tab.picture(whole=False))
    assert seen[False] > 200
    assert seen[True] < 60


def test_the_scale_of_a_chart(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["run"])
    assert set(tab.run(SHOWN)) == {"steps linear"}
    tab.run("document.querySelector('#chart-loss [data-scale=log]').click()")
    shown = tab.run(SHOWN)
    assert (shown[0], set(shown[1:])) == ("steps log", {"steps linear"})
    assert tab.run("document.querySelector('#chart-loss [data-scale=log]').getAttribute('aria-pressed')") == "true"
    heights = "[...document.querySelectorAll('#chart-loss .view:not([hidden]) .smooth')].map(e => e.getBBox().height)"
    assert 0 < tab.run(heights)[0] <= 1000


def test_values_at_the_pointer_and_by_the_keyboard(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["run"])
    box = tab.run(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('#chart-loss .area').getBoundingClientRect())"
    )
    tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] / 2, y=box[1] + 20)
    said = tab.run("document.querySelector('#chart-loss .readout').textContent")
    assert said.startswith("step 35")
    assert "smoothed" in said
    assert "event" not in said
    # The other charts show the same place.
    assert tab.run("document.querySelector('#chart-lr .readout').textContent").startswith("step 35")
    tab.run("document.querySelector('#chart-loss .area').focus()")
    for key, place in (("Home", "step 0"), ("End", "step 700"), ("ArrowLeft", "step 698")):
        for kind in ("keyDown", "keyUp"):
            tab.ask("Input.dispatchKeyEvent", type=kind, key=key)
        assert tab.run("document.querySelector('#chart-loss .readout b').textContent") == place
    tab.ask("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert tab.run("document.querySelector('#chart-loss .readout').hidden")
    assert tab.complaints == []


def test_what_the_horizontal_axis_counts(tab: Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["compare"])
    for counted in ("tokens", "hours", "steps"):
        tab.run(f"document.querySelector('[data-counted={counted}]').click()")
        assert set(tab.run(SHOWN)) == {f"{counted} linear"}
        tab.run("document.querySelector('#chart-loss .area').focus()")
        assert counted[:4] in tab.run("document.querySelector('#chart-loss .readout b').textContent")
        tab.run("document.activeElement.blur()")
    assert tab.complaints == []


def test_without_its_script_a_page_shows_all_but_the_buttons(tab: Browser, pages: dict[str, Path]) -> None:
    tab.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(pages["run"])
        assert set(tab.run(SHOWN)) == {"steps linear"}
        assert tab.run("[...document.querySelectorAll('.switch')].every(each => each.hidden)")
    finally:
        tab.ask("Emulation.setScriptExecutionDisabled", value=False)
