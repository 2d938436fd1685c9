"""What a world of test processes runs: the questions of an evaluation, with what was computed for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import yaml
from torch import Tensor

from sft_dist.config.schema import Config
from sft_dist.data.batch import MicroBatch
from sft_dist.data.chat_template import load_renderer
from sft_dist.evaluation.decode import Generated, generate
from sft_dist.evaluation.examiner import Examiner
from sft_dist.evaluation.prompt import prompter_of
from sft_dist.model.row_cache import RowCache
from sft_dist.sharding.strategy import Strategy
from tests.helpers import cells


@dataclass
class Counted:
    """
    Args:
        passes: forward passes of this rank.
        rows: most rows of one.
        cache_bytes: most that keys and values took when one had ended.
        tokens: that this rank generated.
    """

    passes: int = 0
    rows: int = 0
    cache_bytes: int = 0
    tokens: int = 0


def bytes_of(cache: RowCache) -> int:
    return sum(t.numel() * t.element_size() for pair in cache._layers.values() for t in pair)


def _watch(strategy: Strategy) -> Counted:
    found, infer = Counted(), strategy.infer

    def counted(batch: MicroBatch, *, logits: bool, cache: RowCache | None = None) -> Tensor:
        result = infer(batch, logits=logits, cache=cache)
        found.passes += 1
        found.rows = max(found.rows, len(batch.seq_lens))
        if cache is not None:
            found.cache_bytes = max(found.cache_bytes, bytes_of(cache))
        return result

    strategy.infer = counted  # type: ignore[method-assign]
    return found


def generated(cfg_yaml: str, prompts: list[list[int]], how: dict[str, Any]) -> Counted:
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    try:
        found = _watch(strategy)
        own: dict[int, Generated] = generate(
            strategy, prompts, rank=dist.get_rank(), world_size=dist.get_world_size(), device=cells.CPU, **how
        )
        found.tokens = sum(len(answer.tokens) for answer in own.values())
        return found
    finally:
        strategy.close()


def examined(cfg_yaml: str) -> tuple[Counted, int]:
    """With how many replies there are; synthetic rows are held out."""
    cfg = Config.model_validate(yaml.safe_load(cfg_yaml))
    run, strategy = cells.start(cfg)
    try:
        tokenizer = load_renderer(cfg.model.path, None, None).tokenizer
        examiner = Examiner(
            run.eval, cells.synthetic_data(rows=11, packing=False), tokenizer, prompter_of(tokenizer, None),
            max_seq_len=run.data.max_seq_len, seed=run.seed, rank=dist.get_rank(), world_size=dist.get_world_size(),
            device=cells.CPU,
        )  # fmt: skip
        found = _watch(strategy)
        findings = examiner.examine(strategy, is_end=True)
        return found, len(findings.samples) + len(findings.judged)
    finally:
        strategy.close()
