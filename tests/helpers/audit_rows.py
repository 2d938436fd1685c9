"""Rows for the audit: a clean data set in two languages, and one kind of defect planted at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from sft_dist.config.audit_schema import AuditConfig
from sft_dist.data.audit.audit import audit
from sft_dist.data.audit.findings import Audit, Finding
from sft_dist.data.audit.rows import AuditedRow
from sft_dist.data.audit.settings import AuditSettings
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.messages import Conversation, Message, Origin
from tests.helpers.templates import CHATML, build_tokenizer

ENGLISH = [
    ("How do I keep bread fresh for longer?", "Store it in a paper bag at room temperature and freeze what you will not eat soon."),
    ("Explain why the sky looks blue.", "Air scatters short wavelengths more than long ones, so blue light reaches us from everywhere."),
    ("What should I check before buying a used bicycle?", "Look at the frame for cracks, spin both wheels, and test the brakes on a slope."),
    ("Summarise the plot of Hamlet in two sentences.", "A prince learns that his uncle murdered his father. His hesitation ends in the death of nearly everyone."),
    ("Which planets have rings?", "Saturn has the brightest ones; Jupiter, Uranus and Neptune have faint rings too."),
    ("Suggest a name for a small bakery.", "The Early Oven would tell customers that you bake before sunrise."),
    ("Why do cats purr?", "They purr when content, and also when hurt, perhaps because it calms them."),
    ("How can I learn to type faster?", "Practise ten minutes a day without looking at the keys and slow down until errors vanish."),
    ("What causes tides?", "The Moon pulls on the near ocean more strongly than on the far one, which raises two bulges."),
    ("Give me a tip for my first public speech.", "Memorise the opening and the ending; the middle may be notes on a card."),
    ("Is it safe to reheat rice?", "Cool it within an hour, keep it cold, and heat it through once only."),
    ("What does a compiler do?", "It translates source code into machine instructions and reports mistakes on the way."),
    ("How tall do sunflowers grow?", "Common varieties reach about two metres, giant ones more than four."),
    ("Describe the taste of umami.", "Savoury and round, like broth, ripe tomatoes or aged cheese."),
    ("Why is my houseplant turning yellow?", "Most often it stands in wet soil. Let the top dry before you water again."),
    ("When was the printing press invented?", "Gutenberg built his around 1440 in Mainz; movable type is older in East Asia."),
    ("How do noise cancelling headphones work?", "Microphones record the outside and the speaker plays its mirror image, so that both add up to silence."),
    ("What is a good warm-up for running?", "Walk briskly for five minutes, then swing your legs and jog slowly."),
    ("Can penguins fly?", "Not in the air, but their wings row them through water at great speed."),
    ("How should I store old photographs?", "Keep them flat, dry and dark, in sleeves free of acid."),
    ("What makes glass transparent?", "Its electrons cannot absorb visible light, which therefore passes through."),
    ("Why do we yawn?", "Nobody knows for certain; one idea is that it cools the brain."),
    ("How do I remove a wine stain?", "Blot it, sprinkle salt, and wash it cold before it dries."),
    ("Who painted the Night Watch?", "Rembrandt finished it in 1642 for a hall in Amsterdam."),
    ("What is the difference between weather and climate?", "Weather is what happens today; climate is what is usual over decades."),
    ("How can I fall asleep more easily?", "Go to bed at the same hour, leave the phone outside, and keep the room cool."),
]  # fmt: skip

JAPANESE = [
    ("美味しい緑茶の淹れ方を教えてください。", "七十度くらいのお湯を注ぎ、一分ほど待ってから少しずつ湯のみに分けます。"),
    ("富士山はどうしてあの形をしているのですか。", "何度も噴火して溶岩と灰が積み重なり、裾野の広い円錐形になりました。"),
    ("会議の議事録を早く書くコツはありますか。", "決まったことと宿題だけを先に書き、発言は後から補うと早く終わります。"),
    ("猫が高いところを好む理由を説明して。", "周りを見渡せて敵に襲われにくいので、安心できる場所だからです。"),
    ("新幹線で一番速い列車は何ですか。", "東北新幹線のはやぶさが時速三百二十キロで走ります。"),
    ("初心者向けの俳句の作り方は？", "季語を一つ選び、見たものを五七五に収めることから始めましょう。"),
    ("梅雨の時期に洗濯物を乾かすには？", "除湿機と扇風機を併用し、間隔を空けて干すと臭いも防げます。"),
    ("敬語の種類を簡潔に述べてください。", "尊敬語、謙譲語、丁寧語に大きく分けられます。"),
    ("カレーを作り過ぎたら保存はどうしますか。", "粗熱を取って小分けにし、その日のうちに冷凍してください。"),
    ("江戸時代は何年続きましたか。", "一六〇三年から一八六八年まで、およそ二百六十五年続きました。"),
    ("パソコンの動作が遅いときは何を見るべき？", "まずメモリの使用量と常駐ソフトを確かめ、要らないものを止めます。"),
    ("桜前線とは何のことですか。", "各地の開花日を結んだ線で、春の進み具合を表します。"),
    ("腰痛を防ぐ座り方を知りたいです。", "深く腰掛けて背もたれを使い、三十分ごとに立ち上がりましょう。"),
    ("豆腐と厚揚げはどう違いますか。", "厚揚げは水を切った豆腐を油で揚げたものです。"),
    ("子どもに金銭感覚を教える方法は？", "小遣い帳をつけさせ、欲しい物のために貯める経験をさせます。"),
    ("将棋の穴熊囲いについて説明して。", "玉を隅に入れて金銀で固める、とても堅い守り方です。"),
    ("台風の目では風が弱いのはなぜ？", "中心では空気がゆっくり下降し、雲ができにくいからです。"),
    ("履歴書の写真で気を付ける点は。", "明るい背景で正面を向き、清潔な服装で撮影しましょう。"),
    ("味噌汁が塩辛くなったらどう直す？", "豆腐や野菜を足して煮るか、出汁で薄めるとよいでしょう。"),
    ("北海道で冬に人気の祭りを挙げて。", "札幌の雪まつりと旭川の冬まつりがよく知られています。"),
    ("読書を習慣にするにはどうすればいい？", "寝る前の十分と決めて、枕元に本を置いておきます。"),
    ("風呂敷の使い道を提案してください。", "瓶を包む、鞄の代わりにする、膝掛けにするなどがあります。"),
    ("紅葉の葉が赤くなる仕組みは？", "気温が下がると葉緑素が壊れ、赤い色素が作られるためです。"),
    ("郵便番号は何桁ですか。", "現在は七桁で、以前は三桁か五桁でした。"),
    ("電車で席を譲るときの一言は？", "「よろしければどうぞ」と軽く声を掛けるのが自然です。"),
    ("メールの件名はどう書くと親切ですか。", "用件と期限が一目で分かるように短くまとめます。"),
]  # fmt: skip

# The last rows are held out.
NUM_HELD_OUT = 4


def conversation(*turns: str | tuple[str, str], origin: Origin) -> Conversation:
    """Turns of user and assistant alternately, or pairs (role, text)."""
    roles = ("user", "assistant")
    messages = [
        Message(*turn) if isinstance(turn, tuple) else Message(roles[number % 2], turn)  # type: ignore[arg-type]
        for number, turn in enumerate(turns)
    ]
    return Conversation(tuple(messages), (), origin)


class DataSet:
    """A set of rows with their tokens, to be changed by a test before it is audited."""

    def __init__(self, renderer: ChatRenderer, pairs: dict[str, Sequence[tuple[str, str]]]) -> None:
        self.renderer = renderer
        self.rows: list[AuditedRow] = []
        for source, turns in pairs.items():
            for turn in turns:
                self.add(source, *turn)

    def add(self, source: str, *turns: str | tuple[str, str]) -> AuditedRow:
        number = sum(row.source == source for row in self.rows) + 1
        row = conversation(*turns, origin=Origin(source, number))
        self.rows.append(AuditedRow(source, row, self.renderer.render(row)))
        return self.rows[-1]

    def change_tokens(
        self, number: int, change: Callable[[list[int], list[bool]], tuple[list[int], list[bool]]]
    ) -> None:
        row = self.rows[number]
        assert row.tokens is not None
        ids, supervised = change(list(row.tokens.input_ids), list(row.tokens.supervised))
        self.rows[number] = replace(row, tokens=type(row.tokens)(ids, supervised))


def chatml() -> ChatRenderer:
    return ChatRenderer(build_tokenizer("chatml", CHATML))


def clean_train(renderer: ChatRenderer) -> DataSet:
    return DataSet(renderer, {"en.jsonl": ENGLISH[:-NUM_HELD_OUT], "ja.jsonl": JAPANESE[:-NUM_HELD_OUT]})


def clean_eval(renderer: ChatRenderer) -> DataSet:
    held_out = ENGLISH[-NUM_HELD_OUT:] + JAPANESE[-NUM_HELD_OUT:]
    return DataSet(renderer, {"eval.jsonl": held_out})


def settings_of(renderer: ChatRenderer, **changed: Any) -> AuditSettings:
    tokenizer = renderer.tokenizer
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    values: dict[str, Any] = {
        "config": AuditConfig(),
        "max_seq_len": 400,
        "special_tokens": special,
        "bos_token": tokenizer.bos_token,
        "end_tokens": (tokenizer.eos_token,),
    }
    return AuditSettings(**{**values, **changed})


def audited(train: DataSet, evaluation: DataSet | None = None, **changed: Any) -> Audit:
    return audit(
        train.rows, None if evaluation is None else evaluation.rows, settings=settings_of(train.renderer, **changed)
    )


def found(result: Audit, *, above_info: bool = True) -> dict[str, Finding]:
    """Findings by check; none may come twice."""
    chosen: Iterable[Finding] = (f for f in result.findings if not above_info or f.severity != "info")
    by_check: dict[str, Finding] = {}
    for finding in chosen:
        assert finding.check not in by_check, finding
        by_check[finding.check] = finding
    return by_check
