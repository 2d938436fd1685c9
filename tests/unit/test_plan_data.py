"""What a dry run says of the data, against what training makes of it."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.config.schema import Config
from sft_dist.data.cache import Cache, cache_folder
from sft_dist.data.loader import TrainingOrder, micro_batches
from sft_dist.data.mixing import Side
from sft_dist.data.prepare import find_set, prepare_sets
from sft_dist.data.prepared import PreparedData, open_prepared
from sft_dist.errors import ConfigError, DataError, PlanError
from sft_dist.model.describe import describe_model
from sft_dist.model.renderer import renderer_of
from sft_dist.plan.assumed import AssumedData, parse_count
from sft_dist.plan.data import plan_data
from sft_dist.plan.result import DataPlan
from sft_dist.plan.sampled import sampled_plan
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells

described = lru_cache(lambda path: describe_model(path, None, cells.config(path).method, "fp32", []))


def write_rows(path: Path, lengths: np.ndarray[Any, Any], *, seed: int = 0) -> Path:
    """A row of prompt and answer for each length in characters; a byte is a token."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            cut = int(rng.integers(1, max(2, length - 1)))
            text = f"{number:06d}" + "x" * int(length)
            file.write(json.dumps({"prompt": text[: 6 + cut], "completion": text[6 + cut :] + "."}) + "\n")
    return path


def configured(base: Path, folder: Path, *paths: Path, ranks: int = 1, **sections: Any) -> tuple[Config, Run]:
    settings = cells.config(str(base)).model_dump(mode="json")
    data = {"train": [{"path": str(path)} for path in paths], "max_seq_len": 128, "over_length": "truncate"}
    settings["data"] |= data | sections.pop("data", {})
    settings["output_dir"] = str(folder / "runs" / "run")
    for name, section in sections.items():
        settings[name] = {**settings[name], **section}
    cfg = Config.model_validate(settings)
    return cfg, resolve(cfg, WorldShape(1, ranks), describe=lambda path, *_: described(path))


def planned(cfg: Config, run: Run, **more: Any) -> DataPlan:
    found = plan_data(cfg, run, **more)
    assert found is not None
    return found


def prepared(cfg: Config, run: Run) -> tuple[PreparedData, PreparedData | None]:
    load = renderer_of(cfg.model, cfg.data)
    made = prepare_sets(cfg.data, Cache(cache_folder(cfg.data, cfg.output_dir), load(), load), seed=run.seed)
    assert made.train is not None
    return open_prepared(made.train), None if made.eval is None else open_prepared(made.eval)


