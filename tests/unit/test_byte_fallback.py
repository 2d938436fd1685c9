"""The bytes of unknown characters stand at their own character, whatever piece the tokenizer made of them."""

from __future__ import annotations

from sft_dist.data.byte_fallback import byte_ids, places_of_bytes
from tests.golden.vocabularies import byte_level, sentencepiece, unigram


def test_each_byte_stands_at_its_character() -> None:
    # "a", then a piece of a line break, an emoji of four bytes and a character of three, then "b"
    ids, text = [900, 10, 1, 2, 3, 4, 5, 6, 7, 901], "a\n🙂鬱b"
    offsets = [(0, 1), *[(1, 4)] * 8, (4, 5)]
    places = places_of_bytes(text, ids, offsets, range(256))
    assert places == [(0, 1), (1, 2), *[(2, 3)] * 4, *[(3, 4)] * 3, (4, 5)]


def test_a_piece_whose_bytes_are_not_those_of_its_text_is_left_alone() -> None:
    assert places_of_bytes("①②", [1, 2], [(0, 2), (0, 2)], range(256)) == [(0, 2), (0, 2)]
    assert places_of_bytes("ab", [900, 900], [(0, 2), (0, 2)], range(256)) == [(0, 2), (0, 2)]


def test_tokenizers_that_need_it() -> None:
    known = {"bos": "<s>", "eos": "</s>"}
    backend = unigram([], **known).backend_tokenizer
    assert len(byte_ids(backend)) == 256
    assert byte_ids(byte_level([], **known).backend_tokenizer) == frozenset()
    assert byte_ids(sentencepiece([], first_space=True, **known).backend_tokenizer) == frozenset()
    encoding = backend.encode("応答:\n🙂", add_special_tokens=False)
    assert encoding.offsets[-5:] == [(3, 5)] * 5
    assert places_of_bytes("応答:\n🙂", encoding.ids, encoding.offsets, byte_ids(backend))[-5:] == [
        (3, 4),
        *[(4, 5)] * 4,
    ]
