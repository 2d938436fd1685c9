"""What the text of a row alone gives away: each function returns where a defect begins, or None.

They run for every row of the data, so each looks for a character that the defect needs before it tries a pattern.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from sft_dist.data.audit.language import without_code

# --- wrong encodings ------------------------------------------------------------------------------------------------

_C1 = re.compile("[\x80-\x84\x86-\x9f]")  # not U+0085, a line break of mainframes
# What Windows-1252 puts where Latin-1 has control characters.
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_CONTINUATION = f"[\xa1-\xbf{_CP1252}]"
# UTF-8 read as Latin-1 or Windows-1252: two bytes of a Latin letter, three of punctuation, kana and Chinese characters.
# The no-break space is left out as a continuation: "café »" is French. Others need company: "É”" ends a quotation.
_LATIN = re.compile(
    f"[\xc2\xc3]{_CONTINUATION}(?<!\xc3\u201d)|\xe2\u20ac{_CONTINUATION}|[\xe3-\xef]{_CONTINUATION}{{2}}"
    f"|(?:[\xc4-\xdf]{_CONTINUATION}){{3}}"
)
# UTF-8 kana read as CP932 (Shift-JIS of Windows) begin with one of these three characters; a real 縺れ or 繧繝 has no
# second one of them in the right place.
_CP932 = re.compile("[縺繧繝](?:[｡-ﾟ�]|[^縺繧繝\\s]{1,2}[縺繧繝])")
# EUC-JP read as Shift-JIS: every kana becomes one of two punctuation marks of half width, and a letter of half width.
_EUC = re.compile("(?:[､･][｡-ﾟ]){3}")
# Shift-JIS read as Windows-1252: every kana begins with one of these.
_SJIS = re.compile(f"(?:[\u201a\u0192][\x21-\x7e\xa1-\xff{_CP1252}]){{3}}")


# One of these is in every text that any of the patterns finds; Japanese without half-width forms has none.
_SUSPECT = re.compile("[\ufffd\x80-\x9f\xc2-\xef縺繧繝､･\u201a\u0192]")


def mojibake(text: str) -> int | None:
    """U+FFFD, or text in UTF-8, Shift-JIS or EUC-JP that was read as something else."""
    if text.isascii() or not _SUSPECT.search(text):
        return None
    found = text.find("\ufffd")
    if found >= 0:
        return found
    return _first(text, _C1, _LATIN, _CP932, _EUC, _SJIS)


# --- special tokens and roles as text -------------------------------------------------------------------------------

KNOWN_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end_of_turn|>", "<end_of_turn>", "<start_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "</s>",
    "<eos>", "<bos>", "[EOS]", "[SEP]", "<pad>", "<unk>",
)  # fmt: skip
"""Special tokens of widespread models, which have no business in the text of another model's data."""


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of ``tokens``, or None where there is none."""
    ordered = sorted(set(tokens) - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def foreign_token(text: str, known: re.Pattern[str]) -> int | None:
    """One of ``KNOWN_TOKENS``; ``</s>`` that closes a struck-out ``<s>`` is HTML."""
    if "<" not in text and "[" not in text:
        return None
    for match in known.finditer(text):
        if match[0] != "</s>" or "<s>" not in text[: match.start()]:
            return match.start()
    return None


_ROLE_MARKER = re.compile(
    r"[ \t]*(?:#{2,3} ?(?:instruction|response|input|output|user|assistant|human|system|question|answer"
    r"|指示|応答|入力|出力|回答|質問)\s*[:：]"
    r"|(?:user|human|assistant|bot|ユーザー?|アシスタント)\s*[:：])",
    re.IGNORECASE,
)


def role_marker(answer: str) -> int | None:
    """A line that begins with the name of a role: another template's turn inside the answer."""
    if ":" not in answer and "：" not in answer:
        return None
    start = 0
    for line in without_code(answer).split("\n"):
        if _ROLE_MARKER.match(line):
            return start
        start += len(line) + 1
    return None


# --- what was not filled in, what was left over ---------------------------------------------------------------------

_PLACEHOLDER = re.compile(
    r"\{\{\s*[A-Za-z_][\w. ]*\}\}"
    r"|(?<![\w$\\{])\{(?:input|output|instruction|question|answer|context|text|name|prompt|response|query|document"
    r"|content|topic|company|date|title|入力|質問|回答|名前)\}"
    r"|\[(?i:insert|your|enter) [^\]\n]{1,40}\]|<(?i:insert|your|enter) [^>\n]{1,40}>"
    r"|\b(?:TODO|FIXME|TBD)\b(?!\s*(?:list|lists|item|items|app|リスト|アプリ))"
    r"|(?i:lorem ipsum)|(?:ここ|此処)に[^。\n]{0,12}(?:入力|記入|挿入)(?:して|する)|[〇○●]{2}(?:株式会社|様)"
)

_PLACEHOLDER_MARKS = ("{", "[", "<", "TODO", "FIXME", "TBD", "orem ", "OREM ", "ここ", "此処", "〇〇", "○○", "●●")