def mixed_lengths(number: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(2, 110, number)


TRAININGS: dict[str, dict[str, Any]] = {
    "epochs": {"num_epochs": 3, "max_steps": None, "global_batch_size": 7, "micro_batch_size": 2},
    "within the first": {"num_epochs": None, "max_steps": 3, "global_batch_size": 5, "micro_batch_size": 1},
    "into the third": {"num_epochs": None, "max_steps": 13, "global_batch_size": 8, "micro_batch_size": 2},
    "a step an epoch": {"num_epochs": 2, "max_steps": None, "global_batch_size": 500, "micro_batch_size": 3},
}


@pytest.mark.parametrize(("ranks", "packing"), [(1, "best_fit"), (3, "best_fit"), (3, "none")])
@pytest.mark.parametrize("training", TRAININGS)
def test_what_is_prepared_is_what_the_trainer_does(
    tiny_base: Path, tmp_path: Path, training: str, ranks: int, packing: str
) -> None:
    train = TRAININGS[training] | {"seed": 3}
    data = {
        "train": [
            {"path": str(write_rows(tmp_path / "a.jsonl", mixed_lengths(50))), "weight": 1.5},
            {"path": str(write_rows(tmp_path / "b.jsonl", mixed_lengths(20, 1), seed=1)), "name": "b"},
        ],
        "eval_split": {"share": 0.2},
        "packing": packing,
    }
    cfg, run = configured(tiny_base, tmp_path, ranks=ranks, data=data, train=train, eval={"every_steps": 2})
    rows, held_out = prepared(cfg, run)
    assert held_out is not None
    plan = planned(cfg, run)
    order, steps = TrainingOrder(rows, run.batch, run.seed), run.num_steps(rows.num_sequences)
    tokens = passes = empty = 0
    for number in range(steps):
        step = order.step(number)
        tokens += step.num_tokens
        for rank in range(ranks):
            for batch, _ in micro_batches(rows, run.batch, step.sequences, rank):
                passes, empty = passes + 1, empty + (batch.seq_lens == (1,))
    assert plan.basis == "prepared"
    assert (plan.rows, plan.sequences, plan.steps) == (rows.num_rows, rows.num_sequences, steps)
    assert plan.tokens.low == plan.tokens.value == plan.tokens.high == rows.num_tokens.sum()
    assert plan.supervised_tokens == rows.num_supervised.sum()
    assert plan.sum_squared_lengths == sum(int(n) ** 2 for n in rows.lengths)
    assert plan.tokens_per_step * steps == pytest.approx(tokens, rel=1e-12)
    assert plan.idle_fraction == pytest.approx(empty / passes, abs=1e-12)
    assert plan.epochs == steps / order.steps_per_epoch
    full = passes_of(rows, run, order)
    assert plan.micro_batches_per_step == full
    fill = rows.num_tokens.sum() / (rows.num_sequences * 128)
    assert plan.fill == pytest.approx(fill if packing == "best_fit" else 1.0)
    assert plan.eval_tokens == held_out.num_tokens.sum()
    due = [n for n in range(1, steps + 1) if n % 2 == 0 or n == steps]
    assert plan.evaluations == 1 + len(due)
    cache = Path(cache_folder(cfg.data, cfg.output_dir))
    files = (path for kind in ("tokens", "sets") for path in (cache / kind).rglob("*"))
    on_disk = sum(path.stat().st_size for path in files if path.is_file() and path.parent.name != "locks")
    assert plan.cache_bytes == on_disk


def passes_of(data: PreparedData, run: Run, order: TrainingOrder) -> int:
    return len(list(micro_batches(data, run.batch, order.step(0).sequences, 0)))


def alike(one: DataPlan, other: DataPlan) -> bool:
    """But for where the figures are from, what headers and digests take on the disk, and what preparing told before."""
    same = {"basis": "prepared", "source": "", "cache_bytes": 0, "lost_share": 0.0}
    return replace(one, **same) == replace(other, **same)  # type: ignore[arg-type]


@pytest.mark.parametrize("over_length", ["drop", "truncate", "split"])
def test_a_sample_of_all_rows_is_exact(tiny_base: Path, tmp_path: Path, over_length: str) -> None:
    data = {
        "train": [
            {"path": str(write_rows(tmp_path / "a.jsonl", mixed_lengths(90) * 2)), "share": 0.7},
            {"path": str(write_rows(tmp_path / "b.jsonl", mixed_lengths(40, 1), seed=1)), "share": 0.3},
        ],
        "eval_split": {"share": 0.1, "by": "row"},
        "over_length": over_length,
        "packing_window": 30,
    }
    cfg, run = configured(tiny_base, tmp_path, data=data)
    sampled = planned(cfg, run)
    assert sampled.basis == "sampled"
    prepared(cfg, run)
    counted = planned(cfg, run)
    assert counted.basis == "prepared"
    assert alike(sampled, counted)
    assert sampled.lost_share == 0 if over_length == "split" else 0.05 < sampled.lost_share < 1
    assert sampled.cache_bytes == pytest.approx(counted.cache_bytes, abs=12_000)


def kinds(folder: Path, rows: list[dict[str, str]]) -> dict[str, Path]:
    import pyarrow
    import pyarrow.parquet

    lines = [json.dumps(row) for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    paths = {name: folder / f"rows.{name}" for name in ("jsonl", "json", "jsonl.gz", "csv", "parquet", "arrow")}
    paths["jsonl"].write_bytes(b"\xef\xbb\xbf\n" + "\r\n\n".join(lines).encode())
    paths["json"].write_text(json.dumps(rows))
    paths["jsonl.gz"].write_bytes(gzip.compress("\n".join(lines).encode()))
    paths["csv"].write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    pyarrow.parquet.write_table(table, paths["parquet"], row_group_size=37)
    with pyarrow.ipc.new_stream(paths["arrow"], table.schema) as stream:
        stream.write_table(table, max_chunksize=50)
    return paths


def test_every_kind_of_file_is_counted_and_sampled(tiny_base: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "source", mixed_lengths(400))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    truth: dict[str, DataPlan] = {}
    for name, path in kinds(tmp_path, rows).items():
        cfg, run = configured(tiny_base, tmp_path, path)
        truth[name] = planned(cfg, run)
        assert truth[name].source == "all 400 rows tokenised"
        assert alike(truth[name], truth["jsonl"]), name
        part = planned(cfg, run, max_sample_rows=120)
        assert part.source == "120 of 400 rows tokenised", name
        assert part.rows == pytest.approx(truth[name].rows, rel=0.02), "some have no answer before the cut"
        assert part.tokens.low < truth[name].tokens.value < part.tokens.high, name
        assert part.sequences == pytest.approx(truth[name].sequences, rel=0.1)
        assert planned(cfg, run, max_sample_rows=120) == part, "the same rows each time"
        assert planned(cfg, run, max_sample_rows=120, seed=1) != part


def test_files_too_large_to_be_read_whole(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.data.sampling.BLOCK_BYTES", 4096)
    monkeypatch.setattr("sft_dist.data.sampling.MAX_LINE_BYTES", 16 * 4096)
    monkeypatch.setattr("sft_dist.data.sampling.MAX_STREAMED_BYTES", 1 << 16)
    monkeypatch.setattr("sft_dist.data.sampling.MAX_GROUP_BYTES", 1 << 14)
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, int(n)))) for n in rng.integers(20, 2000, 2500)]
    rows = [{"prompt": "q", "completion": text} for text in texts]
    for name, path in kinds(tmp_path, rows).items():
        cfg, run = configured(tiny_base, tmp_path, path, data={"max_seq_len": 2100})
        plan = planned(cfg, run, max_sample_rows=300)
        true = sum(len(text) for text in texts)
        assert plan.rows == pytest.approx(2500, rel=0.15), name
        assert plan.tokens.low < true + 2500 * 60, name
        assert plan.tokens.high > true, name
        # The beginning of a compressed file tells how many rows it has; an array is read whole.
        assert ("only the beginning" in plan.source) == (name in ("jsonl.gz", "csv", "arrow")), (name, plan.source)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "even": lambda rng, n: rng.integers(2, 100, n),
    "log-normal": lambda rng, n: np.minimum(rng.lognormal(3.0, 1.0, n), 600) + 2,
    "few long ones": lambda rng, n: np.where(rng.random(n) < 0.05, 500, 10),
    "sorted": lambda rng, n: np.sort(rng.integers(2, 200, n)),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_true_number_of_tokens_is_in_nine_of_ten_intervals(
    tiny_base: Path, tmp_path: Path, distribution: str
) -> None:
    lengths = DISTRIBUTIONS[distribution](np.random.default_rng(5), 3000).astype(int)
    paths = [write_rows(tmp_path / f"{n}.jsonl", part) for n, part in enumerate(np.array_split(lengths, 3))]
    data = {"train": [{"path": str(path), "weight": 0.5 + n} for n, path in enumerate(paths)], "max_seq_len": 400}
    # Packing takes longer than all else here.
    data |= {"packing": "best_fit" if distribution == "log-normal" else "none"}
    cfg, run = configured(tiny_base, tmp_path, data=data)
    renderer = renderer_of(cfg.model, cfg.data)()
    files: dict[Side, list[list[str]] | None] = {"train": [[str(path)] for path in paths], "eval": None}
    plans = [sampled_plan(run, renderer, files, max_sample_rows=150, seed=100 * seed) for seed in range(20)]
    truth = prepared(cfg, run)[0]
    true = float(truth.num_tokens.sum())
    hits = sum(plan.tokens.low <= true <= plan.tokens.high for plan in plans)
    # Of 20 intervals that hold it with probability 0.9, fewer than 14 do once in 400 times.
    assert hits >= 14, hits
    widths = [(plan.tokens.high - plan.tokens.low) / true for plan in plans]
    assert max(widths) < 0.6, "an interval says something"
    assert np.mean([plan.tokens.value for plan in plans]) == pytest.approx(true, rel=0.04)
    assert np.mean([plan.sequences for plan in plans]) == pytest.approx(truth.num_sequences, rel=0.05)
    squares = float(np.square(truth.lengths.astype(float)).sum())
    assert np.mean([plan.sum_squared_lengths for plan in plans]) == pytest.approx(squares, rel=0.1)
    assert all(plan.fill > 0.9 for plan in plans)


