"""``auto`` by a stated rule, with the numbers of real models: a config.json is all that is read of them."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sft_dist.config.schema import Config, Fsdp2Sharding, Zero1Sharding, Zero2Sharding, Zero3Sharding
from sft_dist.errors import ConfigError, PlanError
from sft_dist.plan.accelerate import check_accelerate
from sft_dist.plan.activations import trace
from sft_dist.plan.choose import Choice, choose
from sft_dist.plan.fit import needed_bytes, peak_of, phases_of
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.memory import timeline
from sft_dist.plan.result import Part
from sft_dist.plan.states import state_bytes
from sft_dist.plan.units import gib
from sft_dist.plan.words import PARTS
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import AccelerateChoice
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.refusal import Refusal
from tests.helpers.cells import config

ROOT = Path(__file__).parents[2]
GIB = 2**30
H100 = int(79.1 * GIB)

LLAMA = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "4 layers": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
BLOCK = 218_112_000  # parameters of a layer of 8b
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, sizes in LLAMA.items():
        folders[name] = tmp_path_factory.mktemp(name)
        settings = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
        (folders[name] / "config.json").write_text(json.dumps(settings | sizes))
    return folders


def auto(path: Path, method: str | dict[str, Any] = "full", **sections: Any) -> Config:
    """bf16 compute with fp32 masters, 4096 tokens in a micro-batch, everything auto that can be."""
    base: dict[str, Any] = {
        "sharding": {"strategy": "auto"}, "activation_checkpointing": {"mode": "auto"}, "precision": {"compute": "bf16"},
        "data": {"train": [{"path": "unused"}], "max_seq_len": 4096}, "train": {"micro_batch_size": 1},
    }  # fmt: skip
    return config(str(path), method, **(base | sections))


def chosen(cfg: Config, ranks: int, memory_bytes: int = H100, accelerate: AccelerateChoice | None = None) -> Choice:
    return choose(cfg, WorldShape(1, ranks), memory_bytes=memory_bytes, accelerate=accelerate)


# Where only the strategy is of interest.
FULL = {"activation_checkpointing": {"mode": "full"}}


def decided(choice: Choice) -> tuple[str, str]:
    return choice.config.sharding.strategy, choice.config.activation_checkpointing.mode


# The counts behind the rule


def run_of(path: Path, method: str | dict[str, Any], strategy: str, ranks: int, **sections: Any) -> Run:
    concrete = {"sharding": {"strategy": strategy}, "activation_checkpointing": {"mode": "full"}}
    cfg = auto(path, method, **(concrete | sections))
    return resolve(cfg, WorldShape(1, ranks))


def test_states_by_hand(llama: dict[str, Path]) -> None:
    """Full fine-tuning: 4 bytes of master, 4 of gradient and 8 of AdamW for each parameter; divided by fsdp2."""
    ddp = run_of(llama["8b"], "full", "ddp", 8)
    whole = state_bytes(ddp)
    assert whole.parameters == 4 * PARAMETERS["8b"] + ddp.model.buffer_bytes
    assert (whole.gradients, whole.optimizer) == (4 * PARAMETERS["8b"], 8 * PARAMETERS["8b"])
    sharded = state_bytes(run_of(llama["8b"], "full", "fsdp2", 8))
    assert sharded.total == pytest.approx(whole.total / 8, rel=1e-3)
    bf16 = state_bytes(run_of(llama["8b"], "full", "ddp", 8, precision={"compute": "bf16", "master": "bf16"}))
    assert bf16.total - ddp.model.buffer_bytes == 8 * PARAMETERS["8b"]
    sgd = state_bytes(run_of(llama["8b"], "full", "ddp", 8, optim={"type": "sgd"}))
    assert sgd.optimizer == 0
    momentum = state_bytes(run_of(llama["8b"], "full", "ddp", 8, optim={"type": "sgd", "momentum": 0.9}))
    assert momentum.optimizer == 4 * PARAMETERS["8b"]


def test_states_of_zero_by_hand(llama: dict[str, Path]) -> None:
    """bf16 parameters, fp32 masters, states and gradients; what is on the host takes nothing here."""
    whole = 2 * PARAMETERS["8b"]
    for strategy, parameters, gradients in (("zero1", 1, 1), ("zero2", 1, 8), ("zero3", 8, 8)):
        got = state_bytes(run_of(llama["8b"], "full", strategy, 8))
        assert got.parameters == pytest.approx(whole / parameters, rel=1e-3)
        assert got.gradients == pytest.approx(2 * whole / gradients, rel=1e-3)
        assert got.optimizer == pytest.approx(6 * whole / 8, rel=1e-3)
    sharding = {"strategy": "zero3", "deepspeed_config": str(ROOT / "configs/deepspeed/zero3_offload.json")}
    cfg = auto(llama["8b"], sharding=sharding, activation_checkpointing={"mode": "full"})
    run = resolve(cfg, WorldShape(1, 8))
    assert state_bytes(run).total == run.model.buffer_bytes


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_rank_0_holds_no_less_than_any_other(tiny_base: Path, strategy: str, method: str) -> None:
    run = run_of(tiny_base, method, strategy, 3)
    specs = [registry.describe(run, rank) for rank in range(3)]
    assert specs[0].parameter_bytes == max(s.parameter_bytes for s in specs)
    assert specs[0].optimizer_numel == max(s.optimizer_numel for s in specs)


def kept_by_layers(path: Path, method: str | dict[str, Any], strategy: str = "fsdp2") -> list[int]:
    """Bytes that each kind of layer keeps from forward to backward, 4096 tokens, nothing recomputed: first, others."""
    run = run_of(path, method, strategy, 1, activation_checkpointing={"mode": "none"})
    first, other, last, _ = trace(run).saved_bytes
    assert other == last
    return [first, other]


def test_what_a_layer_keeps_by_hand(llama: dict[str, Path]) -> None:
    """Llama-3 8B for 4096 tokens in bf16; h 4096 numbers a token, 1024 of keys, 14336 in the MLP, 32 heads."""
    first, other = kept_by_layers(llama["4 layers"], "full")
    norms = 2 * (2 * 4096 + 4)  # input, the root mean square
    products = 2 * 2 * 4096  # what attention and MLP multiply
    attention = 2 * (2 * 4096 + 2 * 1024) + 4 * 32  # query, output, key, value; a number a head for the softmax
    mlp = 2 * 3 * 14336  # gate, up, the product of up and the gate's activation
    assert other == 4096 * (norms + products + attention + mlp)
    assert first - other == 4096 * 2 * 2 * 128, "cosines and sines, which all layers share"


def test_ddp_keeps_casts_of_what_it_trains(llama: dict[str, Path]) -> None:
    """In bf16, of every weight of a layer; nothing is cast where master is compute."""
    ddp, fsdp2 = (kept_by_layers(llama["4 layers"], "full", strategy) for strategy in ("ddp", "fsdp2"))
    assert ddp == [kept + 2 * BLOCK for kept in fsdp2]
    bf16 = {"precision": {"compute": "bf16", "master": "bf16"}, "activation_checkpointing": {"mode": "none"}}
    assert list(trace(run_of(llama["4 layers"], "full", "ddp", 1, **bf16)).saved_bytes[:2]) == fsdp2


def test_the_base_of_qlora_has_the_activations_of_lora(llama: dict[str, Path]) -> None:
    """Packed or not: those of full fine-tuning, whose inputs the adapters need, and 4 numbers a token and adapter; but
    nobody asks for the gradient of the first layer's input, which its norm need not keep."""
    lora, qlora, full = (kept_by_layers(llama["4 layers"], method) for method in ("lora", "qlora", "full"))
    adapters = 4096 * 7 * 2 * 4
    assert lora == qlora
    assert lora[1] == full[1] + adapters
    assert lora[0] == full[0] + adapters - 4096 * (2 * 4096 + 4)


