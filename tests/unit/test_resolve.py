"""One description of a run: pure, equal to the model that is built, and summing to the whole over all ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.model.build import build_meta_model
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.model.support import load_model_config
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from tests.helpers.cells import config
from tests.helpers.loaded import load_model

METHODS = pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix projection"])
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
WORLDS = (1, 2, 3, 8)


def run_of(path: Path, method: str = "full", strategy: str = "ddp", world_size: int = 1, **sections: Any) -> Run:
    return resolve(config(str(path), method, strategy, **sections), WorldShape(1, world_size))


# Pure


def test_resolve_needs_no_process_group_and_changes_nothing(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("resolve touched torch.distributed")

    for name in ("init_process_group", "get_rank", "get_world_size", "barrier", "all_reduce"):
        monkeypatch.setattr(dist, name, refused)
    environment, random_state, threads = dict(os.environ), torch.random.get_rng_state(), torch.get_num_threads()
    for method in ("full", "lora", "qlora"):
        for strategy in STRATEGIES:
            first, second = (run_of(tiny_base, method, strategy, 8) for _ in range(2))
            assert first == second
            assert registry.describe(first, 3) == registry.describe(second, 3)
    assert dict(os.environ) == environment
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert not dist.is_initialized()


def test_a_run_is_frozen_and_holds_no_tensor(tiny_base: Path) -> None:
    run = run_of(tiny_base, "qlora", "fsdp2", 2)
    with pytest.raises(FrozenInstanceError):
        run.seed = 1  # type: ignore[misc]

    def leaves(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                yield from leaves(getattr(value, field.name))
        elif isinstance(value, tuple | list):
            for item in value:
                yield from leaves(item)
        else:
            yield value

    torch_parts = [v for v in leaves(run) if type(v).__module__.startswith(("torch", "transformers", "peft"))]
    assert torch_parts == []


def test_the_description_imports_no_torch() -> None:
    code = (
        "import sys, sft_dist.run, sft_dist.resolve, sft_dist.runtime.accelerate_environment, sft_dist.data.batch, sft_dist.model.spec, sft_dist.sharding.spec;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_derived(tiny_base: Path) -> None:
    cfg = config(str(tiny_base), "lora", "zero2", precision={"compute": "bf16", "reduce": "bf16"})
    run = resolve(cfg, WorldShape(2, 3))
    assert (run.world.size, run.batch.world_size, run.strategy) == (6, 6, "zero2")
    assert (run.batch.global_batch_size, run.batch.micro_batch_size, run.batch.max_seq_len) == (7, 2, 48)
    assert run.batch.gradient_accumulation_steps == 1
    assert (run.precision.compute, run.precision.master, run.precision.reduce) == ("bf16", "fp32", "bf16")
    assert (run.model.compute, run.model.method, run.optim, run.seed) == ("bf16", cfg.method, cfg.optim, 3)
    assert (run.num_epochs, run.max_steps, run.output_dir) == (None, 6, "unused")


@pytest.mark.parametrize(
    ("train", "sequences", "steps"), [({"max_steps": 10}, 3, 10), ({"num_epochs": 3, "max_steps": None}, 15, 9)]
)
def test_the_number_of_steps(train: dict[str, Any], sequences: int, steps: int, tiny_base: Path) -> None:
    assert (
        run_of(tiny_base, train=train).num_steps(sequences) == steps
    )  # 15 sequences in batches of 7: 3 steps an epoch


# The description against the model


@METHODS
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["tiny_base", "tied_base"])
def test_the_description_is_the_model(method: str, compute: str, base: str, request: pytest.FixtureRequest) -> None:
    run = run_of(request.getfixturevalue(base), method, precision={"compute": compute})
    model = load_model(run.model, seed=0)
    described = [(p.name, p.shape, p.trainable) for p in run.model.parameters]
    assert described == [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    stored = {name: p.dtype for name, p in model.named_parameters()}
    assert set(stored.values()) == {{"fp32": torch.float32, "bf16": torch.bfloat16}[compute]}
    assert run.model.buffer_bytes == sum(b.nbytes for b in model.buffers())
    assert run.model.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert run.model.blocks == tuple(model.blocks()) != ()
    for parameter in run.model.parameters:
        inside = [block for block in run.model.blocks if parameter.name.startswith(block + ".")]
        assert parameter.block == (inside[0] if inside else None)


def test_counts_by_hand(tiny_base: Path, tied_base: Path) -> None:
    hf = load_model_config(str(tiny_base), None)
    hidden, intermediate, vocab, layers = hf.hidden_size, hf.intermediate_size, hf.vocab_size, hf.num_hidden_layers
    kv = hidden // hf.num_attention_heads * hf.num_key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * kv
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    spec = run_of(tiny_base).model
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers) == (vocab, hidden, layers)
    assert spec.num_trainable == 2 * vocab * hidden + layers * layer + hidden
    assert run_of(tied_base).model.num_trainable == vocab * hidden + layers * layer + hidden
    # LoRA: r * (in + out) for each of the seven linear layers of a block, r = 4.
    adapters = 4 * (4 * hidden + 2 * (hidden + kv) + 3 * (hidden + intermediate))
    assert run_of(tiny_base, "lora").model.num_trainable == layers * adapters


def test_heads_are_those_of_the_model(tiny_base: Path, tmp_path: Path) -> None:
    """Fewer key and value heads than queries have; what ranks that share a sequence repeat is planned from them."""
    model = resolve(config(str(tiny_base)), WorldShape()).model
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (4, 2, 16)
    model = resolve(config(str(model_folder(tmp_path, num_key_value_heads=1, head_dim=24))), WorldShape()).model
    assert (model.num_kv_heads, model.head_dim) == (1, 24)


def test_adapters_start_the_same_for_the_same_seed_and_change_nothing(tiny_base: Path) -> None:
    run = run_of(tiny_base, "lora")
    first, second, other = (
        {n: p.detach() for n, p in load_model(run.model, seed=s).named_parameters() if p.requires_grad}
        for s in (1, 1, 2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(first[n], other[n]) == ("lora_B" in n) for n in first)
    assert all(float(first[n].abs().max()) == 0 for n in first if "lora_B" in n)


@METHODS
def test_the_meta_model_holds_no_weights(method: str, tiny_base: Path) -> None:
    """What it holds is the rotary frequencies, which are in no file: half a head's size, twice."""
    run = run_of(tiny_base, method)
    meta = build_meta_model(run.model.path, None, run.model.method, "bf16")
    assert all(p.is_meta for p in meta.parameters())
    real = {name.rpartition(".")[2]: b.numel() for name, b in meta.named_buffers() if not b.is_meta}
    assert real == {"inv_freq": 8, "original_inv_freq": 8}


