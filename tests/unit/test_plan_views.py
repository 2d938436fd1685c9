"""The three views of a plan say its figures: in the columns there are, on a page that needs nothing else, as JSON."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.cells import cell_len
from rich.console import Console

from sft_dist.errors import ConfigError
from sft_dist.plan import html, words
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.pictures import axis_of
from sft_dist.plan.result import Change, ParetoPoint, Part, PhaseName, Plan, Range
from sft_dist.plan.terminal import argument_lines, render_plan
from sft_dist.plan.terminal_bar import FREE, bar, scale_of
from sft_dist.plan.to_json import load_plan, plan_json, plan_schema, schema_text
from sft_dist.plan.units import (
    count,
    duration,
    duration_range,
    gib,
    gib_range,
    percent,
    ranged,
    step_range,
    step_seconds,
)
from tests.helpers.sample_plans import every_sample, full_8b_too_large, lora_70b, search_points, without_prices

ROOT = Path(__file__).parents[2]

HOSTILE = '<script>alert(1)</script> & "quotes" [bold]not markup[/bold]'

# A screen and a half.
MAX_LINES = 66

every_plan = pytest.mark.parametrize("plan", every_sample().values(), ids=every_sample())


def shown(plan: Plan, columns: int, *, verbose: bool = False, colour: bool = False) -> str:
    system = "truecolor" if colour else None
    console = Console(width=columns, file=io.StringIO(), color_system=system, force_terminal=colour)
    render_plan(plan, console, verbose=verbose)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def joined(text: str) -> str:
    """The words, wherever lines were broken."""
    return " ".join(text.split())


def figures_of(plan: Plan) -> list[str]:
    """What every view has to say of a plan."""
    memory, time, cost = plan.memory, plan.time, plan.cost
    said = [
        f"{words.VERDICTS[memory.verdict]} on {plan.num_gpus} x {plan.gpu}",
        gib_range(memory.allocated),
        gib_range(memory.reserved),
        gib(memory.usable_bytes),
        *(gib(phase.total_bytes) for phase in memory.phases),
        *(gib(size) for size in memory.peak.parts.values()),
        *(f"{name} {gib(size)}" for name, size in (memory.host_parts | memory.disk_parts).items()),
        f"{plan.data.rows:,} rows",
        f"{ranged(plan.data.tokens, count)} tokens",
        f"{plan.data.steps:,} steps",
        duration_range(time.total),
        *(f"{name} {duration(seconds)}" for name, seconds in time.phases.items() if seconds),
        step_range(time.step),
        *(step_seconds(seconds) for seconds in time.step_parts.values()),
        *(percent(seconds / sum(time.step_parts.values())) for seconds in time.step_parts.values()),
        f"{time.tokens_per_s.value:,.0f} ({time.tokens_per_s.low:,.0f}-{time.tokens_per_s.high:,.0f}) tokens/s",
        f"MFU {100 * time.mfu:.0f}%",
        time.source,
        ranged(cost.gpu_hours, "{:,.1f}".format) + " GPU-hours",
        *plan.choices,
        *plan.warnings,
    ]
    if cost.chosen is not None:
        said += [ranged(cost.chosen.usd, format_usd), ranged(cost.chosen.jpy, format_jpy), cost.chosen.name]
        assert cost.usd_per_epoch is not None
        assert cost.usd_per_million_tokens is not None
        said += [f"{format_usd(cost.usd_per_epoch)} ({format_jpy(cost.usd_per_epoch * cost.jpy_per_usd)}) an epoch"]
        said += [f"{format_usd(cost.usd_per_million_tokens)} ("]
    return said


@pytest.mark.parametrize("columns", [80, 120])
@every_plan
def test_the_terminal_says_the_figures_in_its_columns(plan: Plan, columns: int) -> None:
    text = shown(plan, columns)
    assert max(cell_len(line) for line in text.splitlines()) <= columns
    assert len(text.splitlines()) <= MAX_LINES
    assert "\x1b" not in text
    missing = [figure for figure in figures_of(plan) if figure not in joined(text)]
    assert not missing


@pytest.mark.parametrize("columns", [80, 120])
@every_plan
def test_verbose_says_everything(plan: Plan, columns: int) -> None:
    text = shown(plan, columns, verbose=True)
    assert max(cell_len(line) for line in text.splitlines()) <= columns
    every = joined(text)
    for assumption in plan.assumptions:
        assert f"{assumption.text} [{assumption.source}]" in every
    for offer in plan.cost.offers:
        assert format_jpy(offer.jpy.value) in every
    for part in {part for phase in plan.memory.phases for part in phase.parts}:
        sizes = [gib(phase.parts[part]) if part in phase.parts else "-" for phase in plan.memory.phases]
        letter, name = words.PARTS[part]
        assert f"{letter} {name} {' '.join(size.removesuffix(' GiB') for size in sizes)}" in every
    assert "more with --verbose" not in every


def test_wide_terminals_are_not_filled_and_narrow_ones_break_lines_themselves() -> None:
    assert shown(lora_70b(), 300) == shown(lora_70b(), 120)
    assert "79.2 GiB usable" in joined(shown(lora_70b(), 30))


def test_nothing_on_host_and_disk_is_said_too() -> None:
    plan = lora_70b()
    memory = replace(plan.memory, host_parts={}, host_available_bytes=None, disk_parts={})
    text = joined(shown(replace(plan, memory=memory, proposals=(), choices=(), assumptions=()), 80))
    assert "Host RAM 0.0 MiB a node; what it has is not known Disk 0.0 MiB Data" in text


def test_colour_changes_no_figure_and_is_not_needed() -> None:
    coloured = shown(full_8b_too_large(), 100, colour=True)
    assert "\x1b[" in coloured
    without = re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()
    plain = shown(full_8b_too_large(), 100).splitlines()
    for one, other in zip(without, plain, strict=True):
        if "┃" not in one:
            assert one == other
    # A bar has each part's letter in either; where there is no colour, it fills the part.
    [(one, other)] = [pair for pair in zip(without, plain, strict=True) if pair[0].startswith("forward, backward ")]
    assert re.sub(r"[^A-Z]", "", one) == re.sub(r"([A-Z])\1*", r"\1", re.sub(r"[^A-Z]", "", other))


def test_a_bar_is_to_scale() -> None:
    memory = full_8b_too_large().memory
    scale = scale_of(memory, 200)
    peak = memory.peak
    drawn = bar(peak, scale, fill_letters=True).plain
    assert len(drawn) == 200
    # The mark covers one column, wherever it lies.
    for part, size in peak.parts.items():
        assert drawn.count(words.PARTS[part][0]) == pytest.approx(200 * size / peak.total_bytes, abs=2)
    assert drawn.index("┃") == round(200 * memory.usable_bytes / peak.total_bytes)
    load = bar(memory.phases[0], scale, fill_letters=True).plain
    assert FREE not in load[load.index("┃") :]
    assert load.count(FREE) == pytest.approx(
        200 * (memory.usable_bytes - memory.phases[0].total_bytes) / peak.total_bytes, abs=2
    )


def test_every_part_and_phase_has_a_name() -> None:
    assert tuple(words.PARTS) == get_args(Part)
    assert tuple(words.PHASES) == get_args(PhaseName)
    letters = [letter for letter, _ in words.PARTS.values()]
    assert len(set(letters)) == len(letters)


def test_proposals_can_be_pasted() -> None:
    plan = full_8b_too_large()
    text = shown(plan, 80)
    pasted = text[text.index("ready to paste") :].replace("\\\n", " ").splitlines()
    for change in plan.proposals:
        expected = [word for override in change.overrides for word in override.split(" ") if override.startswith("--")]
        expected += [override for override in change.overrides if not override.startswith("--")]
        assert expected in [shlex.split(line) for line in pasted if not line.startswith("  ")]
    assert "does not fit: saves nothing" in text


def test_an_argument_longer_than_the_line_stays_whole() -> None:
    assert argument_lines(["a=1", "b=" + "x" * 30, "c=2"], 20) == ["a=1 \\", "b=" + "x" * 30 + " \\", "c=2"]
    long = Change(("--gpus 2", "data.train=" + "x" * 100), "is read from there", True)
    assert "x" * 100 in shown(replace(lora_70b(), proposals=(long,)), 80)


def test_unknown_prices_are_said() -> None:
    said = "no price of Prototype 64 GB is known"
    text = shown(without_prices(), 80)
    assert said in joined(text)
    assert "$" not in text
    assert "¥" not in text
    page = Page(html.render(without_prices()))
    assert said in page.text
    assert "$" not in page.text


def test_what_is_too_much_is_said_without_colour() -> None:
    text = joined(shown(full_8b_too_large(), 80))
    assert "18.9 GiB too much if it fitted: 2 h 48 min" in text
    assert "66.3 GiB!" in text
    assert "102.1 GiB a node, too much: it has 64.0 GiB" in text


def test_texts_are_no_markup() -> None:
    plan = replace(lora_70b(), subject={"model": HOSTILE}, warnings=(HOSTILE,), choices=(HOSTILE,))
    assert f"! {HOSTILE}" in shown(plan, 120)
    page = Page(html.render(plan, points=[replace(search_points()[0], label=HOSTILE)]))
    assert page.text.count(HOSTILE) >= 4
    assert "script" not in page.tags


class Page(HTMLParser):
    """Text, tags, titles and attributes of a page; every opened tag must be closed."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes, self._open = "", [""][:0], [("", "")][:0], [""][:0]
        self.classes: dict[str, int] = {}
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        for style in (dict(attrs).get("class") or "").split():
            self.classes[f"{tag}.{style}"] = self.classes.get(f"{tag}.{style}", 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@every_plan
def test_the_page_says_everything(plan: Plan) -> None:
    page = Page(html.render(plan))
    text = joined(page.text)
    missing = [figure for figure in figures_of(plan) if figure not in text]
    assert not missing
    for assumption in plan.assumptions:
        assert assumption.text in text
        assert assumption.source in text
    for offer in plan.cost.offers:
        assert ranged(offer.usd, format_usd) in text
        assert ranged(offer.jpy, format_jpy) in text
    for change in plan.proposals:
        assert " ".join(words.overrides(change.overrides)) in text
    for value in plan.subject.values():
        assert value in text


@every_plan
def test_the_page_needs_nothing_else(plan: Plan) -> None:
    text = html.render(plan, points=search_points())
    page = Page(text)
    assert not {"link", "img", "iframe", "script", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    numbers = [float(value) for name, value in page.attributes if name in ("x", "y", "cx", "cy", "width", "height")]
    assert min(numbers) >= 0


def test_the_page_draws_phases_and_steps() -> None:
    plan = lora_70b()
    page = Page(html.render(plan))
    assert page.classes["svg.bar"] == len(plan.memory.phases) + 1
    pieces = sum(len(phase.parts) for phase in plan.memory.phases) + len(plan.time.step_parts)
    assert page.classes["rect.piece"] == pieces
    assert "svg.pareto" not in page.classes
    # A name for those who do not see a picture, and its figures as a table.
    assert page.tags.count("title") == 1 + pieces + len(plan.memory.phases)
    assert [name for name, _ in page.attributes].count("aria-label") == page.classes["svg.bar"]


def test_the_page_draws_a_search() -> None:
    points = search_points()
    page = Page(html.render(lora_70b(), points=points))
    front = [point for point in points if point.on_front]
    misfits = [point for point in points if not point.fits]
    assert 3 <= len(front) < len(points)
    # One more of each is in the legend.
    assert page.classes["circle.front"] == len(front) + 1
    assert page.classes["path.misfit"] == len(misfits) + 1
    assert page.classes["circle.other"] == len(points) - len(front) - len(misfits) + 1
    for point in front:
        assert point.label in page.text
        assert f"{duration(3600 * point.hours)}\n{format_usd(point.usd)}, {format_jpy(150 * point.usd)}" in page.text
        assert " ".join(point.overrides) in page.text
    assert f"The first {html.MAX_LISTED_POINTS} of {len(points)}" in page.text


@pytest.mark.parametrize("hours", [(3.0,), (1.0, 2.0, 3.0), (0.1, 900.0), (0.0, 5.0), (0.0,)])
def test_axes_hold_their_figures(hours: tuple[float, ...]) -> None:
    axis = axis_of(hours, 50, 650)
    assert all(50 <= axis.at(each) <= 650 for each in hours)
    assert all(50 <= axis.at(each) <= 650 for each in axis.ticks())
    assert 2 <= len(axis.ticks()) <= 16
    point = ParetoPoint("one", "A100", 1, 2.0, hours[0], fits=False, on_front=False, overrides=())
    assert "one" in html.render(lora_70b(), points=[point])


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the program chromium")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    page.write_text(html.render(lora_70b(), points=search_points()), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(re.findall(r'<svg class="bar"', dom)) == len(lora_70b().memory.phases) + 1
    assert len(re.findall(r'<circle class="point front"', dom)) == sum(p.on_front for p in search_points()) + 1
    assert "¥58,540" in dom


@every_plan
def test_json_comes_back_as_it_was(plan: Plan) -> None:
    document = json.loads(json.dumps(plan_json(plan)))
    assert load_plan(document) == plan
    phases = document["memory"]["phases"]
    assert [phase["allocated_bytes"] for phase in phases] == [phase.allocated_bytes for phase in plan.memory.phases]
    assert [phase["total_bytes"] for phase in phases] == [sum(phase["parts"].values()) for phase in phases]
    assert document["memory"]["peak_phase"] == plan.memory.peak.name
    assert {field.name for field in fields(Plan)} | {"schema_version"} == set(document)


def edited(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(plan_json(lora_70b())))
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(schema_version=2), "schema_version 2, this program reads 1"),
        (lambda it: it.pop("schema_version"), "schema_version None"),
        (lambda it: it["memory"].pop("verdict"), "memory.verdict: Field required"),
        (lambda it: it["memory"].update(verdict="perhaps"), "memory.verdict: Input should be"),
        (lambda it: it["data"].update(steps="12"), "data.steps: Input should be a valid integer"),
        (lambda it: it["memory"].update(color="red"), "memory.color is unknown"),
        (lambda it: it["memory"]["phases"][1].update(total_bytes=1), "memory.phases.1.total_bytes is unknown or does"),
        (lambda it: it["memory"].update(peak_phase="save"), "memory.peak_phase is unknown or does not agree"),
    ],
)
def test_json_of_something_else_is_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_plan(edited(change))


