"""Bills, against arithmetic done by hand and against runs whose cost was published."""

from __future__ import annotations

from typing import Any

import pytest

from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.errors import UnknownHardware
from sft_dist.hardware.gpus import find_gpu
from sft_dist.plan.cost import POWER_OVER_TDP, cost_assumptions, plan_cost, rents_nodes
from sft_dist.plan.money import format_jpy, format_jpy_japanese, format_usd
from sft_dist.plan.result import CostPlan, Offer, Range

HOUR = Range(3600.0, 3600.0, 3600.0)


def bill(gpu: str, *, gpus: int = 8, nodes: int = 1, total_s: Range = HOUR, **hardware: Any) -> CostPlan:
    return plan_cost(
        find_gpu(gpu),
        hardware=HardwareConfig.model_validate(hardware),
        num_gpus=gpus,
        nodes=nodes,
        gpus_per_node=gpus // nodes,
        total_s=total_s,
        epochs=2,
        tokens=50e6,
    )


def offer(cost: CostPlan, name: str, kind: str = "on demand") -> Offer:
    (found,) = [offer for offer in cost.offers if offer.name.startswith(name) and offer.kind == kind]
    return found


def test_a_whole_machine_by_the_hour() -> None:
    cost = bill("h100", total_s=Range(7200.0, 6480.0, 9000.0))
    aws = offer(cost, "AWS p5.48xlarge, us-east-1")
    assert (aws.machines, aws.gpus_billed) == (1, 8)
    assert aws.usd_per_gpu_hour == pytest.approx(6.88)
    assert (aws.usd.value, aws.usd.low, aws.usd.high) == pytest.approx((2 * 55.04, 1.8 * 55.04, 2.5 * 55.04))
    assert aws.jpy.value == pytest.approx(2 * 55.04 * 156.2)
    assert (cost.jpy_per_usd, cost.fx_as_of) == (156.2, "2026-02-04")
    assert (cost.gpu_hours.value, cost.gpu_hours.high) == pytest.approx((16, 20))


def test_the_range_of_a_spot_price_and_of_the_time_multiply() -> None:
    spot = offer(bill("h100", total_s=Range(3600.0, 1800.0, 7200.0)), "AWS p5.48xlarge, us-east-1", "spot")
    assert (spot.usd.value, spot.usd.low, spot.usd.high) == pytest.approx((14.335, 9.37 / 2, 19.3 * 2))


def test_two_gpus_where_eight_are_sold_cost_eight() -> None:
    cost = bill("a100-80gb", gpus=2)
    aws = offer(cost, "AWS p4de.24xlarge")
    assert aws.name == "AWS p4de.24xlarge, us-east-1 (8 GPUs billed, 2 used)"
    assert aws.usd.value == pytest.approx(27.44705)
    # Priced by the GPU: two are two.
    verda = offer(cost, "Verda")
    assert (verda.gpus_billed, verda.usd.value) == (2, pytest.approx(2 * 1.29))
    assert cost.chosen == verda


def test_the_machine_that_matches_is_taken_of_those_of_one_provider() -> None:
    assert offer(bill("h100", gpus=2), "Lambda").name == "Lambda gpu_2x_h100_sxm5, us"
    assert offer(bill("h100", gpus=3), "Lambda").name == "Lambda gpu_4x_h100_sxm5, us (4 GPUs billed, 3 used)"
    assert not [o for o in bill("h100", gpus=8).offers if o.name.startswith("Lambda")]  # at most 4 in one machine


def test_several_nodes_are_several_machines() -> None:
    aws = offer(bill("h100", gpus=16, nodes=2), "AWS 2 x p5.48xlarge, us-east-1")
    assert (aws.machines, aws.gpus_billed, aws.usd.value) == (2, 16, pytest.approx(110.08))


def test_a_node_that_nobody_rents_in_one_piece_is_spread_and_says_so() -> None:
    (only,) = bill("a6000", gpus=2).offers
    assert only.name == "Lambda 2 x gpu_1x_a6000, us (1 GPU a machine: a node of the run is spread over several)"
    assert only.usd.value == pytest.approx(2 * 1.09)


