"""Small tokenizers of the kinds in use, written down and not trained: the same ids with every version of `tokenizers`.

- ``byte_level``: GPT-2's alphabet of bytes with a pre-tokenizer that joins a mark and the line breaks after it, as those
  of Llama 3, Qwen and Mistral's Tekken do;
- ``sentencepiece``: Llama 2's BPE over characters, "▁" before the text and in place of every space, unknown characters
  in bytes;
- ``sentencepiece`` without that first "▁" and with tokens for line breaks: Gemma's;
- ``unigram``: as many Japanese base models have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

_WORDS = [
    "Hello", "there", "assistant", "user", "system", "model", "tool", "think", "weather", "Hi", "brief", "name",
    "arguments", "parameters", "function", "city", "question", "Answer", "Sunny", "again", "return",
]  # fmt: skip
_JAPANESE = ["こんにちは", "東京", "天気", "晴れ", "です", "ます", "指示", "応答", "。"]
_MARKS = ["\n\n", "\n\n\n", ".\n", ":\n", ">\n", ">\n\n", "}\n", "  ", "    ", "###"]
_PIECES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def byte_level(
    special: Sequence[str], *, bos: str | None, eos: str, adds_bos: bool = False, rstrip: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes; its special tokens come last, as in models of this kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [form for word in [*_WORDS, *_JAPANESE] for form in (word, f" {word}")]
    merges = _merges("".join(_byte_characters(text)) for text in [*words, *_MARKS])
    backend = Tokenizer(models.BPE(vocab=_numbered([*alphabet, *(a + b for a, b in merges)]), merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return _finish(backend, special, bos=bos, eos=eos, adds_bos=adds_bos, rstrip=rstrip)


def sentencepiece(
    special: Sequence[str], *, bos: str, eos: str, first_space: bool, adds_bos: bool = False, rstrip: bool = False
) -> PreTrainedTokenizerFast:
    """BPE over characters. Without ``first_space`` line breaks are tokens, alone and two together."""
    words = [form for word in [*_WORDS, *_JAPANESE] for form in (word, f"▁{word}")]
    merges = _merges(words)
    joined = [a + b for a, b in merges]
    vocabulary = _numbered(["<unk>", bos, eos, *BYTES, *_characters(), *joined])
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if first_space else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if first_space else steps)
    if not first_space:
        backend.add_tokens([AddedToken(breaks, normalized=False) for breaks in ("\n", "\n\n")])
    return _finish(backend, special, bos=bos, eos=eos, adds_bos=adds_bos, rstrip=rstrip)


def unigram(special: Sequence[str], *, bos: str, eos: str) -> PreTrainedTokenizerFast:
    """A unigram model that adds BOS; the longest known piece is always the likeliest."""
    words = [form for word in [*_WORDS, *_JAPANESE] for form in (word, f"▁{word}")]
    pieces = [("<unk>", 0.0), (bos, 0.0), (eos, 0.0), *((byte, -20.0) for byte in BYTES)]
    pieces += [*((character, -10.0) for character in _characters()), *((word, -8.0) for word in words)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _finish(backend, special, bos=bos, eos=eos, adds_bos=True, rstrip=False)


def token_bytes(tokenizer: PreTrainedTokenizerFast, id: int) -> bytes:
    """What a token stands for, a space for "▁"."""
    token = tokenizer.convert_ids_to_tokens(id)
    if id in tokenizer.added_tokens_decoder:
        return token.encode()
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return bytes(_BYTE_OF[character] for character in token)
    return bytes([int(token[3:5], 16)]) if token in BYTES else token.replace("▁", " ").encode()


def _finish(
    backend: Tokenizer, special: Sequence[str], *, bos: str | None, eos: str, adds_bos: bool, rstrip: bool
) -> PreTrainedTokenizerFast:
    names = dict.fromkeys([*([bos] if bos else []), eos, *special])
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=rstrip and name in special) for name in names]
    )
    if adds_bos:
        number = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def _characters() -> list[str]:
    japanese = dict.fromkeys("".join(_JAPANESE))
    return [chr(code) for code in range(33, 127)] + ["▁", *japanese]


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that build each word from the left."""
    merges = {(word[:length], word[length]): None for word in words for length in range(1, len(word))}
    return list(merges)


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _byte_characters(text: str) -> str:
    return "".join(_CHARACTER_OF[value] for value in text.encode())


def _gpt2_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte: itself where it is printable, else the next from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {value: chr(value if value in printable else next(others)) for value in range(256)}


_CHARACTER_OF = _gpt2_alphabet()
_BYTE_OF = {character: value for value, character in _CHARACTER_OF.items()}