def test_dropout_keeps_a_mask_for_each_input_of_an_adapter(llama: dict[str, Path]) -> None:
    plain, dropped = (kept_by_layers(llama["4 layers"], {"type": "lora", "dropout": p}) for p in (0.0, 0.1))
    mask = 4096 * (6 * 4096 + 14336)  # one byte; q, k, v, o, gate and up, and down
    assert dropped == [kept + mask for kept in plain]


def highest(run: Run, *parts: Part) -> int:
    """Bytes of the parts together at the highest moment of forward and backward."""
    phase = next(phase for phase in phases_of(run) if phase.name == "forward_backward")
    return sum(phase.parts.get(part, 0) for part in parts)


def test_gathered_weights(llama: dict[str, Path]) -> None:
    """At the loss: under fsdp2 the root and, in its buffer, the last layer; under ZeRO-3 what its knobs allow,
    and the embedding, which is larger than what is fetched ahead, as it is copied."""
    none = {"activation_checkpointing": {"mode": "none"}}
    gathered = {
        s: highest(run_of(llama["8b"], "full", s, 8, **none), "gather_buffers") for s in ("ddp", "fsdp2", "zero3")
    }
    embedding = 128256 * 4096
    root = 2 * embedding + 4096
    assert gathered == {"ddp": 0, "fsdp2": 2 * (root + BLOCK), "zero3": 2 * (10**9 + 5 * 10**7 + embedding)}


