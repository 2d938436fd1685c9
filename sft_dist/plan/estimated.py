"""What a run trains on where its rows are here and its tokenizer is not, as before `prepare` has fetched the model.

Rows are counted, and rendered and packed as training would, with a tokenizer in the place of the model's own that cuts
a text into pieces of so many characters: four of Latin script or of ASCII, one of Chinese, Japanese or Korean, two of
others.

The figures: four characters of English a token (OpenAI, help article 4936856); a sentence of 82 characters of English
is 27 tokens for cl100k, of whose kind Llama 3's tokenizer is, and 24 for o200k, one of 43 characters of Japanese 37 and
26 (openai.com/index/hello-gpt-4o). Llama 2's takes more than one token for a character of Japanese.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sft_dist.config.schema import Config
from sft_dist.data.cache import row_settings, sources_of
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.messages import Origin
from sft_dist.data.mixing import Side
from sft_dist.data.named_templates import BUILT_IN
from sft_dist.data.sampling import draw_rows
from sft_dist.data.sources import parser_of
from sft_dist.errors import DataError
from sft_dist.plan.assumed import AssumedData, assumed_plan
from sft_dist.plan.result import DataPlan, Range
from sft_dist.plan.sampled import sampled_plan
from sft_dist.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens in truth, in parts of the estimate: the figures above, and code, which has three characters a token.
LEAST, MOST = 0.6, 1.4

# Of a row that no tokenizer but the model's own can take, as in `dry_run.STAND_IN`.
TOKENS_PER_ROW = 400

WIDE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\u3000-\u303f\uff00-\uffef"
NARROW = r"\p{Latin}\u0000-\u007f"
PIECES = rf"[{WIDE}]|[{NARROW}]{{1,4}}|[^{WIDE}{NARROW}]{{1,2}}"
RULE = "4 characters a token, 1 of Chinese, Japanese or Korean, 2 of other scripts"

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"


def estimated_plan(
    config: Config, run: Run, files: dict[Side, list[list[str]] | None], *, max_sample_rows: int, seed: int
) -> DataPlan:
    """As ``sampled_plan``, with the tokenizer of this module. A row is never too long by its estimate.

    Raises:
        DataError: a row cannot be read.
    """
    num_rows = _counted_rows(run, files["train"] or [], max_sample_rows, seed)
    if run.data.over_length == "error":
        run = replace(run, data=run.data.model_copy(update={"over_length": "truncate"}))
    try:
        renderer = ChatRenderer(stand_in_tokenizer(config.model.add_tokens), run.data.chat_template)
        plan = sampled_plan(run, renderer, files, max_sample_rows=max_sample_rows, seed=seed)
        how = plan.source.replace("tokenised", f"read, {RULE}")
    except DataError as error:
        # Token ids, a template for this model alone, a limit that no row keeps by its estimate.
        rule = "split" if run.data.over_length == "drop" else run.data.over_length
        run = replace(run, data=run.data.model_copy(update={"over_length": rule}))
        plan = assumed_plan(run, AssumedData(rows=max(1, round(num_rows)), tokens_per_row=TOKENS_PER_ROW))
        how = f"{num_rows:,.0f} rows, taken for {TOKENS_PER_ROW} tokens each; {error.what}"
    tokens = Range(plan.tokens.value, LEAST * plan.tokens.low, MOST * plan.tokens.high)
    return replace(plan, basis="estimated", tokens=tokens, source=how)


def _counted_rows(run: Run, files: Sequence[list[str]], most: int, seed: int) -> float:
    """Of all sources; those that are drawn are parsed, so that a row that cannot be read is found without a tokenizer.

    Raises:
        DataError: one cannot be read.
    """
    total = 0.0
    for source, names in zip(sources_of(run.data, "train"), files, strict=True):
        settings = row_settings(source, run.data, run.seed)
        parser = parser_of(source, names, skips_bad_rows=settings.skips_bad_rows)
        sample = draw_rows(source, names, parser, most=most, seed=seed)
        for chunk in sample.chunks if not settings.skips_bad_rows else ():
            for raw, place in zip(chunk.rows, chunk.places, strict=True):
                parser.parse(raw, Origin(chunk.path, place, chunk.by_line))
        total += sample.num_rows
    return total


def stand_in_tokenizer(added: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer that knows how many tokens a text has, about, and not which.

    Args:
        added: special tokens of the run.
    """
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(PIECES), "isolated")
    marks = dict.fromkeys([BOS, EOS, *(mark for marks in BUILT_IN.values() for mark in marks), *added])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS, name_or_path="the model"
    )