def test_a_tied_output_layer_stays_tied(tied_base: Path) -> None:
    run = run_of(tied_base)
    for model in (load_model(run.model, seed=0), build_meta_model(run.model.path, None, run.model.method, "fp32")):
        embedding, head = model.causal_lm.get_input_embeddings(), model.causal_lm.get_output_embeddings()
        assert embedding.weight is head.weight


# The shards


@lru_cache
def bf16_run(path: Path, method: str, strategy: str) -> Run:
    return run_of(path, method, strategy, precision={"compute": "bf16"})


@METHODS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_ranks_hold_the_whole_model(method: str, strategy: str, world_size: int, tiny_base: Path) -> None:
    run = replace(bf16_run(tiny_base, method, strategy), world=WorldShape(1, world_size))
    specs = [registry.describe(run, rank) for rank in range(world_size)]
    assert [s.rank for s in specs] == list(range(world_size))
    assert {s.strategy for s in specs} == {strategy}
    for index, parameter in enumerate(run.model.parameters):
        shards = [s.parameters[index] for s in specs]
        held = sum(s.local_numel for s in shards)
        assert {(s.name, s.requires_grad) for s in shards} == {(parameter.name, parameter.trainable)}
        assert held >= parameter.numel
        if strategy in ("ddp", "zero1", "zero2"):
            assert held == parameter.numel * world_size
        elif strategy == "fsdp2":
            chunks = torch.empty(parameter.shape, device="meta").chunk(world_size)
            expected = [c.numel() for c in chunks] + [0] * (world_size - len(chunks))
            assert [s.local_numel for s in shards] == expected
            assert held == parameter.numel
        else:
            assert held < parameter.numel + world_size
            assert len({s.local_numel for s in shards}) == 1

    masters = [s.optimizer_numel for s in specs]
    total = run.model.num_trainable
    if strategy == "ddp":
        assert masters == [total] * world_size
    elif strategy == "fsdp2":
        assert sum(masters) == total
    else:
        padding = len(run.model.trainable) * 2 * world_size
        assert total <= sum(masters) <= total + padding
        assert max(masters) - min(masters) == 0
    for spec in specs:
        assert spec.optimizer_dtype == "fp32"
        assert spec.parameter_bytes == sum(s.local_numel * DTYPE_BYTES[s.dtype] for s in spec.parameters)
        trainable = "bf16" if strategy.startswith("zero") else "fp32"
        assert {s.dtype for s in spec.parameters if s.requires_grad} == {trainable}
        assert {s.dtype for s in spec.parameters if not s.requires_grad} <= {"bf16"}