class Gathers(Ledger):
    """Remembers the most that was gathered at a time."""

    most = 0

    def add(self, part: Part, size: int, moment: str = "") -> None:
        super().add(part, size, moment)
        self.most = max(self.most, self.now["gather_buffers"])


def test_the_largest_layer_decides_what_is_gathered(tmp_path: Path) -> None:
    """Of a base that is quantised but for one layer, that one is four times as large as each of the others."""
    settings = {"model_type": "llama", "vocab_size": 1024, "num_key_value_heads": 8, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(settings | LLAMA["4 layers"]))
    method = {"type": "qlora", "r": 8, "quantization": {"skip": ["layers.2"]}}
    run = run_of(tmp_path, method, "fsdp2", 8)
    sizes: Counter[str | None] = Counter()
    for parameter in run.model.parameters:
        sizes[parameter.block] += parameter.numel
    root, (large, *others) = sizes.pop(None), sorted(sizes.values(), reverse=True)
    assert large > 3 * others[0] == 3 * others[-1]
    gathers = Gathers()
    timeline(run, trace(run)).micro_batch(gathers, first=True, last=True)
    # The layer is copied out of the buffer that it was gathered into.
    assert gathers.most == 2 * (root + 2 * large)
    assert gathers.now["gather_buffers"] == 0


# The strategy


def test_states_in_half_a_device_are_ddp(llama: dict[str, Path]) -> None:
    choice = chosen(auto(llama["8b"], "lora", **FULL), 8)
    assert decided(choice)[0] == "ddp"
    assert choice.reasons[0] == (
        "sharding.strategy auto -> ddp: parameters, gradients and optimizer take 15.1 GiB a process under ddp, "
        "at most half of 79.1 GiB"
    )


def test_more_than_half_is_fsdp2(llama: dict[str, Path]) -> None:
    choice = chosen(auto(llama["8b"]), 8)
    assert decided(choice)[0] == "fsdp2"
    assert choice.reasons[0] == (
        "sharding.strategy auto -> fsdp2: parameters, gradients and optimizer take 119.7 GiB a process under ddp, "
        "more than half of 79.1 GiB; 15.0 GiB under fsdp2"
    )


def test_the_half_is_exact(llama: dict[str, Path]) -> None:
    needed = state_bytes(run_of(llama["8b"], "lora", "ddp", 2)).total
    assert decided(chosen(auto(llama["8b"], "lora", **FULL), 2, 2 * needed))[0] == "ddp"
    assert decided(chosen(auto(llama["8b"], "lora", **FULL), 2, 2 * needed - 1))[0] == "fsdp2"


def test_one_process_is_ddp_whenever_it_fits(llama: dict[str, Path]) -> None:
    choice = chosen(auto(llama["70b"], "qlora", **FULL), 1)
    assert decided(choice)[0] == "ddp"
    assert choice.reasons[0].startswith("sharding.strategy auto -> ddp: one process; parameters, gradients and")


def test_what_does_not_fit_says_what_would(llama: dict[str, Path]) -> None:
    with pytest.raises(PlanError) as caught:
        chosen(auto(llama["70b"], **FULL), 8)
    assert caught.value.exit_code == 3
    assert caught.value.what == (
        "parameters, gradients and optimizer need 131.4 GiB a process even when fsdp2 shards them over 8, and a process "
        "has 79.1 GiB"
    )
    assert caught.value.fix == (
        "use 16 processes of this memory, or method.type lora or qlora, or sharding.strategy zero3 with "
        "sharding.deepspeed_config configs/deepspeed/zero3_offload.json"
    )
    assert decided(chosen(auto(llama["70b"], **FULL), 16))[0] == "fsdp2"
    assert decided(chosen(auto(llama["70b"], "lora", **FULL), 8))[0] == "fsdp2"
    assert decided(chosen(auto(llama["70b"], "qlora", **FULL), 8))[0] == "ddp"  # 38.6 GiB: NF4 fits in half a device


