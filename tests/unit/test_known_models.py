"""The table of known models: what it says is what Transformers builds, and only the dry run may use it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sft_dist.config.schema import FullMethod, QloraMethod
from sft_dist.errors import ConfigError, PlanError
from sft_dist.model.build import build_meta_model
from sft_dist.model.describe import describe_dense, describe_model
from sft_dist.model.hub import ModelNotHere, config_source, model_folder
from sft_dist.model.known import (
    KnownModel,
    ModelNotKnown,
    known_config,
    known_model,
    known_models,
    known_models_allowed,
    nearest_models,
    table,
)
from sft_dist.model.support import heads_of, load_model_config

ARCHITECTURES = Path(__file__).parents[1] / "architectures"

# Published numbers of parameters.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/phi-1_5": 1_418_270_720,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/phi-4": 14_659_507_200,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "deepseek-ai/deepseek-llm-7b-base": 6_910_365_696,
}
# Of LLM-jp-3 its card gives the number without embeddings.
WITHOUT_EMBEDDINGS = {
    "llm-jp/llm-jp-3-1.8b": 1_459_718_144,
    "llm-jp/llm-jp-3-3.7b": 3_171_068_928,
    "llm-jp/llm-jp-3-13b": 12_688_184_320,
    "llm-jp/llm-jp-3-172b": 169_947_181_056,
}

# Names that say no size in billions.
WITHOUT_SIZE = ("microsoft/", "mistralai/Mistral-Nemo")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, so that what a developer fetched changes nothing."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def fetched(hub_cache: Path) -> Callable[[str, dict[str, Any]], None]:
    """Puts a ``config.json`` into the hub cache, as a fetch would."""

    def put(path: str, config: dict[str, Any]) -> None:
        folder = hub_cache / f"models--{path.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return put


def by_first_id(model: KnownModel) -> str:
    return model.ids[0]


# What it says


def parameters(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model", table(), ids=by_first_id)
def test_transformers_builds_as_many_parameters(model: KnownModel) -> None:
    """Of one and of two layers, because all layers are alike: 126 of them would take long."""
    key = "n_layer" if "n_layer" in model.config else "num_hidden_layers"
    one, two = (parameters({**model.config, key: layers}) for layers in (1, 2))
    assert one + (model.config[key] - 1) * (two - one) == model.num_parameters


@pytest.mark.parametrize("path", ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B", "google/gemma-3-1b-it"])
def test_all_layers_are_alike(path: str) -> None:
    config = known_config(path)
    assert config is not None
    assert parameters(config) == known_model(path).num_parameters  # type: ignore[union-attr]


def test_it_has_the_published_number_of_parameters() -> None:
    assert {path: model.num_parameters for path in PUBLISHED if (model := known_model(path))} == PUBLISHED


@pytest.mark.parametrize(("path", "number"), WITHOUT_EMBEDDINGS.items())
def test_it_has_the_published_number_without_embeddings(path: str, number: int) -> None:
    model = known_model(path)
    assert model is not None
    assert model.num_parameters - 2 * model.config["vocab_size"] * model.config["hidden_size"] == number


def test_the_size_in_the_name_is_about_the_number_of_parameters() -> None:
    """Coarse, for a line that was put at the wrong model: names round 1.4 billion to 1B and 8.5 to 7B."""
    for path in known_models():
        name = path.rpartition("/")[2].lower().replace("-a3b", "")
        found = re.search(r"(?:(\d+)x)?(\d+(?:\.\d+)?)b\b", name)
        assert (found is None) == path.startswith(WITHOUT_SIZE), path
        model = known_model(path)
        if found is not None and model is not None:
            size = int(found[1] or 1) * float(found[2]) * 1e9
            assert 0.75 * size < model.num_parameters < 1.5 * size, path


@pytest.mark.parametrize("folder", sorted(ARCHITECTURES.iterdir()), ids=lambda folder: folder.name)
def test_it_agrees_with_the_true_configuration(folder: Path) -> None:
    true = AutoConfig.from_pretrained(folder)
    config = known_config(folder.name.replace("--", "/"))
    assert config is not None
    assert deciding(AutoConfig.for_model(**config)) == deciding(true)


def deciding(config: PretrainedConfig) -> dict[str, Any]:
    """What of a configuration decides shapes and arithmetic, after Transformers filled in what was left out."""
    keys = (
        "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "max_position_embeddings", "tie_word_embeddings", "hidden_act", "hidden_activation", "attention_bias",
        "mlp_bias", "sliding_window", "layer_types", "rope_parameters", "attention_dropout",
        "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    )  # fmt: skip
    values = config.to_dict()
    return {"heads": heads_of(config), **{key: values.get(key) for key in keys}}


def test_no_id_is_twice_in_it() -> None:
    names = [name.lower() for name in known_models()]
    assert len(names) == len(set(names)) > 150


def test_every_entry_says_where_it_is_from() -> None:
    for model in table():
        assert "config.json of" in model.source or model.ids[0].startswith(("llm-jp/llm-jp-3-7.2b", "ibm/PowerLM"))


# How it is asked


def test_upper_and_lower_case_are_alike() -> None:
    assert known_config("META-LLAMA/llama-3.1-8b") == known_config("meta-llama/Llama-3.1-8B") is not None


def test_a_name_without_organisation_is_enough_where_one_model_has_it() -> None:
    assert known_config("Llama-3.1-8B") == known_config("meta-llama/Llama-3.1-8B")
    # Two repositories have this name, with the same configuration.
    assert known_config("Llama-2-7b-hf") == known_config("NousResearch/Llama-2-7b-hf") is not None


def test_a_name_that_two_models_have_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (KnownModel((f"{org}/m-7b",), 1, "", {"hidden_size": size}) for org, size in (("a", 1), ("b", 2)))
    from sft_dist.model import known

    monkeypatch.setattr(known, "table", lambda: (one, two))
    known._index.cache_clear()
    try:
        assert known_config("m-7b") is None
        assert known_config("b/m-7b") == {"hidden_size": 2}
    finally:
        known._index.cache_clear()


def test_what_is_not_known_is_none() -> None:
    assert known_config("nobody/nothing-7b") is None
    assert known_config("Llama") is None
    assert known_config("") is None


def test_what_is_given_out_can_be_changed_without_harm() -> None:
    config = known_config("meta-llama/Llama-3.1-8B")
    assert config is not None
    config["rope_scaling"]["factor"] = config["hidden_size"] = 1
    again = known_config("meta-llama/Llama-3.1-8B")
    assert again is not None
    assert (again["rope_scaling"]["factor"], again["hidden_size"]) == (8.0, 4096)


def test_the_nearest_names() -> None:
    assert nearest_models("meta-llama/Llama-3.1-9B")[0] == "meta-llama/Llama-3.1-8B"
    assert nearest_models("llama-3.1-8b-instrct")[0] == "meta-llama/Llama-3.1-8B-Instruct"
    assert nearest_models("qwen/qwen2.5-7b-instuct")[0] == "Qwen/Qwen2.5-7B-Instruct"
    assert nearest_models("zzz") == []


def test_it_needs_no_torch() -> None:
    code = "import sys; from sft_dist.model.known import known_config as k; assert k('Llama-3.1-8B'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# Where it is used


def test_training_does_not_use_it() -> None:
    for use in (load_model_config, lambda path, revision: build_meta_model(path, revision, FullMethod(), "bf16")):
        with pytest.raises(ModelNotHere, match="not in the local hub cache"):
            use("meta-llama/Llama-3.2-1B", None)
    with known_models_allowed():
        load_model_config("meta-llama/Llama-3.2-1B", None)
    with pytest.raises(ModelNotHere):
        load_model_config("meta-llama/Llama-3.2-1B", None)


def test_the_dry_run_describes_a_model_that_is_not_here() -> None:
    with known_models_allowed():
        full = describe_model("meta-llama/Llama-3.2-1B", None, FullMethod(), "bf16")
        qlora = describe_model("meta-llama/Llama-3.2-1B", None, QloraMethod(type="qlora"), "bf16")
        dense = describe_dense("meta-llama/Llama-3.2-1B", None, "bf16")
    assert full.path == "meta-llama/Llama-3.2-1B"
    assert full.num_parameters == dense.num_parameters == 1_235_814_400
    assert (full.num_layers, full.num_heads, full.num_kv_heads, full.head_dim) == (16, 32, 8, 64)
    assert full.max_positions == 131072
    assert 0 < qlora.num_trainable < full.num_trainable


def test_tokenizer_and_weights_are_not_known() -> None:
    with known_models_allowed():
        for part in ("tokenizer", "weights"):
            with pytest.raises(ModelNotHere):
                model_folder("meta-llama/Llama-3.2-1B", None, part)  # type: ignore[arg-type]
        with pytest.raises(ModelNotHere):  # the id of a new token is the tokenizer's
            describe_model("meta-llama/Llama-3.2-1B", None, FullMethod(), "bf16", ("<tool>",))


def test_the_hub_cache_goes_before_it(fetched: Callable[[str, dict[str, Any]], None]) -> None:
    true = {**(known_config("meta-llama/Llama-3.2-1B") or {}), "num_hidden_layers": 3}
    fetched("meta-llama/Llama-3.2-1B", true)
    with known_models_allowed():
        assert load_model_config("meta-llama/Llama-3.2-1B", None).num_hidden_layers == 3
        assert config_source("meta-llama/Llama-3.2-1B", None) is None


def test_a_folder_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "meta-llama" / "Llama-3.2-1B"
    folder.mkdir(parents=True)
    config = {**(known_config("meta-llama/Llama-3.2-1B") or {}), "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with known_models_allowed():
        assert load_model_config("meta-llama/Llama-3.2-1B", None).num_hidden_layers == 3
        (folder / "config.json").unlink()
        with pytest.raises(ConfigError, match=r"has no config\.json"):
            load_model_config("meta-llama/Llama-3.2-1B", None)


def test_it_says_that_it_was_used() -> None:
    with known_models_allowed():
        assert (
            config_source("LLAMA-3.1-70b", None)
            == "the table of known models (config.json of meta-llama/Llama-3.1-70B)"
        )
        source = config_source("meta-llama/Llama-3.1-70B", "0a1b2c")
    assert source is not None
    assert source.endswith("; revision 0a1b2c was not looked at)")


def test_a_model_that_is_neither_here_nor_known() -> None:
    with known_models_allowed(), pytest.raises(PlanError) as caught:
        load_model_config("meta-llama/Llama-3.1-8B-Instrct", None)
    assert isinstance(caught.value, ModelNotKnown)
    assert caught.value.what.startswith("model.path: meta-llama/Llama-3.1-8B-Instrct is not in the local hub cache")
    told = "(nothing of it is there), nor is it among the known models (nearest: meta-llama/Llama-3.1-8B-Instruct, "
    assert told in caught.value.what
    assert caught.value.fix == "correct the id, or bring it here: sft-dist model fetch CONFIG --no-weights"
    with known_models_allowed(), pytest.raises(PlanError) as caught:
        load_model_config("zzz/zzz", None)
    assert caught.value.fix == "bring it here: sft-dist model fetch CONFIG --no-weights"


@pytest.mark.parametrize("path", ["/absent/Llama-3.1-8B", "./Llama-3.1-8B", "a/b/Llama-3.1-8B"])
def test_a_folder_that_is_not_there_is_no_known_model(path: str) -> None:
    with known_models_allowed(), pytest.raises(ModelNotHere):
        load_model_config(path, None)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "a mixture of 8 experts"),
        ("Qwen/Qwen3-30B-A3B", "a mixture of 128 experts"),
        ("google/gemma-2-9b", "sets attn_logit_softcapping=50.0"),
        ("tiiuae/falcon-40b", "may mix the rows of a pack"),
        ("Fugaku-LLM/Fugaku-LLM-13B", "sets attn_pdrop=0.1"),
    ],
)
def test_what_training_refuses_is_refused(path: str, why: str, fetched: Callable[[str, dict[str, Any]], None]) -> None:
    with known_models_allowed(), pytest.raises(ConfigError, match=re.escape(why)) as planned:
        load_model_config(path, None)
    fetched(path, known_config(path) or {})
    with pytest.raises(ConfigError) as trained:
        load_model_config(path, None)
    assert (planned.value.what, planned.value.fix) == (trained.value.what, trained.value.fix)


REFUSED = re.compile("experts|softcapping|attn_pdrop|mix the rows")


def test_all_others_can_be_described() -> None:
    refused = set()
    with known_models_allowed():
        for model in table():
            try:
                config = load_model_config(model.ids[-1], None)
            except ConfigError as e:
                refused.add(model.config["model_type"])
                found = REFUSED.search(e.what) is not None
            else:
                query, keys, dim = heads_of(config)
                found = query % keys == 0 and dim > 0
            assert found, model.ids
    assert refused == {"mixtral", "qwen3_moe", "gemma2", "falcon", "gpt2"}
