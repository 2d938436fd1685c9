"""Which rows of each source are seen, how often, and which are held out."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.config.data_schema import DataConfig, EvalSplitConfig, SourceConfig
from sft_dist.config.schema import Config
from sft_dist.config.validate import validate
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.mixing import is_held_out, repeated, weights_of
from sft_dist.data.prepare import counts_of, prepare_sets
from sft_dist.data.prepared import PreparedData, open_prepared
from sft_dist.errors import ConfigError, DataError


def source(name: str, number: int, length: int, folder: Path) -> dict[str, str]:
    """Rows whose answers have ``length`` letters and that are known by their prompts."""
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": f"{name}{i}", "completion": "x" * length} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "name": name}


@pytest.fixture
def made(tmp_path: Path, tiny_base: Path) -> Any:
    load = partial(load_renderer, str(tiny_base), None, None)
    cache = Cache(tmp_path / "cache", load(), load)

    def make(*, seed: int = 0, **data: Any) -> tuple[Path, Path | None]:
        sets = prepare_sets(DataConfig.model_validate({"max_seq_len": 128, **data}), cache, seed=seed)
        assert sets.train is not None
        return sets.train, sets.eval

    return make


def seen(folder: Path) -> Counter[int]:
    """How many rows of each source an epoch has."""
    return Counter(open_prepared(folder).rows["store"].tolist())


def texts(data: PreparedData) -> list[bytes]:
    return [data.row(number)[0].tobytes() for number in range(data.num_rows)]


def test_a_weight_is_how_often_a_source_is_seen(tmp_path: Path, made: Any) -> None:
    sources = [source("a", 20, 5, tmp_path), source("b", 10, 5, tmp_path), source("c", 40, 5, tmp_path)]
    weights = (1.0, 3.0, 0.5)
    folder, _ = made(train=[{**s, "weight": w} for s, w in zip(sources, weights, strict=True)], mix_by="rows")
    assert seen(folder) == {0: 20, 1: 30, 2: 20}
    assert {name: count["seen_rows"] for name, count in counts_of(folder).items()} == {"a": 20, "b": 30, "c": 20}
    data = open_prepared(folder)
    rows = Counter(texts(data))
    assert sorted(rows.values()) == [1] * 40 + [3] * 10, "each of b three times, half of c once"
    assert sorted(row for pack in data.packs for row in pack) == list(range(70))


def test_shares_are_of_the_tokens(tmp_path: Path, made: Any) -> None:
    long, short = source("long", 12, 80, tmp_path), source("short", 30, 4, tmp_path)
    folder, _ = made(train=[{**long, "share": 0.5}, {**short, "share": 0.5}])
    data = open_prepared(folder)
    tokens = np.bincount(data.rows["store"], weights=data.lengths)
    assert tokens[0] == pytest.approx(tokens[1], rel=0.02)
    assert seen(folder)[0] == 12, "the one with more tokens than its share is seen once"
    assert seen(folder)[1] > 30
    by_rows, _ = made(train=[{**long, "share": 0.25}, {**short, "share": 0.75}], mix_by="rows")
    assert seen(by_rows) == {0: 12, 1: 36}


def test_what_is_drawn_follows_the_seed_alone(tmp_path: Path, made: Any) -> None:
    drawn = {**source("a", 40, 5, tmp_path), "weight": 0.5}
    one, same, other = (texts(open_prepared(made(train=[drawn], seed=seed)[0])) for seed in (1, 1, 2))
    assert one == same
    assert set(one) != set(other)
    whole = source("b", 40, 5, tmp_path)
    assert made(train=[whole], seed=1) == made(train=[whole], seed=2), "where nothing is drawn, the seed is no matter"


def test_rows_are_held_out_by_their_prompts(tmp_path: Path, made: Any) -> None:
    """None is in both; more data move none to the other side; a prompt is on one side with all its answers."""
    few, many = source("x", 100, 3, tmp_path), tmp_path / "many.jsonl"
    rows = [{"prompt": f"x{i % 300}", "completion": "y" * (3 + i // 300)} for i in range(600)]
    many.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"share": 0.2}
    sides = [made(train=[{"path": path}], eval_split=split) for path in (few["path"], str(many))]
    (train, held_out), (train_more, held_out_more) = (
        [set(texts(open_prepared(side))) for side in pair] for pair in sides
    )
    assert not train & held_out
    assert len(train) + len(held_out) == 100
    assert 8 <= len(held_out) <= 35

    def prompts(rows: set[bytes]) -> set[bytes]:
        return {row.split(np.int32(2).tobytes())[0] for row in rows}  # <|im_end|>

    assert prompts(held_out) <= prompts(held_out_more)
    assert prompts(train) <= prompts(train_more)
    assert not prompts(train_more) & prompts(held_out_more)


def test_a_split_by_rows_has_exactly_its_share(tmp_path: Path, made: Any) -> None:
    sources = [source("a", 50, 3, tmp_path), source("b", 30, 3, tmp_path)]
    train, held_out = made(train=sources, eval_split={"share": 0.1, "by": "row"}, seed=3)
    assert seen(held_out) == {0: 5, 1: 3}
    assert not set(texts(open_prepared(train))) & set(texts(open_prepared(held_out)))
    assert made(train=sources, eval_split={"share": 0.1, "by": "row"}, seed=4)[1] != held_out


def test_what_is_held_out_is_evaluated_once_whatever_its_weight(tmp_path: Path, made: Any) -> None:
    sources = [{**source("a", 40, 3, tmp_path), "weight": 3.0}, {**source("b", 40, 3, tmp_path), "weight": 0.5}]
    train, held_out = made(train=sources, eval_split={"share": 0.1, "by": "row"})
    assert seen(train) == {0: 108, 1: 18}
    assert seen(held_out) == {0: 4, 1: 4}
    assert set(Counter(texts(open_prepared(held_out))).values()) == {1}


def test_two_sources_of_one_name_are_told_apart(tmp_path: Path, made: Any) -> None:
    """Each with its own counts and its own loss."""
    sources = [{**source(name, 4 + index, 3, tmp_path), "name": "rows"} for index, name in enumerate("abc")]
    folder, held_out = made(train=sources, eval=sources)
    assert {name: count["rows"] for name, count in counts_of(folder).items()} == {
        "rows": 4,
        "rows (2)": 5,
        "rows (3)": 6,
    }
    assert open_prepared(held_out).sources == ("rows", "rows (2)", "rows (3)")
    renamed, _ = made(train=[{**each, "name": f"other {index}"} for index, each in enumerate(sources)])
    assert open_prepared(renamed).sources == ("other 0", "other 1", "other 2"), "not the names of an earlier run"


def test_a_share_of_no_row_is_told(tmp_path: Path, made: Any) -> None:
    sources = [{**source("a", 4, 3, tmp_path), "share": 0.5}, {**source("long", 4, 300, tmp_path), "share": 0.5}]
    with pytest.raises(DataError, match=r"long\.jsonl has a share and no row is left of it"):
        made(train=sources, over_length="drop")


def test_a_share_counts_by_what_it_is_mixed_by_also_in_a_cache_that_has_the_other(tmp_path: Path, made: Any) -> None:
    sources = [{**source("a", 12, 80, tmp_path), "share": 0.5}, {**source("b", 30, 4, tmp_path), "share": 0.5}]
    by_tokens, by_rows = (made(train=sources, mix_by=by)[0] for by in ("tokens", "rows"))
    assert seen(by_rows) == {0: 30, 1: 30}
    assert seen(by_tokens)[0] == 12
    other = [{**each, "share": share} for each, share in zip(sources, (0.25, 0.75), strict=True)]
    assert seen(made(train=other, mix_by="rows")[0]) == {0: 12, 1: 36}


def test_a_split_that_holds_nothing_out_is_told(tmp_path: Path, made: Any) -> None:
    with pytest.raises(DataError, match=r"data\.eval_split: no row is held out by a share of 0\.01"):
        made(train=[source("a", 10, 3, tmp_path)], eval_split={"share": 0.01, "by": "row"})


def test_evaluation_packs_have_rows_of_one_source(tmp_path: Path, made: Any) -> None:
    sources = [source("a", 9, 5, tmp_path), source("b", 7, 9, tmp_path)]
    train, held_out = (open_prepared(folder) for folder in made(train=sources, eval=sources))
    for data, mixes in ((train, True), (held_out, False)):
        packs = [set(data.rows["store"][pack].tolist()) for pack in data.packs]
        assert any(len(pack) > 1 for pack in packs) == mixes
        assert sorted(row for pack in data.packs for row in pack) == list(range(16))
    assert held_out.sequence_sources.tolist() == sorted(held_out.sequence_sources)
    assert held_out.sources == ("a", "b")


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(lambda sizes: np.array(sizes, np.int64))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes=SIZES, weight=st.floats(0.05, 4.0), seed=st.integers(0, 9))
def test_rows_are_repeated_as_often_as_asked(sizes: np.ndarray[Any, Any], weight: float, seed: int) -> None:
    rows = repeated(sizes, weight, seed=seed, source=1)
    times = np.bincount(rows, minlength=len(sizes))
    assert times.min() >= int(weight)
    assert times.max() <= int(weight) + 1
    assert abs(sizes[rows].sum() - weight * sizes.sum()) <= sizes.max() / 2 + 1e-6, "no row more would come closer"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=6), data=st.data())
def test_shares_are_kept_and_nothing_is_left_out(sizes: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.integers(1, 100), min_size=len(sizes), max_size=len(sizes)))
    shares = [part / sum(parts) for part in parts]
    weights = weights_of([SourceConfig(path="x", share=share) for share in shares], sizes)
    epoch = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    assert [part / sum(epoch) for part in epoch] == pytest.approx(shares)
    assert min(weights) == pytest.approx(1)


def test_hashes_are_cut_at_the_share() -> None:
    prompts = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    for share in (0.01, 0.5, 0.999):
        assert is_held_out(prompts, EvalSplitConfig(share=share), seed=0, source=0).mean() == pytest.approx(
            share, abs=0.005
        )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": [{"path": "a", "share": 0.5}, {"path": "b"}]}, "1 of 2 sources have a share"),
        ({"train": [{"path": "a", "share": 0.5}, {"path": "b", "share": 0.6}]}, "the shares add up to 1.1"),
        ({"train": [{"path": "a", "share": 1, "weight": 2}]}, "data.train.0 has a weight and a share"),
        ({"train": [{"path": "a"}], "eval": [{"path": "b", "weight": 2}]}, "data.eval.0 has a weight or a share"),
        ({"train": [{"path": "a", "weight": 2}], "mix_by": "rows"}, "data.mix_by is rows, which has no effect"),
        (
            {"train": [{"path": "a"}], "eval": [{"path": "b"}], "eval_split": {"share": 0.1}},
            "both say what is held out",
        ),
    ],
)
def test_contradictions_are_told(data: dict[str, Any], said: str) -> None:
    config = {
        "model": {"path": "m"},
        "data": data,
        "train": {"global_batch_size": 1, "max_steps": 1},
        "output_dir": "o",
    }
    with pytest.raises(ConfigError, match=said):
        validate(Config.model_validate(config))
