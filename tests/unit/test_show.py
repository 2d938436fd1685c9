"""What `data show` shows is what is trained: texts, packs, cut rows, labels; and what it answers to mistakes."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from sft_dist.cli import main
from sft_dist.config.data_schema import DataConfig
from sft_dist.data.batch import IGNORE_INDEX
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.loader import collate
from sft_dist.data.prepare import prepare_sets
from sft_dist.data.prepared import PreparedData, open_prepared, open_stores
from sft_dist.data.show import Place, Shown, ShownPack, ShownRow, Totals, look, to_json
from sft_dist.data.show_choice import Choice, Form
from sft_dist.data.show_html import render
from sft_dist.data.show_terminal import breaks, fill_bar, positions, print_shown, row_brackets
from sft_dist.errors import ConfigError
from tests.helpers.tiny_model import build_tokenizer

WEATHER = {
    "messages": [
        {"role": "user", "content": "東京の天気は?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "東京"}}}],
        },
        {"role": "tool", "content": "晴れ"},
        {"role": "assistant", "content": "晴れです😀。\n傘は不要です。"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {}}}],
}
CONTEXT = {
    "messages": [
        {"role": "user", "content": "Hi\tthere"},
        {"role": "assistant", "content": "Hello!", "weight": 0},
        {"role": "user", "content": "👨\u200d👩\u200d👧?"},
        {"role": "assistant", "content": "A family."},
    ]
}


def plain(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class Prepared:
    """Data prepared in a folder, to be looked at."""

    def __init__(self, folder: Path, base: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
        path = write(folder / "rows.jsonl", rows)
        self.config = DataConfig.model_validate({"train": [{"path": path}], "max_seq_len": 512, **settings})
        load = partial(load_renderer, str(base), None, None)
        cache = Cache(folder / "cache", load(), load)
        self.tokenizer = cache.renderer.tokenizer
        self.sets = prepare_sets(self.config, cache)

    def data(self, side: str = "train") -> PreparedData:
        return open_prepared(self._folder(side))

    def look(self, **choice: Any) -> Shown:
        chosen = Choice(**choice)
        return look(
            self.data(chosen.side),
            open_stores(self._folder(chosen.side)),
            self.tokenizer,
            chosen,
            capacity=self.config.max_seq_len,
            is_packed=self.config.packing == "best_fit",
        )

    def _folder(self, side: str) -> Path:
        folder = self.sets.train if side == "train" else self.sets.eval
        assert folder is not None
        return folder


def printed(shown: Shown, *, tokens: bool = False, **console: Any) -> str:
    file = io.StringIO()
    print_shown(shown, Console(file=file, **console), tokens=tokens)
    return file.getvalue()


ROW_OF_TOOLS = """\
│ <|im_start|>system↵
│ You can call the tools below. To call one, answer with a line of JSON: {"name": ..., "arguments": {...}}↵
│ {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {}}}<|im_end|>↵
│ <|im_start|>user↵
│ 東京の天気は?<|im_end|>↵
│ <|im_start|>assistant↵
│ ⟦{"name": "weather", "arguments": {"city": "東京"}}<|im_end|>⟧↵
│ <|im_start|>tool↵
│ 晴れ<|im_end|>↵
│ <|im_start|>assistant↵
│ ⟦晴れです😀。↵
│ 傘は不要です。<|im_end|>⟧↵
"""

ROW_WITH_CONTEXT = """\
│ <|im_start|>user↵
│ Hi⇥there<|im_end|>↵
│ <|im_start|>assistant↵
│ Hello!<|im_end|>↵
│ <|im_start|>user↵
│ 👨\u200d👩\u200d👧?<|im_end|>↵
│ <|im_start|>assistant↵
│ ⟦A family.<|im_end|>⟧↵
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the byte-level ChatML tokenizer, in which every byte is a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


def test_rows_without_colour(tmp_path: Path, base: Path) -> None:
    shown = Prepared(tmp_path, base, [WEATHER, CONTEXT, plain("a", "b"), plain("c", "d")]).look()
    assert [row.number for row in shown.rows] == [0, 1, 2], "the first three, unless others are asked for"
    head, tools, context, short = printed(shown).split("\n\n")
    assert head == (
        "data.train: 4 rows, 504 tokens, 21.6% trained; 1 pack of 512, 98.4% full\n"
        "⟦trained⟧   context   <special token>   ↵ line break"
    )
    assert tools + "\n" == f"row 0  {tmp_path}/rows.jsonl:1\n374 tokens, 95 trained (25.4%)\n{ROW_OF_TOOLS}"
    assert context + "\n" == f"row 1  {tmp_path}/rows.jsonl:2\n84 tokens, 10 trained (11.9%)\n{ROW_WITH_CONTEXT}"
    assert short.splitlines()[-1] == "│ ⟦b<|im_end|>⟧↵"


