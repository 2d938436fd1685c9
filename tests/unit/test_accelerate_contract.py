"""What `accelerate launch` says against what will be trained. The environments are made by accelerate's own functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config import config_args
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from sft_dist.errors import ConfigError
from sft_dist.plan.accelerate import check_accelerate
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.accelerate_environment import AccelerateChoice, read_accelerate_environment
from sft_dist.runtime.world import WorldShape
from tests.helpers.cells import config

ROOT = Path(__file__).parents[2]
FILES = ROOT / "configs/accelerate"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of this process and no default configuration of this user."""
    import os

    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))


def environment(*arguments: str) -> dict[str, str]:
    """What a process of `accelerate launch ARGUMENTS script.py` finds; nothing is started."""
    typed = list(arguments)
    if "--config_file" not in typed and "--num_processes" not in typed:
        typed += ["--num_processes", "2"]
    parsed = launch_command_parser().parse_args([*typed, "--main_process_port", "0", "script.py"])
    args, defaults, _ = _validate_launch_command(parsed)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config) if defaults else ""
        return prepare_deepspeed_cmd_env(args)[1]
    if args.use_fsdp or args.multi_gpu or args.use_megatron_lm:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


def chosen(*arguments: str) -> AccelerateChoice:
    choice = read_accelerate_environment(environment(*arguments))
    assert choice is not None
    return choice


@pytest.fixture
def run(tiny_base: Path) -> Any:
    """``run(strategy, **sections)`` on two processes: 7 sequences in micro-batches of 2 make accumulation 2; norm 0.5."""

    def make(strategy: str, **sections: Any) -> Run:
        return resolve(config(str(tiny_base), "full", strategy, **sections), WorldShape(1, 2))

    return make


def contradiction(choice: AccelerateChoice, run: Run) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        check_accelerate(choice, run)
    return caught.value.what, caught.value.fix


# What is read


FSDP2 = AccelerateChoice(
    family="fsdp", reshard_after_forward=True, reshard_name="fsdp_reshard_after_forward true"
)  # fmt: skip
FSDP1 = replace(FSDP2, reshard_name="fsdp_sharding_strategy FULL_SHARD")
DEEPSPEED = AccelerateChoice(family="deepspeed")
USE_FSDP = ("--use_fsdp", "--fsdp_version", "2")

READ: list[tuple[tuple[str, ...], AccelerateChoice]] = [
    (("--multi_gpu",), AccelerateChoice()),
    (("--num_processes", "1"), AccelerateChoice()),
    (("--cpu", "--num_processes", "1"), AccelerateChoice()),
    (("--multi_gpu", "--mixed_precision", "bf16"), AccelerateChoice(mixed_precision="bf16")),
    (("--use_fsdp",), FSDP1),
    (("--use_fsdp", "--fsdp_sharding_strategy", "SHARD_GRAD_OP"), replace(FSDP1, reshard_after_forward=False, reshard_name="fsdp_sharding_strategy SHARD_GRAD_OP")),
    (("--use_fsdp", "--fsdp_sharding_strategy", "2"), replace(FSDP1, reshard_after_forward=False, reshard_name="fsdp_sharding_strategy SHARD_GRAD_OP")),
    (USE_FSDP, FSDP2),
    ((*USE_FSDP, "--fsdp_sharding_strategy", "SHARD_GRAD_OP"), FSDP2),  # version 2 does not read it
    ((*USE_FSDP, "--fsdp_reshard_after_forward", "False"), replace(FSDP2, reshard_after_forward=False, reshard_name="fsdp_reshard_after_forward false")),
    ((*USE_FSDP, "--fsdp_activation_checkpointing", "true"), replace(FSDP2, activation_checkpointing=True)),
    (("--use_deepspeed",), DEEPSPEED),
    (("--use_deepspeed", "--zero_stage", "2"), replace(DEEPSPEED, zero_stage=2)),
    (("--use_deepspeed", "--gradient_accumulation_steps", "4", "--gradient_clipping", "0.5"), replace(DEEPSPEED, gradient_accumulation_steps=4, gradient_clipping=0.5)),
    (("--use_deepspeed", "--zero_stage", "3", "--offload_optimizer_device", "cpu", "--offload_param_device", "none"), replace(DEEPSPEED, zero_stage=3, offload_optimizer=True)),
    (("--use_deepspeed", "--offload_param_device", "cpu"), replace(DEEPSPEED, offload_param=True)),
    (("--use_deepspeed", "--deepspeed_config_file", "ds.json"), replace(DEEPSPEED, deepspeed_config_file="ds.json")),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), READ, ids=[" ".join(a) for a, _ in READ])
