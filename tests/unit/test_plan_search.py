"""A search plans as a plan does: its points are plans of their own, its front is a front, its answers can be pasted."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console

from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, PlanError
from sft_dist.plan.assumed import AssumedData
from sft_dist.plan.candidates import Space, parse_methods, variants
from sft_dist.plan.command import wishes
from sft_dist.plan.dry_run import DryRun, dry_run
from sft_dist.plan.front import Budget, check_wishes, front_of, parse_budget, parse_deadline, picks_of
from sft_dist.plan.machines import machines_of
from sft_dist.plan.result import ParetoPoint, Search
from sft_dist.plan.search import HOST_TOO_SMALL, NO_DTYPE, SMALLER_FAILS, search
from sft_dist.plan.terminal_search import render_search
from sft_dist.plan.to_json import load_plan, plan_json
from sft_dist.plan.units import gib

DATA = AssumedData(rows=2000, tokens_per_row=300)

# Wide and with few layers: quick to record, and large enough that not everything fits everywhere.
MODEL = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 7, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    settings: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "method": {"type": "full"},
        "data": {
            "train": [{"path": "not-here.jsonl"}],
            "max_seq_len": 4096,
            "packing": "best_fit",
            "over_length": "truncate",
        },
        "sharding": {"strategy": "fsdp2", "reshard_after_forward": False},
        "train": {"global_batch_size": 4, "num_epochs": 1},
        "optim": {"lr": 1e-5},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def planned(file: Path, *overrides: str) -> DryRun:
    config = load_config(file, overrides)
    return dry_run(config, machines_of(config.hardware), assumed=DATA)


@pytest.fixture(scope="module")
def base(file: Path) -> DryRun:
    return planned(file, "hardware.gpu=H100-SXM")


@pytest.fixture(scope="module")
def found(file: Path, base: DryRun) -> Search:
    """On two kinds of GPU, through prices that name no others."""
    return search(load_config(file, ["hardware.gpu=A100-SXM-40GB"]), base.plan.data, Space(max_gpus=4))


def numbers(point: ParetoPoint) -> tuple[float, ...]:
    return point.usd, point.hours, point.peak_bytes, point.usable_bytes, point.jpy, point.host_bytes


def of_plan(made: DryRun) -> tuple[float, ...]:
    plan = made.plan
    assert plan.cost.chosen is not None
    memory = plan.memory
    return (
        plan.cost.chosen.usd.value, plan.time.total.value / 3600, memory.peak.total_bytes, memory.usable_bytes,
        plan.cost.chosen.jpy.value, sum(memory.host_parts.values()),
    )  # fmt: skip


def test_every_point_is_a_plan_of_its_own(file: Path, found: Search) -> None:
    assert len(found.points) >= 8
    for point in found.points:
        alone = planned(file, "hardware.gpu=A100-SXM-40GB", *point.overrides)
        assert numbers(point) == of_plan(alone), point.label
        assert (point.verdict, point.num_gpus) == (alone.plan.memory.verdict, alone.plan.num_gpus)


def test_it_finds_what_trying_everything_finds(file: Path, found: Search) -> None:
    """Every variant with every size, each as a plan of its own, on as many GPUs."""
    config = load_config(file, ["hardware.gpu=A100-SXM-40GB"])
    fitting = []
    for count in (1, 2):
        for variant in variants(config, nodes=1, gpus_per_node=count, methods=None):
            for size in (1, 2, 4):
                if size * count > 4:
                    continue
                said = (*variant.overrides, f"train.micro_batch_size={size}", f"hardware.gpus_per_node={count}")
                try:
                    made = planned(file, "hardware.gpu=A100-SXM-40GB", *said)
                except ConfigError:
                    continue
                if made.plan.memory.verdict != "does not fit":
                    fitting.append(of_plan(made)[:2])
    small = search(config, planned(file, "hardware.gpu=A100-SXM-40GB").plan.data, Space(max_gpus=2))
    assert small.fitting == len(fitting)
    assert small.looked_at == small.fitting + sum(refused.number for refused in small.refused)
    assert (small.front[0].usd, small.front[-1].hours) == (min(fitting)[0], min(hours for _, hours in fitting))


def test_the_front_is_a_front(found: Search) -> None:
    assert found.front
    for one, other in itertools.pairwise(found.front):
        assert one.usd < other.usd
        assert one.hours > other.hours
    for point in found.points:
        assert point.on_front == (point in found.front)
        assert any(best.usd <= point.usd and best.hours <= point.hours for best in found.front)


def test_what_does_not_fit_is_counted_by_reason(file: Path) -> None:
    config = load_config(file, ["hardware.gpu=RTX3090", "hardware.price_per_hour=0.3", "train.global_batch_size=16"])
    data = planned(file, "hardware.gpu=H100-SXM", "train.global_batch_size=16").plan.data
    few = search(config, data, Space(max_gpus=2))
    reasons = {refused.reason: refused.number for refused in few.refused}
    assert any(reason.startswith("does not fit by") for reason in reasons)
    assert SMALLER_FAILS in reasons
    assert few.looked_at == few.fitting + sum(reasons.values())


def test_what_needs_more_host_memory_than_there_is_is_refused(file: Path, base: DryRun) -> None:
    config = load_config(file, ["hardware.gpu=H100-SXM", "hardware.host_memory_gib=4", "train.global_batch_size=1"])
    few = search(config, base.plan.data, Space(max_gpus=1))
    assert few.fitting == 0
    assert HOST_TOO_SMALL in {refused.reason for refused in few.refused}


def test_a_gpu_without_the_dtype_is_not_searched(file: Path, base: DryRun) -> None:
    config = load_config(file, ["hardware.gpu=V100-SXM-16GB", "train.global_batch_size=1"])
    few = search(config, base.plan.data, Space(max_gpus=1))
    assert [refused.reason for refused in few.refused] == [NO_DTYPE]
    assert few.looked_at == few.refused[0].number > 0


def test_methods_are_searched_where_they_are_asked_for(file: Path) -> None:
    config = load_config(file, ["hardware.gpu=H100-SXM", "train.global_batch_size=1"])
    data = planned(file, "hardware.gpu=H100-SXM", "train.global_batch_size=1").plan.data
    both = search(config, data, Space(methods=("full", "qlora"), max_gpus=1))
    said = {override for point in both.points for override in point.overrides if override.startswith("method")}
    assert said == {"method.type=qlora"}
    assert "qlora" in both.front[0].label


def test_a_search_is_shown_and_written(found: Search, base: DryRun) -> None:
    from dataclasses import replace

    picked = replace(found, picks=picks_of(found.front, budget=Budget(1e6, "USD"), deadline_s=1e6))
    for columns in (80, 120):
        console = Console(width=columns, file=io.StringIO())
        render_search(picked, console)
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert max(cell_len(line) for line in text.splitlines()) <= columns
        for question in (
            "Cheapest that fits",
            "Fastest that fits",
            "Fastest for at most $1,000,000",
            "Cheapest within",
        ):
            assert question in text
        assert f"{found.looked_at:,} configurations" in text
    plan = replace(base.plan, search=picked)
    assert load_plan(json.loads(json.dumps(plan_json(plan)))) == plan


# Money and time


def point(usd: float, hours: float, *, fits: bool = True) -> ParetoPoint:
    return ParetoPoint("p", "H100-SXM", 8, usd, hours, fits, False, ("a=1",), jpy=150 * usd)


POINTS = [point(10, 5), point(20, 2), point(15, 6), point(40, 1), point(1, 0.1, fits=False), point(10, 7), point(40, 1)]


def test_front_and_picks_by_hand() -> None:
    front = front_of(POINTS)
    assert [(p.usd, p.hours) for p in front] == [(10, 5), (20, 2), (40, 1)]
    picks = picks_of(front, budget=Budget(25, "USD"), deadline_s=3 * 3600)
    assert [(pick.point.usd, pick.point.hours) for pick in picks] == [(10, 5), (40, 1), (20, 2), (20, 2)]
    assert picks_of(front, budget=Budget(1500, "JPY"))[-1].point.usd == 10


def test_wishes_that_nothing_meets_name_the_nearest() -> None:
    front = front_of(POINTS)
    check_wishes(front, budget=Budget(10, "USD"), deadline_s=3600)
    with pytest.raises(PlanError, match=r"at most \$9.00: the cheapest costs \$10.00 and takes 5 h"):
        check_wishes(front, budget=Budget(9, "USD"))
    check_wishes(front, budget=Budget(1500, "JPY"))
    with pytest.raises(PlanError, match="at most ¥1,499: the cheapest costs ¥1,500"):
        check_wishes(front, budget=Budget(1499, "JPY"))
    with pytest.raises(PlanError, match="at most 30 min: the fastest takes 1 h 0 min and costs") as error:
        check_wishes(front, deadline_s=1800)
    assert "a=1" in error.value.fix
    with pytest.raises(PlanError, match="nothing that was searched fits"):
        check_wishes([])


@pytest.mark.parametrize(
    ("text", "amount", "currency"),
    [("50", 50, "USD"), ("$50", 50, "USD"), ("50.5 USD", 50.5, "USD"), ("1.5k", 1500, "USD"), ("¥8000", 8000, "JPY"),
     ("8_000 jpy", 8000, "JPY"), ("8,000円", 8000, "JPY")],
)  # fmt: skip
def test_budgets(text: str, amount: float, currency: str) -> None:
    assert parse_budget(text) == Budget(amount, currency)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "fifty", "-5", "0", "$5 jpy", "¥5 usd", "5 EUR", "5 5"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6h", 21600), ("90m", 5400), ("1h30m", 5400), ("2 days", 172800), ("1.5 hours", 5400), ("45 min", 2700)],
)
def test_deadlines(text: str, seconds: float) -> None:
    assert parse_deadline(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "soon", "0h", "-1h", "6x", "h"])
def test_what_is_no_deadline(text: str) -> None:
    with pytest.raises(ConfigError, match="--deadline"):
        parse_deadline(text)


def test_layouts_and_methods() -> None:
    assert Space(max_gpus=16).layouts() == [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8)]
    assert Space(max_gpus=4).layouts() == [(1, 1), (1, 2), (1, 4)]
    assert Space(max_gpus=64, nodes=4).layouts() == [(4, 8)]
    assert Space(max_gpus=16, gpus_per_node=4).layouts() == [(1, 4), (2, 4), (4, 4)]
    assert parse_methods("all") == ("full", "lora", "qlora")
    with pytest.raises(ConfigError, match="'qlroa' is not searched"):
        parse_methods("lora,qlroa")
    with pytest.raises(ConfigError, match="--max-gpus 4 leaves none"):
        wishes(methods=None, budget=None, deadline=None, max_gpus=4, gpus=8, nodes=None)


# Proposals


def test_proposals_fit_when_they_are_pasted(file: Path) -> None:
    said = (
        "hardware.gpu=A100-SXM-40GB",
        "sharding={strategy: ddp}",
        "activation_checkpointing.mode=none",
        "train.micro_batch_size=4",
    )
    made = planned(file, *said)
    assert made.plan.memory.verdict == "does not fit"
    assert len(made.plan.proposals) >= 3
    for change in made.plan.proposals:
        alone = planned(file, *said, *change.overrides).plan
        assert alone.memory.verdict != "does not fit", change
        assert f": {gib(alone.memory.peak.total_bytes)} of " in change.reason


def test_nothing_is_proposed_that_needs_more_host_memory_than_there_is(file: Path) -> None:
    said = (
        "hardware.gpu=RTX3090",
        "hardware.price_per_hour=0.3",
        "sharding={strategy: ddp}",
        "train.global_batch_size=1",
        "data.max_seq_len=1024",
    )

    def on_host(*more: str) -> list[bool]:
        proposed = planned(file, *said, *more).plan.proposals
        return [any("cpu_offload" in override for override in change.overrides) for change in proposed]

    assert any(on_host())
    assert not any(on_host("hardware.host_memory_gib=24"))


def test_where_auto_finds_nothing_the_nearest_is_shown_with_proposals(file: Path) -> None:
    said = ("hardware.gpu=RTX3090", "sharding={strategy: auto}", "train.micro_batch_size=auto")
    made = planned(file, *said)
    assert (made.config.sharding.strategy, made.config.activation_checkpointing.mode) == ("fsdp2", "full")
    assert made.plan.memory.verdict == "does not fit"
    assert "but nothing fits" in made.plan.choices[0]
    assert made.plan.proposals
    first = planned(file, *said, *made.plan.proposals[0].overrides)
    assert first.plan.memory.verdict != "does not fit"


def test_what_fits_has_no_proposals(base: DryRun) -> None:
    assert base.plan.memory.verdict == "fits"
    assert base.plan.proposals == ()


# Speed


@pytest.mark.ci
def test_two_thousand_candidates_take_seconds(file: Path, base: DryRun) -> None:
    config: Config = load_config(file)
    found = search(config, base.plan.data, Space())
    assert found.looked_at >= 2000
    assert found.seconds < 60, f"{found.seconds:.1f} s"  # the tapes are recorded in it
