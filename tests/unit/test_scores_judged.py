"""Labels, JSON, a function of the user's own, and the settings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from pydantic import ValidationError
from sklearn.metrics import accuracy_score, f1_score

from sft_dist.config.scores_schema import ScoresConfig
from sft_dist.errors import ConfigError, DataError
from sft_dist.scores.answered import Answered
from sft_dist.scores.compare import notes_on_intervals
from sft_dist.scores.judge import judge, score
from sft_dist.scores.labels import NO_LABEL, LabelReader
from tests.helpers.answers import answered

LABELS = ["肯定", "否定", "中立", "neutral"]


def labelled(number: int, seed: int) -> tuple[list[Answered], list[str], list[str]]:
    """Examples, the label of each reference, and of each answer ("": none)."""
    random_source = random.Random(seed)
    examples, truth, found = [], [], []
    for i in range(number):
        truth.append(random_source.choice(LABELS))
        found.append(truth[-1] if random_source.random() < 0.5 else random_source.choice([*LABELS, ""]))
        answer = random_source.choice(["{}", "{}。", " {}\n理由は次のとおりです。", "{}です"]).format(
            found[-1] or "不明"
        )
        examples.append(answered(answer, truth[-1], prompt=str(i), source=f"source {i % 2}"))
    return examples, truth, found


@pytest.mark.parametrize("labels", [None, LABELS, [*LABELS, "never"]])
def test_accuracy_and_macro_f1_are_scikit_learns(labels: list[str] | None) -> None:
    examples, truth, found = labelled(200, seed=0)
    values = score(examples, ScoresConfig(metrics=["accuracy", "macro_f1"], labels=labels))
    wanted = f1_score(truth, found, labels=labels or LABELS, average="macro", zero_division=0)
    assert values.values["accuracy"] == pytest.approx(accuracy_score(truth, found), abs=1e-9)
    assert values.values["macro_f1"] == pytest.approx(wanted, abs=1e-9)
    assert values.per_example["accuracy"] == [float(a == b) for a, b in zip(truth, found, strict=True)]
    assert any(f"{found.count('')} of 200 answers are no label" in note for note in values.notes)
    assert any("no reference is 'never'" in note for note in values.notes) == (labels is not None and len(labels) == 5)


def test_a_source_counts_its_own_labels_if_nobody_listed_them() -> None:
    examples = [
        answered("yes", "yes", source="a"),
        answered("good", "no", source="a"),
        answered("good", "good", source="b"),
        answered("bad", "bad", source="b"),
    ]
    found = score(examples, ScoresConfig(metrics=["macro_f1"]))
    assert found.by_source["a"]["macro_f1"] == pytest.approx(
        f1_score(["yes", "no"], ["yes", "good"], labels=["yes", "no"], average="macro", zero_division=0), abs=1e-9
    )
    assert found.by_source["b"]["macro_f1"] == 1.0
    listed = score(examples, ScoresConfig(metrics=["macro_f1"], labels=["yes", "no", "good", "bad"]))
    assert listed.by_source["b"]["macro_f1"] == 0.5


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("no", "no"),
        ("No.", "no"),
        ("ＮＯ！", "no"),
        ("no, because it rains", "no"),
        ("no\nyes", "no"),
        ("nothing", None),
        ("no_answer", None),
        ("The answer is no", None),
        ("\n\nno", "no"),
        ("noです", "no"),
        ("3", "3"),
        ("3.", "3"),
        ("3. because", "3"),
        ("3.5", None),
        ("30", None),
        ("3,000", None),
        ("３点", "3"),
        ("肯定的な意見です", "肯定的"),
        ("肯定だ", "肯定"),
        ("very good indeed", "very good"),
        ("very", None),
        ("", None),
    ],
)
def test_the_label_of_an_answer(answer: str, label: str | None) -> None:
    reader = LabelReader(["no", "3", "肯定", "肯定的", "good", "very good"], normalise=True)
    code = reader.read(answer)
    assert (None if code == NO_LABEL else reader.labels[code]) == label


def test_labels_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'Yes' and 'yes\.', which are the same"):
        score([answered("yes", "yes")], ScoresConfig(metrics=["accuracy"], labels=["Yes", "yes."]))
    with pytest.raises(ConfigError, match="empty when compared"):
        score([answered("yes", "yes")], ScoresConfig(metrics=["accuracy"], labels=["yes", " . "]))
    with pytest.raises(DataError, match=r"1 of 2 references are none of eval.scores.labels, e.g. 'maybe'"):
        score([answered("yes", "yes"), answered("no", "maybe")], ScoresConfig(metrics=["macro_f1"], labels=["yes"]))


def test_labels_are_compared_as_written_if_wanted() -> None:
    examples = [answered("Yes", "yes"), answered("yes", "yes"), answered("", "no")]
    found = score(examples, ScoresConfig(metrics=["accuracy"], normalise=False))
    assert found.per_example["accuracy"] == [0.0, 1.0, 0.0]


def test_an_empty_reference_is_a_label_that_only_an_empty_answer_has() -> None:
    found = score([answered("", ""), answered("x", ""), answered("yes", "yes")], ScoresConfig(metrics=["accuracy"]))
    assert found.per_example["accuracy"] == [1.0, 0.0, 1.0]


def test_free_texts_as_labels_are_told() -> None:
    examples = [answered(f"text {i}", f"text {i}") for i in range(60)]
    notes = score(examples, ScoresConfig(metrics=["accuracy"])).notes
    assert notes == [
        "labels: the 60 references have 60 different forms; are they labels? (eval.scores.labels lists them)"
    ]


def test_labels_that_few_references_have_are_told_and_half_as_many_labels_as_references_are_none() -> None:
    examples = [answered("a", "a")] * 9 + [answered("b", "b")] * 4 + [answered("c", "c")]
    found = judge(examples, ScoresConfig(metrics=["macro_f1"]))
    assert notes_on_intervals(found) == ["labels: fewer than 5 references are 'b', 'c'; macro_f1's interval is too low"]
    assert found.signature["macro_f1"].startswith("labels:3 of the references|NFKC")
    listed = score(examples, ScoresConfig(metrics=["accuracy"], labels=["a", "b", "c"], normalise=False))
    assert listed.signature["accuracy"] == "labels:3 listed|compared as written"
    texts = [answered(f"text {i}", f"text {i}") for i in range(61)]
    [note] = score([*texts, *texts[:50]], ScoresConfig(metrics=["accuracy"])).notes
    assert note.startswith("labels: the 111 references have 61 different forms; are they labels?")


def test_only_who_sees_macro_f1_and_its_interval_is_told_of_them() -> None:
    examples = [answered("yes", "yes")] * 9 + [answered("no", "no")]
    for metrics in (["chrf", "exact_match", "accuracy"], ["accuracy", "macro_f1"]):
        settings = ScoresConfig.model_validate({"metrics": metrics, "labels": ["yes", "no", "never"]})
        judged = judge(examples, settings)
        assert notes_on_intervals(judged) == (
            ["labels: fewer than 5 references are 'no'; macro_f1's interval is too low"]
            if "macro_f1" in metrics
            else []
        )
        assert any("macro_f1" in note for note in judged.notes) == ("macro_f1" in metrics)
        assert not any("interval" in note for note in judged.notes)


@pytest.mark.parametrize(
    ("answer", "is_valid"),
    [
        ('{"a": [1, 2.5e3, null, true, "あ"]}', True),
        ("  [ ] \n", True),
        ("12", True),
        ('```json\n{"a": 1}\n```', True),
        ('\n```JSON\r\n{"a": 1}\r\n```\n', True),
        ('```\n{"a": 1}```', True),
        ('Here it is:\n```json\n{"a": 1}\n```', False),
        ('```json\n{"a": 1}\n```\nDone.', False),
        ('```python\n{"a": 1}\n```', False),
        ('```json\n{"a": 1}', False),
        ("", False),
        ("```json\n```", False),
        ("NaN", False),
        ('{"a": Infinity}', False),
        ('{"a": -Infinity}', False),
        ("{'a': 1}", False),
        ('{"a": 1,}', False),
        ('{"a": 1, "a": 2}', False),
        ('{"a": 1} {"b": 2}', False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_strict(answer: str, is_valid: bool) -> None:
    assert score([answered(answer, "{}")], ScoresConfig(metrics=["json_valid"])).values == {
        "json_valid": float(is_valid)
    }


SCHEMA = {
    "type": "object",
    "properties": {"名前": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["名前"],
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


def test_json_schema(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA, ensure_ascii=False), encoding="utf-8")
    answers = [
        '{"名前": "花子", "age": 3}',
        '```json\n{"名前": "花子"}\n```',
        '{"名前": "花子", "age": -1}',
        "{}",
        "[]",
        "no",
    ]
    found = score(
        [answered(answer, "") for answer in answers],
        ScoresConfig(metrics=["json_valid", "json_schema"], json_schema=str(path)),
    )
    assert found.per_example["json_schema"] == [1, 1, 0, 0, 0, 0]
    assert found.per_example["json_valid"] == [1, 1, 1, 1, 1, 0]
    assert found.signature["json_schema"].startswith("sha256:")
    assert "Draft202012Validator" in found.signature["json_schema"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON: "),
        ("3", "holds no JSON Schema"),
        ('{"type": "objekt"}', r"is no JSON Schema: \$.type: 'objekt' is not valid"),
        ('{"$ref": "https://example.invalid/other.json"}', "refers to 'https://example.invalid/other.json'"),
        ('{"$ref": "#/$defs/none"}', r"refers to '/\$defs/none'"),
    ],
)
def test_a_schema_that_cannot_be_used_is_told(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        score([answered("{}", "")], ScoresConfig(metrics=["json_schema"], json_schema=str(path)))


def test_an_answer_that_is_nested_too_deep_for_a_check_is_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"$ref": "#"}}')
    settings = ScoresConfig(metrics=["json_valid", "json_schema"], json_schema=f"{tmp_path}/schema.json")
    deep = "[" * 500 + "]" * 500
    assert score([answered(deep, ""), answered("[[]]", "")], settings).per_example == {
        "json_valid": [1, 1], "json_schema": [0, 1]
    }  # fmt: skip


def test_a_schema_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, *_, **__: asked.append(request))
    (tmp_path / "schema.json").write_text('{"$ref": "http://127.0.0.1:1/other.json"}')
    with pytest.raises(ConfigError, match="which it does not hold"):
        score([answered("{}", "")], ScoresConfig(metrics=["json_schema"], json_schema=f"{tmp_path}/schema.json"))
    assert asked == []


def own_score(folder: Path, code: str, *, name: str = "own") -> dict[str, list[float]]:
    (folder / "own.py").write_text(code, encoding="utf-8")
    settings = ScoresConfig(metrics=["custom"], custom=f"{folder}/own.py:{name}")
    examples = [answered("東京", "東京都", prompt="首都は？"), answered("", "x", prompt="empty")]
    return score(examples, settings).per_example


def test_a_function_of_ones_own_gets_the_texts(tmp_path: Path) -> None:
    code = (
        "from dataclasses import dataclass\n\n"
        "@dataclass\nclass Seen:\n    n: int\n\n"
        "def own(prompt, answer, reference):\n"
        "    return Seen(len(prompt) + 10 * len(answer) + 100 * len(reference)).n / 2\n"
    )
    assert own_score(tmp_path, code) == {"custom": [162.0, 52.5]}


def test_whole_numbers_truth_values_and_numpy_are_numbers(tmp_path: Path) -> None:
    assert own_score(tmp_path, "def own(p, a, r): return len(a)") == {"custom": [2.0, 0.0]}
    assert own_score(tmp_path, "def own(p, a, r): return a in r and a != ''") == {"custom": [1.0, 0.0]}
    assert own_score(tmp_path, "import numpy\ndef own(p, a, r): return numpy.float32(0.5)") == {"custom": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def own(p, a, r)\n    return 1\n", r"own\.py:1: SyntaxError: expected ':'"),
        ("import json\n\nimport no_such_package\n", r"own\.py:3: ModuleNotFoundError: .*no_such_package"),
        ("import sys\nsys.exit(3)\n", r"own\.py:2: SystemExit: 3"),
        ("def other(p, a, r):\n    return 1.0\n", r"own\.py has no function own\n  fix: name one that it has: other"),
        ("own = 3\n", r"own\.py has no function own\n  fix: define own in it"),
        (
            "def own(p, a, r):\n    return part(a)\n\ndef part(a):\n    return 1 / len(a)\n",
            r"own\.py:5: ZeroDivisionError: division by zero, at example 2 \(answer ''\)",
        ),
        (
            "import json\n\ndef own(p, a, r):\n    return json.loads(a)\n",
            r"own\.py:4: json\S+JSONDecodeError: .* 1 \(ans",
        ),
        ("def own(p, a):\n    return 1.0\n", r"own\.py: TypeError: own\(\) takes 2 positional"),
        ("\ndef own(p, a, r):\n    pass\n", r"own\.py:2: own returned None \(NoneType\) for example 1"),
        ("def own(p, a, r):\n    return 'good'\n", r"returned 'good' \(str\)"),
        ("def own(p, a, r):\n    return float('nan')\n", r"returned nan \(float\)"),
        ("def own(p, a, r):\n    return [1.0]\n", r"returned \[1.0\] \(list\)"),
    ],
)
def test_errors_of_ones_own_function_name_file_and_line(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^eval\.scores\.custom: .*" + message) as caught:
        own_score(tmp_path, code)
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.py cannot be read: No such file"):
        score([answered("a", "a")], ScoresConfig(metrics=["custom"], custom=f"{tmp_path}/none.py:own"))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    assert own_score(tmp_path, "def own(p, a, r): return 1")["custom"] == [1.0, 1.0]
    assert own_score(tmp_path, "def own(p, a, r): return 2")["custom"] == [2.0, 2.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"metrics": []},
        {"metrics": ["bleu", "bleu"]},
        {"metrics": ["rouge9"]},
        {"metrics": ["accuracy"], "labels": []},
        {"metrics": ["accuracy"], "labels": ["a", "a"]},
        {"metrics": ["custom"], "custom": "own.py"},
        {"metrics": ["custom"], "custom": "own.py:not a name"},
        {"tokeniser": "moses"},
        {"tokenizer": "char"},
    ],
)
def test_settings_that_are_none(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ScoresConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ScoresConfig(metrics=["json_schema"]), "eval.scores.json_schema names no file"),
        (ScoresConfig(metrics=["custom"]), "eval.scores.custom names no function"),
        (ScoresConfig(metrics=["chrf"], json_schema="a.json"), "no effect without json_schema in eval.scores.metrics"),
        (ScoresConfig(metrics=["chrf"], custom="a.py:b"), "no effect without custom in eval.scores.metrics"),
        (ScoresConfig(metrics=["chrf"], labels=["a"]), "no effect without accuracy or macro_f1"),
        (ScoresConfig(metrics=["chrf"], tokeniser="char"), "no effect without bleu"),
    ],
)
def test_settings_that_contradict_each_other(settings: ScoresConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score([answered("a", "a")], settings)
