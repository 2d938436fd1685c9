"""What usual runs take and cost, as the dry run plans them: does it fit, how many hours, how much money.

    python benchmarks/plan_table.py [--tokens-per-example 400] [--verbose]

Needs no GPU, no weights and no network. Each run is a shipped recipe with the changes named here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sft_dist.config.load import load_config  # noqa: E402
from sft_dist.errors import SftError  # noqa: E402
from sft_dist.model.known import known_models_allowed  # noqa: E402
from sft_dist.plan.assumed import AssumedData, assumed_plan  # noqa: E402
from sft_dist.plan.dry_run import DryRun, dry_run, plan_run  # noqa: E402
from sft_dist.plan.machines import machines_of  # noqa: E402
from sft_dist.plan.money import format_jpy, format_usd  # noqa: E402
from sft_dist.plan.result import Plan  # noqa: E402
from sft_dist.plan.terminal import STYLES  # noqa: E402
from sft_dist.plan.units import HOUR_S, gib  # noqa: E402
from sft_dist.runtime.quiet import quiet_libraries  # noqa: E402

EXAMPLES = (10_000, 100_000, 1_000_000)

A100, H100 = "hardware.gpu=a100-80gb", "hardware.gpu=h100-80gb"


@dataclass(frozen=True)
class Row:
    """
    Args:
        recipe: of ``configs/recipes``; changes: of it.
    """

    said: str
    recipe: str
    changes: tuple[str, ...] = ()


ONE_70B = (A100, "hardware.gpus_per_node=1", "sharding.strategy=ddp")
ROWS = (
    Row("7B LoRA, 1 x A100-80", "qwen2.5_7b_lora_1xa100_80", (A100,)),
    Row("7B QLoRA, 1 x A100-80", "7b_qlora_1xa100_40", (A100,)),
    Row("8B QLoRA, 1 x A100-80", "swallow_8b_qlora_1xa100_40", (A100,)),
    Row("13B LoRA, 1 x A100-80", "llmjp3_13b_lora_1xa100_80", (A100,)),
    Row("13B QLoRA, 1 x A100-80", "13b_qlora_1xa100", (A100,)),
    Row("70B LoRA, 2 x A100-80", "70b_lora_4xa100", (A100, "hardware.gpus_per_node=2")),
    Row("70B LoRA, 4 x A100-80", "70b_lora_4xa100", (A100,)),
    Row("70B QLoRA, 1 x A100-80", "70b_qlora_2xa100", ONE_70B),
    Row("70B QLoRA, 2 x A100-80", "70b_qlora_2xa100", (A100,)),
    Row("70B full, 8 x H100, all in bf16", "70b_full_8xh100_offload",
        (H100, "sharding.cpu_offload=false", "precision.master=bf16", "precision.reduce=bf16",
         "train.micro_batch_size=1", "activation_checkpointing.offload=true")),
    Row("70B full, 8 x H100, 8-bit states", "70b_full_8xh100_offload",
        (H100, "sharding.cpu_offload=false", "precision.optimizer_state=8bit", "train.micro_batch_size=1")),
    Row("70B full, 8 x H100, offload", "70b_full_8xh100_offload", (H100,)),
    Row("70B full, 2 x 8 x H100, fp32", "70b_full_2x8xh100", (H100, "precision.optimizer_state=null")),
    Row("70B full, 2 x 8 x H100, 8-bit", "70b_full_2x8xh100", (H100,)),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-example", type=float, default=400, metavar="T")
    parser.add_argument("--verbose", action="store_true", help="with the commands behind the rows")
    given = parser.parse_args(arguments)
    quiet_libraries()
    console = Console(width=max(Console().width, 118))
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("")
    table.add_column("")
    for name in ("GPU memory", "host", *(f"{number // 1000:,}k examples" for number in EXAMPLES)):
        table.add_column(name, justify="right")
    planned = []
    for row in ROWS:
        try:
            plans = plans_of(row, tokens=given.tokens_per_example)
        except SftError as error:
            sys.exit(f"{row.said}: {error}")
        planned.append(plans[0])
        table.add_row(*_cells(row, plans))
    console.print(table)
    for line in _assumptions(planned, given.tokens_per_example):
        console.print(line, style="dim", highlight=False)
    if given.verbose:
        for row in ROWS:
            console.print(f"{row.said}: sft-dist plan configs/recipes/{row.recipe}.yaml {' '.join(row.changes)}",
                          highlight=False, soft_wrap=True)  # fmt: skip


def plans_of(row: Row, *, tokens: float) -> list[Plan]:
    """A plan for each number of examples, one epoch of them."""
    config = load_config(ROOT / "configs" / "recipes" / f"{row.recipe}.yaml", ["train.num_epochs=1", *row.changes])
    machines = machines_of(config.hardware)
    first = dry_run(config, machines, assumed=AssumedData(EXAMPLES[0], tokens))
    return [first.plan, *(_with_examples(first, number, tokens) for number in EXAMPLES[1:])]


def _with_examples(first: DryRun, number: int, tokens: float) -> Plan:
    data = assumed_plan(first.run, AssumedData(number, tokens))
    with known_models_allowed():
        return plan_run(first.config, first.run, machines_of(first.config.hardware), data)


def _cells(row: Row, plans: list[Plan]) -> list[str | Text]:
    memory = plans[0].memory
    share = f"{gib(memory.peak.total_bytes).removesuffix(' GiB')} of {gib(memory.usable_bytes)}"
    host = gib(sum(memory.host_parts.values()))
    cells = [_bill(plan) if memory.verdict != "does not fit" else Text("-") for plan in plans]
    return [row.said, Text(memory.verdict, STYLES[memory.verdict]), share, host, *cells]


def _bill(plan: Plan) -> Text:
    hours = plan.time.total.value / HOUR_S
    if plan.cost.chosen is None:
        return Text(f"{hours:,.1f} h")
    chosen = plan.cost.chosen
    return Text(f"{hours:,.1f} h\n{format_usd(chosen.usd.value)}\n{format_jpy(chosen.jpy.value)}")


def _assumptions(plans: list[Plan], tokens: float) -> list[str]:
    cost = plans[0].cost
    offers = {plan.gpu: plan.cost.chosen for plan in plans if plan.cost.chosen is not None}
    prices = "; ".join(
        f"{gpu} ${offer.usd_per_gpu_hour:.2f} a GPU-hour ({offer.name.partition(' (')[0]}, {offer.as_of})"
        for gpu, offer in offers.items()
    )
    return [
        f"Assumed: one epoch of examples of {tokens:g} tokens, packed; log-normal lengths. Recipes: configs/recipes.",
        "GPU memory is the peak with CUDA's context, of what can be used; host memory is of a node, saving included.",
        f"Prices: the cheapest that anybody may rent by the hour: {prices}.",
        f"¥{cost.jpy_per_usd:,.2f} a dollar ({cost.fx_as_of}). Hours are of the whole run, with loading and saving.",
    ]


if __name__ == "__main__":
    main()