def test_colours_take_the_place_of_brackets(tmp_path: Path, base: Path) -> None:
    shown = Prepared(tmp_path, base, [plain("a", "b")]).look()
    coloured = printed(shown, force_terminal=True, color_system="standard", width=100)
    assert "⟦" not in coloured
    assert "\x1b[32mb\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m\x1b[2m↵\x1b[0m" in coloured
    assert "\x1b[35m<|im_start|>\x1b[0massistant" in coloured
    without = printed(shown, force_terminal=True, color_system="standard", width=100, no_color=True)
    assert "│ \x1b[0m⟦b\x1b[1m<|im_end|>\x1b[0m⟧" in without, "as NO_COLOR asks: bold is no colour"


def test_tokens_with_their_borders_and_ids(tmp_path: Path, base: Path) -> None:
    shown = Prepared(tmp_path, base, [plain("a b", "é")]).look()
    lines = printed(shown, tokens=True).splitlines()
    assert lines[1] == "⟦trained⟧   context   <special token>   ↵ line break   ␣ space"
    assert lines[5:] == [
        "│ <|im_start|>│u │s │e │r │↵  │",
        "│ 1           │87│85│71│84│201│",
        "│ a │␣  │b │<|im_end|>│↵  │",
        "│ 67│223│68│2         │201│",
        "│ <|im_start|>│a │s │s │i │s │t │a │n │t │↵  │",
        "│ 1           │67│85│85│75│85│86│67│80│86│201│",
        "│ ⟦é     │<|im_end|>⟧│↵  │",
        "│ 130+105│2          │201│",
    ]


def test_lines_are_broken_where_the_terminal_ends() -> None:
    line = "English words break at spaces, 日本語の文はどこでも折り返せますが、句読点からは始まりません。" + "x" * 30
    for columns in range(8, 60):
        parts = [line[a:b] for a, b in pairwise([0, *breaks(line, columns), len(line)])]
        assert all(0 < cell_len(part) <= columns for part in parts)
        assert "".join(parts) == line
        assert not any(part.startswith(("、", "。")) for part in parts)
    assert breaks("aa bb cc", 5) == [3]
    assert breaks("aaaaaa", 4) == [4]
    assert breaks("abcd", 4) == []


def of_lengths(*lengths: tuple[int, int]) -> tuple[ShownRow, ...]:
    """Rows of (tokens, of which the last are trained)."""
    return tuple(
        ShownRow(number, "s", Place("s:1", length), ids := np.arange(length), np.where(ids < length - n, -100, ids), ())
        for number, (length, n) in enumerate(lengths, start=7)
    )


def test_the_picture_of_a_pack() -> None:
    pack = ShownPack(0, 64, of_lengths((16, 4), (31, 8), (8, 8), (2, 1)))
    assert fill_bar(pack, 32).plain == "░░░░░░██░░░░░░░░░░░██████████···"
    assert row_brackets(pack, 32) == "└7─────┘└8─────────────┘└9─┘"
    assert positions(pack, 32) == "0    15 0            30 0 7"
    assert pack.position_ids == [*range(16), *range(31), *range(8), *range(2)]
    assert pack.starts == [0, 16, 47, 55]
    dense = printed(Shown("train", Totals(12, 84, 0, 1, 90, True), (), (ShownPack(0, 90, of_lengths(*[(7, 2)] * 12)),)))
    lines = dense.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("tokens"))
    assert [line[:14].strip() for line in lines[start : start + 6]] == ["tokens", "rows", "position ids"] * 2
    assert lines[start][14:] == "░░░░░██" * 12 + "··"
    assert lines[start + 3][14:] == "····"
    assert lines[start + 1].endswith("└17───┘└18───┘")


def test_packs(tmp_path: Path, base: Path) -> None:
    prepared = Prepared(tmp_path, base, [plain("a" * 30, "b" * 30), plain("c", "d"), plain("e", "f")], max_seq_len=110)
    shown = prepared.look(packs=1)
    rows = [row.number for row in shown.packs[0].rows]
    assert rows == prepared.data().packs[0].tolist()
    lines = printed(shown).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("━━ pack 0 ━━━"))
    assert len(lines[start]) == 100
    assert lines[start + 1] == "2 rows, 104 of 110 tokens (94.5% full, 6 free), 33 trained (31.7%)"
    assert lines[start + 2].startswith("tokens        ░░░░")
    assert lines[start + 2].endswith("██░····")
    assert "tokens 81 to 103 of the pack, position ids 0 to 22" in lines
    assert not shown.rows
    alone = Prepared(tmp_path, base, [plain("a", "b")], packing="none").look(packs=1)
    assert alone.packs[0].rows[0].number == 0
    assert "pack" not in printed(alone).splitlines()[0]


