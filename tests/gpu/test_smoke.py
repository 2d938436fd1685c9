"""What only a GPU can show: the CUDA kernels and the NCCL path, in a world of one.

Skipped without a CUDA device. Run with ``pytest tests/gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: these tests run kernels that have no CPU form", allow_module_level=True)

from sft_dist.data.loader import TrainingOrder
from sft_dist.evaluation.decode import generate
from sft_dist.model.attention import next_token_attention, packed_attention_forward, per_segment_sdpa
from sft_dist.model.row_cache import RowCache
from sft_dist.model.sequence_parallel import SequenceParallel
from sft_dist.resolve import resolve
from sft_dist.runtime.process_group import process_group
from sft_dist.runtime.world import World, WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.optim import learning_rate
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.step import evaluate, train_step
from tests.helpers import cells, generation

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with process_group(World(0, 0, WorldShape()), CUDA, dist.HashStore()):
        yield


def losses(model: Path, method: str, strategy: str, compute: str, **sections: Any) -> list[float]:
    """Five steps and an evaluation in the middle, on the GPU."""
    precision = {"compute": compute, **sections.pop("precision", {})}
    cfg = cells.config(str(model), method, strategy, precision=precision, **sections)
    run = resolve(cfg, WorldShape())
    built = registry.apply(run, CUDA)
    verify_sharding(built, registry.describe(run, 0))
    where = "cpu" if built.parts_on_host() else "cuda"
    assert all(t.device.type == where for _, t, _ in built.local_parameters())
    data = cells.synthetic_data()
    order = TrainingOrder(data, run.batch, run.seed)
    result = []
    try:
        for number in range(5):
            if number == 2:
                evaluate(built, data, run.batch, rank=0, device=CUDA)
            lr = learning_rate(run.optim, number, 10)
            out = train_step(built, data, run.batch, order.step(number), rank=0, device=CUDA, lr=lr)
            result.append(float(out.loss))
    finally:
        built.close()
    return result


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_five_steps_in_bf16(tiny_base: Path, strategy: str, method: str) -> None:
    got = losses(tiny_base, method, strategy, "bf16")
    assert got[-1] < got[0]


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "p_tuning lstm", "prefix projection"])
def test_fp32_is_equal_under_ddp_and_fsdp2(tiny_base: Path, method: str) -> None:
    torch.testing.assert_close(
        losses(tiny_base, method, "ddp", "fp32"), losses(tiny_base, method, "fsdp2", "fp32"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("exchanged", [False, True])
def test_varlen_equals_attention_by_segment(heads: int, kv_heads: int, window: int | None, exchanged: bool) -> None:
    """Also behind NCCL's all-to-all, here with itself, which hands it views of one tensor."""
    torch.manual_seed(0)
    seq_lens = (100, 1, 63, 92)
    bounds = torch.tensor([0, 100, 101, 164, 256], dtype=torch.int32, device=CUDA)
    shape = lambda n: (1, n, 256, 64)  # noqa: E731
    q, k, v = (
        torch.randn(shape(n), device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    assert dist.group.WORLD is not None
    shared = SequenceParallel(dist.group.WORLD, (256,)) if exchanged else None
    out, _ = packed_attention_forward(
        torch.nn.Identity(), q, k, v, None, seq_lens=seq_lens, max_seq_len=100, cu_seqlens=bounds,
        sliding_window=window, sequence_parallel=shared,
    )  # fmt: skip
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), grad)
    flat = [t.detach().float()[0].transpose(0, 1).requires_grad_() for t in (q, k, v)]
    reference = per_segment_sdpa(*flat, seq_lens, 64**-0.5, window or 0)  # type: ignore[arg-type]
    want = torch.autograd.grad(reference, flat, grad[0].float())
    torch.testing.assert_close(out[0].float(), reference, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine[0].transpose(0, 1).float(), theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("window", [None, 50])
@torch.no_grad()
def test_the_newest_tokens_see_their_rows(heads: int, kv_heads: int, window: int | None) -> None:
    """The kernel against attention row by row, over buffers whose rows have room behind them."""
    torch.manual_seed(0)
    layer, cache, lens = torch.nn.Identity(), RowCache(), (100, 1, 63)
    draw = lambda rows, n: torch.randn(rows, n, 64, device=CUDA, dtype=torch.bfloat16)  # noqa: E731
    cache.begin_pass(lens)
    cache.fill(layer, draw(sum(lens), kv_heads), draw(sum(lens), kv_heads))
    cache.keep([2, 0, 1], room=3)
    for _ in range(3):
        cache.begin_pass([1, 1, 1])
        keys, values = cache.append(layer, draw(3, kv_heads), draw(3, kv_heads))
        query = draw(3, heads)
        got = next_token_attention(query, keys, values, cache, 64**-0.5, window)
        want = next_token_attention(query.float(), keys.float(), values.float(), cache, 64**-0.5, window)
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["full", "p_tuning lstm", "prefix"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_generation_on_the_gpu_says_what_the_cpu_says(tiny_base: Path, strategy: str, method: str) -> None:
    """In fp32, where the two round alike enough for greedy tokens."""
    run = resolve(cells.config(str(tiny_base), method, strategy), WorldShape())
    answers = []
    for device in (CUDA, cells.CPU) if strategy == "ddp" else (CUDA, CUDA):
        built = registry.apply(run, device)
        how: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": [2], "rows_at_once": 3}
        asked = generation.prompts(7)
        answers.append(generate(built, asked, rank=0, world_size=1, device=device, **how))
        built.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["full", "p_tuning lstm", "prefix"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_host_does_not_wait_in_a_step(tiny_base: Path, strategy: str, method: str) -> None:
    """CUDA's own synchronisation detector, from the first micro-batch to the update."""
    cfg = cells.config(str(tiny_base), method, strategy, precision={"compute": "bf16"})
    run = resolve(cfg, WorldShape())
    built = registry.apply(run, CUDA)
    data = cells.synthetic_data()
    order = TrainingOrder(data, run.batch, run.seed)
    train_step(built, data, run.batch, order.step(0), rank=0, device=CUDA, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(built, data, run.batch, order.step(1), rank=0, device=CUDA, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        built.close()
