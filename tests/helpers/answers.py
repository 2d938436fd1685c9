"""Answers to be scored: two systems, in English and Japanese, with what is often wrong with answers."""

from __future__ import annotations

import random

from sft_dist.scores.answered import Answered

ENGLISH = [
    "The quick brown fox jumps over the lazy dog.",
    "It's 3.5 km to the station, isn't it? \"Yes\", she said.",
    "Set `max_steps` to 1,000 and run it again;\nthen look at the log.",
    "A model-free method (see Smith et al., 2019) needs 10% fewer samples.",
    "No.",
]
JAPANESE = [
    "日本の首都は東京です。",
    "ＰｙＴｏｒｃｈの「DataLoader」を使うと、データを１個ずつ読み込めます。",
    "明日は雨が降るでしょう。傘を持って行ってください。\nコーヒーも忘れずに。",
    "ﾊﾝｶｸのｶﾀｶﾅと全角のカタカナは、同じ文字として比べます。",
    "はい。",
]
CHINESE = ["北京是中国的首都。", "明天会下雨，请带上雨伞。", "我们使用深度学习模型进行训练。"]


def answered(answer: str, reference: str, *, prompt: str = "question", source: str = "one") -> Answered:
    return Answered(prompt=prompt, answer=answer, reference=reference, source=source)


def worsened(text: str, chance: float, random_source: random.Random) -> str:
    """``text`` with characters exchanged, lost and doubled."""
    characters = []
    for character in text:
        if random_source.random() >= chance:
            characters.append(character)
        else:
            characters.append(random_source.choice(["", character * 2, random_source.choice(text)]))
    return "".join(characters)


def system(texts: list[str], *, number: int, chance: float, seed: int) -> list[Answered]:
    """``number`` answers; some are right, and every seventh is empty."""
    random_source = random.Random(seed)
    found = []
    for i in range(number):
        reference = texts[i % len(texts)]
        answer = "" if i % 7 == 6 else worsened(reference, chance if i % 3 else 0.0, random_source)
        found.append(answered(answer, reference, prompt=f"question {i}", source=f"source {i % 2}"))
    return found
