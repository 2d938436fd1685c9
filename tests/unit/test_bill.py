"""The running bill: what an hour costs, what sessions add up to, and where paid time went that trained nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import micro_batches
from sft_dist.data.packing import Packs
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import UnknownHardware
from sft_dist.hardware.gpus import all_gpus, find_gpu
from sft_dist.hardware.prices import prices_of
from sft_dist.metrics.logger import METRICS
from sft_dist.plan.bill import HourlyPrice, hourly_price, running_bill
from sft_dist.plan.cost import plan_cost
from sft_dist.plan.expected import Expected
from sft_dist.plan.machines import Machines
from sft_dist.plan.result import Range
from sft_dist.resolve import resolve
from sft_dist.run import StrategyName
from sft_dist.runtime.world import WorldShape
from sft_dist.train.account import Account, TrainedStep
from sft_dist.train.occupancy import Occupancy, occupancy
from sft_dist.train.outlook import Outlook
from sft_dist.train.sessions import RECEIPT, Session, earlier_sessions
from sft_dist.train.waste import waste_lines
from tests.helpers import cells

EIGHT_H100 = Machines(find_gpu("h100"), nodes=1, gpus_per_node=8)
THREE_DOLLARS = HourlyPrice(usd=3.0, jpy_per_usd=150.0, name="your price")


# What an hour costs


def test_an_hour_costs_what_the_plan_says_it_does() -> None:
    for hardware in (
        HardwareConfig(), HardwareConfig(price_kind="spot"), HardwareConfig(price_per_hour=2.0),
        HardwareConfig(owned={"price_per_kwh_jpy": 30.0}),
    ):  # fmt: skip
        price = hourly_price(hardware, EIGHT_H100, num_processes=8)
        ten_hours = plan_cost(
            EIGHT_H100.gpu, hardware=hardware, num_gpus=8, nodes=1, gpus_per_node=8,
            total_s=Range(36_000, 36_000, 36_000), epochs=1, tokens=1,
        )  # fmt: skip
        assert price is not None
        assert ten_hours.chosen is not None
        assert price.usd_of(36_000) == pytest.approx(ten_hours.chosen.usd.value)
        assert price.name == ten_hours.chosen.name
    assert price.jpy_per_usd == ten_hours.jpy_per_usd


def test_machines_are_billed_whole() -> None:
    """AWS rents eight H100 together or one: three of a node cost eight."""
    aws = HardwareConfig(provider="AWS")
    three = hourly_price(aws, Machines(find_gpu("h100"), nodes=1, gpus_per_node=3), num_processes=3)
    eight = hourly_price(aws, EIGHT_H100, num_processes=8)
    assert three is not None
    assert eight is not None
    assert three.usd == eight.usd


def test_a_device_that_is_not_in_the_table_has_the_price_that_the_user_says() -> None:
    assert hourly_price(HardwareConfig(price_per_hour=2.0, fx=150), None, num_processes=3) == HourlyPrice(
        6.0, 150, "your price"
    )
    in_yen = hourly_price(HardwareConfig(price_per_hour_jpy=300.0, fx=150), None, num_processes=3)
    assert in_yen == HourlyPrice(6.0, 150, "your price")
    assert hourly_price(HardwareConfig(), None, num_processes=3) is None
    assert hourly_price(HardwareConfig(owned={"price_per_kwh": 0.2}), None, num_processes=1) is None, "of what power?"


def test_a_gpu_without_a_price_has_no_bill() -> None:
    unsold = next(gpu for gpu in all_gpus().values() if not prices_of(gpu))
    assert hourly_price(HardwareConfig(), Machines(unsold, 1, 1), num_processes=1) is None
    with pytest.raises(UnknownHardware, match="no prices in the table"):
        hourly_price(HardwareConfig(provider="Nobody"), EIGHT_H100, num_processes=8)


def test_the_line_of_a_step() -> None:
    line = running_bill(THREE_DOLLARS, spent_usd=1.234, to_finish_s=7200, usd_per_million_tokens=0.117)
    assert line == "spent $1.23 (¥185), $6.00 (¥900) to finish, $0.12 per 1M tokens"


# The account of a session


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def account(
    base: Path, clock: Clock, *, price: HourlyPrice | None = THREE_DOLLARS, earlier: tuple[Session, ...] = (),
    expected: Expected | None = None, strategy: str = "ddp", size: int = 2,
) -> Account:  # fmt: skip
    """Of a run of 6 steps of 7 packs of 48 tokens on two ranks."""
    run = resolve(cells.config(str(base), "lora", strategy), WorldShape(1, size))
    rows = [(np.arange(length) % 7, np.ones(length)) for length in [40, 48, 24, 48, 48, 16, 48, 48] * 3]
    outlook = Outlook(None, expected, price)
    return Account(
        run, PreparedData.of(rows), outlook, earlier=earlier, session=Session("2026-01-01T00:00:00+00:00", first_step=1),
        num_steps=6, started=clock.now, clock=clock,
    )  # fmt: skip


def step(
    number: int, *, elapsed_s: float = 2.0, size: int = 7, is_steady: bool = True, wait_s: float = 0.0
) -> TrainedStep:
    return TrainedStep(
        number, tuple(range(size)), tokens=272, elapsed_s=elapsed_s, data_wait_s=wait_s, is_steady=is_steady
    )


def test_the_bill_goes_on_from_earlier_sessions(tiny_base: Path) -> None:
    clock = Clock()
    before = (Session("a", 1, elapsed_s=3600.0, cost_usd=2.0, ended=False), Session("b", 3, elapsed_s=1200.0))
    booked = account(tiny_base, clock, earlier=before)
    clock.now += 600
    booked.begin_training()
    clock.now += 600
    metrics, bill = booked.trained(step(4))
    assert metrics["elapsed_s"] == 3600 + 1200 + 1200
    # The first at what it cost then, the second, whose price nobody knew, at today's.
    assert metrics["cost_usd"] == pytest.approx(2.0 + 3.0 * 1200 / 3600 + 3.0 * 1200 / 3600)
    # One step took 600 s; two more are to come.
    assert "spent $4.00 (¥600), $1.00 (¥150) to finish" in bill
    assert bill.endswith(f"${0.5 / 272 * 1e6:,.0f} per 1M tokens")
    assert "mfu" not in metrics, "of no known GPU"
    assert [session.ended for session in booked.sessions(ended=True)] == [False, False, True]


def test_without_a_price_there_is_no_key_and_no_zero(tiny_base: Path) -> None:
    clock = Clock()
    booked = account(tiny_base, clock, price=None)
    booked.begin_training()
    clock.now += 5
    assert booked.trained(step(1)) == ({"elapsed_s": 5.0}, "")


def test_mfu_is_model_flops_over_the_peak(tiny_base: Path) -> None:
    expected = Expected(1, 6, 1632, 0, 1, 1, 1, flops_per_token=40e9, peak_flops_per_s=1e12)
    booked = account(tiny_base, Clock(), price=None, expected=expected)
    booked.begin_training()
    metrics, _ = booked.trained(step(1, elapsed_s=34.0))
    # 272 tokens in 34 s on two devices: 4 tokens/s each.
    assert metrics["mfu"] == pytest.approx(4 * 40e9 / 1e12)


def test_a_step_is_timed_when_it_is_steady_and_full(tiny_base: Path) -> None:
    booked = account(tiny_base, Clock())
    booked.begin_training()
    for took in (90.0, 50.0):
        booked.trained(step(1, elapsed_s=took))
    assert booked.figures() is None, "both warm up"
    booked.trained(step(3, elapsed_s=0.1, is_steady=False))
    booked.trained(step(4, elapsed_s=1.0, size=3))
    for took in (2.0, 6.0, 4.0):
        booked.trained(step(5, elapsed_s=took))
    figures = booked.figures()
    assert figures is not None
    assert (figures.steps, figures.step_s, figures.tokens_per_s) == (3, 4.0, 3 * 272 / 12)


def test_where_the_time_went(tiny_base: Path) -> None:
    clock = Clock()
    booked = account(tiny_base, clock)
    clock.now += 100
    booked.rehearsed(40.0)
    booked.begin_training()
    clock.now += 200
    booked.trained(step(1, wait_s=7.0))
    booked.evaluated(30.0)
    booked.saved(10.0)
    booked.end_training()
    clock.now += 50
    waste = booked.waste()
    assert (waste.session_s, waste.starting_s, waste.rehearsing_s, waste.finishing_s) == (350, 60, 40, 50)
    assert (waste.evaluating_s, waste.saving_s, waste.data_wait_s) == (30, 10, 7)
    # Seven packs among two ranks, two a pass: 2 x 2 passes, the last of rank 1 with one pack, none empty.
    assert waste.idle_s == 0
    # Rank 0 has 40 + 24 + 48 + 48, rank 1 has 48 + 48 + 16, and they meet once a step.
    assert waste.uneven_s == pytest.approx(160 * (1 - 272 / (2 * 160)))
    assert waste.fill == pytest.approx(272 / (7 * 48))
    lines = waste_lines(waste, THREE_DOLLARS).splitlines()
    assert lines[0] == "waste     of 6 min  $0.29 (¥44):"
    assert any(line.split() == ["starting", "17%", "1", "min", "$0.05", "(¥7.5)"] for line in lines)
    assert any(line.split()[:2] == ["rehearsing", "11%"] for line in lines)
    assert not any("empty micro-batches" in line for line in lines), "what is nothing is not told"
    assert "$" not in waste_lines(waste, None)


@pytest.mark.parametrize(("world_size", "micro_batch_size", "sequences"), [(1, 2, 7), (2, 2, 7), (3, 1, 4), (4, 2, 3)])
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "ddp", "zero1"])
def test_occupancy_is_that_of_the_loader(
    world_size: int, micro_batch_size: int, sequences: int, strategy: StrategyName
) -> None:
    rng = np.random.default_rng(0)
    rows = [(np.ones(n), np.ones(n)) for n in rng.integers(2, 48, sequences)]
    data, batch = PreparedData.of(rows, Packs.single(sequences)), BatchPlan(8, micro_batch_size, world_size, 48)
    order = rng.permutation(sequences)
    passes = [[b for b, _ in micro_batches(data, batch, order, rank)] for rank in range(world_size)]
    # An empty pass has one token and no label.
    tokens = np.array([[b.num_tokens if b.num_tokens > 1 else 0 for b in of_rank] for of_rank in passes])
    found = occupancy(data.num_tokens[order], batch, strategy)
    waited_for = tokens.max(axis=0).sum() if strategy in ("fsdp2", "zero2") else tokens.sum(axis=1).max()
    assert found == Occupancy(
        passes=tokens.size, idle=int((tokens == 0).sum()), tokens=int(tokens.sum()),
        slots=int(waited_for) * world_size, sequences=sequences,
    )  # fmt: skip


# Sessions of a run


def metric_lines(folder: Path, *lines: dict[str, float], end: str = "") -> None:
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def receipt(folder: Path, *sessions: dict[str, Any]) -> None:
    (folder / RECEIPT).write_text(json.dumps({"sessions": sessions}))


ENDED = {"started": "a", "first_step": 1, "elapsed_s": 100.0, "cost_usd": 1.0, "ended": True}


def test_a_killed_session_is_paid_until_its_last_line(tmp_path: Path) -> None:
    """Also for the steps that are trained again."""
    receipt(tmp_path, ENDED, {"started": "b", "first_step": 5, "elapsed_s": 9.0, "cost_usd": 0.1, "ended": False})
    lines = [{"step": n, "elapsed_s": 100.0 + 10 * n, "cost_usd": 1 + n / 10} for n in range(1, 9)]
    metric_lines(tmp_path, *lines, end='{"step": 9, "elapsed_s": 9999')
    first, killed = earlier_sessions(tmp_path)
    assert first == Session(**ENDED)
    assert (killed.elapsed_s, killed.cost_usd, killed.ended) == (80.0, pytest.approx(0.8), False)


def test_a_session_that_wrote_no_line_is_what_the_receipt_says(tmp_path: Path) -> None:
    """The lines that are left are of the one before it: what that had lost is not lost again."""
    killed = {"started": "b", "first_step": 5, "elapsed_s": 70.0, "cost_usd": 0.7, "ended": False}
    receipt(tmp_path, killed, {**killed, "started": "c", "elapsed_s": 4.0, "cost_usd": None})
    metric_lines(tmp_path, {"step": 4, "elapsed_s": 50.0, "cost_usd": 0.5})
    assert [s.elapsed_s for s in earlier_sessions(tmp_path)] == [70.0, 4.0]


def test_nothing_is_known_of_a_folder_without_a_run(tmp_path: Path) -> None:
    assert earlier_sessions(tmp_path) == ()
    receipt(tmp_path, ENDED)
    assert earlier_sessions(tmp_path) == (), "a receipt that was left behind"


@pytest.mark.parametrize("text", ["", "[]", '{"sessions": [{"started": 3}]}', '{"sessions": 4}'])
def test_a_damaged_receipt_counts_as_absent(tmp_path: Path, text: str) -> None:
    (tmp_path / RECEIPT).write_text(text)
    metric_lines(tmp_path, {"step": 1, "loss": 2.0}, {"step": 2, "elapsed_s": 30.0, "cost_usd": 0.25})
    (only,) = earlier_sessions(tmp_path)
    assert (only.elapsed_s, only.cost_usd, only.ended) == (30.0, 0.25, False)
    metric_lines(tmp_path, {"step": 1, "loss": 2.0})
    assert earlier_sessions(tmp_path) == (), "of an older version, without times"
