"""Optimizers with few bits or few states: each against the plain thing, and against what it claims of its rounding."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TransformersAdafactor

from sft_dist.config.schema import AdafactorConfig, AdamWConfig, OptimConfig
from sft_dist.run import Precision, StateDtype
from sft_dist.sharding import adafactor, adamw
from sft_dist.sharding.adamw import CHUNK_NUMEL, MixedAdamW
from sft_dist.sharding.optim import build_optimizer
from sft_dist.sharding.stochastic_rounding import random_16_bits, store

SHAPES = {"matrix": (96, 64), "small": (40, 3), "vector": (70,)}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES.values()]


def trained(optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    """The weights after steps with the same gradients, whatever the optimizer; the rate changes as a schedule's does."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for parameter, grad in zip(parameters, tensors(100 + step), strict=True):
            parameter.grad = grad.to(parameter.dtype) * 10.0 ** -(step % 3)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
    return [p.detach().float() for p in parameters]


def ours(config: OptimConfig, state: StateDtype = "fp32", master: Any = "fp32") -> torch.optim.Optimizer:
    precision = Precision(compute=master, master=master, reduce="fp32", optimizer_state=state)
    dtype = torch.float32 if master == "fp32" else torch.bfloat16
    named = [(name, nn.Parameter(t)) for name, t in zip(SHAPES, tensors(0, dtype), strict=True)]
    return build_optimizer(config, precision, named)


ADAMW = AdamWConfig(weight_decay=0.1)


def fp32_adamw() -> list[Tensor]:
    return trained(ours(ADAMW))


def test_the_mixed_step_is_adamw() -> None:
    """In fp32 throughout its arithmetic is that of torch's fused step."""
    groups = [{"params": [nn.Parameter(t)], "weight_decay": 0.1 if t.dim() > 1 else 0.0} for t in tensors(0)]
    mixed = MixedAdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, state_dtype=torch.float32)
    torch.testing.assert_close(trained(mixed), fp32_adamw(), rtol=1e-6, atol=1e-7)


def test_the_mixed_step_has_the_constants_of_the_run() -> None:
    groups = [{"params": [nn.Parameter(t)], "weight_decay": 0.1 if t.dim() > 1 else 0.0} for t in tensors(0)]
    mixed = MixedAdamW(groups, lr=1.0, betas=(0.7, 0.8), eps=1e-2, state_dtype=torch.float32)
    expected = trained(ours(ADAMW.model_copy(update={"beta1": 0.7, "beta2": 0.8, "eps": 1e-2})))
    torch.testing.assert_close(trained(mixed), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [1000, CHUNK_NUMEL])