# What is refused


def model_folder(folder: Path, **settings: Any) -> Path:
    defaults = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**defaults, **settings}), encoding="utf-8")
    return folder


def refusal(path: Path, **sections: Any) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        run_of(path, **sections)
    assert str(path) in caught.value.what or "method" in caught.value.what
    assert caught.value.fix
    return caught.value.what, caught.value.fix


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    what, fix = refusal(tmp_path)
    assert what == f"model.path: {tmp_path} has no config.json"
    assert fix == "give a folder in Hugging Face layout"


def test_a_path_that_is_nothing(tmp_path: Path) -> None:
    what, _ = refusal(tmp_path / "absent")
    assert what == f"model.path: the folder {tmp_path / 'absent'} does not exist"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_configuration_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    refusal(tmp_path)


@pytest.mark.parametrize("model_type", ["t5", "bart", "marian", "vit"])  # BART and Marian have a causal head too
def test_a_model_that_is_no_decoder(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    what, fix = refusal(tmp_path)
    assert f"is a {model_type} model" in what
    assert "decoder-only" in fix


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "mamba"},
        {"model_type": "rwkv"},
        {"model_type": "recurrent_gemma"},
        {"model_type": "bloom"},
        {"model_type": "qwen3_next", "num_experts": 0, "layer_types": ["linear_attention"]},
        {"model_type": "lfm2", "layer_types": ["conv"]},
    ],
    ids=lambda settings: settings["model_type"],
)
def test_a_model_that_may_mix_the_rows_of_a_pack(settings: dict[str, Any], tmp_path: Path) -> None:
    """Packed attention keeps rows apart; a state that runs through the whole sequence does not."""
    what, fix = refusal(model_folder(tmp_path, **settings))
    assert "may mix the rows of a pack" in what
    assert "attention interface" in fix


