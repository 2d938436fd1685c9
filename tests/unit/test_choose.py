"""``auto`` by a stated rule, with the numbers of real models: a config.json is all that is read of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config, Fsdp2Sharding, Zero1Sharding, Zero2Sharding, Zero3Sharding
from sft_dist.errors import ConfigError, PlanError
from sft_dist.plan.choose import Choice, choose
from sft_dist.plan.states import activation_bytes, gather_bytes, state_bytes
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import AccelerateChoice
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from tests.helpers.cells import config

ROOT = Path(__file__).parents[2]
GIB = 2**30
H100 = int(79.1 * GIB)

LLAMA = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
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


def decided(choice: Choice) -> tuple[str, str]:
    return choice.config.sharding.strategy, choice.config.activation_checkpointing.mode


# The counts behind the rule


def run_of(path: Path, method: str | dict[str, Any], strategy: str, ranks: int, **sections: Any) -> Run:
    cfg = auto(path, method, sharding={"strategy": strategy}, activation_checkpointing={"mode": "full"}, **sections)
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


def test_activations_are_an_upper_estimate_of_what_was_measured(llama: dict[str, Path]) -> None:
    """Llama-3 8B keeps 864.5 MiB a layer for 4096 tokens in bf16 (measured by tracing its own step)."""
    run = run_of(llama["8b"], "full", "ddp", 1)
    logits = 2 * 256 * 2**20
    per_layer = (activation_bytes(run) - logits) / 32
    # q and o: 4096 -> 4096; k and v: 4096 -> 1024; gate, up and down: 4096 <-> 14336.
    assert per_layer == 1.5 * 4096 * 2 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert 864.5 * 2**20 < per_layer < 1.2 * 864.5 * 2**20


def test_the_base_of_qlora_has_the_activations_of_lora(llama: dict[str, Path]) -> None:
    """Its packed weights have lost their shapes; adapters add their own inputs and outputs."""
    lora, qlora, full = (activation_bytes(run_of(llama["8b"], m, "ddp", 1)) for m in ("lora", "qlora", "full"))
    assert lora == qlora > full


def test_dropout_keeps_a_mask_for_each_input_of_an_adapter(llama: dict[str, Path]) -> None:
    plain, dropped = (
        activation_bytes(run_of(llama["8b"], {"type": "lora", "dropout": p}, "ddp", 1)) for p in (0.0, 0.1)
    )
    assert dropped - plain == 4096 * 32 * (6 * 4096 + 14336), "one byte; q, k, v, o, gate and up, and down"


def test_gathered_weights(llama: dict[str, Path]) -> None:
    block, root = 218_112_000, 2 * 128256 * 4096 + 4096
    assert gather_bytes(run_of(llama["8b"], "full", "fsdp2", 8)) == 2 * (2 * block + root)
    # DDP keeps the bf16 cast of every trainable weight until backward; nothing is cast where master is compute.
    assert gather_bytes(run_of(llama["8b"], "full", "ddp", 8)) == 2 * PARAMETERS["8b"]
    fp32 = run_of(llama["8b"], "full", "ddp", 8, precision={"compute": "fp32"})
    assert gather_bytes(fp32) == 0
    zero3, zero2 = (gather_bytes(run_of(llama["8b"], "full", s, 8)) for s in ("zero3", "zero2"))
    assert zero2 == 2 * 2 * 500_000_000
    assert zero3 == zero2 + 2 * (2 * block + root)


def test_the_largest_blocks_are_the_ones_that_are_gathered(llama: dict[str, Path]) -> None:
    """Of a base that is quantised but for one layer, that one is four times as large as each of the others."""
    method = {"type": "qlora", "quantization": {"skip": ["layers.7"]}}
    run = run_of(llama["8b"], method, "fsdp2", 8)
    sizes: Counter[str | None] = Counter()
    for parameter in run.model.parameters:
        sizes[parameter.block] += parameter.numel
    root, (largest, second, *rest) = sizes.pop(None), sorted(sizes.values(), reverse=True)
    assert largest > 3 * second == 3 * rest[-1]
    assert gather_bytes(run) == 2 * (largest + second + root)


# The strategy


def test_states_in_half_a_device_are_ddp(llama: dict[str, Path]) -> None:
    choice = chosen(auto(llama["8b"], "lora"), 8)
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
    assert decided(chosen(auto(llama["8b"], "lora"), 2, 2 * needed))[0] == "ddp"
    assert decided(chosen(auto(llama["8b"], "lora"), 2, 2 * needed - 1))[0] == "fsdp2"


def test_one_process_is_ddp_whenever_it_fits(llama: dict[str, Path]) -> None:
    choice = chosen(auto(llama["70b"], "qlora"), 1)
    assert decided(choice)[0] == "ddp"
    assert choice.reasons[0].startswith("sharding.strategy auto -> ddp: one process; parameters, gradients and")


def test_what_does_not_fit_says_what_would(llama: dict[str, Path]) -> None:
    with pytest.raises(PlanError) as caught:
        chosen(auto(llama["70b"]), 8)
    assert caught.value.exit_code == 3
    assert caught.value.what == (
        "parameters, gradients and optimizer need 131.4 GiB a process even when fsdp2 shards them over 8, and a process "
        "has 79.1 GiB"
    )
    assert caught.value.fix == (
        "use 16 processes of this memory, or method.type lora or qlora, or sharding.strategy zero3 with "
        "sharding.deepspeed_config configs/deepspeed/zero3_offload.json"
    )
    assert decided(chosen(auto(llama["70b"]), 16))[0] == "fsdp2"
    assert decided(chosen(auto(llama["70b"], "lora"), 8))[0] == "fsdp2"
    assert decided(chosen(auto(llama["70b"], "qlora"), 8))[0] == "ddp"  # 38.6 GiB: NF4 fits in half a device


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
    assert decided(chosen(auto(llama["8b"]), 2, needed))[0] == "fsdp2"
    with pytest.raises(PlanError):
        chosen(auto(llama["8b"]), 2, needed - 1)


def test_an_explicit_strategy_is_nobodys_business(llama: dict[str, Path]) -> None:
    cfg = auto(llama["70b"], sharding={"strategy": "ddp"}, activation_checkpointing={"mode": "full"})
    assert chosen(cfg, 8, memory_bytes=1) == Choice(cfg, [])


# Activation checkpointing


def test_checkpointing_only_where_it_is_needed(llama: dict[str, Path]) -> None:
    choice = chosen(auto(llama["8b"]), 8)
    assert decided(choice) == ("fsdp2", "none")
    assert choice.reasons[1] == (
        "activation_checkpointing.mode auto -> none: states 15.0 GiB + gathered or cast weights 2.8 GiB + activations "
        "(at most) 30.5 GiB = 48.2 GiB, within 80 % of 79.1 GiB"
    )
    choice = chosen(auto(llama["8b"], train={"micro_batch_size": 2, "global_batch_size": 16}), 8)
    assert decided(choice) == ("fsdp2", "full")
    assert "= 78.2 GiB, more than 80 % of 79.1 GiB" in choice.reasons[1]


def test_the_share_is_exact(llama: dict[str, Path]) -> None:
    cfg = auto(llama["8b"], "lora", sharding={"strategy": "fsdp2"})
    run = run_of(llama["8b"], "lora", "fsdp2", 8)
    total = state_bytes(run).total + gather_bytes(run) + activation_bytes(run)
    enough = -(-total * 10 // 8)
    assert decided(chosen(cfg, 8, enough))[1] == "none"
    assert decided(chosen(cfg, 8, enough - 2))[1] == "full"


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
    sections = {"sharding": cfg.sharding, "activation_checkpointing": cfg.activation_checkpointing}
    assert choice.config.model_copy(update=sections) == cfg
    assert chosen(choice.config, 2) == Choice(choice.config, [])


@pytest.mark.parametrize(
    "sections", [{"sharding": {"strategy": "auto"}}, {"activation_checkpointing": {"mode": "auto"}}]
)
def test_resolve_wants_it_concrete(tiny_base: Path, sections: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is auto"):
        resolve(config(str(tiny_base), **sections), WorldShape())
