"""What the three reports hold: every finding, nothing of the data unescaped, nothing from elsewhere."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from sft_dist.data.audit import report_html, report_terminal
from sft_dist.data.audit.audit import audit
from sft_dist.data.audit.figures import length_edges
from sft_dist.data.audit.findings import Audit
from sft_dist.data.audit.pictures import length_histogram, shortened
from sft_dist.data.audit.render_diff import compare_prompts
from sft_dist.data.audit.settings import PackUse
from sft_dist.data.messages import Origin
from sft_dist.errors import DataError
from tests.helpers.audit_rows import ENGLISH, JAPANESE, chatml, clean_eval, clean_train, conversation, settings_of
from tests.helpers.templates import R1, renderer_of

HOSTILE = '<script>alert(1)</script> & "quotes" \'\x1b[31m'


@lru_cache
def example() -> Audit:
    """An audit with findings of all severities, hostile texts and names, and prompts that differ."""
    renderer = chatml()
    train, evaluation = clean_train(renderer), clean_eval(renderer)
    train.add("ja.jsonl", "この記号は何ですか。", f"これは譁�蟄怜喧縺です。{HOSTILE}")
    train.add("en.jsonl", "Tell me a joke.", f"As an AI language model I know none. {HOSTILE}")
    train.add("en.jsonl", "Tell me more about geology.", "Rocks fold slowly. " * 90)
    train.add("ja.jsonl", JAPANESE[9][0], JAPANESE[9][1] + "とても。")
    train.add("<b>evil</b> & co/データ.jsonl", *ENGLISH[-1])
    diffs = compare_prompts(renderer_of("r1", R1), conversation("Hi", "Hello.", origin=Origin("r1.jsonl", 1)))
    diffs += compare_prompts(renderer, conversation("Hi", "Hello.", origin=Origin("chatml.jsonl", 1)))
    packs = {"train": PackUse(np.array([400, 370, 130]), 400)}
    settings = settings_of(renderer, over_length="truncate")
    return audit(train.rows, evaluation.rows, settings=settings, packs=packs, render_diffs=diffs)


def test_json_comes_back_as_it_was() -> None:
    text = example().to_json()
    assert Audit.from_json(text) == example()
    assert "これは譁" in text  # readable, not escaped


def test_json_has_the_documented_keys() -> None:
    content = json.loads(example().to_json())
    documented = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = documented[documented.index("## Audit") :]

    def keys(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if not isinstance(value, dict):
            return set()
        inner = {key: part for key, part in value.items() if not key.endswith("languages") and key != "distinct_n"}
        return set(value) | set().union(*map(keys, inner.values()))

    assert content["version"] == 1
    missing = sorted(key for key in keys(content) if f"`{key}`" not in section)
    assert not missing


@pytest.mark.parametrize("text", ["{}", "not JSON", '{"findings": 3}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not the JSON of an audit"):
        Audit.from_json(text)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(replace(example(), version=2).to_json(), encoding="utf-8")
    with pytest.raises(DataError, match="version 2"):
        Audit.read(path)
    with pytest.raises(DataError, match="No such file"):
        Audit.read(tmp_path / "missing.json")


class Page(HTMLParser):
    """Text, tags and attributes of a page; every opened tag must be closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes, self._open = "", [""][:0], [("", "")][:0], [""][:0]
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_everything_and_escapes_the_data() -> None:
    page = Page(report_html.render(example(), title="Audit of <config> データ"))
    for finding in example().findings:
        assert finding.check in page.text
        assert finding.what in page.text
        assert finding.fix in page.text
        assert all(shown.origin in page.text and shown.text in page.text for shown in finding.examples)
    assert HOSTILE in page.text
    assert "<b>evil</b> & co/データ.jsonl" in page.text
    assert "Audit of <config> データ" in page.text
    assert "script" not in page.tags
    assert page.tags.count("b") == 7  # the figures on top; none from the data