def test_bf16_moments_stay_near_fp32_ones(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five updates of 0.01 or less each. A moment is off by at most 2^-7 of itself each time it is stored: after five
    steps an update is by a few times that, 5 % here."""
    monkeypatch.setattr("sft_dist.sharding.adamw.CHUNK_NUMEL", chunk)
    optimizer = ours(ADAMW, "bf16")
    after = trained(optimizer)
    moved = 0.0
    for got, want, before in zip(after, fp32_adamw(), tensors(0), strict=True):
        moved = max(moved, float((want - before).abs().max()))
        assert (got - want).abs().max() < 0.05 * (want - before).abs().max()
    assert moved > 0.01
    kinds = {t.dtype for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
    assert kinds == {torch.bfloat16}


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(ours(ADAMW, "bf16"))
    monkeypatch.setattr("sft_dist.sharding.adamw.CHUNK_NUMEL", 1000)
    for a, b in zip(whole, trained(ours(ADAMW, "bf16")), strict=True):
        assert torch.equal(a, b)


def test_a_falling_second_moment_falls() -> None:
    """To the nearest bf16 value it would stay where it is for ever: a step takes 0.001 of it, half a bit is 0.002."""
    weight = nn.Parameter(torch.zeros(4096, 1))
    optimizer = build_optimizer(ADAMW, Precision("fp32", "fp32", "fp32", "bf16"), [("w", weight)])
    for step in range(300):
        weight.grad = torch.full_like(weight, 1.0 if step == 0 else 1e-6)
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"].float()
    # 300 roundings of 2^-9 of the value each, by chance up or down, averaged over 4096 elements.
    assert float(second.mean()) == pytest.approx(0.001 * 0.999**299, rel=2e-3)


@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(lr=5e-4, weight_decay=1.0),
        AdafactorConfig(type="adafactor", lr=5e-4, weight_decay=1.0),
    ],
)
def test_small_updates_and_decays_of_bf16_weights_arrive(config: OptimConfig) -> None:
    """A weight of 1 does not see 0.0005 to the nearest: 100 such updates would be none."""
    weight = nn.Parameter(torch.ones(4096, 1, dtype=torch.bfloat16))
    optimizer = build_optimizer(config, Precision("bf16", "bf16", "fp32", "bf16"), [("w", weight)])
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # w <- w (1 - 0.0005) - 0.0005, a hundred times
    assert float(weight.detach().float().mean()) == pytest.approx(2 * (1 - 5e-4) ** 100 - 1, abs=1e-3)


def test_rounding_is_fair_to_every_place_and_every_step() -> None:
    value = 1.0 + 2**-7 * 0.3  # three tenths of the way from one bf16 value to the next
    steps = torch.stack(
        [_stored(torch.full((2000,), value), first=0, step=step) for step in range(1, 401)]
    )  # [step, place]
    up = (steps > 1.0).double()
    assert set(steps.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(up.mean()) == pytest.approx(0.3, abs=0.003)
    # 400 draws of a 0.3 coin have a deviation of 0.023; no place and no step may be preferred.
    assert up.mean(0).std() == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.1)
    assert up.mean(1).std() == pytest.approx((0.3 * 0.7 / 2000) ** 0.5, rel=0.2)
    neighbours = torch.corrcoef(up[:, :200].T)
    assert (neighbours - torch.eye(200)).abs().max() < 0.3


def test_a_weight_and_its_moments_do_not_share_their_chance() -> None:
    """Else a moment that happened to be rounded up would come with a weight that was, and the errors would add up."""
    weight = nn.Parameter(torch.full((64, 64), 0.7, dtype=torch.bfloat16))
    optimizer = build_optimizer(AdamWConfig(lr=3e-3), Precision("bf16", "bf16", "fp32", "bf16"), [("w", weight)])
    weight.grad = torch.full_like(weight, 0.31)
    optimizer.step()
    rounded = [weight.detach(), *(optimizer.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq"))]
    up = torch.stack([(t > t.min()).double().flatten() for t in rounded])
    assert ((up.mean(1) > 0.05) & (up.mean(1) < 0.95)).all(), "each is between two values of bf16"
    assert (torch.corrcoef(up) - torch.eye(3)).abs().max() < 0.1


def _stored(value: Tensor, *, first: int, step: int) -> Tensor:
    out = torch.empty(value.numel(), dtype=torch.bfloat16)
    store(out, value.clone(), first=first, step=step, stream=0)
    return out.float()


def test_rounding_depends_on_the_place_in_the_whole_tensor_alone() -> None:
    whole = random_16_bits(1000, 0, 7, 1, torch.device("cpu"))
    assert torch.equal(whole[300:], random_16_bits(700, 300, 7, 1, torch.device("cpu")))
    assert (int(whole.min()) >= 0, int(whole.max()) < 1 << 16) == (True, True)
    assert not torch.equal(whole, random_16_bits(1000, 0, 7, 2, torch.device("cpu")))
    far = random_16_bits(10, 2**31 - 5, 7, 1, torch.device("cpu"))  # across what an int32 counts to
    assert torch.equal(far[5:], random_16_bits(5, 2**31, 7, 1, torch.device("cpu")))


@pytest.mark.parametrize(("config", "module"), [(AdamWConfig(), adamw), (AdafactorConfig(type="adafactor"), adafactor)])
def test_a_shard_of_bf16_weights_is_rounded_as_its_part_of_the_whole(
    config: OptimConfig, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector with equal gradients, so that Adafactor's means of a part are those of the whole."""

    def stepped(first: int) -> Tensor:
        monkeypatch.setattr(module, "first_element", lambda _: first)
        weight = nn.Parameter(torch.linspace(0.5, 1.5, 1000)[first:].bfloat16())
        optimizer = build_optimizer(config, Precision("bf16", "bf16", "fp32", "bf16"), [("w", weight)])
        for _ in range(3):
            weight.grad = torch.full_like(weight, 0.3)
            optimizer.step()
        return weight.detach()

    assert torch.equal(stepped(300), stepped(0)[300:])


def test_what_bf16_can_hold_is_not_touched() -> None:
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), float("-inf"), 1e-30]).bfloat16().float()
    for step in range(20):
        assert torch.equal(_stored(exact, first=0, step=step), exact)
    assert _stored(torch.tensor([float("nan")]), first=0, step=1).isnan().all()