def test_one_process_that_does_not_fit(llama: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=r"shards them over 1, and a process has 79\.1 GiB"):
        chosen(auto(llama["8b"]), 1)


@pytest.mark.parametrize(("method", "others"), [("lora", "method.type qlora, or "), ("qlora", "")])
def test_another_method_is_named_only_where_it_takes_less(llama: dict[str, Path], method: str, others: str) -> None:
    with pytest.raises(PlanError) as caught:
        chosen(auto(llama["8b"], method), 2, 2**30)
    assert re.fullmatch(rf"use \d+ processes of this memory, or {others}sharding\.strategy zero3 .*", caught.value.fix)


def test_the_share_under_fsdp2_may_fill_a_device(llama: dict[str, Path]) -> None:
    needed = state_bytes(run_of(llama["8b"], "full", "fsdp2", 2)).total
    assert decided(chosen(auto(llama["8b"], **FULL), 2, needed))[0] == "fsdp2"
    with pytest.raises(PlanError):
        chosen(auto(llama["8b"], **FULL), 2, needed - 1)


def test_an_explicit_strategy_is_nobodys_business(llama: dict[str, Path]) -> None:
    cfg = auto(llama["70b"], sharding={"strategy": "ddp"}, activation_checkpointing={"mode": "full"})
    assert chosen(cfg, 8, memory_bytes=1) == Choice(cfg, [])


# Activation checkpointing