def placeholder(text: str) -> int | None:
    """``{input}``, ``{{name}}``, ``[Your Name]``, TODO, filler text; not in code."""
    if not any(mark in text for mark in _PLACEHOLDER_MARKS):
        return None
    return _first(without_code(text), _PLACEHOLDER)


_ENTITY = re.compile(r"&(?:amp|nbsp|lt|gt|quot|apos|hellip|mdash|ndash|#0?39|#x27|#\d{2,5}|#x[0-9a-fA-F]{2,5});")
_TAG = re.compile(
    r"<br\s*/?>|</(?:p|div|span|a|td|tr|table|font|li|ul|h[1-6]|b|i|strong|em)>|<(?:div|span|font|table)[ >]"
)
_ABOUT_MARKUP = re.compile(r"html|xml|css|javascript|react|vue|svg|markdown|タグ|\btags?\b|entit", re.IGNORECASE)


def markup_remains(text: str, row: str) -> int | None:
    """An entity or a tag of HTML outside code, where nothing in ``row`` speaks of markup."""
    if "&" not in text and "<" not in text:
        return None
    found = _first(without_code(text), _ENTITY, _TAG)
    return None if found is None or _ABOUT_MARKUP.search(row) else found


_BOILERPLATE = re.compile(
    r"\bas an ai\b|\bas a(?: large)? language model|\bi(?:'m| am) (?:just )?an ai\b"
    r"|\bi(?:'m| am) (?:really |very )?sorry,? but (?:i|as)\b|\bi can(?:not|'t|’t) (?:assist|help|fulfill|comply)\b"
    r"|\bmy knowledge cut-?off\b|\bi(?:'m| am) not able to (?:assist|help|provide)\b"
    r"|aiとして|ai言語モデル|aiアシスタントとして|(?:私|わたし)は(?:大規模)?(?:言語モデル|ai(?:です|なので|である))"
    r"|申し訳(?:ありません|ございません)が、?[^。\n]{0,60}(?:できません|できかねます|お答えすること|対応しかね)",
    re.IGNORECASE,
)

_BOILERPLATE_MARKS = (
    "as an ai", "language model", "m an ai", "am an ai", "m just an ai", "am just an ai", "sorry", "i can't", "i can’t",
    "i cannot", "knowledge cut", "not able to", "aiと", "aiで", "aiな", "aiア", "aiの", "言語モデル", "申し訳",
)  # fmt: skip


def boilerplate(answer: str) -> int | None:
    """A refusal, or an answer that speaks as an AI language model."""
    plain = answer.lower()
    return _first(answer, _BOILERPLATE) if any(mark in plain for mark in _BOILERPLATE_MARKS) else None


# --- the form of an answer ------------------------------------------------------------------------------------------

_WORD_EDGE = " \t\r\n.,!?;:'\"()。、！？「」『』・…"
_MARKDOWN_LINE = re.compile(r"#{1,6} \S|[-*+] \S|\d+\. \S|```|\|.+\|")
_MARKDOWN_BOLD = re.compile(r"\*\*[^*\n]+\*\*")
_LONGEST_WORD = 40
SHORT_CJK_CHARACTERS = 3


def is_one_word(answer: str) -> bool:
    """One word between spaces, or at most three characters where words have none between them."""
    if len(answer) > _LONGEST_WORD:
        return False
    word = answer.strip(_WORD_EDGE)
    if not word or any(character.isspace() for character in word):
        return False
    return word.isascii() or len(word) <= SHORT_CJK_CHARACTERS or all(c < "\u0250" for c in word)


def form(answer: str) -> str:
    """``json``, ``markdown`` or ``text``."""
    stripped = answer.strip()
    if stripped[:1] in ("{", "[") and stripped[-1:] in ("}", "]"):
        try:
            json.loads(stripped)
        except ValueError:
            pass  # it only looks like JSON
        else:
            return "json"
    if "**" in stripped and _MARKDOWN_BOLD.search(stripped):
        return "markdown"
    return "markdown" if any(map(_MARKDOWN_LINE.match, stripped.split("\n"))) else "text"


_YES = re.compile(r"(?:yes|true|correct|right|はい|ええ|正しい|正解|真|可能です)(?![a-z])", re.IGNORECASE)
_NO = re.compile(r"(?:no|false|incorrect|wrong|いいえ|いえ|誤り|間違い|不正解|偽|不可能です)(?![a-z])", re.IGNORECASE)


def verdict(answer: str) -> int:
    """1 for an answer that begins with yes, -1 with no, in English or Japanese; else 0."""
    head = answer[:40].lstrip(_WORD_EDGE + "*")
    return 1 if _YES.match(head) else -1 if _NO.match(head) else 0


def _first(text: str, *patterns: re.Pattern[str]) -> int | None:
    for pattern in patterns:
        match = pattern.search(text)
        if match is not None:
            return match.start()
    return None
