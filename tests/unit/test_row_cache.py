"""Rows that go on from kept keys and values against rows that are computed whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sft_dist.data.batch import MicroBatch
from sft_dist.model.row_cache import RowCache
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells, generation
from tests.helpers.loaded import load_model

LENS = (9, 1, 14, 4)
STEPS = 12
LEFT = (3, 0)  # the rows that are kept half way, in another order


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda kind: tiny_base if kind == "llama" else generation.build_base(tmp_path_factory.mktemp(kind), kind)


def batch(rows: list[Tensor], positions: list[Tensor], index: Tensor) -> MicroBatch:
    lens = tuple(len(row) for row in rows)
    return MicroBatch(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat(positions)[None],
        cu_seqlens=torch.tensor([0, *lens]).cumsum(0).int(),
        supervised_index=index,
        labels=index,
        seq_lens=lens,
    )


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "lora"), ("llama", "prefix"), ("llama", "prompt"), ("llama", "qlora"), ("mistral", "full"),
        ("mistral", "prefix"), ("mistral", "prompt"), ("qwen2", "full"), ("qwen3", "full"), ("gemma3", "full"),
        ("gemma3", "prefix"), ("phi3", "full"), ("gpt2", "full"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_logits_are_those_of_whole_rows(base: Callable[[str], Path], kind: str, method: str) -> None:
    """Virtual tokens move out of the windows of Mistral and Gemma while the rows go on."""
    run = resolve(cells.config(str(base(kind)), method, data={"max_seq_len": 32}), WorldShape())
    model = load_model(run.model, seed=0).eval()
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randint(3, 259, (n + STEPS,), generator=generator) for n in LENS]
    everywhere = batch(whole, [torch.arange(len(row)) for row in whole], torch.arange(sum(map(len, whole))))
    wanted = model(everywhere, logits=True).split([len(row) for row in whole])

    cache = RowCache()
    starts = [row[:n] for row, n in zip(whole, LENS, strict=True)]
    first = batch(starts, [torch.arange(n) for n in LENS], torch.tensor(LENS).cumsum(0) - 1)
    found = model(first, logits=True, cache=cache)
    rows = list(range(len(LENS)))
    torch.testing.assert_close(found, torch.stack([wanted[r][LENS[r] - 1] for r in rows]), rtol=1e-5, atol=1e-5)
    cache.keep(rows, room=STEPS // 2)
    for step in range(STEPS):
        if step == STEPS // 2:
            cache.keep(LEFT, room=STEPS - step)
            rows = list(LEFT)
        at = [LENS[row] + step for row in rows]
        newest = [whole[row][place : place + 1] for row, place in zip(rows, at, strict=True)]
        found = model(batch(newest, [torch.tensor([n]) for n in at], torch.arange(len(rows))), logits=True, cache=cache)
        expected = torch.stack([wanted[row][place] for row, place in zip(rows, at, strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    virtual = 5 if method in ("prefix", "prompt") else 0
    assert cache.lens == tuple(LENS[row] + STEPS + virtual for row in LEFT)


def test_no_more_tokens_than_there_is_room_for(tiny_base: Path) -> None:
    run = resolve(cells.config(str(tiny_base), "full"), WorldShape())
    model = load_model(run.model, seed=0).eval()
    cache, row = RowCache(), torch.tensor([5, 6, 7])
    newest = batch([row[:1]], [torch.tensor([3])], torch.tensor([0]))
    with torch.no_grad():
        model(batch([row], [torch.arange(3)], torch.tensor([2])), logits=True, cache=cache)
        cache.keep([0], room=1)
        model(newest, logits=True, cache=cache)
        with pytest.raises(AssertionError, match="keep"):
            model(newest, logits=True, cache=cache)