def test_no_more_is_recomputed_than_is_needed(llama: dict[str, Path]) -> None:
    """As the device shrinks: none, selective, full, and full where nothing fits."""
    cfg = auto(llama["8b"], sharding={"strategy": "fsdp2"})
    needed = {}
    for mode in ("none", "selective", "full"):
        needed[mode] = needed_bytes(run_of(llama["8b"], "full", "fsdp2", 8, activation_checkpointing={"mode": mode}))
    assert needed["none"] > needed["selective"] > needed["full"]
    for mode, costlier in (("none", "selective"), ("selective", "full"), ("full", "full")):
        enough = -(-needed[mode] * 10 // 9)
        choice = chosen(cfg, 8, enough)
        assert decided(choice)[1] == mode
        assert f"= {gib(needed[mode])} at the peak" in choice.reasons[0]
        less = chosen(cfg, 8, enough - 2)
        assert decided(less)[1] == costlier
        assert f"{mode} takes {gib(needed[mode])}" in less.reasons[0] or mode == "full"
    assert "auto -> full, but nothing fits: " in less.reasons[0]


def test_the_reason_lists_the_parts_of_the_peak(llama: dict[str, Path]) -> None:
    choice = chosen(auto(llama["8b"]), 8)
    assert decided(choice) == ("fsdp2", "none")
    run = run_of(llama["8b"], "full", "fsdp2", 8, activation_checkpointing={"mode": "none"})
    peak = peak_of(run)
    words = choice.reasons[1].removeprefix("activation_checkpointing.mode auto -> none: ")
    listed, rest = words.split(" = ")
    large = {part: size for part, size in peak.parts.items() if size > peak.total_bytes / 100}
    assert {*listed.split(" + ")} == {f"{PARTS[part][1]} {gib(size)}" for part, size in large.items()}
    assert rest == f"{gib(peak.total_bytes)} at the peak (forward, backward: {peak.moment}), within 90% of 79.1 GiB"


def test_a_cpu_has_no_cuda_that_takes_memory(tiny_base: Path) -> None:
    given = {"memory_bytes": H100}
    on_gpu = choose(auto(tiny_base), WorldShape(1, 2), **given)
    on_cpu = choose(auto(tiny_base), WorldShape(1, 2), on_cpu=True, **given)
    assert on_cpu.config == on_gpu.config
    assert "CUDA and NCCL 2.0 GiB" in " ".join(on_gpu.reasons)
    assert "CUDA" not in " ".join(on_cpu.reasons)
    assert " MiB at the peak" in on_cpu.reasons[1]


def test_a_mode_that_is_refused_is_passed_over(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"none"}

    def unsupported(run: Run) -> Refusal | None:
        return Refusal("not so", "try") if run.activation_checkpointing.mode in refused else None

    monkeypatch.setattr(registry, "unsupported", unsupported)
    choice = chosen(auto(tiny_base, sharding={"strategy": "ddp"}), 2)
    assert decided(choice) == ("ddp", "selective")
    assert choice.reasons[0].endswith("; none is refused (not so)")
    assert decided(chosen(auto(tiny_base, sharding={"strategy": "ddp"}), 2, memory_bytes=GIB))[1] == "full"
    refused |= {"selective", "full"}
    with pytest.raises(ConfigError, match=r"^not so"):
        chosen(auto(tiny_base, sharding={"strategy": "ddp"}), 2)


# Micro-batches


def open_micro_batches(path: Path, batch: int, method: str = "full", mode: str = "full", **sections: Any) -> Config:
    base = {
        "sharding": {"strategy": "fsdp2"}, "activation_checkpointing": {"mode": mode},
        "train": {"global_batch_size": batch, "micro_batch_size": "auto"},
    }  # fmt: skip
    return auto(path, method, **(base | sections))


@pytest.mark.parametrize(
    ("batch", "ranks", "data", "size", "why"),
    [
        (64, 2, {"max_seq_len": 4096}, 4, "8 have more than 16,384 tokens on a rank"),
        (64, 2, {"max_seq_len": 40_000}, 1, "2 have more than 16,384 tokens on a rank"),
        (64, 2, {"max_seq_len": 128}, 32, "a rank has 32 of a step's 64 sequences"),
        (7, 3, {"max_seq_len": 128}, 2, "a rank has 3 of a step's 7 sequences"),
        (2, 3, {"max_seq_len": 128}, 1, "a rank has 1 of a step's 2 sequences"),
    ],
)
def test_micro_batches_are_no_larger_than_they_need_be(
    tiny_base: Path, batch: int, ranks: int, data: dict[str, Any], size: int, why: str
) -> None:
    choice = chosen(open_micro_batches(tiny_base, batch, data={"train": [{"path": "unused"}], **data}), ranks)
    assert choice.config.train.micro_batch_size == size
    (reason,) = choice.reasons
    assert reason.startswith(f"train.micro_batch_size auto -> {size}: CUDA and NCCL 2.0 GiB")
    assert reason.endswith(f", within 90% of 79.1 GiB; {why}")


def test_ranks_that_share_sequences_take_more_of_them(tiny_base: Path) -> None:
    """Each has its part of their tokens. Planned with a group of ranks that are not there, of which nothing stays."""
    sharding = {"strategy": "fsdp2", "sequence_parallel": 2}
    cfg = open_micro_batches(tiny_base, 64, mode="auto", sharding=sharding, data={"max_seq_len": 4096})
    hook = sys.excepthook
    choice = chosen(cfg, 4)
    assert sys.excepthook is hook
    assert decided(choice) == ("fsdp2", "none")
    assert choice.config.train.micro_batch_size == 8
    assert not dist.is_initialized()


def test_virtual_tokens_count_with_their_rows(tiny_base: Path) -> None:
    method = {"type": "prefix", "num_virtual_tokens": 1000}
    data = {"max_seq_len": 4096, "packing": "none"}
    run = chosen(open_micro_batches(tiny_base, 64, method, data=data), 2)  # type: ignore[arg-type]
    assert run.config.train.micro_batch_size == 2


def test_micro_batches_as_large_as_fit(llama: dict[str, Path]) -> None:
    """Found by halving, and the same as by trying all."""
    cfg = open_micro_batches(llama["4 layers"], 32, "lora", data={"max_seq_len": 512})
    needed = {}
    for size in (1, 2, 4, 8, 16, 32):
        train = {"global_batch_size": 32, "micro_batch_size": size}
        run = run_of(llama["4 layers"], "lora", "fsdp2", 1, train=train, data={"max_seq_len": 512})
        needed[size] = needed_bytes(run)
    assert sorted(needed, key=lambda size: needed[size]) == list(needed)
    for size, more in zip([1, *needed], needed, strict=False):
        choice = chosen(cfg, 1, -(-needed[more] * 10 // 9) - 2)
        assert choice.config.train.micro_batch_size == size
        assert ("1, but nothing fits: " if more == 1 else f"; {more} takes {gib(needed[more])}") in choice.reasons[0]
    assert chosen(cfg, 1, -(-needed[32] * 10 // 9)).config.train.micro_batch_size == 32


def test_recomputation_is_decided_with_one_sequence(llama: dict[str, Path]) -> None:
    """Larger micro-batches do not bring it in: what they save of a step is less than recomputing costs."""
    modes = {}
    for size in (1, "auto", 4):
        cfg = auto(llama["8b"], train={"global_batch_size": 32, "micro_batch_size": size})
        modes[size] = decided(chosen(cfg, 8))[1]
    assert modes == {1: "none", "auto": "none", 4: "selective"}


def test_a_size_that_is_refused_is_not_taken(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry, "unsupported", lambda run: Refusal("not so", "try") if run.batch.micro_batch_size > 2 else None
    )
    choice = chosen(open_micro_batches(tiny_base, 64, data={"max_seq_len": 128}), 2)
    assert choice.config.train.micro_batch_size == 2
    assert choice.reasons[0].endswith("; 4 is refused")


def test_accelerates_accumulation_is_compared_with_what_was_chosen(tiny_base: Path) -> None:
    choice = chosen(open_micro_batches(tiny_base, 64, data={"max_seq_len": 4096}), 2)
    run = resolve(choice.config, WorldShape(1, 2))
    check_accelerate(AccelerateChoice(gradient_accumulation_steps=8), run)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size 4 that makes 8"):
        check_accelerate(AccelerateChoice(gradient_accumulation_steps=4), run)


# What all of it rests on


def test_every_rank_decides_alike(llama: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what was kept and without, and without drawing a random number, of which ranks draw the same ones later."""
    cfg = auto(
        llama["4 layers"], {"type": "lora", "dropout": 0.1}, train={"global_batch_size": 64, "micro_batch_size": "auto"}
    )
    choices = []
    before = torch.get_rng_state()
    for folder in (tmp_path / "cache", tmp_path / "cache", "/dev/null"):
        monkeypatch.setenv("SFT_DIST_CACHE", str(folder))
        choices.append(chosen(cfg, 2))
    assert choices[0] == choices[1] == choices[2]
    assert list((tmp_path / "cache/plan").iterdir())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_model_is_decided_in_no_time(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits, so that every mode and several sizes are planned; nothing is kept."""
    monkeypatch.setenv("SFT_DIST_CACHE", "/dev/null")
    cfg = auto(tiny_base, train={"global_batch_size": 64, "micro_batch_size": "auto"})
    started = time.process_time()
    assert decided(chosen(cfg, 2, memory_bytes=GIB))[1] == "full"
    assert time.process_time() - started < 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_one_of_the_two_may_be_explicit(tiny_base: Path, strategy: str) -> None:
    choice = chosen(auto(tiny_base, sharding={"strategy": strategy}), 2)
    assert decided(choice) == (strategy, "none")
    assert [line.split(" auto")[0] for line in choice.reasons] == ["activation_checkpointing.mode"]
    choice = chosen(auto(tiny_base, activation_checkpointing={"mode": "every_k", "k": 2}), 2)
    assert decided(choice) == ("ddp", "every_k")
    assert [line.split(" auto")[0] for line in choice.reasons] == ["sharding.strategy"]


# What accelerate chose


FSDP = AccelerateChoice(family="fsdp", reshard_after_forward=True, reshard_name="fsdp_reshard_after_forward true")
DEEPSPEED = AccelerateChoice(family="deepspeed")


def test_fsdp_is_taken(tiny_base: Path) -> None:
    choice = chosen(auto(tiny_base), 2, accelerate=FSDP)
    assert choice.config.sharding == Fsdp2Sharding(reshard_after_forward=True)
    assert choice.reasons[0] == (
        "sharding.strategy auto -> fsdp2: accelerate launch chose FSDP with fsdp_reshard_after_forward true"
    )
    kept = replace(FSDP, reshard_after_forward=False, reshard_name="fsdp_sharding_strategy SHARD_GRAD_OP")
    choice = chosen(auto(tiny_base), 2, accelerate=kept)
    assert choice.config.sharding == Fsdp2Sharding(reshard_after_forward=False)


def test_fsdps_activation_checkpointing_is_taken(tiny_base: Path) -> None:
    choice = chosen(auto(tiny_base), 2, accelerate=replace(FSDP, activation_checkpointing=True))
    assert decided(choice) == ("fsdp2", "full")
    assert choice.reasons[1].endswith("full: accelerate launch has fsdp_activation_checkpointing true")


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_deepspeeds_stage_is_taken(tiny_base: Path, stage: int | None) -> None:
    """accelerate's own default is stage 2."""
    choice = chosen(auto(tiny_base), 2, accelerate=replace(DEEPSPEED, zero_stage=stage))
    sharding = choice.config.sharding
    assert isinstance(sharding, Zero1Sharding | Zero2Sharding | Zero3Sharding)
    assert (sharding.strategy, sharding.deepspeed_config) == (f"zero{stage or 2}", None)


def test_deepspeeds_offload_is_taken(tiny_base: Path) -> None:
    on_host = {"device": "cpu"}
    accelerate = replace(DEEPSPEED, zero_stage=3, offload_optimizer=True, offload_param=True)
    choice = chosen(auto(tiny_base), 2, accelerate=accelerate)
    knobs = {"offload_optimizer": on_host, "offload_param": on_host}
    assert choice.config.sharding == Zero3Sharding(strategy="zero3", deepspeed_config={"zero_optimization": knobs})
    spec = registry.describe(resolve(choice.config, WorldShape(1, 2)), 0)
    assert spec.on_host == {"optimizer", "parameters"}
    choice = chosen(auto(tiny_base), 2, accelerate=replace(DEEPSPEED, offload_optimizer=True))
    knobs = {"offload_optimizer": on_host}
    assert choice.config.sharding == Zero2Sharding(strategy="zero2", deepspeed_config={"zero_optimization": knobs})
    assert choice.reasons[0].endswith("chose DeepSpeed with zero_stage 2, offload_optimizer on the host")


def test_deepspeeds_file_is_taken(tiny_base: Path, tmp_path: Path) -> None:
    file = str(ROOT / "configs/deepspeed/zero3_offload.json")
    choice = chosen(auto(tiny_base), 2, accelerate=replace(DEEPSPEED, deepspeed_config_file=file))
    assert choice.config.sharding == Zero3Sharding(strategy="zero3", deepspeed_config=file)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": "auto"}}')
    stageless = replace(DEEPSPEED, deepspeed_config_file=str(tmp_path / "ds.json"))
    with pytest.raises(ConfigError, match=r"ds\.json: zero_optimization\.stage is None"):
        chosen(auto(tiny_base), 2, accelerate=stageless)
    assert decided(chosen(auto(tiny_base), 2, accelerate=replace(stageless, zero_stage=1)))[0] == "zero1"


def test_plain_processes_leave_the_choice_to_the_rule(tiny_base: Path) -> None:
    assert decided(chosen(auto(tiny_base), 2, accelerate=AccelerateChoice()))[0] == "ddp"


def test_what_accelerate_chose_must_go_with_the_rest(tiny_base: Path) -> None:
    """Under auto this could not be checked when the file was read."""
    cfg = auto(tiny_base, precision={"compute": "bf16", "master": "bf16"})
    with pytest.raises(ConfigError, match=r"precision\.master is bf16, but sharding\.strategy zero3"):
        chosen(cfg, 2, accelerate=replace(DEEPSPEED, zero_stage=3))


# The edges


def test_the_choice_changes_nothing_else(tiny_base: Path) -> None:
    cfg = auto(tiny_base)
    choice = chosen(cfg, 2)
    assert cfg.train.micro_batch_size == 1
    sections = {"sharding": cfg.sharding, "activation_checkpointing": cfg.activation_checkpointing}
    assert choice.config.model_copy(update=sections) == cfg
    assert chosen(choice.config, 2) == Choice(choice.config, [])


@pytest.mark.parametrize(
    "sections",
    [
        {"sharding": {"strategy": "auto"}},
        {"activation_checkpointing": {"mode": "auto"}},
        {"train": {"micro_batch_size": "auto"}},
    ],
)
def test_resolve_wants_it_concrete(tiny_base: Path, sections: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is auto"):
        resolve(config(str(tiny_base), **sections), WorldShape())
