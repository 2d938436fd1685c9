"""Plans as a dry run could give them, for tests of the views alone: of the right size, but computed by nobody."""

from __future__ import annotations

from sft_dist.plan.result import (
    Assumption,
    Basis,
    Change,
    CostPlan,
    DataPlan,
    MemoryPlan,
    Offer,
    ParetoPoint,
    Part,
    Phase,
    PhaseName,
    Plan,
    Range,
    TimePlan,
    Verdict,
)

GIB = 2**30
JPY_PER_USD = 150.0


def band(value: float, low: float, high: float) -> Range:
    """A figure with its error, the ends as shares of the value."""
    return Range(value, value * low, value * high)


def phase(name: PhaseName, moment: str, **parts: float) -> Phase:
    """Parts in GiB, in the order of ``Part``."""
    order: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]
    unknown = set(parts) - set(order)
    assert not unknown, unknown
    return Phase(name, {part: int(parts[part] * GIB) for part in order if part in parts}, moment)


def memory(
    phases: tuple[Phase, ...],
    *,
    device_gib: float,
    usable_gib: float,
    verdict: Verdict,
    host: dict[str, float],
    host_available_gib: float | None,
    disk: dict[str, float],
) -> MemoryPlan:
    """Host and disk in GiB; the bands are 3 % of what is allocated, and slack above it."""
    allocated = max(each.allocated_bytes for each in phases)
    total = max(each.total_bytes for each in phases)
    resident = phases[1].parts
    kept = ("weights", "quantization_state", "adapters", "buffers", "optimizer")
    return MemoryPlan(
        phases=phases,
        device_bytes=int(device_gib * GIB),
        usable_bytes=int(usable_gib * GIB),
        allocated=band(allocated, 0.97, 1.03),
        reserved=Range(1.08 * total, total, 1.25 * total),
        verdict=verdict,
        host_parts={name: int(size * GIB) for name, size in host.items()},
        host_available_bytes=None if host_available_gib is None else int(host_available_gib * GIB),
        disk_parts={name: int(size * GIB) for name, size in disk.items()},
        resident_bytes=sum(size for part, size in resident.items() if part in kept),
    )


def time(
    step_parts: dict[str, float],
    data: DataPlan,
    *,
    num_gpus: int,
    hidden_s: float,
    phases: dict[str, float],
    flops_per_token: float,
    peak_flops: float,
    hfu_over_mfu: float,
    basis: Basis,
    source: str,
) -> TimePlan:
    """Training follows from the steps; ``phases`` says what else takes time."""
    step_s = sum(step_parts.values())
    tokens_per_s = data.tokens_per_step / step_s
    mfu = tokens_per_s * flops_per_token / (num_gpus * peak_flops)
    every = {
        "load": phases["load"],
        "prepare": phases["prepare"],
        "train": step_s * data.steps,
        "eval": phases["eval"],
        "save": phases["save"],
    }
    return TimePlan(
        step_parts=step_parts,
        step=band(step_s, 0.91, 1.12),
        hidden_communication_s=hidden_s,
        phases=every,
        total=band(sum(every.values()), 0.91, 1.13),
        tokens_per_s=band(tokens_per_s, 0.89, 1.1),
        tokens_per_s_per_gpu=tokens_per_s / num_gpus,
        mfu=mfu,
        hfu=mfu * hfu_over_mfu,
        flops_per_token=flops_per_token,
        efficiency=mfu * hfu_over_mfu * 1.15,
        basis=basis,
        source=source,
    )


def cost(
    offers: tuple[tuple[str, str, float, str], ...], seconds: Range, data: DataPlan, *, num_gpus: int, kwh: float | None
) -> CostPlan:
    """Offers as (name, kind, USD per GPU and hour, source); the cheapest on demand is chosen."""
    gpu_hours = seconds.scaled(num_gpus / 3600)
    priced = tuple(
        Offer(
            name=name,
            kind=kind,  # type: ignore[arg-type]
            usd_per_gpu_hour=price,
            machines=1,
            gpus_billed=num_gpus,
            usd=gpu_hours.scaled(price),
            jpy=gpu_hours.scaled(price * JPY_PER_USD),
            as_of="2026-08",
            source=source,
        )
        for name, kind, price, source in sorted(offers, key=lambda offer: offer[2])
    )
    chosen = next((offer for offer in priced if offer.kind == "on demand"), None)
    return CostPlan(
        gpu_hours=gpu_hours,
        offers=priced,
        chosen=chosen,
        usd_per_epoch=chosen.usd.value / data.epochs if chosen else None,
        usd_per_million_tokens=chosen.usd.value / (data.tokens.value * data.epochs / 1e6) if chosen else None,
        energy_kwh=kwh,
        jpy_per_usd=JPY_PER_USD,
        fx_as_of="2026-08-21",
    )