@pytest.mark.parametrize(("attribute", "value"), [("_is_stateful", True), ("_supports_attention_backend", False)])
def test_each_sign_of_such_a_model_is_enough(
    attribute: str, value: bool, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, attribute, value)
    assert "may mix the rows of a pack" in refusal(tiny_base)[0]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": 30.0},
            "final_logit_softcapping",
        ),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits_scaling"),
        ({"model_type": "cohere", "logit_scale": 0.0625}, "logit_scale"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "gpt_bigcode", "attn_pdrop": 0.1}, "attn_pdrop"),
    ],
)
def test_settings_that_would_be_left_out(settings: dict[str, Any], key: str, tmp_path: Path) -> None:
    what, fix = refusal(model_folder(tmp_path, **settings))
    assert re.search(f"sets {key}=[0-9.]+, which is not supported", what)
    assert fix == "choose a model without logit scaling, soft-capping or attention dropout"


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "mixtral", "num_local_experts": 8},
        {"model_type": "qwen3_moe", "num_experts": 8},
        {"model_type": "deepseek_v3", "n_routed_experts": 8},
    ],
    ids=lambda settings: settings["model_type"],
)
def test_a_mixture_of_experts_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    what, fix = refusal(model_folder(tmp_path, **settings))
    assert f"is a {settings['model_type']} model with a mixture of 8 experts: its router's balancing loss" in what
    assert fix == "choose a dense model"


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_dropout": 0.0},
        {"model_type": "granite", "logits_scaling": 1.0},
        {"model_type": "mistral", "sliding_window": 4},
    ],
)
def test_settings_that_change_nothing_are_accepted(settings: dict[str, Any], tmp_path: Path) -> None:
    assert load_model_config(str(model_folder(tmp_path, **settings)), None).vocab_size == 64


def test_a_target_module_that_the_model_lacks(tiny_base: Path) -> None:
    cfg = config(str(tiny_base), "lora").model_dump()
    cfg["method"]["target_modules"] = ["q_proj", "qkv"]
    with pytest.raises(ConfigError) as caught:
        resolve(Config.model_validate(cfg), WorldShape())
    assert caught.value.what == "method.target_modules: the model has no linear layer named qkv"
    assert caught.value.fix.startswith("choose from ")
    assert "q_proj" in caught.value.fix


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter, not a model") as caught:
        run_of(tmp_path, "full")
    assert "method.init_from to this folder" in caught.value.fix


def test_a_folder_that_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "swallow-8b").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        resolve(config("models/swalow-8b", "full"), WorldShape())
    assert caught.value.fix == "sft-dist model fetch CONFIG; or did you mean the folder models/swallow-8b?"
    with pytest.raises(ConfigError) as caught:
        resolve(config("models/other", "full"), WorldShape())
    assert caught.value.fix == ("sft-dist model fetch CONFIG; or correct the name: the folder models has no other")


def test_a_pattern_that_matches_no_whole_path(tmp_path: Path) -> None:
    cfg = config(str(model_folder(tmp_path)), "lora").model_dump()
    cfg["method"]["target_modules"] = ["re:q_proj"]
    with pytest.raises(ConfigError) as caught:
        resolve(Config.model_validate(cfg), WorldShape())
    assert "re:q_proj matches no linear layer; behind re: stands an expression for a whole path" in caught.value.what
    assert caught.value.fix == "write re:.*q_proj for what ends so"
    cfg["method"]["target_modules"] = [r"re:.*layers\.77\..*"]
    with pytest.raises(ConfigError) as caught:
        resolve(Config.model_validate(cfg), WorldShape())
    last = "model.layers.0.mlp.down_proj"
    assert caught.value.fix == f"correct the expression; the last linear layer is {last}", "no .* would help"


def test_a_weight_that_nf4_cannot_split(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, hidden_size=20, intermediate_size=6)
    with pytest.raises(ConfigError, match="not a multiple of 64") as caught:
        run_of(folder, "qlora")
    assert caught.value.fix == "name it in method.quantization.skip or set that to auto, or use method.type lora"
    assert run_of(folder, "lora").model.num_trainable > 0


def test_configs_of_tests_are_what_a_user_could_write(tiny_base: Path) -> None:
    cfg = config(str(tiny_base), "qlora", "zero3")
    assert Config.model_validate(cfg.model_dump()) == cfg