def test_figures_that_json_cannot_say_are_refused() -> None:
    plan = lora_70b()
    with pytest.raises(ValueError, match="JSON"):
        plan_json(replace(plan, time=replace(plan.time, mfu=float("nan"))))


def test_the_schema_is_current() -> None:
    written = (ROOT / "docs/plan_schema.json").read_text(encoding="utf-8")
    assert written == schema_text(), "run: python -m sft_dist.plan.to_json > docs/plan_schema.json"


@every_plan
def test_the_schema_describes_the_document(plan: Plan) -> None:
    schema = plan_schema()
    types = {"integer": int, "number": (int, float), "string": str, "object": dict, "array": list, "null": type(None)}

    def check(value: Any, rule: dict[str, Any], place: str) -> None:
        """As much of JSON Schema as the schema uses; a word that it does not know is an error."""
        rule = {**schema["$defs"][rule["$ref"].rpartition("/")[2]], **rule} if "$ref" in rule else rule
        known = {"$ref", "$defs", "$schema", "type", "properties", "required", "additionalProperties", "items", "enum"}
        known |= {"const", "anyOf", "propertyNames", "title", "description", "default"}
        assert set(rule) <= known, place
        assert "const" not in rule or value == rule["const"], place
        assert "enum" not in rule or value in rule["enum"], place
        if "anyOf" in rule:
            [one] = [each for each in rule["anyOf"] if (each.get("type") == "null") == (value is None)]
            check(value, one, place)
            return
        if "type" in rule:
            kind = bool if rule["type"] == "boolean" else types[rule["type"]]
            assert isinstance(value, kind), place  # type: ignore[arg-type]
        if "properties" in rule:
            assert set(value) == set(rule["properties"]) == set(rule["required"]), place
            for key, inner in rule["properties"].items():
                check(value[key], inner, f"{place}.{key}")
        elif isinstance(value, dict):
            for key, each in value.items():
                check(each, rule["additionalProperties"], f"{place}.{key}")
                check(key, rule.get("propertyNames", {}), place)
        elif isinstance(value, list):
            for each in value:
                check(each, rule["items"], place)

    check(json.loads(json.dumps(plan_json(plan))), schema, "plan")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.21, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (20 * 60, "20 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (86_399, "1.0 days"),
        (2.3 * 86_400, "2.3 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ranges() -> None:
    assert ranged(Range(12.3, 11, 14.1), "{:.1f}".format) == "12.3 (11.0-14.1)"
    assert ranged(Range(12.3, 12.32, 12.34), "{:.1f}".format) == "12.3"
    assert duration_range(Range(1320, 1200, 1500)) == "22 (20-25) min"
    assert duration_range(Range(3600, 3300, 3900)) == "1 h 0 min (55 min-1 h 5 min)"
    assert duration_range(Range(130_000, 80_000, 180_000)) == "1.5 (0.9-2.1) days"
    assert gib_range(Range(2**30, 2**29, 2**31)) == "1.0 (0.5-2.0) GiB"
    assert gib_range(Range(2**20, 2**20, 2**21)) == "1.0 (1.0-2.0) MiB"
    assert step_range(Range(0.4, 0.36, 0.5)) == "0.400 (0.360-0.500) s"


def test_sizes_and_shares() -> None:
    assert gib(0.1 * 2**30) == "0.1 GiB"
    assert gib(0.09 * 2**30) == "92.2 MiB"
    assert gib(1200 * 2**30) == "1,200.0 GiB"
    assert [percent(share) for share in (0, 0.0001, 0.004, 0.0097, 0.385, 1)] == [
        "0%", "<0.1%", "0.4%", "1%", "38%", "100%"
    ]  # fmt: skip
    assert [count(number) for number in (7, 41_200, 41.2e6, 1.234e9)] == ["7", "41,200", "41.2 M", "1.23 B"]


def test_the_views_come_without_torch() -> None:
    program = (
        "import sys, sft_dist.plan.terminal, sft_dist.plan.html, sft_dist.plan.to_json\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_the_line_below_the_headline_names_what_is_a_bare_word() -> None:
    plan = replace(lora_70b(), subject={"model": "org/model", "recomputed": "full"})  # the keys of plan/dry_run.py
    assert "org/model · activation checkpointing full\n" in shown(plan, 300)
