"""Rows to tokenise, English and Japanese conversations from a seeded generator, and a tokenizer trained on such rows.

Sentences come from the demo's phrasebooks and, four times as many, from a lexicon of 50,000 words whose frequencies
follow Zipf's law with Mandelbrot's offset, as those of natural languages do: a tokenizer that remembers words meets new
ones as often as in real text. Japanese has no spaces.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_dist.demo.house_format import PHRASEBOOKS
from sft_dist.demo.phrasebook import Language, Phrasebook

LANGUAGES: dict[str, Language] = {"English": "en", "Japanese": "ja"}
NUM_WORDS = 50_000
VOCABULARY = 16_384
# Of the log-normal number of words of a row's texts; with the template, half of the rows have 180 tokens or fewer.
MEDIAN_WORDS = {"en": 84, "ja": 74}
SPREAD = 0.7
PHRASES = 0.2  # of the sentences

# Words are drawn in batches: a call of numpy for each would take most of the time.
DRAWN_AT_ONCE = 1 << 16

# Llama 3's, which Qwen 2 has too but for numbers.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_TAGS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"with generation tags": CHATML_WITH_TAGS, "without tags": CHATML}

_ONSETS = "b c d f g h j k l m n p r s t v w br cl cr dr fl gr pl pr qu sh sp st str th tr"
_NUCLEI = "a e i o u ai ea ee ie io oa ou"
_CODAS = ["", "", "", "b", "ct", "d", "g", "l", "m", "n", "nd", "nt", "p", "r", "rd", "s", "st", "t", "x"]
_ENDINGS = ["", "", "", "s", "ed", "ing", "er", "ly", "ion", "ment", "able", "ness"]
_FREQUENT = (
    "the of and to a in is that it for as with was on be by at this are from or have an they which you one had not but "
    "what all were when we there can more if no other so time up out them some could these two may then do first any "
    "my now such like our over even most me after also made many before must through where much your way well down "
    "should because each just those people how too little state good very make world still own see work long get here "
    "between both life being under never day same another know while last might us great old year off come since "
    "against go came right used take three"
)
_KANJI = (
    "一二三四五六七八九十百千万円年月日時分秒上下左右東西南北前後内外中間大小高低長短新古多少強弱早遅明暗春夏秋冬朝昼夜"
    "人口目耳手足心体力男女父母子兄弟姉妹友家族国町村市県道路駅車船空海山川田林森花草木石土火水風雨雪雲星光音声色形"
    "学校生先教室本文字語話読書聞見行来帰出入立休止動走歩飛食飲米肉魚茶野菜店屋買売金銀物品質問題答考思知覚楽苦悲喜"
    "仕事会社員業務部長課題計画進発達成果報告連絡相談確認承認決定変更追加削除修正検査調整管理運営組織責任権利義務契約"
    "情報技術機械電気通信処理記録保存検索分析比較評価結果原因影響効率性能安全危険予防対策方法手順基準規則制度法律政治"
    "経済市場価格費用予算収支利益損失税率銀行投資資産負債研究開発実験理論証明医療病院薬患者健康運動競技選手試合勝敗"
    "歴史文化芸術音楽絵画映画写真旅行観光地図世界自然環境資源温度気候災害地震台風救助消防警察交通事故案内受付配送返品"
)
_MORAS = (
    "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモラリルレロ"
    "ンーガギグゲゴザジズゼゾダデドバビブベボパピプペポ"
)
_OKURIGANA = [
    "する",
    "します",
    "しました",
    "した",
    "できる",
    "されます",
    "される",
    "しています",
    "いたします",
    "でした",
    "です",
]
_PARTICLES = ["は", "が", "を", "に", "で", "と", "も", "の", "から", "まで", "より", "については", "において", "、"]


def rows(language: Language, count: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """``messages`` rows, one to three turns each."""
    generator = random.Random(f"{seed} {language}")
    words = _words(language, generator)
    sentence = {"en": _english_sentence, "ja": _japanese_sentence}[language]
    phrases = _phrases(PHRASEBOOKS[language], generator)
    joint = {"en": " ", "ja": ""}[language]

    def text(num_words: float) -> str:
        sentences: list[str] = []
        while num_words > 0:
            if generator.random() < PHRASES:
                sentences.append(next(phrases))
                num_words -= 10
            else:
                length = generator.randint(4, min(20, max(5, int(num_words) + 3)))
                sentences.append(sentence(list(itertools.islice(words, length)), generator))
                num_words -= length
            if generator.random() < 0.1:
                sentences[-1] += "\n"
        return joint.join(sentences).strip()

    for _ in range(count):
        turns = generator.choice((1, 1, 1, 2, 3))
        each = MEDIAN_WORDS[language] * generator.lognormvariate(0, SPREAD) / turns
        yield {
            "messages": [
                {"role": role, "content": text(share * each)}
                for _ in range(turns)
                for role, share in (("user", 0.35), ("assistant", 0.65))
            ]
        }


def save_tokenizer(folder: Path, template: str) -> None:
    """A byte-level BPE tokenizer trained on rows of both languages, with ``template``, into ``folder``."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (
        message["content"]
        for language in LANGUAGES.values()
        for row in rows(language, 2_000, seed=1)
        for message in row["messages"]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    ).save_pretrained(folder)


