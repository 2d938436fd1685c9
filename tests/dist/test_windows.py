"""Sliding-window perplexity: that of a plain loop of transformers, on any number of processes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM

from sft_dist.config.schema import Config
from sft_dist.evaluation.windows import Window, WindowedLoss, windowed_loss, windows_of
from tests.helpers import cells, generation
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

LENS = (150, 0, 1, 2, 24, 25, 60, 7, 31, 107)


def texts() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 259, n).astype(np.int32) for n in LENS]


def score(cfg_yaml: str, how: dict[str, int]) -> WindowedLoss:
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        return windowed_loss(strategy, texts(), rank=rank, world_size=size, device=cells.CPU, **how)
    finally:
        strategy.close()


def by_transformers(folder: Path, length: int, stride: int) -> list[float]:
    """Hugging Face's "Perplexity of fixed-length models", with sums in the place of means."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums = []
    for text in texts():
        total, previous_end = 0.0, 0
        for begin in range(0, len(text), stride):
            end = min(begin + length, len(text))
            ids = torch.from_numpy(text[begin:end].astype(np.int64))[None]
            labels = ids.clone()
            labels[:, : -(end - previous_end)] = -100
            if (labels[:, 1:] != -100).any():
                with torch.no_grad():
                    loss = model(ids, labels=labels).loss
                total += float(loss) * int((labels[:, 1:] != -100).sum())
            previous_end = end
            if end == len(text):
                break
        sums.append(total)
    return sums


def test_windows() -> None:
    assert windows_of(10, length=6, stride=3) == [Window(0, 1, 6), Window(3, 6, 9), Window(6, 9, 10)]
    assert windows_of(6, length=6, stride=3) == [Window(0, 1, 6)]
    assert windows_of(7, length=6, stride=5) == [Window(0, 1, 6), Window(5, 6, 7)]
    assert windows_of(1, length=6, stride=3) == windows_of(0, length=6, stride=3) == []


@pytest.mark.parametrize("length", [2, 5, 6])
@pytest.mark.parametrize("num_tokens", range(2, 30))
def test_every_token_but_the_first_counts_once(length: int, num_tokens: int) -> None:
    for stride in range(1, length):
        windows = windows_of(num_tokens, length=length, stride=stride)
        assert [t for w in windows for t in range(w.scored, w.end)] == list(range(1, num_tokens))
        assert all(w.begin < w.scored and w.end - w.begin <= length for w in windows)


@pytest.mark.parametrize(
    ("kind", "strategy", "ranks", "length", "stride"),
    [
        ("llama", "fsdp2", 3, 24, 10),
        *(
            pytest.param(*cell, marks=pytest.mark.ci)
            for cell in [
                ("llama", "zero3", 3, 24, 10), ("llama", "ddp", 3, 24, 23), ("llama", "zero1", 2, 24, 1),
                ("mistral", "zero2", 3, 25, 12), ("phi3", "ddp", 3, 60, 20), ("gpt2", "fsdp2", 3, 40, 20),
            ]
        ),
    ],
)  # fmt: skip
def test_it_is_what_transformers_has(
    world: World, tiny_base: Path, tmp_path: Path, kind: str, strategy: str, ranks: int, length: int, stride: int
) -> None:
    """Phi's rows of more than 32 tokens have other rotary frequencies than its last, shorter windows."""
    base = tiny_base if kind == "llama" else generation.build_base(tmp_path, kind)
    cfg = cells.dump(cells.config(str(base), "full", strategy, data={"max_seq_len": 32}))
    how = {"length": length, "stride": stride, "windows_at_once": 3}
    found = world(ranks).run(score, cfg, how)
    (alone,) = world(1).run(score, cfg, how)
    for each in found:
        assert each.sums.tolist() == alone.sums.tolist()
        assert each.tokens.tolist() == alone.tokens.tolist() == [max(0, n - 1) for n in LENS]
    np.testing.assert_allclose(alone.sums, by_transformers(base, length, stride), rtol=1e-5)
    assert alone.loss == pytest.approx(alone.sums.sum() / alone.tokens.sum())
    assert alone.perplexity == pytest.approx(np.exp(alone.loss))


@pytest.mark.ci
@pytest.mark.parametrize("method", ["qlora", "prefix", "prompt"])
def test_with_every_method(world: World, tiny_base: Path, method: str) -> None:
    how = {"length": 24, "stride": 10, "windows_at_once": 2}
    sums = [
        world(ranks).run(score, cells.dump(cells.config(str(tiny_base), method, strategy)), how)[0].sums.tolist()
        for strategy, ranks in (("ddp", 1), ("fsdp2", 3), ("zero3", 3))
    ]
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.ci
def test_windows_that_cannot_be(world: World, tiny_base: Path) -> None:
    cfg = cells.dump(cells.config(str(tiny_base), "lora", "ddp"))
    for length, stride in ((24, 24), (24, 0), (1, 1)):
        with pytest.raises(AssertionError, match=f"a window of {length} tokens that moves by {stride}"):
            world(1).run(score, cfg, {"length": length, "stride": stride, "windows_at_once": 1})
    with pytest.raises(AssertionError, match="a window of 513 tokens, and the model has 512 positions"):
        world(1).run(score, cfg, {"length": 513, "stride": 5, "windows_at_once": 1})
