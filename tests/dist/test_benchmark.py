"""What ``sft-dist calibrate`` measures, on CPU processes: the code is that of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from sft_dist.hardware.gpus import find_gpu
from sft_dist.plan.calibrate import Effort, compared, measure
from sft_dist.plan.measured_rates import MeasuredRates
from tests.helpers import cells
from tests.helpers.pool import WorldPool

H100 = find_gpu("h100")

SMALL = Effort(shapes=((64, 64, 64), (96, 128, 64)), copy_bytes=2**20, ring_bytes=2**18, repeats=3)


def rates_of_this_process() -> MeasuredRates:
    return measure(H100, cells.CPU, num_gpus=dist.get_world_size(), effort=SMALL)


def test_all_is_measured_on_several_processes(world: Callable[[int], WorldPool]) -> None:
    for rates in world(2).run(rates_of_this_process):
        assert set(rates.product_flops_per_s) == set(H100.flops)
        assert set(rates.link_bytes_per_s) == {2}
        figures = [*rates.product_flops_per_s.values(), rates.memory_bytes_per_s, *rates.link_bytes_per_s.values()]
        # Of a CPU: between a megabyte and a terabyte a second, between a MFLOP/s and 100 TFLOP/s.
        assert all(1e6 < figure < 1e14 for figure in figures), figures
    table = compared(H100, rates, num_gpus=2)
    assert [str(cell) for cell in table.columns[0].cells][-2:] == ["memory, copied", "link among 2"]