def test_what_is_read(arguments: tuple[str, ...], expected: AccelerateChoice) -> None:
    assert chosen(*arguments) == expected


def test_without_accelerate_nothing_is_read() -> None:
    assert read_accelerate_environment({}) is None
    # FSDP's own variables may stand in a shell; accelerate itself reads them only behind its switch.
    assert read_accelerate_environment({"FSDP_VERSION": "2", "RANK": "0"}) is None


def test_numbers_that_deepspeed_is_to_find_out_say_nothing() -> None:
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_GRADIENT_CLIPPING": "none"}  # fmt: skip
    assert read_accelerate_environment(env) == DEEPSPEED


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_USE_FSDP", "maybe"), ("ACCELERATE_GRADIENT_CLIPPING", "much")]
)
def test_a_value_that_accelerate_never_writes(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is '{value}'"):
        read_accelerate_environment({"ACCELERATE_MIXED_PRECISION": "no", name: value})


UNSUPPORTED = [
    (("--multi_gpu", "--mixed_precision", "fp16"), "--mixed_precision fp16"),
    (("--multi_gpu", "--dynamo_backend", "inductor"), "--dynamo_backend inductor"),
    (("--use_megatron_lm",), "--use_megatron_lm"),
    (("--use_fsdp", "--fsdp_sharding_strategy", "NO_SHARD"), "fsdp_sharding_strategy NO_SHARD"),
    (("--use_fsdp", "--fsdp_sharding_strategy", "HYBRID_SHARD"), "fsdp_sharding_strategy HYBRID_SHARD"),
    (("--use_fsdp", "--fsdp_sharding_strategy", "5"), "fsdp_sharding_strategy HYBRID_SHARD_ZERO2"),
    ((*USE_FSDP, "--fsdp_offload_params", "true"), "fsdp_offload_params true"),
    ((*USE_FSDP, "--fsdp_activation_checkpointing_offload", "true"), "fsdp_activation_checkpointing_offload true"),
    ((*USE_FSDP, "--use_parallelism_config", "--parallelism_config_tp_size", "2"), "parallelism_config_tp_size 2"),
    ((*USE_FSDP, "--use_parallelism_config", "--parallelism_config_cp_size", "2"), "parallelism_config_cp_size 2"),
    ((*USE_FSDP, "--use_parallelism_config", "--parallelism_config_dp_replicate_size", "2"), "parallelism_config_dp_replicate_size 2"),
    (("--use_deepspeed", "--zero_stage", "0"), "deepspeed zero_stage 0"),
    (("--use_deepspeed", "--zero_stage", "3", "--offload_param_device", "nvme"), "deepspeed offload_param_device nvme"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "name"), UNSUPPORTED, ids=[name for _, name in UNSUPPORTED])
def test_what_no_configuration_can_honour(arguments: tuple[str, ...], name: str, run: Any) -> None:
    strategy = "zero3" if "--use_deepspeed" in arguments else "fsdp2"
    what, fix = contradiction(chosen(*arguments), run(strategy))
    assert what == f"accelerate's {name} is not supported"
    assert fix


def test_fp8_is_not_supported_either(run: Any) -> None:
    """By its variable: the command line is refused by accelerate itself on this machine."""
    choice = read_accelerate_environment({"ACCELERATE_MIXED_PRECISION": "fp8"})
    assert choice is not None
    assert contradiction(choice, run("ddp"))[0] == "accelerate's --mixed_precision fp8 is not supported"


def test_a_parallelism_config_without_any_is_none(run: Any) -> None:
    check_accelerate(chosen(*USE_FSDP, "--use_parallelism_config"), run("fsdp2"))


# What contradicts


def zero(strategy: str, **knobs: Any) -> dict[str, Any]:
    return {"sharding": {"strategy": strategy, "deepspeed_config": {"zero_optimization": knobs}}}


CPU = {"device": "cpu"}
CONTRADICTIONS: list[tuple[tuple[str, ...], str, dict[str, Any], str, str]] = [
    (USE_FSDP, "ddp", {}, "--use_fsdp contradicts sharding.strategy ddp",
     "set sharding.strategy to fsdp2 or auto, or start with configs/accelerate's file for ddp"),
    (USE_FSDP, "zero2", {}, "--use_fsdp contradicts sharding.strategy zero2",
     "set sharding.strategy to fsdp2 or auto, or start with --use_deepspeed"),
    (("--use_deepspeed",), "fsdp2", {}, "--use_deepspeed contradicts sharding.strategy fsdp2",
     "set sharding.strategy to zero1, zero2 or zero3 or auto, or start with configs/accelerate's file for fsdp2"),
    (("--use_deepspeed", "--zero_stage", "3"), "ddp", {}, "--use_deepspeed contradicts sharding.strategy ddp",
     "set sharding.strategy to zero3 or auto, or start with configs/accelerate's file for ddp"),
    (("--use_deepspeed", "--zero_stage", "2"), "zero3", {}, "deepspeed zero_stage 2 contradicts sharding.strategy zero3",
     "set sharding.strategy to zero2 or auto, or zero_stage to 3"),
    ((*USE_FSDP, "--fsdp_reshard_after_forward", "false"), "fsdp2", {},
     "fsdp_reshard_after_forward false contradicts sharding.reshard_after_forward true",
     "set sharding.reshard_after_forward to false, or fsdp_reshard_after_forward to true"),
    (("--use_fsdp", "--fsdp_sharding_strategy", "SHARD_GRAD_OP"), "fsdp2", {},
     "fsdp_sharding_strategy SHARD_GRAD_OP contradicts sharding.reshard_after_forward true",
     "set sharding.reshard_after_forward to false, or fsdp_sharding_strategy to FULL_SHARD"),
    ((*USE_FSDP, "--fsdp_activation_checkpointing", "true"), "fsdp2", {"activation_checkpointing": {"mode": "none"}},
     "fsdp_activation_checkpointing true contradicts activation_checkpointing.mode none",
     "set activation_checkpointing.mode to full or auto, or fsdp_activation_checkpointing to false"),
    (("--multi_gpu", "--mixed_precision", "bf16"), "ddp", {}, "--mixed_precision bf16 contradicts precision.compute fp32",
     "set precision.compute to bf16, or --mixed_precision to no"),
    (("--use_deepspeed", "--gradient_accumulation_steps", "4"), "zero2", {},
     "gradient_accumulation_steps 4 contradicts train.global_batch_size 7: with 2 processes and train.micro_batch_size 2 that makes 2",
     "leave gradient_accumulation_steps out, or set it to 2"),
    (("--use_deepspeed", "--gradient_clipping", "2.0"), "zero2", {},
     "gradient_clipping 2.0 contradicts optim.max_grad_norm 0.5",
     "set optim.max_grad_norm to 2.0, or leave gradient_clipping out"),
    (("--use_deepspeed", "--gradient_clipping", "0"), "zero2", {},
     "gradient_clipping 0.0 contradicts optim.max_grad_norm 0.5",
     "set optim.max_grad_norm to null, or leave gradient_clipping out"),
    (("--use_deepspeed", "--offload_optimizer_device", "cpu"), "zero2", {},
     "deepspeed offload_optimizer_device cpu contradicts sharding.strategy zero2, whose knobs have no zero_optimization.offload_optimizer on cpu",
     "name a file with it as sharding.deepspeed_config, or set offload_optimizer_device to none"),
    (("--use_deepspeed", "--offload_param_device", "cpu"), "zero3", zero("zero3", offload_optimizer=CPU),
     "deepspeed offload_param_device cpu contradicts sharding.strategy zero3, whose knobs have no zero_optimization.offload_param on cpu",
     "name a file with it as sharding.deepspeed_config, or set offload_param_device to none"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "strategy", "sections", "what", "fix"), CONTRADICTIONS, ids=[c[3][:60] for c in CONTRADICTIONS]
)
def test_contradiction(
    arguments: tuple[str, ...], strategy: str, sections: dict[str, Any], what: str, fix: str, run: Any
) -> None:
    assert contradiction(chosen(*arguments), run(strategy, **sections)) == (f"accelerate's {what}", fix)


AGREEMENTS: list[tuple[tuple[str, ...], str, dict[str, Any]]] = [
    # Plain processes choose no strategy.
    *((("--multi_gpu",), strategy, {}) for strategy in ("ddp", "fsdp2", "zero1", "zero3")),
    (("--multi_gpu", "--mixed_precision", "no"), "ddp", {"precision": {"compute": "bf16"}}),
    (("--multi_gpu", "--mixed_precision", "bf16"), "ddp", {"precision": {"compute": "bf16"}}),
    (("--use_fsdp",), "fsdp2", {}),
    # accelerate's own defaults, whatever the run has.
    (USE_FSDP, "fsdp2", {"sharding": {"strategy": "fsdp2", "reshard_after_forward": False}}),
    (("--use_fsdp",), "fsdp2", {"sharding": {"strategy": "fsdp2", "reshard_after_forward": False}}),
    (USE_FSDP, "fsdp2", {"activation_checkpointing": {"mode": "none"}}),
    (("--use_deepspeed",), "zero3", {}),
    (("--use_deepspeed", "--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0"), "zero2", {}),
    (("--use_deepspeed", "--offload_optimizer_device", "none"), "zero3", zero("zero3", offload_optimizer=CPU)),
    # The same on both sides.
    ((*USE_FSDP, "--fsdp_reshard_after_forward", "false"), "fsdp2", {"sharding": {"strategy": "fsdp2", "reshard_after_forward": False}}),
    ((*USE_FSDP, "--fsdp_activation_checkpointing", "true"), "fsdp2", {}),
    (("--use_deepspeed", "--zero_stage", "2", "--gradient_accumulation_steps", "2", "--gradient_clipping", "0.5"), "zero2", {}),
    (("--use_deepspeed", "--zero_stage", "3", "--offload_optimizer_device", "cpu", "--offload_param_device", "cpu"), "zero3", zero("zero3", offload_optimizer=CPU, offload_param=CPU)),
    (("--use_deepspeed", "--zero3_init_flag", "true", "--zero_stage", "3", "--zero3_save_16bit_model", "true"), "zero3", {}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "strategy", "sections"), AGREEMENTS, ids=lambda v: str(v)[:60])
def test_no_contradiction(arguments: tuple[str, ...], strategy: str, sections: dict[str, Any], run: Any) -> None:
    check_accelerate(chosen(*arguments), run(strategy, **sections))


def test_all_contradictions_of_a_start_come_at_once(run: Any) -> None:
    arguments = ("--use_deepspeed", "--zero_stage", "1", "--mixed_precision", "fp16", "--gradient_clipping", "2.0")
    what, fix = contradiction(chosen(*arguments), run("zero3"))
    assert [line.split(" is not ")[0].split(" contradicts ")[0] for line in what.splitlines()] == [
        "accelerate's --mixed_precision fp16", "accelerate's deepspeed zero_stage 1", "accelerate's gradient_clipping 2.0",
    ]  # fmt: skip
    assert fix == "correct these 3 places"


# accelerate's DeepSpeed file


def test_the_same_file_or_the_same_knobs_agree(run: Any) -> None:
    file = str(ROOT / "configs/deepspeed/zero3_offload.json")
    choice = chosen("--use_deepspeed", "--deepspeed_config_file", file)
    check_accelerate(choice, run("zero3", sharding={"strategy": "zero3", "deepspeed_config": file}))
    check_accelerate(choice, run("zero3", **zero("zero3", offload_optimizer=CPU, offload_param=CPU)))
    shipped = chosen("--use_deepspeed", "--deepspeed_config_file", str(ROOT / "configs/deepspeed/zero3.json"))
    check_accelerate(shipped, run("zero3"))


def test_another_file_does_not(run: Any) -> None:
    file = str(ROOT / "configs/deepspeed/zero3_offload.json")
    choice = chosen("--use_deepspeed", "--deepspeed_config_file", file)
    what, fix = contradiction(choice, run("zero3"))
    assert what == (
        f"accelerate's deepspeed_config_file {file} contradicts sharding.deepspeed_config (null, which is the shipped file)"
    )
    assert fix == f"set sharding.deepspeed_config to {file}, or leave deepspeed_config_file out"
    what, _ = contradiction(choice, run("zero2"))
    assert what.startswith(f"accelerate's deepspeed_config_file: {file}: zero_optimization.stage is 3, but sharding.")
    what, _ = contradiction(chosen("--use_deepspeed", "--deepspeed_config_file", "absent.json"), run("zero2"))
    assert "absent.json cannot be read" in what


# The files that are shipped


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_shipped_file_starts_what_its_name_says(strategy: str, run: Any) -> None:
    file = FILES / f"{strategy}.yaml"
    shipped = ROOT / "sft_dist/config/shipped/accelerate" / file.name
    assert file.read_bytes() == shipped.read_bytes()
    loaded = config_args.load_config_from_file(str(file))
    assert (loaded.num_processes, loaded.num_machines) == (2, 1)
    choice = chosen("--config_file", str(file))
    assert choice.family == {"ddp": None, "fsdp2": "fsdp", "zero3": "deepspeed"}[strategy]
    assert choice.unsupported == ()
    for compute in ("fp32", "bf16"):
        check_accelerate(choice, run(strategy, precision={"compute": compute}))
    for other in {"ddp", "fsdp2", "zero3"} - {strategy}:
        if strategy != "ddp":
            contradiction(choice, run(other))


def test_no_other_file_is_shipped() -> None:
    for folder in (FILES, ROOT / "sft_dist/config/shipped/accelerate"):
        assert sorted(p.name for p in folder.glob("*.yaml")) == ["ddp.yaml", "fsdp2.yaml", "zero3.yaml"]