@pytest.mark.parametrize("master", ["fp32", "bf16"])
def test_8bit_is_bitsandbytes_own(master: Any) -> None:
    """Bit for bit, codes and scales too; what has fewer than 4096 elements is in fp32 in both."""
    optimizer = ours(ADAMW, "8bit", master)
    got = trained(optimizer)
    dtype = torch.float32 if master == "fp32" else torch.bfloat16
    groups = [{"params": [nn.Parameter(t)], "weight_decay": 0.1 if t.dim() > 1 else 0.0} for t in tensors(0, dtype)]
    reference = bitsandbytes.optim.AdamW8bit(groups)
    for a, b in zip(got, trained(reference), strict=True):
        assert torch.equal(a, b)
    mine, theirs = (next(iter(o.state.values())) for o in (optimizer, reference))
    for kind, name in {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1"}.items():
        assert torch.equal(mine[kind], theirs[name].flatten())
    assert mine["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize(("state", "bits"), [("8bit", 8), ("fp32", 32)])
def test_bitsandbytes_steps_with_the_constants_of_the_run(
    state: StateDtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels have defaults of their own. Paged fp32 moments take the second one, here in ordinary memory."""
    monkeypatch.setattr(bnb_functional, "get_paged", lambda numel, dtype, device: torch.empty(numel, dtype=dtype))
    monkeypatch.setattr(bnb_functional, "fill", lambda tensor, value: tensor.fill_(value))
    monkeypatch.setattr(bnb_functional, "prefetch_tensor", lambda tensor: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    constants = {"beta1": 0.7, "beta2": 0.8, "eps": 1e-2, "paged": bits == 32}
    got = trained(ours(ADAMW.model_copy(update=constants), state))
    groups = [{"params": [nn.Parameter(t)], "weight_decay": 0.1 if t.dim() > 1 else 0.0} for t in tensors(0)]
    reference = bitsandbytes.optim.AdamW(groups, betas=(0.7, 0.8), eps=1e-2, optim_bits=bits)
    torch.testing.assert_close(got, trained(reference), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state", ["8bit", "fp32"])
def test_paged_moments_are_fetched_before_a_step_and_waited_for_after_it(
    state: StateDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory that only pretends to be CUDA's; tests/gpu has the real one."""
    fetched: list[int] = []
    waited: list[bool] = []
    made: list[Tensor] = []

    def get_paged(numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(torch.full((numel,), 77, dtype=dtype))  # managed memory comes as it is
        return made[-1]

    monkeypatch.setattr(bnb_functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb_functional, "fill", lambda tensor, value: tensor.fill_(value))
    monkeypatch.setattr(bnb_functional, "prefetch_tensor", lambda tensor: fetched.append(id(tensor)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    paged = ours(ADAMW.model_copy(update={"paged": True}), state)
    after = trained(paged)
    moments = [s[kind] for s in paged.state.values() for kind in ("exp_avg", "exp_avg_sq")]
    assert {id(m) for m in moments} == {id(m) for m in made}, "all of them, and the very tensors that were allocated"
    assert set(fetched) == {id(m) for m in made}
    assert len(waited) >= 5
    plain = trained(ours(ADAMW, state))
    for a, b in zip(after, plain, strict=True):
        assert torch.equal(a, b) if state == "8bit" else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_parameter", [False, True])
def test_adafactor_is_transformers(scale_parameter: bool) -> None:
    config = AdafactorConfig(type="adafactor", weight_decay=0.1, scale_parameter=scale_parameter)
    groups = [{"params": [nn.Parameter(t)], "weight_decay": 0.1 if t.dim() > 1 else 0.0} for t in tensors(0)]
    reference = TransformersAdafactor(groups, lr=1.0, scale_parameter=scale_parameter, relative_step=False)
    torch.testing.assert_close(trained(ours(config)), trained(reference), rtol=1e-5, atol=1e-6)


def test_adafactor_has_the_constants_of_the_run() -> None:
    """Neither is its default: the running means forget slower, and most updates are clipped."""
    config = AdafactorConfig(type="adafactor", decay_rate=-0.4, clip_threshold=0.3)
    groups = [{"params": [nn.Parameter(t)]} for t in tensors(0)]
    reference = TransformersAdafactor(
        groups, lr=1.0, decay_rate=-0.4, clip_threshold=0.3, scale_parameter=False, relative_step=False
    )
    expected = trained(reference)
    torch.testing.assert_close(trained(ours(config)), expected, rtol=1e-5, atol=1e-6)
    for other in ({"decay_rate": -0.8}, {"clip_threshold": 1.0}):
        different = trained(ours(config.model_copy(update=other)))
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(different, expected, strict=True)), other


def test_adafactor_of_what_is_small() -> None:
    """Its two bounds are the paper's: a tensor of zeros would never move, and gradients of 1e-8 are no zeros."""
    config = AdafactorConfig(type="adafactor", lr=0.01, scale_parameter=True)
    named = [(name, nn.Parameter(t * 1e-5)) for name, t in zip(SHAPES, tensors(0), strict=True)]
    mine = build_optimizer(config, Precision("fp32", "fp32", "fp32", "fp32"), named)
    groups = [{"params": [nn.Parameter(t * 1e-5)], "weight_decay": 0.0} for t in tensors(0)]
    theirs = TransformersAdafactor(groups, lr=0.01, scale_parameter=True, relative_step=False)
    for optimizer in (mine, theirs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach() * 1e-3
        optimizer.step()
    weights = [[p.detach() * 1e5 for group in o.param_groups for p in group["params"]] for o in (mine, theirs)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)
    assert all((w - t).abs().max() > 0.1 for w, t in zip(weights[0], tensors(0), strict=True))