def test_the_page_needs_nothing_else() -> None:
    text = report_html.render(example())
    page = Page(text)
    assert not {"link", "img", "iframe", "script"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert ("charset", "utf-8") in page.attributes


def test_the_page_has_its_pictures() -> None:
    page = Page(report_html.render(example()))
    # Bars of either set, lengths of each source, and one of packs.
    assert page.tags.count("svg") == 2 + 4 + 1
    assert "max_seq_len 400" in page.text
    numbers = [float(value) for name, value in page.attributes if name in ("x", "y", "width", "height")]
    assert min(numbers) >= 0


def test_the_page_shows_where_prompts_differ() -> None:
    text = report_html.render(example())
    assert "<mark>&lt;think&gt;⏎\n</mark>" in text
    assert "1 the same, 1 different" in text


def shown(result: Audit, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    report_terminal.show(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_says_everything_in_100_columns_without_colour() -> None:
    text = shown(example())
    assert max(cell_len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text
    joined = " ".join(text.split())
    for finding in example().findings:
        assert f"{finding.severity.upper()} {finding.check} {finding.place}" in joined
        assert " ".join(finding.what.split()) in joined
    assert "1 error, 7 warnings" in text.splitlines()[-2]
    assert "rows/s" in text.splitlines()[-1]
    assert "inference: <think>⏎" in text


def test_nothing_found_is_said() -> None:
    clean = clean_train(chatml())
    result = audit(clean.rows, None, settings=settings_of(clean.renderer), cheap=True)
    assert "nothing was found" in shown(result)
    assert "near-duplicates were not looked for" in shown(result)
    assert "Nothing was found." in Page(report_html.render(result)).text


def test_figures() -> None:
    train, evaluation = example().figures
    assert (train.set, train.rows, evaluation.set, evaluation.rows) == ("train", 49, "eval", 8)
    assert [source.rows for source in train.sources] == [24, 24, 1]
    assert sum(source.tokens for source in train.sources) == train.tokens
    for source in train.sources:
        assert sum(source.lengths.counts) == source.rows
        assert 0 < source.supervised_tokens < source.tokens
    assert train.packs is not None
    assert train.packs.fill == pytest.approx(900 / 1200)
    assert train.packs.fill_histogram.counts[-2:] == (1, 1)
    assert sum(train.packs.fill_histogram.counts) == 3
    assert train.packs.padding_if_unpacked == pytest.approx(1 - train.tokens / (49 * 400))
    assert train.distinct_prompts == 48
    assert train.question_languages == {"ja": 24, "latin": 25}
    assert train.num_clusters == 1
    assert example().rows == 57


@pytest.mark.parametrize("lengths", [[1], [10, 20, 30], [5] * 999 + [100_000], [2048], [2049], [50_000] * 10])
def test_bins_hold_every_row_and_begin_one_at_max_seq_len(lengths: list[int]) -> None:
    edges = length_edges(np.array(lengths), 2048)
    counts, _ = np.histogram(lengths, edges)
    assert counts.sum() == len(lengths)
    assert len(edges) <= 100
    assert (np.diff(edges) > 0).all()


def test_a_row_of_exceptional_length_does_not_flatten_the_picture() -> None:
    train = example().figures[0]
    edges = length_edges(np.array([100] * 5000 + [10**6]), 2048)
    assert edges[-2] < 3000
    picture = length_histogram(
        replace(
            train.sources[0],
            lengths=replace(
                train.sources[0].lengths, edges=tuple(edges.tolist()), counts=(5000, *[0] * (len(edges) - 3), 1)
            ),
        ),
        2048,
    )
    assert "rows of more than" in picture
    assert "max_seq_len 2,048" in picture


def test_names_are_cut_at_their_beginning() -> None:
    assert shortened("a/b.jsonl", 190) == "a/b.jsonl"
    long = shortened("データ" * 20 + "/last.jsonl", 190)
    assert long.startswith("…")
    assert long.endswith("タ/last.jsonl")


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the program chromium")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    page.write_text(report_html.render(example()), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(re.findall(r"<section class=\"panel finding", dom)) == len(example().findings)
    assert "<script" not in dom
