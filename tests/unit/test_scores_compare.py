"""The paired bootstrap: a slow one beside it, its coverage, and what has no difference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import f1_score

from sft_dist.config.scores_schema import ScoreName, ScoresConfig
from sft_dist.errors import ConfigError, DataError
from sft_dist.scores import compare as compare_module
from sft_dist.scores.answered import Answered
from sft_dist.scores.compare import compare, compare_judged
from sft_dist.scores.judge import Judged, judge, score
from tests.helpers.answers import ENGLISH, JAPANESE, answered, system

SAMPLES = 60
LABELS = ["yes", "no", "maybe"]


def two_systems(texts: list[str]) -> tuple[list[Answered], list[Answered]]:
    return system(texts, number=30, chance=0.3, seed=1), system(texts, number=30, chance=0.2, seed=2)


def slow(
    value: Callable[[list[Answered]], float], base: list[Answered], tuned: list[Answered], *, seed: int
) -> dict[str, object]:
    """The same as ``compare``, by judging every resample from its texts."""
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(len(base), size=len(base)) for _ in range(SAMPLES)]
    of_base, of_tuned = (np.array([value([own[i] for i in rows]) for rows in drawn]) for own in (base, tuned))
    return {
        "base": value(base),
        "tuned": value(tuned),
        "difference": value(tuned) - value(base),
        "base_interval": tuple(np.percentile(of_base, [2.5, 97.5])),
        "tuned_interval": tuple(np.percentile(of_tuned, [2.5, 97.5])),
        "difference_interval": tuple(np.percentile(of_tuned - of_base, [2.5, 97.5])),
        "tuned_better": float(np.mean(of_tuned - of_base > 1e-9)),
    }


def bleu(examples: list[Answered]) -> float:
    return sacrebleu.corpus_bleu([e.answer for e in examples], [[e.reference for e in examples]], tokenize="char").score


def chrf(examples: list[Answered]) -> float:
    return sacrebleu.corpus_chrf([e.answer for e in examples], [[e.reference for e in examples]]).score


def rouge_l(examples: list[Answered]) -> float:
    return score(examples, ScoresConfig(metrics=["rougeL"])).values["rougeL"]


def macro_f1(examples: list[Answered]) -> float:
    truth, found = [e.reference for e in examples], [e.answer for e in examples]
    return float(f1_score(truth, found, labels=LABELS, average="macro", zero_division=0))


@pytest.mark.parametrize("texts", [ENGLISH, JAPANESE], ids=["english", "japanese"])
@pytest.mark.parametrize(
    ("name", "value"), [("bleu", bleu), ("chrf", chrf), ("rougeL", rouge_l)], ids=["bleu", "chrf", "rougeL"]
)
def test_equals_a_slow_bootstrap(texts: list[str], name: ScoreName, value: Callable[[list[Answered]], float]) -> None:
    base, tuned = two_systems(texts)
    settings = ScoresConfig(metrics=[name], tokeniser="char" if name == "bleu" else "auto")
    found = dataclasses.asdict(compare(base, tuned, settings, samples=SAMPLES, seed=5)[name])
    for key, wanted in slow(value, base, tuned, seed=5).items():
        assert found[key] == pytest.approx(wanted, abs=1e-9), key


def test_macro_f1_equals_a_slow_bootstrap() -> None:
    generator = np.random.default_rng(0)
    truth = [LABELS[i] for i in generator.integers(3, size=40)]
    base, tuned = (
        [answered(str(a), b, prompt=str(i)) for i, (a, b) in enumerate(zip(answers, truth, strict=True))]
        for answers in (generator.choice([*LABELS, "?"], size=40), np.where(generator.random(40) < 0.6, truth, "no"))
    )
    found = dataclasses.asdict(compare(base, tuned, ScoresConfig(metrics=["macro_f1"]), samples=SAMPLES)["macro_f1"])
    for key, wanted in slow(macro_f1, base, tuned, seed=0).items():
        assert found[key] == pytest.approx(wanted, abs=1e-9), key


def test_blocks_of_resamples_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = two_systems(ENGLISH)
    settings = ScoresConfig(metrics=["bleu", "chrf", "exact_match"])
    whole = compare(base, tuned, settings, samples=50)
    monkeypatch.setattr(compare_module, "_COUNTS_AT_A_TIME", 7 * len(base))
    in_blocks = compare(base, tuned, settings, samples=50)
    for name, found in whole.items():
        assert dataclasses.astuple(in_blocks[name])[:3] == dataclasses.astuple(found)[:3]
        assert in_blocks[name].difference_interval == pytest.approx(found.difference_interval, abs=1e-12)
        assert in_blocks[name].tuned_better == found.tuned_better
    assert compare(base, tuned, settings, samples=50, seed=1)["bleu"] != whole["bleu"]


def own_scores(folder: Path) -> ScoresConfig:
    (folder / "own.py").write_text("def own(prompt, answer, reference):\n    return float(answer)\n")
    return ScoresConfig(metrics=["custom"], custom=f"{folder}/own.py:own")


def test_the_interval_covers_the_truth_in_95_of_100_cases(tmp_path: Path) -> None:
    settings = own_scores(tmp_path)
    generator = np.random.default_rng(0)
    true_difference, trials, examples = 0.5, 300, 60
    covered = decided = 0
    widths: list[tuple[float, float]] = []
    for trial in range(trials):
        prompts = generator.normal(size=examples) * 3  # hard and easy ones, for both alike
        base, tuned = (
            [
                answered(str(value), "", prompt=str(i))
                for i, value in enumerate(prompts + gain + generator.normal(size=examples))
            ]
            for gain in (0.0, true_difference)
        )
        found = compare(base, tuned, settings, samples=300, seed=trial)["custom"]
        low, high = found.difference_interval
        covered += low <= true_difference <= high
        decided += low > 0
        widths.append((found.base_interval[1] - found.base_interval[0], high - low))
    # 95 % less the bootstrap's own loss at 60 examples (about 1 %); 4 standard deviations of 300 trials are 5 %.
    assert 0.89 <= covered / trials <= 0.99
    assert decided / trials > 0.6
    # Prompts have 9 times the variance of an answer, and are the same for both: (9 + 1) / (1 + 1) = 2.24 squared.
    of_base, of_difference = np.mean(widths, axis=0)
    assert of_base / of_difference == pytest.approx(5**0.5, rel=0.05)


def test_the_interval_of_corpus_scores_covers_the_truth() -> None:
    settings = ScoresConfig(metrics=["bleu", "chrf"], tokeniser="char")
    texts = ENGLISH + JAPANESE
    population = [
        judge(system(texts, number=3000, chance=chance, seed=seed), settings) for chance, seed in ((0.3, 1), (0.25, 2))
    ]
    truth = {name: population[1].values()[name] - population[0].values()[name] for name in settings.metrics}
    generator = np.random.default_rng(0)
    covered = dict.fromkeys(truth, 0)
    trials = 200
    for trial in range(trials):
        rows = generator.integers(3000, size=100).tolist()
        base, tuned = (
            Judged(
                tuple(whole.examples[row] for row in rows),
                {name: tally.part(rows) for name, tally in whole.tallies.items()},
                {},
                [],
            )
            for whole in population
        )
        for name, found in compare_judged(base, tuned, samples=200, seed=trial).items():
            low, high = found.difference_interval
            covered[name] += low <= truth[name] <= high
    assert all(0.88 <= count / trials <= 0.99 for count in covered.values()), covered


def test_a_share_in_the_middle_for_two_of_one_kind(tmp_path: Path) -> None:
    settings = own_scores(tmp_path)
    generator = np.random.default_rng(1)
    shares = []
    for trial in range(200):
        base, tuned = (
            [answered(str(value), "", prompt=str(i)) for i, value in enumerate(generator.normal(size=40))]
            for _ in range(2)
        )
        shares.append(compare(base, tuned, settings, samples=200, seed=trial)["custom"].tuned_better)
    assert 0.43 < np.mean(shares) < 0.57
    assert np.mean(np.array(shares) > 0.975) < 0.08


def test_identical_systems_have_no_difference() -> None:
    base, _ = two_systems(JAPANESE)
    settings = ScoresConfig(
        metrics=["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "accuracy", "macro_f1", "json_valid"],
        tokeniser="char",
    )
    for found in compare(base, list(base), settings, samples=200).values():
        assert (found.difference, found.difference_interval, found.tuned_better) == (0.0, (0.0, 0.0), 0.0)
        assert found.base_interval == found.tuned_interval
        assert found.base == found.tuned


def test_a_tie_of_different_answers_is_not_better(tmp_path: Path) -> None:
    settings = own_scores(tmp_path)
    tenths = np.random.default_rng(0).integers(10, size=12)
    base, tuned = (
        [answered(str(value / 10), "", prompt="same") for value in values] for values in (tenths, tenths[::-1])
    )
    generator = np.random.default_rng(0)
    gains = [(tenths[::-1] - tenths)[generator.integers(12, size=12)].sum() for _ in range(400)]
    assert gains.count(0) > 5
    found = compare(base, tuned, settings, samples=400)["custom"]
    assert found.difference == 0.0
    assert found.tuned_better == sum(gain > 0 for gain in gains) / 400


def test_one_example_and_no_overlap_of_right_answers() -> None:
    base, tuned = [answered("a b c d", "w x y z")], [answered("w x y z", "w x y z")]
    found = compare(base, tuned, ScoresConfig(metrics=["bleu", "exact_match"]), samples=20)
    assert found["bleu"].base_interval == (0.0, 0.0)
    assert found["bleu"].difference_interval == pytest.approx((100.0, 100.0))
    assert found["exact_match"].tuned_better == 1.0


def test_sets_that_do_not_belong_together_are_refused() -> None:
    base, tuned = two_systems(ENGLISH)
    with pytest.raises(DataError, match="30 answers cannot be compared with 29"):
        compare(base, tuned[1:], ScoresConfig())
    with pytest.raises(DataError, match="example 1 of the two sets is not the same: 'question 0' and 'question 29'"):
        compare(base, tuned[::-1], ScoresConfig())
    for changed in (dataclasses.replace(tuned[0], reference="x"), dataclasses.replace(tuned[0], source="x")):
        with pytest.raises(DataError, match="example 1 of the two sets is not the same"):
            compare(base, [changed, *tuned[1:]], ScoresConfig())
    with pytest.raises(DataError, match="no answer to be judged"):
        compare([], [], ScoresConfig())
    with pytest.raises(ConfigError, match="0 resamples"):
        compare(base, tuned, ScoresConfig(), samples=0)


def test_a_thousand_resamples_of_a_thousand_examples_take_seconds() -> None:
    base = system(JAPANESE, number=1000, chance=0.3, seed=1)
    tuned = system(JAPANESE, number=1000, chance=0.2, seed=2)
    settings = ScoresConfig(metrics=["bleu", "chrf", "rougeL", "exact_match", "macro_f1"])
    start = time.process_time()
    found = compare(base, tuned, settings)
    assert time.process_time() - start < 15
    assert all(found[name].tuned_better >= 0.99 for name in ("bleu", "chrf", "rougeL"))
