"""Signatures estimate what they should, similar rows are found, and memory and time stay bounded."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from sft_dist.data.audit.minhash import CJK_SHINGLE, OTHER_SHINGLE, MinHasher, shingle_hashes, similarity
from sft_dist.data.audit.neighbours import Lookup, Signatures, band_rows, clusters
from sft_dist.data.audit.rows import normalised
from sft_dist.data.audit.samples import AnswerSample, FrequentPrefixes, Tally, prefix_of

WORDS = [f"w{number:x}" for number in range(5000)]


def texts(number: int, *, seed: int = 0, words: int = 60) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=words)) for _ in range(number)]


def changed(text: str, share: float, seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(word if chosen.random() > share else "changed" for word in text.split())


def jaccard(left: str, right: str, size: int) -> float:
    a, b = ({text[i : i + size] for i in range(len(text) - size + 1)} for text in (left, right))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3])
def test_signatures_estimate_the_similarity_of_shingle_sets(share: float) -> None:
    left = texts(60)
    right = [changed(text, share, seed) for seed, text in enumerate(left)]
    hasher = MinHasher(256)
    estimated = similarity(hasher.sign(left), hasher.sign(right))
    true = np.array([jaccard(a, b, OTHER_SHINGLE) for a, b in zip(left, right, strict=True)])
    # Four standard deviations, of the mean and of a single one.
    deviation = np.sqrt(true * (1 - true) / 256)
    assert abs((estimated - true).mean()) <= 4 * deviation.mean() / np.sqrt(60)
    assert (abs(estimated - true) <= 4 * deviation + 1e-9).all()


def test_japanese_is_cut_into_shorter_shingles() -> None:
    pair = [
        "東京都は日本の首都であり、人口が最も多い都市です。",
        "東京都は日本の首都であり、面積が三番目に小さい都市です。",
    ]
    signed = MinHasher(1024).sign(pair)
    assert similarity(signed[:1], signed[1:])[0] == pytest.approx(jaccard(*pair, CJK_SHINGLE), abs=0.06)


def test_shingles_never_cross_texts_and_do_not_depend_on_their_company() -> None:
    alone, bounds = shingle_hashes(["abcdefghijkl"], 9)
    together, starts = shingle_hashes(["zz", "abcdefghijkl", "", "abcdefghi"], 9)
    assert (len(alone), bounds.tolist()) == (4, [0])
    assert starts.tolist() == [0, 1, 5, 6]
    assert together[1:5].tolist() == alone.tolist()
    assert together[6] == alone[0]
    assert len(set(together.tolist())) == 6


def test_a_signature_is_the_same_in_any_batch() -> None:
    many = texts(300)
    hasher = MinHasher(32)
    whole = hasher.sign(many)
    for number in (0, 137, 299):
        assert np.array_equal(hasher.sign([many[number]])[0], whole[number])


def test_case_width_and_white_space_do_not_count() -> None:
    assert normalised("Ｈello\n\t  ＷORLD ①") == "hello world 1"


@pytest.mark.parametrize(("threshold", "rows"), [(0.5, 2), (0.8, 5), (0.95, 10)])
def test_bands_find_nearly_all_pairs_of_the_wanted_similarity(threshold: float, rows: int) -> None:
    assert band_rows(64, threshold) == rows
    assert 1 - (1 - threshold**rows) ** (64 // rows) >= 0.99


def test_clusters_are_found_among_many_rows_and_no_others() -> None:
    rows = texts(3000)
    groups = {10: [500, 2999], 20: [21, 700, 1500]}
    for first, others in groups.items():
        for number in others:
            rows[number] = changed(rows[first], 0.02, number)
    signatures = Signatures(64, 0.7)
    signed = MinHasher(64).sign(rows)
    for start in range(0, len(rows), 700):  # in parts, as a stream brings them
        signatures.extend(signed[start : start + 700])
    kept = np.ones(len(rows), bool)
    first = clusters(len(rows), signatures.similar_pairs(kept))
    joined = {number: int(first[number]) for number in range(len(rows)) if first[number] != number}
    assert joined == {number: head for head, others in groups.items() for number in others}
    kept[700] = False
    assert clusters(len(rows), signatures.similar_pairs(kept))[700] == 700


def test_signatures_over_several_blocks_are_the_rows_that_were_added() -> None:
    signed = np.random.default_rng(0).integers(0, 1 << 32, (70_000, 16), dtype=np.uint32)
    signatures = Signatures(16, 0.8)
    for part in np.array_split(signed, 7):
        signatures.extend(part)
    chosen = np.array([0, 69_999, 32_768, 5, 65_535])
    assert len(signatures) == 70_000
    assert np.array_equal(signatures.rows(chosen), signed[chosen])
    assert np.array_equal(signatures.keys(1), signatures.keys_of(signed, 1))


def test_a_cluster_of_thousands_is_one_and_takes_no_square_of_time() -> None:
    base = texts(1, words=100)[0]
    rows = [changed(base, 0.01, seed) for seed in range(4000)]
    signatures = Signatures(64, 0.8)
    signatures.extend(MinHasher(64).sign(rows))
    started = time.perf_counter()
    first = clusters(len(rows), signatures.similar_pairs(np.ones(len(rows), bool)))
    assert time.perf_counter() - started < 20
    # Eight million pairs are similar; those that are compared are enough to join all but a few.
    assert (first == 0).mean() > 0.99


def test_lookup_finds_the_closest_of_a_small_set() -> None:
    held_out, train = texts(200), texts(2000, seed=1)
    train[77] = changed(held_out[5], 0.02, 0)
    train[1234] = held_out[199]
    hasher = MinHasher(64)
    small = Signatures(64, 0.7)
    small.extend(hasher.sign(held_out))
    left, right, found = Lookup(small).similar(hasher.sign(train))
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == [(77, 5), (1234, 199)]
    assert found[1] == 1.0
    assert found[0] == pytest.approx(jaccard(train[77], held_out[5], OTHER_SHINGLE), abs=0.2)


def test_frequent_beginnings_in_bounded_memory() -> None:
    prefixes = FrequentPrefixes(capacity=50)
    stream = ["please write a poem about snow"] * 300 + ["東京の天気はどうですか"] * 200 + texts(2000)
    random.Random(0).shuffle(stream)
    for text in stream:
        prefixes.add(text)
    top = prefixes.top(10)
    assert [prefix.text for prefix in top[:2]] == ["please write a poem", "東京の天気はどう"]
    # Too low by at most texts / capacity, never too high.
    assert 300 / 2500 - 1 / 50 <= top[0].share <= 300 / 2500
    assert len(prefixes._counts) <= 100
    assert prefix_of("one two three four five") == "one two three four"


def test_a_sample_draws_every_answer_with_the_same_chance() -> None:
    sample = AnswerSample(size=400)
    for number in range(4000):
        place = sample.place()
        if place is not None:
            sample.keep(place, [number])
    drawn = np.concatenate(sample._kept)
    assert len(drawn) == len(np.unique(drawn)) == 400
    # Mean 2000, standard deviation of the mean 58.
    assert abs(drawn.mean() - 2000) < 250


def test_distinct_n_counts_runs_within_answers() -> None:
    sample = AnswerSample()
    for units in ([1, 2, 1, 2], [1, 2], [3]):
        place = sample.place()
        assert place is not None
        sample.keep(place, units)
    # Units 1 2 1 2 1 2 3; pairs 12 21 12 12; triples 121 212.
    assert sample.distinct_n() == {"1": 3 / 7, "2": 2 / 4, "3": 1.0}


def test_examples_are_the_first_few() -> None:
    tally = Tally()
    for number in range(1000):
        tally.add("source", "check", f"row {number}", f"text {number}")
    assert tally.counts["source", "check"] == 1000
    assert [example.origin for example in tally.examples("source", "check")] == [f"row {n}" for n in range(5)]