def test_more_rows_than_are_packed(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", mixed_lengths(3000))
    data = {"eval_split": {"share": 0.25}}
    cfg, run = configured(tiny_base, tmp_path, path, data=data)
    whole = planned(cfg, run, max_sample_rows=500)
    monkeypatch.setattr("sft_dist.plan.sampled.MAX_PACKED_ROWS", 1000)
    part = planned(cfg, run, max_sample_rows=500)
    assert part.rows == whole.rows == pytest.approx(2250, rel=0.01), "some have no answer before the cut"
    assert part.tokens.value == pytest.approx(whole.tokens.value, rel=0.01)
    assert part.sequences == pytest.approx(whole.sequences, rel=0.03)
    assert part.eval_tokens == pytest.approx(whole.tokens.value / 3, rel=0.01)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_nothing_is_written(tiny_base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", mixed_lengths(60))
    cfg, run = configured(tiny_base, tmp_path, path)
    before = snapshot(tmp_path)
    assert planned(cfg, run).basis == "sampled"
    assert snapshot(tmp_path) == before
    assert not Path(cfg.output_dir).parent.exists()
    prepared(cfg, run)
    path.touch()  # what the cache remembers of it no longer holds: it is read again, and is the same
    before = snapshot(tmp_path)
    assert planned(cfg, run).basis == "prepared"
    write_rows(path, mixed_lengths(61))
    before[str(path)] = snapshot(tmp_path)[str(path)]
    assert planned(cfg, run).basis == "sampled"
    assert snapshot(tmp_path) == before


def test_another_configuration_is_not_what_was_prepared(tiny_base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", mixed_lengths(60))
    cfg, run = configured(tiny_base, tmp_path, path)
    prepared(cfg, run)
    held_out = {"eval": [{"path": str(path)}]}
    for other in ({"max_seq_len": 130}, {"packing": "none"}, {"train_on": "all"}, held_out):
        assert planned(*configured(tiny_base, tmp_path, path, data=other)).basis == "sampled", other
    cfg, run = configured(tiny_base, tmp_path, path, data=held_out)
    rows = prepared(cfg, run)[1]
    assert rows is not None
    assert planned(cfg, run).eval_tokens == rows.num_tokens.sum()
    store = next((Path(cache_folder(cfg.data, cfg.output_dir)) / "tokens").glob("*/meta.json"))
    store.unlink()
    load = renderer_of(cfg.model, cfg.data)
    assert find_set(cfg.data, Cache(cache_folder(cfg.data, cfg.output_dir), load(), load), seed=run.seed) is None


def test_what_is_not_here(tiny_base: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    assert plan_data(*configured(tiny_base, tmp_path, gone)) is None
    url = configured(tiny_base, tmp_path, data={"train": [{"path": "https://example.invalid/rows.jsonl"}]})
    assert plan_data(*url) is None
    stated = AssumedData(1000, 50)
    cfg, run = configured(tiny_base, tmp_path, gone)
    assert planned(cfg, run, assumed=stated).basis == "assumed"
    here = write_rows(tmp_path / "here.jsonl", mixed_lengths(10))
    cfg, run = configured(tiny_base, tmp_path, here, data={"eval": [{"path": str(gone)}]})
    plan = planned(cfg, run)
    assert (plan.eval_tokens, plan.evaluations) == (0, 0)
    assert plan.source.endswith("data.eval is not here")
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare)
    for path in bare.glob("*token*"):
        path.unlink()
    cfg, run = configured(tiny_base, tmp_path, here)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(bare)})})
    assert planned(cfg, run).basis == "estimated"
    assert planned(cfg, run, assumed=stated).basis == "assumed"