def test_rows_that_were_cut_or_split_say_so(tmp_path: Path, base: Path) -> None:
    turns = [turn for index in range(4) for turn in plain(f"{index}" * 20, "x" * 20)["messages"]]
    rows = [plain("a", "b"), {"messages": turns}, plain("c", "d")]
    cut = Prepared(tmp_path, base, rows, max_seq_len=128, over_length="truncate").look()
    assert [row.notes for row in cut.rows] == [[], ["cut: the first 128 of its 244 tokens are left"], []]
    assert "! cut: the first 128 of its 244 tokens are left\n" in printed(cut)
    split = Prepared(tmp_path, base, rows, max_seq_len=138, over_length="split").look(rows=("0-3",))
    notes = [row.notes for row in split.rows]
    assert notes == [
        [],
        ["split: part 1 of 2 of a row that is too long"],
        ["split: part 2 of 2 of a row that is too long"],
        [],
    ]
    assert [row.place.origin[-2:] for row in split.rows] == [":1", ":2", ":2", ":3"]


@pytest.mark.parametrize("settings", [{}, {"train_on": "all"}, {"over_length": "truncate", "max_seq_len": 100}])
def test_labels_are_those_that_are_trained(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    prepared = Prepared(tmp_path, base, [WEATHER, CONTEXT, plain("a", "b"), plain("こん", "にちは")], **settings)
    data, number = prepared.data(), prepared.data().num_sequences
    said = json.loads(json.dumps(to_json(prepared.look(packs=number))))
    rows = {row["row"]: row for row in said["rows"]}
    assert len(rows) == data.num_rows
    for pack in said["packs"]:
        trained = collate(data, pack["rows"])
        labels = [label for row in pack["rows"] for label in rows[row]["labels"]]
        places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
        assert trained.labels.tolist() == [labels[place] for place in places]
        assert trained.supervised_index.tolist() == [place - 1 for place in places], "a token predicts the next one"
        assert trained.input_ids[0].tolist() == [id for row in pack["rows"] for id in rows[row]["input_ids"]]
        assert trained.position_ids[0].tolist() == pack["position_ids"]
        assert list(trained.seq_lens) == pack["seq_lens"]
    assert sum(row["supervised_tokens"] for row in rows.values()) == data.num_supervised.sum()


def test_pieces_are_trained_as_their_tokens(tmp_path: Path, base: Path) -> None:
    shown = Prepared(tmp_path, base, [WEATHER, CONTEXT]).look()
    for row in shown.rows:
        ids = [id for piece in row.pieces for id in piece.ids]
        trained = [label for piece in row.pieces for label in piece.ids if piece.is_supervised]
        assert ids == row.input_ids.tolist()
        assert trained == [label for label in row.labels.tolist() if label != IGNORE_INDEX]


def test_ways_to_choose(tmp_path: Path, base: Path) -> None:
    other = write(tmp_path / "other.jsonl", [plain("x" * 50, "y"), plain("z", "zz")])
    rows = [plain("q" * n, "a" * (20 - n)) for n in range(1, 13)]
    prepared = Prepared(tmp_path, base, rows)
    sources = [{"path": prepared.config.train[0].path, "name": "first"}, {"path": other, "name": "other"}]
    prepared = Prepared(tmp_path, base, rows, train=sources, eval=[{"path": other}])

    def numbers(**choice: Any) -> list[int]:
        return [row.number for row in prepared.look(**choice).rows]

    assert numbers(rows=("7", "2-4", "0")) == [7, 2, 3, 4, 0]
    assert numbers(source="other") == [12, 13]
    assert numbers(longest=2) == [12, 0], "the first of those that are alike"
    assert numbers(least_supervised=3) == [12, 13, 11]
    assert numbers(least_supervised=1, source="first") == [11]
    drawn = numbers(random=5, seed=3)
    assert len(set(drawn)) == 5
    assert drawn == sorted(drawn) == numbers(random=5, seed=3) != numbers(random=5, seed=4)
    assert numbers(random=99) == list(range(14))
    assert set(numbers(random=1, source="other")) < {12, 13}
    held_out = prepared.look(side="eval")
    assert [row.place.origin for row in held_out.rows] == [f"{other}:1", f"{other}:2"]
    assert "data.eval: 2 rows" in printed(held_out)
    assert "source first" in printed(prepared.look())
    for pack in prepared.look(packs=99, source="other").packs:
        assert "other" in {row.source for row in pack.rows}


def test_mistakes_are_answered_with_a_fix(tmp_path: Path, base: Path) -> None:
    prepared = Prepared(tmp_path, base, [plain("a", "b")] * 3)
    path = prepared.config.train[0].path
    prepared = Prepared(tmp_path, base, [plain("a", "b")] * 3, train=[{"path": path, "name": "support"}])

    def answer(**choice: Any) -> tuple[str, str]:
        with pytest.raises(ConfigError) as caught:
            prepared.look(**choice)
        return caught.value.what, caught.value.fix

    assert answer(rows=("3",)) == ("--row 3: data.train has 3 rows", "say a number from 0 to 2")
    assert answer(rows=("1-5",))[0] == "--row 5: data.train has 3 rows"
    for text in ("x", "5-2", "-1", "1-"):
        assert answer(rows=(text,)) == (
            f"--row {text} is no row and no range of rows",
            "say a number or a range, e.g. --row 7 --row 0-5",
        )
    assert answer(source="suport") == (
        "--source suport: data.train has no source of this name",
        "did you mean support?",
    )
    assert answer(source="zzz", packs=1)[1] == "its sources are: support"
    assert answer(random=1, longest=1)[0] == "--random and --longest both choose what is shown"
    assert answer(rows=("1",), packs=2)[0] == "--row and --packs both choose what is shown"
    assert answer(seed=1)[0] == "--seed draws nothing without --random"
    assert answer(rows=("1",), source="support")[1] == "leave out one of them"
    for form in ({"as_json": True, "html": Path("x")}, {"as_json": True, "tokens": True}, {"html": Path("none/x")}):
        with pytest.raises(ConfigError):
            Form(**form)  # type: ignore[arg-type]


def test_a_page_escapes_and_names_no_address(tmp_path: Path, base: Path) -> None:
    evil = "</pre><script>alert(1)</script>\x1b[31m"
    shown = Prepared(tmp_path, base, [plain(evil, evil), plain("晴れ", "😀")], max_seq_len=256).look(packs=9)
    for tokens in (False, True):
        page = render(shown, tokens=tokens)
        assert "<script" not in page
        assert not re.search(r"https?://|url\(|src=", page)
        assert "\x1b" not in page
        assert page.count('<section class="panel row"') == 2
        assert page.count('class="segment"') == 2
    assert '<span class="trained">&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;[U+001B][31m</span>' in render(shown)
    assert '<span class="trained special">&lt;|im_end|&gt;</span><span class="context">↵\n</span></pre>' in render(
        shown
    )
    assert '<span class="token trained"><span class="word">😀</span>' in render(shown, tokens=True)


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the program chromium")
def test_a_browser_shows_the_page(tmp_path: Path, base: Path) -> None:
    page = tmp_path / "rows.html"
    page.write_text(render(Prepared(tmp_path, base, [WEATHER, CONTEXT]).look(packs=2)), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert dom.count('<section class="panel row"') == 2
    assert "傘は不要です。" in dom


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as caught:
        main(["data", "show", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [plain("a", "晴れ"), plain("c", "d")])
    config = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": {"global_batch_size": 1, "max_steps": 1},
        "output_dir": "run",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    code, out, _ = run(capsys, "run.yaml", "--row", "0")
    assert (code, out.splitlines()[-1]) == (0, "│ ⟦晴れ<|im_end|>⟧↵")
    code, out, _ = run(capsys, "run.yaml", "--json", "--longest", "1", "data.packing=none")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert (row["row"], row["origin"], row["part"], row["parts"]) == (0, "rows.jsonl:1", 1, 1)
    code, out, _ = run(capsys, "run.yaml", "--html", "rows.html", "--tokens")
    assert (code, out) == (0, "rows.html written\n")
    assert "晴" in Path("rows.html").read_text(encoding="utf-8")
    code, out, err = run(capsys, "run.yaml", "--set", "eval")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: --set eval: the configuration has no evaluation data",
        "  fix: set data.eval or data.eval_split, or leave out --set eval",
    ]
    code, _, err = run(capsys, "run.yaml", "--row", "2")
    assert (code, err.splitlines()[0]) == (2, "error: --row 2: data.train has 2 rows")
