"""The ``data`` section: sources, what is trained of them, and how rows become sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft_dist.config.audit_schema import AuditConfig
from sft_dist.config.section import Section

DataFormat = Literal[
    "auto", "alpaca", "sharegpt", "messages", "prompt_completion", "input_output", "segments", "text", "tokens"
]


class SourceConfig(Section):
    path: str = Field(
        description="JSON, JSONL, CSV, TSV, Parquet or Arrow, also with gzip or Zstandard: a file, a folder, a glob or "
        "a URL (https, s3, gs); with format text, also plain text files, each one document. Or a dataset of the "
        "Hugging Face hub, OWNER/NAME, where no file or folder has that name."
    )
    format: DataFormat = Field(
        "auto", description="Layout of the rows; `auto` recognises it by the first row's content."
    )
    split: str | None = Field(None, description="Split of a dataset of the hub; null: train.")
    subset: str | None = Field(
        None, description="Subset (configuration) of a dataset of the hub; null: its default, or the only one."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a dataset of the hub; null: main.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="What the file calls the keys of the layout, e.g. {instruction: question, output: answer}.",
    )
    templates: list[str] = Field(
        default_factory=list,
        description="Texts with {prompt} for the first question of a row; for each row one is drawn by train.seed.",
    )
    name: str | None = Field(None, min_length=1, description="What reports and metrics call it; null: its path.")
    weight: float = Field(
        1.0,
        gt=0,
        description="How often a training source is seen in an epoch: 2.0 twice, 0.5 half of it. A fraction is drawn "
        "by train.seed, once for all epochs.",
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="In place of `weight`, for all training sources: this one's share of an epoch. Every source is "
        "seen at least once, and all but one more often.",
    )


class EvalSplitConfig(Section):
    """Rows of the training sources that are held out and evaluated."""

    share: float = Field(gt=0, lt=1, description="Of the rows of each training source.")
    by: Literal["prompt", "row"] = Field(
        "prompt",
        description="prompt: by a hash of what comes before the first answer, so that rows with one prompt stay "
        "together, and on their side however the data grow; row: drawn by train.seed, exactly this share.",
    )


class DataConfig(Section):
    train: list[SourceConfig] = Field(min_length=1, description="Training sources, concatenated in this order.")
    eval: list[SourceConfig] = Field(
        default_factory=list, description="Held-out sources; the loss is reported for each and for all."
    )
    eval_split: EvalSplitConfig | None = Field(None, description="Hold out rows of the training sources instead.")
    mix_by: Literal["tokens", "rows"] = Field(
        "tokens", description="What `weight` and `share` of the training sources count."
    )
    chat_template: str | None = Field(
        None,
        description="What replaces the tokenizer's chat template and is saved with the result: path of a Jinja file, "
        "Jinja text, or a built-in one: chatml, llama3, mistral, gemma, qwen3, phi3, deepseek, plain, alpaca_ja. null: "
        "the tokenizer's; where it has none, chatml if it knows its tokens, else plain.",
    )
    max_seq_len: int = Field(2048, ge=8, description="Tokens; the size of a pack and the most a row may have.")
    over_length: Literal["error", "drop", "truncate", "split"] = Field(
        "error",
        description="What happens to a row longer than max_seq_len, counted in any case. truncate: its end is cut off; "
        "split: it becomes several rows, each of whole exchanges under the system prompt; one that does not fit by "
        "itself is cut.",
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant",
        description="Train the assistant's answers, only the last one of a conversation, or all of its text. Answers "
        "with weight 0 are context in any case.",
    )
    train_reasoning: bool = Field(True, description="Train the reasoning before an answer too.")
    train_tool_calls: bool = Field(True, description="Train the answers that call tools too.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="What happens at a row that cannot be read or trained on: end the run, or go on without it; "
        "rows that are left out are counted and the first of them named.",
    )
    packing: Literal["best_fit", "none"] = Field(
        "best_fit", description="Pack rows into sequences of at most max_seq_len tokens, or train one row a sequence."
    )
    packing_window: int | None = Field(
        None,
        ge=1,
        description="Rows that are packed by themselves, so that those of a pack lie near each other in the data; "
        "null: all at once.",
    )
    cache_dir: str | None = Field(
        None,
        description="Folder for the prepared data, which runs share that read the same files in the same way; null: "
        "data_cache beside output_dir. All nodes must see it.",
    )
    num_workers: int | None = Field(
        None,
        ge=0,
        description="Processes that tokenise a large source; 0: none but the run's own; null: one for each "
        "CPU that the run may use.",
    )
    audit: AuditConfig = Field(AuditConfig(), description="What `sft-dist data audit` looks for and accepts.")