ASSUMPTIONS = (
    Assumption("CUDA context and NCCL take 1.6 GiB of each GPU", "median of 269 runs, fms-acceleration benchmarks"),
    Assumption("79.2 GiB of an A100 80 GB can be used", "NVML total in the same logs"),
    Assumption(
        "products reach 57 % of what the GPU can multiply at most", "fms-acceleration, A100, LoRA with fused kernels"
    ),
    Assumption("an A100 multiplies at most 271 of its 312 TFLOP/s", "ml-engineering, mamf-finder, 2026-08"),
    Assumption("NVLink 3: 300 GB/s in one direction, 80 % of it in collectives", "ml-engineering, network, 2026-08"),
    Assumption("the slack of torch's allocator is 8 %, in nine of ten runs less than 25 %", "the same 269 runs"),
    Assumption("a host takes 25 % of the energy of its GPUs", "assumed; DGX A100 data sheet: 6.5 kW of 3.2 kW"),
)

A100_OFFERS = (
    ("RunPod A100 80GB SXM, community", "spot", 0.95, "SkyPilot catalogue v8, runpod"),
    ("AWS p4de.24xlarge us-east-1", "spot", 1.78, "SkyPilot catalogue v9, aws"),
    ("Lambda gpu_8x_a100_80gb_sxm4", "on demand", 2.79, "SkyPilot catalogue v9, lambda"),
    ("AWS p4de.24xlarge us-east-1", "on demand", 3.43, "SkyPilot catalogue v9, aws"),
    ("Azure ND96amsr_A100_v4 eastus", "on demand", 4.10, "SkyPilot catalogue v6, azure"),
    ("Own machine, depreciation and power", "owned", 1.10, "hardware.prices of the configuration"),
)


