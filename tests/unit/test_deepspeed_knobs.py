"""DeepSpeed's JSON files: what may be tuned in them, and the exact words for what may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.deepspeed import (
    DECIDED,
    FIXED,
    SHIPPED,
    OffloadKnobs,
    Zero3Knobs,
    Zero12Knobs,
    load_knobs,
    stage_in,
)
from sft_dist.errors import ConfigError
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding.zero_engine import deepspeed_config
from tests.helpers.cells import config

ROOT = Path(__file__).parents[2]
EDITABLE = ROOT / "configs/deepspeed"
FILES = (
    "zero1.json", "zero1_offload.json", "zero2.json", "zero2_offload.json", "zero3.json", "zero3_offload.json",
    "zero3_offload_optimizer.json", "zero3_offload_param.json",
)  # fmt: skip


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


def refusal(given: Any, stage: int = 3) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_knobs(given, stage)
    return caught.value.what.removeprefix("sharding.deepspeed_config: "), caught.value.fix


# The files that are shipped


def test_the_editable_copies_are_the_shipped_files() -> None:
    assert (
        sorted(p.name for p in EDITABLE.glob("*.json")) == sorted(p.name for p in SHIPPED.glob("*.json")) == list(FILES)
    )
    for name in FILES:
        assert (EDITABLE / name).read_bytes() == (SHIPPED / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_states_every_knob_at_its_default(name: str) -> None:
    """So that the file shows what there is to tune, and no file changes a run by itself - but for the offload."""
    stage = int(name[4])
    model = Zero3Knobs if stage == 3 else Zero12Knobs
    stated = json.loads((EDITABLE / name).read_text())["zero_optimization"]
    assert set(stated) == {"stage", *model.model_fields}
    _, _, part = name.removesuffix(".json").partition("_offload")
    parts = ["offload_optimizer", "offload_param"] if stage == 3 and not part else [f"offload{part or '_optimizer'}"]
    expected = model(**dict.fromkeys(parts if "offload" in name else [], OffloadKnobs(device="cpu")))
    assert load_knobs(str(EDITABLE / name), stage) == expected
    assert stage_in(str(EDITABLE / name)) == stage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_a_file_the_shipped_one_counts(stage: int) -> None:
    assert load_knobs(None, stage) == load_knobs(str(EDITABLE / f"zero{stage}.json"), stage) == load_knobs({}, stage)


def test_every_knob_is_explained() -> None:
    page = (EDITABLE / "README.md").read_text(encoding="utf-8")
    for name in {*Zero12Knobs.model_fields, *Zero3Knobs.model_fields, *OffloadKnobs.model_fields}:
        assert any(quoted in page for quoted in (f"`{name}`", f".{name}`", f"`{name}.")), name


def test_deepspeed_knows_every_knob() -> None:
    """Under its own name and with its own default, where ours is not a choice of the machine."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name: field for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for model in (Zero12Knobs, Zero3Knobs):
        for name, field in model.model_fields.items():
            assert name in fields
            if not name.startswith("offload_"):
                assert fields[name].default == field.default, name


# What the engine gets


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_engines_configuration(stage: int, tiny_base: Path) -> None:
    run = resolve(config(str(tiny_base), "full", f"zero{stage}"), WorldShape(1, 2))
    engine = deepspeed_config(run)
    given = engine.pop("zero_optimization")
    assert engine == {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32", "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }  # fmt: skip
    assert given["stage"] == stage
    assert given["overlap_comm"] in (True, False)
    assert given["stage3_param_persistence_threshold"] == 0
    assert given["contiguous_gradients"] is given["reduce_scatter"] is True
    assert given["offload_optimizer"]["device"] == "none"


def test_a_stated_knob_reaches_the_engine(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(zero(overlap_comm=True, reduce_bucket_size=7)))
    sharding = {"strategy": "zero2", "deepspeed_config": str(tmp_path / "ds.json")}
    run = resolve(config(str(tiny_base), "full", "zero2", sharding=sharding), WorldShape(1, 2))
    given = deepspeed_config(run)["zero_optimization"]
    assert (given["overlap_comm"], given["reduce_bucket_size"]) == (True, 7)


def test_knobs_that_stage_1_does_not_read_in_bf16(tiny_base: Path) -> None:
    def resolved(strategy: str, compute: str, **knobs: Any) -> None:
        sharding = {"strategy": strategy, "deepspeed_config": zero(**knobs)}
        resolve(
            config(str(tiny_base), "full", strategy, sharding=sharding, precision={"compute": compute}), WorldShape()
        )

    resolved("zero1", "fp32", reduce_bucket_size=7)
    resolved("zero2", "bf16", reduce_bucket_size=7)
    resolved("zero1", "bf16", allgather_bucket_size=8, reduce_scatter=True)
    resolved("zero1", "bf16", reduce_bucket_size=7, offload_optimizer={"device": "cpu"})
    with pytest.raises(ConfigError) as caught:
        resolved("zero1", "bf16", reduce_bucket_size=7)
    assert caught.value.what == (
        "zero_optimization.reduce_bucket_size has no effect in stage 1 with precision.compute bf16, unless the optimizer "
        "is offloaded; stage 2 reads all knobs"
    )
    assert caught.value.fix == "remove it, or set sharding.strategy to zero2"


# What another trainer's file may hold


