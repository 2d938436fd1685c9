"""BLEU, chrF, ROUGE and exact match: equal to the libraries that define them, and right for Japanese."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from sft_dist.config.scores_schema import SCORE_NAMES, ScoresConfig
from sft_dist.errors import ConfigError, DataError
from sft_dist.scores import bleu
from sft_dist.scores.answered import Answered
from sft_dist.scores.judge import score
from sft_dist.scores.plain_form import plain_form
from sft_dist.scores.rouge import longest_common_subsequence, tokens
from tests.helpers.answers import CHINESE, ENGLISH, JAPANESE, answered, system

SETS = {
    "english": system(ENGLISH, number=40, chance=0.2, seed=1),
    "japanese": system(JAPANESE, number=40, chance=0.2, seed=2),
    "chinese": system(CHINESE, number=40, chance=0.2, seed=3),
    "mixed": system(ENGLISH + JAPANESE, number=40, chance=0.3, seed=4),
    "right": system(ENGLISH, number=12, chance=0.0, seed=5),
    "nothing right": [answered("xyz xyz xyz xyz xyz", "abc def ghi jkl mno")],
    "no bigram right": [answered("a x b y c z d", "a b c d e f g h i")],
    "one short": [answered("Yes", "Yes")],
    "empty answers": [answered("", "one two three four five"), answered("", "six")],
    "empty references": [answered("one two three four five", ""), answered("", "")],
}
TOKENISERS = ["13a", "intl", "char", "zh", "none"]


def texts(examples: list[Answered]) -> tuple[list[str], list[list[str]]]:
    return [example.answer for example in examples], [[example.reference for example in examples]]


@pytest.mark.parametrize("name", SETS)
def test_bleu_is_sacrebleus(name: str) -> None:
    for tokeniser in TOKENISERS:
        found = score(SETS[name], ScoresConfig(metrics=["bleu"], tokeniser=tokeniser))  # type: ignore[arg-type]
        metric = sacrebleu.BLEU(tokenize=tokeniser)
        assert found.values["bleu"] == pytest.approx(metric.corpus_score(*texts(SETS[name])).score, abs=1e-9)
        assert found.signature["bleu"] == str(metric.get_signature())
        assert f"tok:{tokeniser}|" in found.signature["bleu"]


@pytest.mark.parametrize("name", SETS)
def test_chrf_is_sacrebleus(name: str) -> None:
    found = score(SETS[name], ScoresConfig(metrics=["chrf"]))
    metric = sacrebleu.CHRF()
    assert found.values["chrf"] == pytest.approx(metric.corpus_score(*texts(SETS[name])).score, abs=1e-9)
    assert found.signature["chrf"] == str(metric.get_signature())


def test_each_source_has_the_score_of_its_own_examples() -> None:
    settings = ScoresConfig(metrics=["bleu", "chrf", "rouge2", "exact_match"], tokeniser="char")
    found = score(SETS["mixed"], settings)
    assert list(found.by_source) == ["source 0", "source 1"]
    for source, values in found.by_source.items():
        own = [example for example in SETS["mixed"] if example.source == source]
        assert values == pytest.approx(score(own, settings).values, abs=1e-12)
        assert values["bleu"] == pytest.approx(
            sacrebleu.BLEU(tokenize="char").corpus_score(*texts(own)).score, abs=1e-9
        )
    assert found.by_source["source 0"] != found.by_source["source 1"]


def test_counts_of_examples_add_up_to_the_score() -> None:
    found = score(SETS["english"], ScoresConfig(metrics=["bleu", "chrf"]))
    sums = [sum(column) for column in zip(*found.statistics["bleu"], strict=True)]
    again = sacrebleu.BLEU.compute_bleu(sums[2:6], sums[6:], sums[0], sums[1], smooth_method="exp")
    assert found.values["bleu"] == pytest.approx(again.score, abs=1e-9)
    assert {len(row) for row in found.statistics["chrf"]} == {18}


def test_rouge_is_googles_on_english() -> None:
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    for kind in ("english", "right", "no bigram right", "one short", "empty answers", "empty references"):
        found = score(SETS[kind], ScoresConfig(metrics=names))  # type: ignore[arg-type]
        for name in names:
            theirs = [scorer.score(example.reference, example.answer)[name].fmeasure for example in SETS[kind]]
            assert found.per_example[name] == pytest.approx(theirs, abs=1e-9)
            assert found.values[name] == pytest.approx(sum(theirs) / len(theirs), abs=1e-9)


def test_rouge_is_googles_on_japanese_if_it_is_given_the_tokens() -> None:
    class Ours:
        def tokenize(self, text: str) -> list[str]:
            return tokens(text)

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=Ours())
    found = score(SETS["japanese"], ScoresConfig(metrics=names))  # type: ignore[arg-type]
    for name in names:
        theirs = [scorer.score(example.reference, example.answer)[name].fmeasure for example in SETS["japanese"]]
        assert found.per_example[name] == pytest.approx(theirs, abs=1e-9)
    assert RougeScorer(names).score(JAPANESE[0], JAPANESE[0])["rougeL"].fmeasure == 0
    assert min(found.values.values()) > 0.3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The U.S. don't (re-)use snake_case", ["the", "u", "s", "don", "t", "re", "use", "snake", "case"]),
        ("日本の首都、東京！", list("日本の首都東京")),
        ("PyTorchのＤａｔａ１２", ["pytorch", "の", "data12"]),
        ("ｺｰﾋｰ・サーバー", list("コーヒーサーバー")),
        ("時々〜", ["時", "々"]),
        ("한국어 text", ["한", "국", "어", "text"]),
        ("Die Straße, naïve café, Привет", ["die", "straße", "naïve", "café", "привет"]),
        ("。、！？…", []),
        ("", []),
    ],
)
def test_words_of_letters_and_single_cjk_characters(text: str, wanted: list[str]) -> None:
    assert tokens(text) == wanted


def test_longest_common_subsequence_is_that_of_the_table() -> None:
    def by_table(a: str, b: str) -> int:
        row = [0] * (len(b) + 1)
        for one in a:
            above = row
            row = [0]
            for j, other in enumerate(b):
                row.append(above[j] + 1 if one == other else max(above[j + 1], row[j]))
        return row[-1]

    random_source = random.Random(0)
    for _ in range(300):
        a, b = ("".join(random_source.choices("abcd", k=random_source.randint(0, 90))) for _ in range(2))
        assert longest_common_subsequence(list(a), list(b)) == by_table(a, b)


@pytest.mark.parametrize(
    ("references", "script"),
    [
        (JAPANESE, "ja"),
        (CHINESE, "zh"),
        ([*CHINESE * 10, "優しいの"], "zh"),
        (["東京", "大阪", "京都です"], "ja"),
        (ENGLISH, "other"),
        ([*ENGLISH, "はい"], "other"),
        (["PyTorchでDataLoaderを使って学習します"], "ja"),
        (["한국어 문장입니다"], "other"),
        (["", "12"], "other"),
    ],
)
def test_script_of_references(references: list[str], script: str) -> None:
    assert bleu.script_of(references) == script


def test_auto_takes_characters_where_mecab_is_missing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bleu, "has_mecab", lambda: False)
    found = score(SETS["japanese"], ScoresConfig(metrics=["bleu"]))
    assert found.values["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(*texts(SETS["japanese"]), tokenize="char").score, abs=1e-9
    )
    assert "tok:char" in found.signature["bleu"]
    assert any("MeCab is not installed" in note and "sacrebleu[ja]" in note for note in found.notes)
    with pytest.raises(ConfigError, match="tokeniser is ja-mecab, and MeCab"):
        score(SETS["japanese"], ScoresConfig(metrics=["bleu"], tokeniser="ja-mecab"))


@pytest.mark.skipif(not bleu.has_mecab(), reason="MeCab is not installed: pip install 'sacrebleu[ja]'")
def test_auto_takes_mecab_where_it_is_installed() -> None:
    found = score(SETS["japanese"], ScoresConfig(metrics=["bleu"]))
    theirs = sacrebleu.BLEU(tokenize="ja-mecab")
    assert found.values["bleu"] == pytest.approx(theirs.corpus_score(*texts(SETS["japanese"])).score, abs=1e-9)
    assert found.signature["bleu"] == str(theirs.get_signature())
    assert any("MeCab's words" in note for note in found.notes)


def test_auto_means_zh_for_chinese_and_13a_for_the_rest() -> None:
    assert "tok:zh|" in score(SETS["chinese"], ScoresConfig(metrics=["bleu"])).signature["bleu"]
    assert "tok:13a|" in score(SETS["english"], ScoresConfig(metrics=["bleu"])).signature["bleu"]


def test_the_script_is_that_of_the_references_whatever_the_answers_are() -> None:
    asked = [answered(e.reference, e.answer, source="en") for e in SETS["english"]]
    mixed = [
        answered(wrong.reference, e.reference, source="zh")
        for e, wrong in zip(SETS["chinese"][:6], asked, strict=False)
    ]
    found = score([*asked, *mixed], ScoresConfig(metrics=["bleu"]))
    assert "tok:zh|" in found.signature["bleu of zh"]


def test_a_source_in_another_script_has_its_own_tokeniser() -> None:
    english = [answered(e.answer, e.reference, source="en") for e in SETS["english"]]
    chinese = [answered(e.answer, e.reference, source="zh") for e in SETS["chinese"][:6]]
    found = score(english + chinese, ScoresConfig(metrics=["bleu"]))
    assert found.by_source["zh"]["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(*texts(chinese), tokenize="zh").score, abs=1e-9
    )
    assert found.by_source["en"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(*texts(english)).score, abs=1e-9)
    assert "tok:13a|" in found.signature["bleu"]
    assert "tok:zh|" in found.signature["bleu of zh"]
    assert any(note.startswith("bleu: zh alone is counted with tokeniser zh") for note in found.notes)


def test_references_in_two_scripts_are_told_where_nobody_named_the_tokeniser() -> None:
    japanese = [answered("x", f"東京は日本の首都です{n}") for n in range(9)]
    english = [answered("x", f"Tokyo is the capital city of Japan, and it has been for a while {n}") for n in range(15)]

    def told(examples: list[Answered], **settings: str) -> list[str]:
        found = score(examples, ScoresConfig.model_validate({"metrics": ["bleu"], **settings}))
        return [note for note in found.notes if "counted with tokeniser" in note]

    (note,) = told(japanese + english)
    assert note.startswith("bleu: 9 of 24 references (38%) are Japanese, and all were counted with tokeniser 13a; ")
    (note,) = told(japanese * 3 + english[:3])
    assert note.startswith("bleu: 3 of 30 references (10%) are not Japanese, and all were counted with tokeniser ")
    assert told(japanese + english, tokeniser="char") == []
    assert told(english * 15 + japanese) == [], "too few to matter"
    assert told([*japanese, answered("12", "12"), answered("東京", "東京")]) == [], (
        "numbers and names are in no language"
    )


@pytest.mark.parametrize(
    ("answer", "reference", "is_same"),
    [
        ("Ｔｏｋｙｏ　１２３", "tokyo 123", True),
        ("ﾄｳｷｮｳ｡", "トウキョウ", True),
        (" はい。\n", "はい", True),
        ("Yes.", "yes", True),
        ("STRASSE", "Straße", True),
        ("がぎ", "か\u3099き\u3099", True),
        ("℡", "tel", True),
        ("yes!", "yes", False),
        ("yes..", "yes", False),
        ("ハイ", "はい", False),
        ("", "", True),
        ("", "yes", False),
    ],
)
def test_exact_match_by_form(answer: str, reference: str, is_same: bool) -> None:
    found = score([answered(answer, reference)], ScoresConfig(metrics=["exact_match"]))
    assert found.values == {"exact_match": float(is_same)}
    written = score([answered(answer, reference)], ScoresConfig(metrics=["exact_match"], normalise=False))
    assert written.values == {"exact_match": float(answer == reference)}
    assert plain_form(plain_form("ＡＢＣ")) == plain_form("abc")


def test_right_answers_have_the_highest_scores() -> None:
    right = [answered(text, text) for text in ENGLISH + JAPANESE]
    found = score(right, ScoresConfig(metrics=["bleu", "chrf", "rouge1", "rougeL", "exact_match"], tokeniser="char"))
    assert found.values == pytest.approx(
        {"bleu": 100, "chrf": 100, "rouge1": 1, "rougeL": 1, "exact_match": 1}, abs=1e-9
    )
    assert found.per_example["exact_match"] == [1.0] * 10


def test_what_is_empty_or_too_short_is_told() -> None:
    found = score(SETS["empty answers"] + SETS["empty references"], ScoresConfig(metrics=["chrf", "rouge1"]))
    assert found.notes == [
        "3 of 4 answers are empty",
        "2 of 4 references are empty",
        "rouge: 2 references have no letter or digit and count 0",
    ]
    assert score([answered(" \n", "x")], ScoresConfig(metrics=["chrf"])).notes == ["1 of 1 answers are empty"]
    short = score(SETS["one short"], ScoresConfig(metrics=["bleu"]))
    assert short.values == {"bleu": 0.0}
    assert any("no answer has four tokens" in note for note in short.notes)


def test_no_example_is_an_error() -> None:
    with pytest.raises(DataError, match="no answer to be judged"):
        score([], ScoresConfig())


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    code = (
        "import sys\n"
        "from sft_dist.scores import judge, compare\n"
        "from sft_dist.scores.answered import Answered\n"
        "from sft_dist.config.scores_schema import ScoresConfig\n"
        "print([n for n in ('sacrebleu', 'jsonschema', 'torch', 'transformers') if n in sys.modules])\n"
        "judge.score([Answered('p', 'a', 'a', 's')], ScoresConfig(metrics=['bleu', 'chrf', 'rougeL', 'accuracy']))\n"
        "print([n for n in ('sacrebleu', 'jsonschema', 'torch', 'transformers', 'rouge_score') if n in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["[]", "['sacrebleu']"]


def test_every_name_has_a_score(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "schema.json").write_text("{}")
    (tmp_path / "own.py").write_text("def own(prompt, answer, reference):\n    return 0.25\n")
    settings = ScoresConfig(
        metrics=list(SCORE_NAMES), json_schema=str(tmp_path / "schema.json"), custom=f"{tmp_path}/own.py:own"
    )
    found = score(SETS["english"], settings)
    assert list(found.values) == list(found.signature) == list(SCORE_NAMES)
    assert set(found.per_example) | set(found.statistics) == set(SCORE_NAMES)
    assert set(found.statistics) == {"bleu", "chrf", "macro_f1"}
    assert {len(values) for values in found.per_example.values()} == {40}
