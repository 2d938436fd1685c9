"""The demo's data, tokenizer and base model: correct, reproducible, and held out where they say so."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from sft_dist.demo import base_model, dataset, report
from sft_dist.demo.curve import draw, read_curve
from sft_dist.demo.house_format import KEYS, answer_of, house_format_ok, kind_of, prompt_of
from sft_dist.demo.phrasebook import FAMILIES, LANGUAGES

ROOT = Path(__file__).parents[2]
MAX_TOKENS = 120


def _read(name: str) -> list[dict]:
    return [json.loads(line) for line in dataset.data_file(name).read_text(encoding="utf-8").splitlines()]


TRAIN, EVAL = _read("train.jsonl"), _read("eval.jsonl")


def _row(family: str, language: str) -> dict:
    return next(row for row in EVAL if kind_of(row) == (family, language))


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    dataset.write(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == dataset.data_file(name).read_bytes()


def test_the_recipe_in_configs_is_the_one_the_package_ships() -> None:
    assert (ROOT / "configs/recipes/demo.yaml").read_text() == (ROOT / "sft_dist/demo/demo.yaml").read_text()


def test_every_task_and_language_is_equally_frequent() -> None:
    kinds = {(family, language) for family in FAMILIES for language in LANGUAGES}
    assert Counter(map(kind_of, TRAIN)) == dict.fromkeys(kinds, dataset.TRAIN_ROWS_PER_TASK)
    assert Counter(map(kind_of, EVAL)) == dict.fromkeys(kinds, dataset.EVAL_ROWS_PER_TASK)
    assert len(TRAIN) >= 480
    assert len(EVAL) >= 48


def test_no_held_out_text_occurs_in_training_not_even_under_another_instruction() -> None:
    train, held_out = ({prompt_of(row).partition("\n")[2] for row in rows} for rows in (TRAIN, EVAL))
    assert len(train) == len(TRAIN)
    assert len(held_out) == len(EVAL)
    assert not train & held_out


def test_every_reference_keeps_the_house_format() -> None:
    for row in [*TRAIN, *EVAL]:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert house_format_ok(row, answer_of(row)), row
        assert "{" not in prompt_of(row), "a slot was left unfilled"


def test_the_facts_of_an_extraction_stand_in_its_text() -> None:
    for row in [*TRAIN, *EVAL]:
        family, language = kind_of(row)
        if family != "extraction":
            continue
        text, record = prompt_of(row), json.loads(answer_of(row))
        assert list(record) == list(KEYS)
        year, month, day = map(int, record["date"].split("-"))
        date = f"{year}年{month}月{day}日" if language == "ja" else f"{day} {dataset._MONTHS[month - 1]} {year}"
        sign = {"USD": "$", "EUR": "€", "GBP": "£"}.get(record["currency"], "")
        amount = f"{sign}{record['amount']:,}" + ("円" if language == "ja" else "")
        assert all(fact in text for fact in (record["name"], date, amount, record["item"])), row


def test_answers_are_written_in_the_language_of_their_prompt() -> None:
    for row in [*TRAIN, *EVAL]:
        _, language = kind_of(row)
        japanese = re.search(r"[぀-ヿ一-鿿]", answer_of(row)) is not None
        assert japanese == (language == "ja"), row


@pytest.mark.parametrize(
    ("family", "language", "answer"),
    [
        ("reply", "ja", "【件名】掃除機の返品について\n【回答】承りました。"),
        ("reply", "ja", "【件名】掃除機の返品について\n【担当】返品窓口\n【回答】承りました。"),
        ("reply", "en", "[Subject] Kettle\n[Answer]\n[Team] Returns"),
        ("reply", "en", "[Subject] Kettle\n[Answer] Yes.\n[Team] Returns\n"),
        ("extraction", "en", '{"name": "Emma Clarke"}'),
        ("extraction", "en", '{"name": "A", "date": "2026-13-01", "amount": 1, "currency": "USD", "item": "x"}'),
        ("extraction", "en", '{"name": "A", "date": "2026-12-01", "amount": "1", "currency": "USD", "item": "x"}'),
        ("extraction", "ja", '{"name": "A", "date": "2026-12-01", "amount": 1, "currency": "円", "item": "x"}'),
        ("extraction", "ja", "2026年12月1日"),
        ("rewriting", "ja", "報告書、直しといたよ。"),
        ("rewriting", "ja", "報告書を修正いたしました"),
        ("rewriting", "en", "the report is late."),
        ("rewriting", "en", "The report is late. Sorry."),
        ("rewriting", "en", ""),
    ],
)
def test_answers_that_break_the_house_format(family: str, language: str, answer: str) -> None:
    assert not house_format_ok(_row(family, language), answer)


def test_the_tokenizer_keeps_rows_short_and_texts_whole() -> None:
    tokenizer = base_model.build_tokenizer()
    for row in [*TRAIN, *EVAL]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokens = tokenizer(text)["input_ids"]
        assert len(tokens) <= MAX_TOKENS
        assert tokenizer.decode(tokens) == text


def test_digits_are_grouped_alike_with_and_without_a_comma() -> None:
    tokenizer = base_model.build_tokenizer()
    with_comma, without = (
        [token for token in tokenizer.tokenize(text) if token != ","] for text in ("12,800", "12800")
    )
    assert with_comma == without == ["12", "800"]


def test_the_base_model_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        base_model.build_base_model(tmp_path / name, seed=seed)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


def test_what_is_supervised_is_the_answer_and_its_end(tmp_path: Path) -> None:
    base_model.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for row in EVAL[:6]:
        tokens = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(tokens["input_ids"], tokens["assistant_masks"], strict=True)
        assert tokenizer.decode([token for token, mask in pairs if mask]) == answer_of(row) + "<|im_end|>"


def test_the_curve_is_read_from_the_metrics_and_drawn(tmp_path: Path) -> None:
    lines = [{"step": 0, "eval_loss": 7.6, "eval_perplexity": 2000.0}]
    lines += [{"step": n, "loss": 8.0 / n, "tokens_per_s": 100.0 * n} for n in range(1, 7)]
    lines += [{"step": 6, "eval_loss": 0.7, "eval_perplexity": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curve(tmp_path / "metrics.jsonl")
    assert (curve.steps, curve.eval_steps, curve.perplexities) == ([1, 2, 3, 4, 5, 6], [0, 6], [2000.0, 2.0])
    assert curve.tokens_per_s == 500.0
    draw(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_next_commands_fetch_before_they_train(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    report.show_places(console, tmp_path / "demo", tmp_path / "curve.png", processes=2)
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    config = tmp_path / "demo" / "config.yaml"
    fetch, train = (line for line in lines if str(config) in line)
    model = "model.path=Qwen/Qwen2.5-0.5B-Instruct"
    assert fetch.endswith(f" -m sft_dist model fetch {config} {model}")
    assert f" --nproc-per-node 2 train {config} {model} " in train
    assert lines.index(fetch) < lines.index(train)