def test_auto_states_nothing() -> None:
    given = {
        "bf16": {"enabled": "auto"}, "optimizer": {"type": "auto", "params": {"lr": "auto"}}, "train_batch_size": "auto",
        "wall_clock_breakdown": False, "zero_allow_untested_optimizer": True,
    } | zero(stage="auto", reduce_bucket_size="auto", stage3_param_persistence_threshold="auto",
             offload_param={"device": "auto", "pin_memory": False})  # fmt: skip
    assert load_knobs(given, 3) == Zero3Knobs(offload_param=OffloadKnobs(pin_memory=False))


@pytest.mark.parametrize("key", DECIDED)
def test_what_the_configuration_decides(key: str) -> None:
    inner = key.removeprefix("zero_optimization.")
    what, fix = refusal(zero(**{inner: 2}) if inner != key else {key: 2})
    if inner == "stage":
        assert (what, fix) == (
            "zero_optimization.stage is 2, but sharding.strategy is zero3",
            "set sharding.strategy to the stage you want, or write 3 or remove zero_optimization.stage",
        )
    else:
        assert what == f"{key} is 2, but {DECIDED[key]} decides it"
        assert fix == f'write "auto" or remove {key}'


@pytest.mark.parametrize("key", FIXED)
def test_what_the_project_fixes(key: str) -> None:
    value, reason = FIXED[key]
    inner = key.removeprefix("zero_optimization.")

    def file(given: Any) -> dict[str, Any]:
        return zero(**{inner: given}) if inner != key else {key: given}

    load_knobs(file(value), 3)
    what, fix = refusal(file(5))
    assert (what, fix) == (f"{key} is 5, which is not taken: {reason}", f"remove {key}")


WRONG = [
    (zero(reduce_buckt_size=1), 2, "zero_optimization.reduce_buckt_size is not a knob that is taken here", "did you mean reduce_bucket_size?"),
    ({"zero_optimisation": {}}, 2, "zero_optimisation is not a key that is taken here", "did you mean zero_optimization?"),
    ({"flops_profiler": {}}, 2, "flops_profiler is not a key that is taken here", "remove it; configs/deepspeed/README.md lists what is taken"),
    (zero(stage3_max_live_parameters=1), 2, "zero_optimization.stage3_max_live_parameters has no effect in stage 2", "remove zero_optimization.stage3_max_live_parameters"),
    (zero(allgather_bucket_size=2), 3, "zero_optimization.allgather_bucket_size has no effect in stage 3", "remove zero_optimization.allgather_bucket_size"),
    (zero(reduce_bucket_size=0), 2, "zero_optimization.reduce_bucket_size is 0", "set zero_optimization.reduce_bucket_size to a whole number > 0"),
    (zero(allgather_bucket_size=3), 2, "zero_optimization.allgather_bucket_size is 3", "set zero_optimization.allgather_bucket_size to a whole number > 0 and divisible by 2"),
    (zero(reduce_bucket_size="5e8"), 2, 'zero_optimization.reduce_bucket_size is "5e8"', "set zero_optimization.reduce_bucket_size to a whole number > 0"),
    (zero(overlap_comm="yes"), 2, 'zero_optimization.overlap_comm is "yes"', "set zero_optimization.overlap_comm to true or false"),
    (zero(offload_optimizer={"device": "gpu"}), 2, 'zero_optimization.offload_optimizer.device is "gpu"', "set zero_optimization.offload_optimizer.device to cpu or none"),
    (zero(offload_param={"pin_memry": True}), 3, "zero_optimization.offload_param.pin_memry is not a knob that is taken here", "did you mean pin_memory?"),
    (zero(offload_optimizer={"device": "cpu", "buffer_count": 4}), 3, "zero_optimization.offload_optimizer.buffer_count has an effect with nvme only, which is not supported", "remove zero_optimization.offload_optimizer.buffer_count"),
    (zero(offload_param={"device": "cpu"}), 2, "zero_optimization.offload_param has no effect in stage 2", "remove zero_optimization.offload_param"),
    ({"zero_optimization": 2}, 2, "zero_optimization is 2", "make zero_optimization a section of keys and values"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "stage", "what", "fix"), WRONG, ids=[what[:50] for _, _, what, _ in WRONG])
def test_a_mistake(given: Any, stage: int, what: str, fix: str) -> None:
    assert refusal(given, stage) == (what, fix)


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_nvme_is_refused_with_the_reason(part: str) -> None:
    what, fix = refusal(zero(**{part: {"device": "nvme", "nvme_path": "/local", "buffer_count": 5}}))
    assert what.startswith(
        f"zero_optimization.{part}.device is nvme, which is not supported: it needs DeepSpeed's compiled"
    )
    assert fix == f"set zero_optimization.{part}.device to cpu"


def test_several_mistakes_come_at_once_and_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"gradient_clipping": 1.0, "bf16": {"enabled": True}} | zero(stage=2)))
    with pytest.raises(ConfigError) as caught:
        load_knobs(str(file), 3)
    assert caught.value.what.splitlines() == [
        f'{file}: gradient_clipping is 1.0, but optim.max_grad_norm decides it; write "auto" or remove gradient_clipping',
        f'{file}: bf16 is {{"enabled": true}}, but precision.compute decides it; write "auto" or remove bf16',
        f"{file}: zero_optimization.stage is 2, but sharding.strategy is zero3; set sharding.strategy to the stage you "
        "want, or write 3 or remove zero_optimization.stage",
    ]
    assert caught.value.fix == "correct these 3 places"


@pytest.mark.parametrize(
    ("text", "what"), [(None, "cannot be read: No such file"), ("{", "not JSON: "), ("[1]", "holds [1], not keys")]
)
def test_a_file_that_is_none(text: str | None, what: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    message, fix = refusal(str(tmp_path / "ds.json"))
    assert what in message
    assert fix