def unfetched(base: Path, folder: Path, *paths: Path, **sections: Any) -> tuple[Config, Run]:
    """The same configuration before its model was fetched."""
    cfg, run = configured(base, folder, *paths, **sections)
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": "org/not-fetched"})}), run


def test_without_the_tokenizer_rows_are_counted_and_tokens_told_from_the_text(tiny_base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("four" * 10, "漢字かなカナ。", "дважды")))
    plan = planned(*unfetched(tiny_base, tmp_path, rows))
    ends = 3  # of a document
    assert (plan.basis, plan.rows) == ("estimated", 3)
    assert plan.tokens.value == 10 + 7 + 3 + ends
    assert plan.tokens.low < 0.7 * plan.tokens.value < 1.3 * plan.tokens.value < plan.tokens.high
    assert "4 characters a token, 1 of Chinese, Japanese or Korean" in plan.source


@pytest.mark.parametrize("template", [None, "llama3", "plain"])
def test_an_estimate_has_the_rows_that_training_has(tiny_base: Path, tmp_path: Path, template: str | None) -> None:
    path = write_rows(tmp_path / "rows.jsonl", mixed_lengths(300))
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    chat.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    data = {"chat_template": template}
    plan = planned(*unfetched(tiny_base, tmp_path, path, chat, data=data), max_sample_rows=200)
    assert plan.rows == pytest.approx(340, abs=1)
    assert "rows read, 4 characters" in plan.source
    sequences = 300 * 65 / 4 / 128
    assert sequences < plan.sequences < 2.5 * sequences, "they are packed"


