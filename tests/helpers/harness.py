"""Tasks of lm-eval over files of this machine, and what a world of test processes answers to its requests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from lm_eval.api.instance import Instance

from sft_dist.config.schema import Config
from sft_dist.data.chat_template import load_renderer
from sft_dist.evaluation.decode import generate
from sft_dist.evaluation.harness import HarnessModel
from sft_dist.evaluation.likelihood import Likelihood, Span, log_likelihoods
from sft_dist.evaluation.prompt import Prompter
from sft_dist.runtime.process_group import gathered
from tests.helpers import cells, generation

CHOICES = ["日本の首都です。", "西の都です。", "青い😀です。"]
QUESTIONS = [("東京は？", 0), ("大阪は？", 1), ("空は？", 2), ("京都は？", 1), ("海は？", 2)]
TEXTS = ["東京は日本の首都です。 " * 30, "a short text", "x"]


def write_tasks(folder: Path) -> Path:
    """``choices``, ``answers`` and ``texts``: one task of each kind of request, on local files."""
    folder.mkdir(parents=True)
    questions = [{"question": q, "choices": CHOICES, "gold": gold} for q, gold in QUESTIONS]
    texts = [{"text": text} for text in TEXTS]
    for name, rows in (("questions", questions), ("texts", texts)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    def task(name: str, file: str, **settings: Any) -> None:
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{file}.jsonl")}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole, allow_unicode=True), encoding="utf-8")

    task(
        "choices", "questions", output_type="multiple_choice", doc_to_text="{{question}}", target_delimiter=" ",
        doc_to_choice="{{choices}}", doc_to_target="{{gold}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    task(
        "answers", "questions", output_type="generate_until", doc_to_text="{{question}}",
        doc_to_target="{{choices[gold]}}", generation_kwargs={"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    task(
        "texts", "texts", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    return folder


@dataclass(frozen=True)
class Requests:
    """Arguments of each kind of request."""

    pairs: list[tuple[str, str]]
    texts: list[str]
    prompts: list[tuple[str, dict[str, Any]]]


REQUESTS = Requests(
    pairs=[
        ("Tokyo is", " a city"), ("Tokyo is ", "a city"), ("", "no context"), ("A or B? ", "A"), ("A or B? ", "B"),
        ("A or B? ", "AB"), ("東京は？", CHOICES[0]), ("long " * 130, "end"), ("q", "a" * 40),
    ],
    texts=["One short text.", "", "東京は日本の首都です。" * 40, "b" * 511, "b" * 512, "b" * 513],
    prompts=[
        ("Say: ", {"until": ["\n"], "max_gen_toks": 30}), ("東京は？", {"until": ["\n"], "max_gen_toks": 30}),
        ("one two three", {"until": "e", "max_gen_toks": 25, "temperature": 0.0, "do_sample": False}),
        ("Again", {"until": [], "max_gen_toks": 11}), ("w" * 600, {"until": ["\n"], "max_gen_toks": 30}),
    ],
)  # fmt: skip


def instances(kind: Any, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, args, n, metadata=("test", n, 1)) for n, args in enumerate(arguments)]


def ask_all(model: Any, requests: Requests) -> tuple[list[tuple[float, bool]], list[float], list[str]]:
    return (
        model.loglikelihood(instances("loglikelihood", requests.pairs)),
        model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in requests.texts])),
        model.generate_until(instances("generate_until", requests.prompts)),
    )


def answered(
    cfg_yaml: str, requests: Requests, scale: float, folder: str | None = None
) -> tuple[list[tuple[float, bool]], list[float], list[str], list[str]]:
    """Of a model whose trained weights are moved by ``scale``, with the notes.

    Args:
        folder: that the model is exported to.
    """
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    try:
        generation.move(strategy, scale)
        if folder is not None:
            generation.export_to(Path(folder), run, strategy)
        renderer = load_renderer(run.model.path, None, None)
        eot = renderer.tokenizer.eos_token_id
        model = HarnessModel(
            strategy, Prompter(renderer.tokenizer, None), eot_id=eot, rows_at_once=3, seed=run.seed,
            rank=dist.get_rank(), world_size=dist.get_world_size(), device=cells.CPU,
        )  # fmt: skip
        return *ask_all(model, requests), model.notes
    finally:
        strategy.close()


def own_answers_as_continuations(cfg_yaml: str) -> list[Likelihood]:
    """Of two prompts: what the model says, the same with another last token, and with another first one."""
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    share: dict[str, Any] = {
        "rows_at_once": 2, "rank": dist.get_rank(), "world_size": dist.get_world_size(), "device": cells.CPU
    }  # fmt: skip
    try:
        prompts = generation.prompts(2)
        own = generate(strategy, prompts, max_new_tokens=6, stop_ids=[], **share)
        answers = {number: answer for part in gathered(own) for number, answer in part.items()}
        spans = []
        for number, prompt in enumerate(prompts):
            said = answers[number].tokens
            for changed in (said, (*said[:-1], said[-1] ^ 1), (said[0] ^ 1, *said[1:])):
                spans.append(Span(tuple(prompt), tuple(changed)))
        return log_likelihoods(strategy, spans, with_greedy=True, **share)
    finally:
        strategy.close()
