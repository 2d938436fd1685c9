"""The audit of prepared data: with its texts, and by its token stores alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.cli import main
from sft_dist.config.data_schema import DataConfig
from sft_dist.config.schema import Config
from sft_dist.data.audit.audit import enforce
from sft_dist.data.audit.findings import Audit
from sft_dist.data.audit.stored import StoredSource, audit_stores, audited_rows
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import ChatRenderer, load_renderer
from sft_dist.data.prepare import prepare_sets, tokenise_sources
from sft_dist.data.sources import read_source
from sft_dist.errors import DataError
from sft_dist.train.audit import audit_prepared, settings_of

# The end of a turn is left to the EOS, which is not the token that ends a turn here; and BOS comes twice.
BAD_TEMPLATE = (
    "{{ '<|endoftext|><|endoftext|>' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role != 'assistant' %}<|im_end|>\n{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path: Path, rows: list[tuple[str, str]]) -> dict[str, str]:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return {"path": str(path), "name": path.stem}


def stored(folder: Path, base: Path, data: DataConfig, template: str | None = None) -> Any:
    load = partial(load_renderer, str(base), None, template)
    cache = Cache(folder / "cache", load(), load)

    def side(name: Any) -> list[StoredSource]:
        tokenised = tokenise_sources(data, cache, side=name)
        assert tokenised is not None
        return [StoredSource(each.named, each.work, None) for each in tokenised]

    return cache.renderer, side("train"), side("eval")


def audited(
    folder: Path, base: Path, template: str | None = None, untrained: tuple[str, ...] = (), **data: Any
) -> Audit:
    config = DataConfig.model_validate(data)
    renderer, train, held_out = stored(folder, base, config, template)
    renderer.tokenizer.bos_token = "<|endoftext|>"
    return audit_stores(
        train, held_out, settings=settings_of(config, renderer, untrained), packs={}, decode=renderer.tokenizer.decode
    )


def test_what_the_stores_alone_tell(tmp_path: Path, tiny_base: Path) -> None:
    rows = [(f"question {i}", f"answer {i}") for i in range(20)]
    train = write(tmp_path / "train.jsonl", [*rows, rows[3], ("long", "x" * 200)])
    held_out = write(tmp_path / "held.jsonl", [("another", "one"), ("question 7", "other words")])
    found = audited(tmp_path, tiny_base, train=[train], eval=[held_out], max_seq_len=128)
    assert [(f.check, f.set, f.count, f.total, f.severity) for f in found.findings] == [
        ("leak_exact", "eval", 1, 2, "error"),
        ("over_length", "train", 1, 22, "warning"),
        ("exact_duplicate", "train", 1, 22, "warning"),
    ]
    places = [finding.examples[0].origin for finding in found.findings]
    assert places == [f"{held_out['path']}:2", f"{train['path']}:22", f"{train['path']}:21"]
    assert "question 7" in found.findings[0].examples[0].text
    assert [figures.rows for figures in found.figures] == [22, 2]
    assert sum(found.figures[0].sources[0].lengths.counts) == 22
    assert Audit.from_json(found.to_json()) == found
    with pytest.raises(DataError, match=r"eval held: leak_exact: 1 of 2 rows \(50.0 %\), limit 0 %"):
        enforce(found, DataConfig.model_validate({"train": [train]}).audit.max_share)


def test_tokens_that_no_row_should_begin_or_end_with(tmp_path: Path, tiny_base: Path) -> None:
    train = write(tmp_path / "train.jsonl", [("a", "b"), ("c", "d")])
    found = audited(tmp_path, tiny_base, BAD_TEMPLATE, train=[train])
    assert [(f.check, f.count) for f in found.findings] == [("double_bos", 2)]
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    clean = audited(tmp_path, tiny_base, train=[{"path": str(tokens)}])
    assert clean.findings == ()


def test_a_token_that_was_never_trained_is_found_where_it_is_produced(tmp_path: Path, tiny_base: Path) -> None:
    """<|im_start|> opens every turn and is produced by none; <|im_end|> ends every answer."""
    rows = [{"segments": [{"text": "a", "train": True}]}, {"segments": [{"text": "b<|im_end|>", "train": True}]}]
    literal = tmp_path / "literal.jsonl"
    literal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [write(tmp_path / "train.jsonl", [("a", "b"), ("c", "d")]), {"path": str(literal), "name": "literal"}]
    found = audited(tmp_path, tiny_base, untrained=("<|im_start|>",), train=train, on_bad_row="skip")
    assert "untrained_token" not in {finding.check for finding in found.findings}
    found = audited(tmp_path, tiny_base, untrained=("<|im_end|>",), train=train, on_bad_row="skip")
    told = [(f.source, f.count, f.severity) for f in found.findings if f.check == "untrained_token"]
    assert told == [("train", 2, "error"), ("literal", 1, "error")]


def test_rows_are_read_again_with_their_tokens(tmp_path: Path, tiny_base: Path) -> None:
    train = write(tmp_path / "train.jsonl", [(f"q{i} " * i, f"a{i} " * (40 if i == 3 else 1)) for i in range(6)])
    data = DataConfig.model_validate({"train": [train], "max_seq_len": 64, "over_length": "split"})
    renderer, (source,), _ = stored(tmp_path, tiny_base, data)
    assert isinstance(renderer, ChatRenderer)
    whole = {str(row.origin): row for row in read_source(data.train[0])}
    seen = list(audited_rows(source))
    assert [str(each.row.origin) for each in seen] == list(whole)
    for each in seen:
        assert each.row == whole[str(each.row.origin)]
        expected = renderer.render(whole[str(each.row.origin)])
        assert each.tokens is not None
        assert each.tokens.input_ids == expected.input_ids, "of all parts of a row that was split"
        assert each.tokens.supervised == expected.supervised
    half = StoredSource(source.named, source.work, source.store.rows["number"] % 2 == 0)
    assert [each.row.origin.row for each in audited_rows(half)] == [2, 4, 6]


def config_file(folder: Path, base: Path, **data: Any) -> str:
    config = {
        "model": {"path": str(base)}, "data": data, "train": {"global_batch_size": 2, "max_steps": 1},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(config))
    return str(folder / "run.yaml")


def test_the_command_writes_its_report_and_fails_over_a_limit(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", [(f"question {i}", f"answer {i}") for i in range(20)])
    held_out = write(tmp_path / "held.jsonl", [("question 7", "other words"), ("x" * 300, "y")])
    config = config_file(tmp_path, tiny_base, train=[train], eval=[held_out], max_seq_len=256)
    html, as_json = tmp_path / "out" / "a.html", tmp_path / "out" / "a.json"
    with pytest.raises(SystemExit) as ended:
        main(["data", "audit", config, "--html", str(html), "--json", str(as_json)])
    assert ended.value.code == 4
    told = capsys.readouterr()
    assert "leak_exact" in told.out
    assert told.err.startswith(
        "error: the data audit found too much: eval held: leak_exact: 1 of 2 rows (50.0 %), limit 0 %"
    )
    audit = Audit.read(as_json)
    assert {finding.check for finding in audit.findings} >= {"leak_exact", "over_length"}
    assert audit.render_diffs
    assert not audit.is_cheap
    assert "leak_exact" in html.read_text()
    accepted = "data.audit={max_share: {leak_exact: null}}"
    for more, code in (("data.over_length=error", 4), ("data.over_length=drop", 0)):
        with pytest.raises(SystemExit) as ended:
            main(["data", "audit", config, accepted, more])
        assert ended.value.code == code, "what training would refuse is refused here too"


def test_held_out_rows_of_the_training_sources_are_audited_as_such(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", [(f"question {i}", f"answer {i}") for i in range(100)])
    config = config_file(tmp_path, tiny_base, train=[train], eval_split={"share": 0.2})
    with pytest.raises(SystemExit) as ended:
        main(["data", "audit", config, "--json", str(tmp_path / "a.json")])
    assert ended.value.code == 0, capsys.readouterr().err
    audit = Audit.read(tmp_path / "a.json")
    assert sum(figures.rows for figures in audit.figures) == 100
    assert min(figures.rows for figures in audit.figures) >= 8


def test_bad_rows_are_a_finding_and_what_training_refuses_fails_at_the_end(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", [(f"question {i}", f"answer {i}") for i in range(20)])
    with Path(train["path"]).open("a") as file:
        file.write('{"prompt": "no answer"}\nnot JSON\n')
    config = config_file(tmp_path, tiny_base, train=[train])
    for override, code in (("data.on_bad_row=skip", 0), ("data.on_bad_row=error", 4)):
        with pytest.raises(SystemExit) as ended:
            main(["data", "audit", config, override, "--json", str(tmp_path / "a.json")])
        assert ended.value.code == code
        (found,) = (f for f in Audit.read(tmp_path / "a.json").findings if f.check == "rejected_row")
        assert (found.count, found.total) == (2, 22)
        assert f"{train['path']}:21" in found.examples[0].text
    assert f"error: {train['path']}:21: " in (said := capsys.readouterr().err)
    assert "(and 1 more row that cannot be read or trained on)" in said
    assert len(list((tmp_path / "data_cache" / "tokens").glob("*/meta.json"))) == 1, "one store for both"


def of_a_run(folder: Path, base: Path, *, seed: int = 0, untrained: tuple[str, ...] = (), **data: Any) -> Audit:
    """What a training run is told, in one cache for all of them."""
    load = partial(load_renderer, str(base), None, None)
    cache = Cache(folder / "cache", load(), load)
    config = Config.model_validate(
        {
            "model": {"path": str(base)}, "data": data, "output_dir": str(folder / "run"),
            "train": {"global_batch_size": 2, "max_steps": 1, "seed": seed},
        }
    )  # fmt: skip
    return audit_prepared(config, cache, prepare_sets(config.data, cache, seed=seed), untrained=untrained)


def told(audit: Audit) -> list[tuple[str, str, int, int]]:
    return [(f.check, f.set, f.count, f.total) for f in audit.findings]


def test_a_run_audits_each_side_of_a_split_by_its_own_rows(tmp_path: Path, tiny_base: Path) -> None:
    """A prompt that is held out with all its answers is no leak; one of which an answer is trained is."""
    rows = [(f"question {i}", f"answer {i}") for i in range(40)]
    train = write(tmp_path / "train.jsonl", rows)
    found = of_a_run(tmp_path, tiny_base, train=[train], eval_split={"share": 0.2})
    assert told(found) == []
    assert sum(figures.rows for figures in found.figures) == 40
    packs = [figures.packs for figures in found.figures]
    assert packs[0] is not None
    assert packs[1] is not None
    assert packs[0].fill > 2 * packs[1].fill > 0
    twice = write(tmp_path / "twice.jsonl", rows + rows)
    sides = {"train": [twice], "eval_split": {"share": 0.5, "by": "row"}}
    with pytest.raises(DataError, match="leak_exact"):
        of_a_run(tmp_path, tiny_base, **sides)
    accepted = {"max_share": {"leak_exact": None}}
    leaks = [
        next(f for f in of_a_run(tmp_path, tiny_base, seed=seed, audit=accepted, **sides).findings
             if f.check == "leak_exact")
        for seed in range(3)
    ]  # fmt: skip
    assert all(0 < leak.count < leak.total == 40 for leak in leaks)
    held_out = {number: tuple(example.origin for example in leak.examples) for number, leak in enumerate(leaks)}
    assert len(set(held_out.values())) == 3, "the seed decides what is held out, and examples are of those rows"


def test_an_audit_that_is_kept_is_of_the_same_settings_and_enforced_again(tmp_path: Path, tiny_base: Path) -> None:
    rows = [("a", "b"), ("c", "d"), ("c", "d")]
    train = write(tmp_path / "train.jsonl", rows)
    assert told(of_a_run(tmp_path, tiny_base, train=[train])) == [("exact_duplicate", "train", 1, 3)]
    strict = {"max_share": {"exact_duplicate": 0.1}}
    for _ in range(2):  # the second time it is read
        with pytest.raises(DataError, match="exact_duplicate: 1 of 3 rows"):
            of_a_run(tmp_path, tiny_base, train=[train], audit=strict)
    loose = {"max_share": {"untrained_token": None}}
    found = of_a_run(tmp_path, tiny_base, train=[train], audit=loose, untrained=("<|im_end|>",))
    assert ("untrained_token", "train", 3, 3) in told(found)
    write(tmp_path / "train.jsonl", rows[:2])
    assert told(of_a_run(tmp_path, tiny_base, train=[train])) == [], "of the data as they are now"


def test_examples_are_of_the_rows_that_a_set_has(tmp_path: Path, tiny_base: Path) -> None:
    """With rows of the store left out before them, and rows of a second file."""
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "a.jsonl", [("long", "x" * 200), ("b", "c"), ("d", "e")])
    write(tmp_path / "rows" / "b.jsonl", [("f", "g"), ("unique", "y" * 200), ("d", "e")])
    data = DataConfig.model_validate({"train": [{"path": str(tmp_path / "rows")}], "max_seq_len": 128})
    renderer, (source,), _ = stored(tmp_path, tiny_base, data)
    part = StoredSource(source.named, source.work, np.array([False, False, True, True, True, True]))
    settings = settings_of(data, renderer, ("<|im_end|>",))
    found = audit_stores([part], [], settings=settings, packs={}, decode=renderer.tokenizer.decode)
    examples = {
        f.check: [(e.origin.removeprefix(f"{tmp_path}/rows/"), e.text) for e in f.examples] for f in found.findings
    }
    assert {check: [origin for origin, _ in each] for check, each in examples.items()} == {
        "over_length": ["b.jsonl:2"],
        "exact_duplicate": ["b.jsonl:3"],
        "untrained_token": ["a.jsonl:3", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3"],
    }
    assert "unique" in examples["over_length"][0][1]
    again = [(Path(row.row.origin.path).name, row.row.origin.row) for row in audited_rows(part)]
    assert again == [("a.jsonl", 3), ("b.jsonl", 1), ("b.jsonl", 2), ("b.jsonl", 3)]
    second = StoredSource(source.named, source.work, source.store.rows["file"] == 1)
    assert [str(row.row.origin).removeprefix(f"{tmp_path}/rows/") for row in audited_rows(second)] == [
        "b.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:3",
    ]


def test_a_turn_whose_end_is_not_trained_is_found(tmp_path: Path, tiny_base: Path) -> None:
    """Such a model does not stop. The same tokens with other masks are no duplicates, and raw text needs no end."""
    path = tmp_path / "rows.jsonl"
    parts = [(False, True, True), (False, True, False), (False, False, True)]
    rows = [
        {"segments": [{"text": t, "train": on} for t, on in zip(("a", "b", "<|im_end|>"), each, strict=True)]}
        for each in parts
    ]
    rows.append({"segments": [{"text": "abc", "train": True}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = audited(tmp_path, tiny_base, train=[{"path": str(path)}])
    assert [(f.check, [e.origin for e in f.examples]) for f in found.findings] == [("unsupervised_end", [f"{path}:2"])]


def test_untrained_tokens_are_searched_piece_by_piece_and_told_of_their_own_row(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the row before one that the set lacks, nor where the token stands first, which is never trained."""
    monkeypatch.setattr("sft_dist.data.audit.stored.SEARCHED_AT_ONCE", 2)
    path = tmp_path / "rows.jsonl"
    texts = ["<|im_end|>bc", "bcd<|im_end|>", "bc<|im_end|>", "bcd"]
    path.write_text("".join(json.dumps({"segments": [{"text": text, "train": True}]}) + "\n" for text in texts))
    data = DataConfig.model_validate({"train": [{"path": str(path)}], "max_seq_len": 8})
    renderer, (source,), _ = stored(tmp_path, tiny_base, data)
    part = StoredSource(source.named, source.work, np.array([True, False, True, True]))
    longest = int(source.store.rows["length"].max())
    settings = settings_of(data.model_copy(update={"max_seq_len": longest}), renderer, ("<|im_end|>",))
    found = audit_stores([part], [], settings=settings, packs={}, decode=renderer.tokenizer.decode)
    assert [(f.check, [e.origin for e in f.examples]) for f in found.findings] == [("untrained_token", [f"{path}:3"])]
    whole = StoredSource(source.named, source.work, None)
    found = audit_stores([whole], [], settings=settings, packs={}, decode=renderer.tokenizer.decode)
    assert [f.check for f in found.findings] == ["untrained_token"], "the longest row just fits"


def test_a_run_is_told_of_rejected_rows(tmp_path: Path, tiny_base: Path) -> None:
    sources = [write(tmp_path / f"{name}.jsonl", [("a", name), ("c", name)]) for name in ("train", "held")]
    for source in sources:
        with Path(source["path"]).open("a") as file:
            file.write('{"prompt": "no answer"}\n')
    found = audited(tmp_path, tiny_base, train=sources[:1], on_bad_row="skip")
    assert told(found) == [("rejected_row", "train", 1, 3)]
    assert f"{sources[0]['path']}:3: " in found.findings[0].examples[0].text
    found = audited(tmp_path, tiny_base, train=sources[:1], eval=sources[1:], on_bad_row="skip")
    assert {each[:2] for each in told(found)} >= {("rejected_row", "train"), ("rejected_row", "eval")}