def lora_70b() -> Plan:
    """Llama-3.1 70B, LoRA of rank 16, FSDP2 on four A100 80 GB: fits."""
    rows, tokens, epochs = 51_760, 41.2e6, 3.0
    steps = 1_215
    data = DataPlan(
        basis="prepared",
        rows=rows,
        tokens=Range(tokens, tokens, tokens),
        supervised_tokens=17.3e6,
        sequences=10_130,
        sum_squared_lengths=5.4e10,
        fill=0.993,
        idle_fraction=0.002,
        steps=steps,
        epochs=epochs,
        micro_batches_per_step=6,
        tokens_per_step=tokens * epochs / steps,
        eval_tokens=412_000,
        evaluations=6,
        cache_bytes=int(0.3 * GIB),
        source="runs/cache, sets/9f3ab2",
    )
    phases = (
        phase("load", "the last tensor on its way", weights=32.9, adapters=0.2, gather_buffers=2.0, context=1.6),
        phase(
            "forward_backward",
            "backward of block 79",
            weights=32.9,
            adapters=0.19,
            buffers=0.05,
            gradients=0.19,
            optimizer=0.38,
            gather_buffers=7.1,
            activations=11.4,
            logits=2.4,
            communication=1.6,
            context=1.6,
        ),
        phase(
            "optimizer_step", "", weights=32.9, adapters=0.19, gradients=0.19, optimizer=0.38, temporaries=0.1, context=1.6
        ),
        phase("eval", "logits of a chunk", weights=32.9, adapters=0.19, gather_buffers=7.1, activations=1.2, logits=1.2,
              context=1.6),
        phase("save", "", weights=32.9, adapters=0.19, optimizer=0.38, context=1.6),
    )  # fmt: skip
    when = time(
        {
            "forward": 23.4,
            "backward": 49.8,
            "recomputation": 21.9,
            "communication, not hidden": 6.2,
            "optimizer": 0.04,
            "waiting and launching": 1.1,
        },
        data,
        num_gpus=4,
        hidden_s=18.3,
        phases={"load": 412, "prepare": 95, "eval": 780, "save": 140},
        flops_per_token=4 * 70.5e9,
        peak_flops=312e12,
        hfu_over_mfu=1.5,
        basis="published",
        source="fms-acceleration, 111 FSDP rows on A100",
    )
    return Plan(
        subject={
            "model": "meta-llama/Llama-3.1-70B-Instruct",
            "method": "LoRA, rank 16, all linear layers",
            "strategy": "fsdp2, activation checkpointing full",
            "GPU": "4 x A100 SXM 80 GB on 1 node, NVLink",
            "batch": "24 sequences of 4,096, micro-batches of 1",
        },
        gpu="A100 SXM 80 GB",
        num_gpus=4,
        choices=(
            "sharding.strategy auto -> fsdp2: states take 132.2 GiB under ddp, 33.5 GiB a rank under fsdp2, of 79.2 GiB",
            "activation_checkpointing.mode auto -> full: without it activations take up to 214.0 GiB",
        ),
        memory=memory(
            phases,
            device_gib=80,
            usable_gib=79.2,
            verdict="fits",
            host={"weights on their way": 2.1, "4 processes": 22.4, "data, mapped": 0.3, "pinned buffers": 1.0},
            host_available_gib=576,
            disk={"base model": 131.4, "prepared data": 0.3, "checkpoints, the last 2": 2.3, "final adapter": 0.77},
        ),
        data=data,
        time=when,
        cost=cost(A100_OFFERS, when.total, data, num_gpus=4, kwh=218.0),
        assumptions=ASSUMPTIONS,
        proposals=(),
        warnings=("RunPod's spot machines can end at any time: state checkpoint.every_steps, or an epoch is lost",),
    )


def qlora_7b() -> Plan:
    """Mistral 7B, QLoRA on one RTX 4090: tight."""
    data = DataPlan(
        basis="sampled",
        rows=15_011,
        tokens=Range(3.1e6, 2.9e6, 3.4e6),
        supervised_tokens=1.2e6,
        sequences=15_011,
        sum_squared_lengths=1.4e9,
        fill=1.0,
        idle_fraction=0.0,
        steps=938,
        epochs=1.0,
        micro_batches_per_step=4,
        tokens_per_step=3_305,
        eval_tokens=0,
        evaluations=0,
        cache_bytes=int(0.02 * GIB),
        source="2,000 of 15,011 rows of data/train.jsonl",
    )
    phases = (
        phase("load", "", weights=3.87, quantization_state=0.11, gather_buffers=0.11, context=0.6),
        phase(
            "forward_backward",
            "logits of the loss",
            weights=3.87,
            quantization_state=0.11,
            adapters=0.16,
            gradients=0.16,
            optimizer=0.31,
            gather_buffers=0.22,
            activations=14.6,
            logits=2.6,
            context=0.6,
        ),
        phase("optimizer_step", "", weights=3.87, quantization_state=0.11, adapters=0.16, gradients=0.16, optimizer=0.31,
              context=0.6),
        phase("save", "", weights=3.87, quantization_state=0.11, adapters=0.16, optimizer=0.31, context=0.6),
    )  # fmt: skip
    when = time(
        {"forward": 0.41, "backward": 0.83, "dequantisation": 0.12, "optimizer": 0.011},
        data,
        num_gpus=1,
        hidden_s=0.0,
        phases={"load": 38, "prepare": 12, "eval": 0, "save": 6.4},
        flops_per_token=4 * 7.11e9,
        peak_flops=165e12,
        hfu_over_mfu=1.0,
        basis="calibrated here",
        source="calibration of 2026-08-20, 6 products and 4 copies",
    )
    return Plan(
        subject={
            "model": "mistralai/Mistral-7B-v0.3",
            "method": "QLoRA, NF4, rank 16",
            "strategy": "ddp, no activation checkpointing",
            "GPU": "1 x RTX 4090 24 GB",
            "batch": "16 rows, micro-batches of 4",
        },
        gpu="RTX 4090 24 GB",
        num_gpus=1,
        choices=(),
        memory=memory(
            phases,
            device_gib=24,
            usable_gib=23.5,
            verdict="tight",
            host={"1 process": 5.6, "weights on their way": 0.9},
            host_available_gib=None,
            disk={"base model": 13.5, "prepared data": 0.02, "checkpoints, the last 2": 1.9, "final adapter": 0.16},
        ),
        data=data,
        time=when,
        cost=cost(
            (("RunPod RTX 4090, community", "on demand", 0.34, "SkyPilot catalogue v8, runpod"),),
            when.total,
            data,
            num_gpus=1,
            kwh=0.7,
        ),
        assumptions=ASSUMPTIONS[:1],
        proposals=(
            Change(("train.micro_batch_size=2",), "peak 14.2 instead of 22.0 GiB, 4 % slower", True),
        ),
        warnings=(),
    )  # fmt: skip