def test_no_estimate_refuses_a_row(tiny_base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", np.array([900] * 9))
    for rule in ("error", "drop", "truncate", "split"):
        plan = planned(*unfetched(tiny_base, tmp_path, path, data={"over_length": rule, "max_seq_len": 100}))
        assert plan.basis == "estimated", rule
        assert plan.tokens.value >= 9, rule
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"input_ids": [5, 900, 7], "labels": [-100, 900, 7]}\n' * 20)
    plan = planned(*unfetched(tiny_base, tmp_path, ids))
    assert (plan.basis, plan.rows) == ("estimated", 20)
    with path.open("a") as file:
        file.write('{"prompt": "no end\n')
    with pytest.raises(DataError, match=r"rows.jsonl:10: "):
        planned(*unfetched(tiny_base, tmp_path, path))


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "too long": ("7 of 9 rows have more than data.max_seq_len=40", {"over_length": "error", "max_seq_len": 40}),
    "nothing left": ("none of 9 rows is left", {"over_length": "drop", "max_seq_len": 8}),
    "no weight": ("the weights draw none of 9 rows", {"weight": 0.001}),
    "a bad row": ("rows.jsonl:10: ", {}),
    "no row": ("holds no row", {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_training_refuses_is_refused(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    said, data = FAULTS[fault]
    path = write_rows(tmp_path / "rows.jsonl", np.array([2, 4] + [60] * 7))
    if fault == "a bad row":
        path.write_text(path.read_text() + '{"prompt": "a", "completion": ""}\n')
    if fault == "no row":
        path.write_text("\n\n")
    weight = {"weight": data["weight"]} if "weight" in data else {}
    settings = {name: value for name, value in data.items() if name != "weight"}
    cfg, run = configured(tiny_base, tmp_path, data=settings | {"train": [{"path": str(path)} | weight]})
    with pytest.raises(DataError, match=said) as ours:
        plan_data(cfg, run)
    with pytest.raises(DataError) as theirs:
        prepared(cfg, run)
    assert ours.value.what == theirs.value.what


@pytest.mark.parametrize("rule", ["error", "truncate", "drop", "split"])
def test_what_is_stated(tiny_base: Path, tmp_path: Path, rule: str) -> None:
    data = {"over_length": rule, "max_seq_len": 256}
    cfg, run = configured(tiny_base, tmp_path, tmp_path / "gone.jsonl", data=data)
    plan = planned(cfg, run, assumed=AssumedData(10_000, 100, supervised_share=0.4, sigma=0.9))
    rng = np.random.default_rng(0)
    drawn = np.rint(rng.lognormal(math.log(100) - 0.9**2 / 2, 0.9, 1_000_000))
    is_short = drawn <= 256
    expected = {"error": 100, "truncate": np.minimum(drawn, 256).mean(), "split": drawn.mean(),
                "drop": drawn[is_short].mean() * is_short.mean()}[rule]  # fmt: skip
    assert plan.tokens.value == pytest.approx(10_000 * expected, rel=0.015)
    assert plan.supervised_tokens == pytest.approx(0.4 * plan.tokens.value)
    assert plan.rows == pytest.approx(10_000 * is_short.mean(), rel=0.01) if rule == "drop" else plan.rows >= 10_000
    assert 0.97 < plan.fill <= 1
    larger = planned(cfg, run, assumed=AssumedData(10_000_000, 100, supervised_share=0.4, sigma=0.9))
    assert larger.tokens.value == pytest.approx(1000 * plan.tokens.value, rel=0.01)


def test_stated_rows_are_held_out_too(tiny_base: Path, tmp_path: Path) -> None:
    data = {"eval_split": {"share": 0.2}}
    cfg, run = configured(tiny_base, tmp_path, tmp_path / "gone.jsonl", data=data)
    plan = planned(cfg, run, assumed=AssumedData(1000, 20, sigma=0))
    assert (plan.rows, plan.tokens.value, plan.eval_tokens) == (800, 16_000, 4_000)


def test_what_cannot_be_stated(tiny_base: Path, tmp_path: Path) -> None:
    cfg, run = configured(tiny_base, tmp_path, tmp_path / "gone.jsonl", data={"over_length": "error"})
    with pytest.raises(PlanError, match=r"longer than data\.max_seq_len=128"):
        plan_data(cfg, run, assumed=AssumedData(10, 200))
    cfg, run = configured(tiny_base, tmp_path, tmp_path / "gone.jsonl", data={"over_length": "drop"})
    with pytest.raises(PlanError, match="no example of 200 tokens is left"):
        plan_data(cfg, run, assumed=AssumedData(10, 200, sigma=0))
    for wrong in ({"rows": 0}, {"tokens_per_row": 1}, {"supervised_share": 0}, {"sigma": -1}):
        with pytest.raises(ConfigError):
            AssumedData(**({"rows": 1, "tokens_per_row": 9} | wrong))  # type: ignore[arg-type]


def test_counts_as_people_write_them() -> None:
    given = {"512": 512, "10k": 10_000, "1.5M": 1_500_000, "52_000": 52_000, "52,000": 52_000, "2G": 2e9, "3b": 3e9}
    assert {text: parse_count(text) for text in given} == given
    for text in ("", "k", "1.2.3", "-5", "10 thousand", "1e6", "ten"):
        with pytest.raises(ConfigError, match="is no number"):
            parse_count(text)