def write_rows(file: Path, language: Language, count: int, *, seed: int) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for row in rows(language, count, seed=seed):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _words(language: Language, generator: random.Random) -> Iterator[str]:
    """Endless, from the lexicon, by the law of Zipf and Mandelbrot. The lexicon is the same for every seed.

    Offset and exponent are such that as many different words come up as in English instruction data, as a byte-level
    tokenizer sees them: in 1,000 rows of the Alpaca set 11.9 thousand among the first 80 thousand and 16.7 among 135
    thousand, here 11.9 and 17.3.
    """
    lexicon = _LEXICONS[language](random.Random(language))
    weights = 1.0 / (np.arange(len(lexicon)) + 5.0) ** 1.2
    edges = np.cumsum(weights / weights.sum())
    rng = np.random.default_rng(generator.getrandbits(64))
    while True:
        drawn = np.searchsorted(edges, rng.random(DRAWN_AT_ONCE)).clip(max=len(lexicon) - 1)
        yield from (lexicon[number] for number in drawn.tolist())


def _english_lexicon(generator: random.Random) -> Sequence[str]:
    """Frequent words and the phrasebook's first, then made ones, short ones before long ones."""
    book = PHRASEBOOKS["en"]
    known = {word.strip(".,?!:;").lower() for topic in book.topics for text in topic.enquiries for word in text.split()}
    onsets, nuclei = _ONSETS.split(), _NUCLEI.split()
    lexicon = dict.fromkeys([*_FREQUENT.split(), *sorted(word for word in known if word.isalpha())])
    while len(lexicon) < NUM_WORDS:
        syllables = 1 + (len(lexicon) > 5_000) + (generator.random() < 0.2)
        word = "".join(
            generator.choice(onsets) + generator.choice(nuclei) + generator.choice(_CODAS) for _ in range(syllables)
        )
        lexicon[word + generator.choice(_ENDINGS)] = None
    return list(lexicon)


def _japanese_lexicon(generator: random.Random) -> Sequence[str]:
    kanji = sorted(set(_KANJI))
    lexicon: dict[str, None] = {}
    while len(lexicon) < NUM_WORDS:
        if generator.random() < 0.8:
            word = "".join(generator.choices(kanji, k=generator.choice((1, 2, 2, 2, 2, 3, 4))))
        else:
            word = "".join(generator.choices(_MORAS, k=generator.randint(3, 6)))
        lexicon[word] = None
    return list(lexicon)


def _english_sentence(words: list[str], generator: random.Random) -> str:
    if generator.random() < 0.25:
        words[generator.randrange(len(words))] = str(generator.randrange(10_000))
    if len(words) > 8:
        words[len(words) // 2] += ","
    return " ".join(words).capitalize() + generator.choice("........?!")


def _japanese_sentence(words: list[str], generator: random.Random) -> str:
    if generator.random() < 0.25:
        words[0] = f"{generator.randrange(10_000)}"
    joined = "".join(word + generator.choice(_PARTICLES) for word in words[:-1])
    return joined + words[-1] + generator.choice(_OKURIGANA) + generator.choice("。。。。?")


def _phrases(book: Phrasebook, generator: random.Random) -> Iterator[str]:
    while True:
        topic = generator.choice(book.topics)
        facts = {"name": generator.choice(book.callers), "item": generator.choice(book.goods)}
        yield generator.choice((topic.answer, *topic.enquiries)).format(**facts)


_LEXICONS: dict[Language, Callable[[random.Random], Sequence[str]]] = {"en": _english_lexicon, "ja": _japanese_lexicon}