def full_8b_too_large() -> Plan:
    """Llama-3 8B, all weights, on two GPUs of 48 GB: does not fit, on the device and on the host."""
    sample = qlora_7b()
    phases = (
        phase("load", "", weights=15.0, gather_buffers=3.9, context=1.4),
        phase(
            "forward_backward",
            "backward of block 31",
            weights=15.0,
            buffers=0.01,
            gradients=7.5,
            optimizer=29.9,
            gather_buffers=6.2,
            activations=4.3,
            logits=1.1,
            communication=0.9,
            context=1.4,
        ),
        phase("optimizer_step", "", weights=15.0, gradients=15.0, optimizer=29.9, temporaries=2.0, context=1.4),
        phase("save", "", weights=15.0, optimizer=29.9, context=1.4),
    )
    when = time(
        {"forward": 1.9, "backward": 3.9, "communication, not hidden": 4.4, "optimizer": 0.21},
        sample.data,
        num_gpus=2,
        hidden_s=1.2,
        phases={"load": 55, "prepare": 12, "eval": 0, "save": 240},
        flops_per_token=6 * 7.5e9,
        peak_flops=155e12,
        hfu_over_mfu=1.0,
        basis="assumed",
        source="no measurement of this GPU: the efficiency of the RTX 4090",
    )
    return Plan(
        subject={
            "model": "meta-llama/Meta-Llama-3-8B",
            "method": "full",
            "strategy": "fsdp2, activation checkpointing full",
            "GPU": "2 x RTX A6000 48 GB, PCIe",
            "batch": "16 rows, micro-batches of 1",
        },
        gpu="RTX A6000 48 GB",
        num_gpus=2,
        choices=("activation_checkpointing.mode auto -> full: without it activations take up to 31.0 GiB",),
        memory=memory(
            phases,
            device_gib=48,
            usable_gib=47.4,
            verdict="does not fit",
            host={"2 processes": 11.2, "weights on their way": 1.1, "state gathered for a checkpoint": 89.8},
            host_available_gib=64,
            disk={"base model": 15.0, "prepared data": 0.02, "checkpoints, the last 2": 179.6, "final model": 15.0},
        ),
        data=sample.data,
        time=when,
        cost=cost(
            (("RunPod RTX A6000, secure", "on demand", 0.49, "SkyPilot catalogue v8, runpod"),),
            when.total,
            sample.data,
            num_gpus=2,
            kwh=None,
        ),
        assumptions=ASSUMPTIONS[:4],
        proposals=(
            Change(("optim.type=adamw", "precision.optimizer_state=8bit"), "optimizer 7.6 instead of 29.9 GiB", True),
            Change(("--gpus 4",), "33.1 GiB a GPU instead of 66.3", True),
            Change(
                ("method.type=lora", "method.rank=16", 'method.target_modules=["q_proj", "v_proj", "o_proj"]'),
                "trains 0.3 % of the weights; peak 24.0 GiB",
                True,
            ),
            Change(("train.micro_batch_size=1",), "saves nothing: micro-batches are of one row already", False),
        ),
        warnings=(
            "saving needs 102.1 GiB of host memory on a node that has 64.0: the kernel would end the run",
            "no measurement of the RTX A6000 is known: times may be wrong by half",
        ),
    )