def test_offers_are_sorted_and_the_cheapest_open_one_of_the_kind_is_chosen() -> None:
    cost = bill("h100")
    assert [o.usd.value for o in cost.offers] == sorted(o.usd.value for o in cost.offers)
    on_demand = [o for o in cost.offers if o.kind == "on demand"]
    assert cost.chosen == on_demand[0]
    assert cost.offers[0].kind == "spot"
    assert bill("h100", price_kind="spot").chosen == cost.offers[0]
    assert cost.usd_per_epoch == pytest.approx(on_demand[0].usd.value / 2)
    assert cost.usd_per_million_tokens == pytest.approx(on_demand[0].usd.value / 50)


def test_a_price_that_not_anybody_gets_is_shown_but_not_chosen() -> None:
    cost = bill("a100-40gb")
    squid = offer(cost, "SQUID")
    assert squid.usd.value == pytest.approx(7_032_000 / 8760 / 156.2)
    assert squid.jpy.value == pytest.approx(7_032_000 / 8760)
    assert "a node for a year" in squid.name
    assert cost.offers[0] == squid
    assert cost.chosen is not None
    assert cost.chosen.name == "AWS p4d.24xlarge, us-east-1"
    assert bill("a100-40gb", provider="squid").chosen == squid


def test_who_rents_a_node_at_the_wanted_kind_of_price() -> None:
    def is_rented(gpus: int, **hardware: Any) -> bool:
        return rents_nodes(find_gpu("B200"), HardwareConfig.model_validate(hardware), gpus)

    assert is_rented(8, provider="Lambda")
    assert not is_rented(8, provider="Lambda", price_kind="spot"), "it sells on demand alone"
    assert is_rented(8, provider="AWS", price_kind="spot")
    assert not is_rented(16, provider="Lambda"), "no machine has sixteen"
    assert is_rented(16, price_per_hour=2.0)


def test_prices_in_yen() -> None:
    cost = bill("tsubame4", gpus=4, provider="tsubame4.0", fx=150)
    assert cost.chosen is not None
    assert cost.chosen.jpy.value == pytest.approx(275)
    assert cost.chosen.usd.value == pytest.approx(275 / 150)
    assert len(cost.offers) == 2  # what industry pays too
    assert cost.fx_as_of == "hardware.fx"


def test_a_price_of_ones_own() -> None:
    cost = bill("h100", gpus=2, price_per_hour=2.5)
    assert cost.chosen is not None
    assert (cost.chosen.kind, cost.chosen.usd.value, cost.chosen.gpus_billed) == ("yours", pytest.approx(5.0), 2)
    assert len(cost.offers) > 5  # the others, to compare
    yen = bill("h100", gpus=2, price_per_hour_jpy=500, fx=160).chosen
    assert yen is not None
    assert (yen.jpy.value, yen.usd.value) == pytest.approx((1000, 6.25))


def test_electricity_of_ones_own_machines() -> None:
    cost = bill("h100", owned={"price_per_kwh": 0.2, "pue": 1.5})
    # 8 x 700 W are 5.6 kW; with the host 0.76 x 10.2 kW were measured.
    assert cost.energy_kwh == pytest.approx(0.76 * 10.2)
    chosen = cost.chosen
    assert chosen is not None
    assert chosen.kind == "owned"
    assert chosen.usd.value == pytest.approx(0.76 * 10.2 * 1.5 * 0.2)
    assert (chosen.usd.low, chosen.usd.high) == pytest.approx((5.6 * 1.5 * 0.2, 8.4 * 1.5 * 0.2))
    yen = bill("h100", owned={"price_per_kwh_jpy": 30, "pue": 1.0}).chosen
    assert yen is not None
    assert yen.jpy.value == pytest.approx(0.76 * 10.2 * 30)