def without_prices() -> Plan:
    """A GPU that nobody sells by the hour, data that is only stated, and nothing that is special."""
    tokens = Range(9.0e8, 9.0e8, 9.0e8)
    data = DataPlan(
        basis="assumed",
        rows=600_000,
        tokens=tokens,
        supervised_tokens=4.0e8,
        sequences=111_000,
        sum_squared_lengths=9.1e11,
        fill=0.98,
        idle_fraction=0.08,
        steps=13_875,
        epochs=2.0,
        micro_batches_per_step=2,
        tokens_per_step=129_730,
        eval_tokens=1_000_000,
        evaluations=20,
        cache_bytes=int(6.7 * GIB),
        source="plan.data of the configuration",
    )
    when = time(
        {"forward": 7.2, "backward": 14.6, "communication, not hidden": 0.9, "optimizer": 0.07},
        data,
        num_gpus=8,
        hidden_s=4.0,
        phases={"load": 30, "prepare": 900, "eval": 2_400, "save": 300},
        flops_per_token=6 * 7.11e9,
        peak_flops=120e12,
        hfu_over_mfu=1.33,
        basis="assumed",
        source="stated in hardware of the configuration",
    )
    return Plan(
        subject={"model": "./models/内部-7b", "method": "full", "strategy": "zero3", "GPU": "8 x Prototype 64 GB"},
        gpu="Prototype 64 GB",
        num_gpus=8,
        choices=(),
        memory=memory(
            (
                phase("load", "", weights=1.66, gather_buffers=0.98, context=1.9),
                phase(
                    "forward_backward",
                    "backward of block 31",
                    weights=1.66,
                    gradients=3.3,
                    optimizer=9.9,
                    gather_buffers=3.2,
                    activations=9.8,
                    logits=1.9,
                    communication=1.9,
                    context=1.9,
                ),
                phase("optimizer_step", "", weights=1.66, gradients=3.3, optimizer=9.9, temporaries=6.6, context=1.9),
                phase("eval", "", weights=1.66, optimizer=9.9, gather_buffers=3.2, activations=1.9, context=1.9),
                phase("save", "", weights=1.66, optimizer=9.9, context=1.9),
            ),
            device_gib=64,
            usable_gib=63.2,
            verdict="fits",
            host={"8 processes": 44.8},
            host_available_gib=1_024,
            disk={"base model": 13.5},
        ),
        data=data,
        time=when,
        cost=cost((), when.total, data, num_gpus=8, kwh=None),
        assumptions=(),
        proposals=(),
        warnings=(),
    )


def every_sample() -> dict[str, Plan]:
    return {
        "lora-70b": lora_70b(),
        "qlora-7b": qlora_7b(),
        "too-large": full_8b_too_large(),
        "no-prices": without_prices(),
    }


def search_points() -> tuple[ParetoPoint, ...]:
    """Configurations on four kinds of GPU, with their front; two that do not fit."""
    kinds = (("RTX 4090", 0.34, 110.0), ("L40S", 0.86, 72.0), ("A100 80GB", 2.79, 38.0), ("H100 SXM", 2.99, 16.5))
    found = []
    for gpu, price, hours_of_one in kinds:
        for num_gpus in (1, 2, 4, 8):
            for strategy, slower in (("ddp", 1.0), ("fsdp2", 1.06), ("zero3", 1.13)):
                hours = hours_of_one * slower / num_gpus * (1 + 0.04 * (num_gpus - 1))
                fits = not (strategy == "ddp" and gpu in ("RTX 4090", "L40S"))
                found.append(
                    (f"{num_gpus} x {gpu}, {strategy}", gpu, num_gpus, hours, hours * num_gpus * price, fits, strategy)
                )
    points = []
    for label, gpu, num_gpus, hours, usd, fits, strategy in found:
        beaten = any(o[5] and o[3] <= hours and o[4] <= usd and (o[3], o[4]) != (hours, usd) for o in found)
        overrides = (f"--gpus {num_gpus}", f"sharding.strategy={strategy}")
        points.append(ParetoPoint(label, gpu, num_gpus, usd, hours, fits, fits and not beaten, overrides))
    return tuple(points)