def test_gpus_without_a_price_have_energy_and_no_offer() -> None:
    cost = bill("rtx4090", gpus=2)
    assert (cost.offers, cost.chosen, cost.usd_per_epoch, cost.usd_per_million_tokens) == ((), None, None, None)
    assert cost.energy_kwh == pytest.approx(0.9 * POWER_OVER_TDP.value)
    assert bill("b300", price_kind="spot").chosen is not None
    assert bill("gh200", gpus=1, price_kind="spot").chosen is None


def test_a_provider() -> None:
    cost = bill("h100", provider="aws")
    assert {o.name.split()[0] for o in cost.offers} == {"AWS"}
    with pytest.raises(UnknownHardware, match="did you mean Lambda") as unknown:
        bill("h100", provider="Lamda")
    assert unknown.value.what == "hardware.provider 'Lamda' has no prices in the table"
    with pytest.raises(UnknownHardware) as other:
        bill("mi300x", provider="lambda")
    assert other.value.what == "hardware.provider 'lambda' has no price of a MI300X"
    assert other.value.fix == "set hardware.provider to Crusoe"


# QLoRA of Llama-2-70B on 1,024 samples of 2,048 tokens (github.com/AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md): GPUs,
# seconds and the printed range of dollars. The prices of a GPU-hour are not printed; those that explain the first row
# of a GPU must give the others of it.
PUBLISHED = {
    "a100-40gb": [(2, 3277, 3.28, 3.75), (4, 1266, 2.53, 2.90), (8, 672, 2.69, 3.08)],
    "rtx6000ada": [(2, 5867, 3.72, 5.22), (4, 2904, 3.68, 5.16)],
}


@pytest.mark.parametrize("gpu", PUBLISHED)
def test_published_bills(gpu: str) -> None:
    (gpus, seconds, *bounds), *others = PUBLISHED[gpu]
    for i, usd in enumerate(bounds):
        per_gpu_hour = usd / (gpus * seconds / 3600)
        for other_gpus, other_seconds, *published in others:
            cost = bill(
                gpu,
                gpus=other_gpus,
                total_s=Range(other_seconds, other_seconds, other_seconds),
                price_per_hour=per_gpu_hour,
            )
            assert cost.chosen is not None
            assert cost.chosen.usd.value == pytest.approx(published[i], abs=0.011)  # printed to the cent, twice


def test_assumptions_say_what_they_rest_on() -> None:
    gpu = find_gpu("h100")
    assert [a.source for a in cost_assumptions(gpu, HardwareConfig())][1] == "hardware/prices.yaml"
    assert "1.38 (1.00 to 1.50) times the 700 W" in cost_assumptions(gpu, HardwareConfig())[0].text
    owned = HardwareConfig.model_validate({"owned": {"price_per_kwh": 0.2}})
    assert "1.56" in cost_assumptions(gpu, owned)[1].text
    assert len(cost_assumptions(gpu, HardwareConfig(price_per_hour=2.0))) == 1


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (0, "$0.00"),
        (0.00417, "$0.0042"),
        (0.05, "$0.05"),
        (2.675, "$2.68"),
        (999.99, "$999.99"),
        (1234.5, "$1,235"),
        (1234567, "$1,234,567"),
        (-3.5, "-$3.50"),
    ],
)
def test_dollars(usd: float, text: str) -> None:
    assert format_usd(usd) == text


@pytest.mark.parametrize(
    ("jpy", "text", "japanese"),
    [
        (0, "¥0.0", "0.0円"),
        (0.042, "¥0.042", "0.042円"),
        (3.41, "¥3.4", "3.4円"),
        (1234.5, "¥1,235", "1,235円"),
        (123_400, "¥123,400", "12.3万円"),
        (10_000, "¥10,000", "1万円"),
        (1_234_000, "¥1,234,000", "123万円"),
        (12_345_678, "¥12,345,678", "1,235万円"),
        (123_456_789, "¥123,456,789", "1.23億円"),
    ],
)
def test_yen(jpy: float, text: str, japanese: str) -> None:
    assert format_jpy(jpy) == text
    assert format_jpy_japanese(jpy) == japanese
