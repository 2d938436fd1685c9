"""Virtual tokens in front of every row: the numbers of plain PEFT, and where they come from."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from sft_dist.config.schema import Fsdp2Sharding, VirtualTokensMethod
from sft_dist.data.loader import collate
from sft_dist.errors import ConfigError
from sft_dist.model.build import SftModel, build_model
from sft_dist.model.initial_virtual_tokens import init_token_ids
from sft_dist.model.virtual_tokens import LongRows, cut_off, put_before, to_save
from sft_dist.model.weights import Part, Weights
from sft_dist.plan.activations import trace
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.activation_checkpointing import apply_activation_checkpointing
from tests.helpers import cells, tiny_model
from tests.helpers.loaded import load_model
from tests.helpers.tiny_model import build_base, build_tokenizer

ROWS = [0, 3, 4]
COUNT = 5

# What a user of plain PEFT would write for the same.
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT}
PLAIN: dict[str, PromptLearningConfig] = {
    "prompt": PromptTuningConfig(**COMMON),
    "p_tuning": PromptEncoderConfig(**COMMON, encoder_hidden_size=24),
    "p_tuning lstm": PromptEncoderConfig(**COMMON, encoder_hidden_size=24, encoder_reparameterization_type="LSTM"),
    "prefix": PrefixTuningConfig(**COMMON),
    "prefix projection": PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=24),
}


@pytest.fixture(scope="module")
def windowed_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token sees the eight before it alone: the virtual ones are soon out of sight."""
    folder = tmp_path_factory.mktemp("windowed-base")
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=8, initializer_range=0.08, head_dim=24,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def plain(base: Path, config: PromptLearningConfig) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    adapted = get_peft_model(model, copy.deepcopy(config))
    assert isinstance(adapted, PeftModel)
    return adapted


def built(base: Path, method: str, *, checkpointing: str = "none", compute: str = "fp32") -> SftModel:
    sections: dict[str, Any] = {"precision": {"compute": compute}, "activation_checkpointing": {"mode": checkpointing}}
    run = resolve(cells.config(str(base), method, **sections), WorldShape())
    model = load_model(run.model, seed=7)
    apply_activation_checkpointing(model, run.activation_checkpointing)
    return model


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("base", ["tiny_base", "windowed_base"])
def test_logits_and_gradients_are_those_of_plain_peft(base: str, method: str, request: pytest.FixtureRequest) -> None:
    """Rows of one micro-batch against rows one by one; every block is recomputed, which PEFT's prefixes cannot be."""
    folder: Path = request.getfixturevalue(base)
    model, theirs = built(folder, method, checkpointing="full"), plain(folder, PLAIN[method])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    counterparts = {n: theirs.get_parameter(n.replace("prompt.encoder.", "prompt_encoder.default.")) for n in trained}
    for name, parameter in trained.items():
        counterparts[name].data.copy_(parameter.data)
    batch = collate(cells.synthetic_data(packing=False), ROWS)
    rows = batch.input_ids[0].split(batch.seq_lens)
    expected = torch.cat([theirs(input_ids=ids[None]).logits[0, -len(ids) :] for ids in rows])
    expected = expected.index_select(0, batch.supervised_index)

    torch.testing.assert_close(model(batch, logits=True), expected, rtol=1e-5, atol=1e-5)
    loss = model(batch)
    torch.testing.assert_close(loss, F.cross_entropy(expected, batch.labels, reduction="sum"), rtol=1e-5, atol=0)
    loss.backward()
    F.cross_entropy(expected, batch.labels, reduction="sum").backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained.keys()
    for name, parameter in trained.items():
        expected_grad = counterparts[name].grad
        assert parameter.grad is not None
        assert expected_grad is not None
        assert expected_grad.any(), name
        scale = float(expected_grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected_grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_rows_do_not_see_each_others_virtual_tokens(tiny_base: Path) -> None:
    """A row's logits are the same beside others as alone, though every row has its own copy."""
    model, data = built(tiny_base, "prefix"), cells.synthetic_data(packing=False)
    together = model.hidden_states(collate(data, ROWS))
    alone = torch.cat([model.hidden_states(collate(data, [row])) for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_putting_before_and_cutting_off() -> None:
    rows, virtual = torch.arange(10, 15), torch.tensor([1, 2])
    long_rows = put_before(virtual, rows, (2, 3))
    assert long_rows.tolist() == [1, 2, 10, 11, 1, 2, 12, 13, 14]
    assert cut_off(long_rows, 2, (4, 5)).tolist() == rows.tolist()


def test_the_bounds_of_rows_that_have_grown() -> None:
    """Attention on a GPU reads ``cu_seqlens``, on a CPU ``seq_lens``."""
    batch = collate(cells.synthetic_data(packing=False), ROWS)
    for with_virtual in (False, True):
        grown = LongRows.of(batch, COUNT, with_virtual=with_virtual)
        assert grown.seq_lens == tuple(n + COUNT for n in batch.seq_lens)
        assert grown.max_seq_len == batch.max_seq_len + COUNT
        assert grown.cu_seqlens.dtype == torch.int32
        assert grown.cu_seqlens.diff().tolist() == list(grown.seq_lens)
        first = 0 if with_virtual else COUNT
        positions = [list(range(first, n + COUNT)) for n in batch.seq_lens]
        assert grown.position_ids.tolist() == [list(itertools.chain(*positions))]


@pytest.mark.parametrize("text", ["Say: ", "東", "A text of more tokens than there are virtual ones"])
def test_text_starts_it_as_in_peft(tiny_base: Path, text: str) -> None:
    config = PromptTuningConfig(
        **COMMON, prompt_tuning_init="TEXT", prompt_tuning_init_text=text, tokenizer_name_or_path=str(tiny_base)
    )
    method = {"type": "prompt", "num_virtual_tokens": COUNT, "init_text": text}
    run = resolve(cells.config(str(tiny_base), method), WorldShape())
    model = load_model(run.model, seed=7)
    expected = plain(tiny_base, config).prompt_encoder.default.embedding.weight
    assert torch.equal(model.get_parameter("prompt.encoder.embedding.weight"), expected)
    assert len({tuple(row) for row in expected.tolist()}) > 2


@pytest.mark.parametrize(("layers", "there"), [(None, {0, 1}), (1, {0}), (3, {0, 1, 2})])
def test_an_lstm_has_as_many_layers_as_stated(tiny_base: Path, layers: int | None, there: set[int]) -> None:
    """Two if nothing is, as in PEFT."""
    method = {"type": "p_tuning", "encoder": "lstm", "encoder_hidden_size": 24, "encoder_num_layers": layers}
    spec = resolve(cells.config(str(tiny_base), {"num_virtual_tokens": COUNT, **method}), WorldShape()).model
    numbers = [p.name.removesuffix("_reverse").rpartition("_l")[2] for p in spec.trainable if "lstm_head." in p.name]
    assert {int(number) for number in numbers} == there


def test_a_rank_reads_its_own_part_of_the_text_alone(tiny_base: Path) -> None:
    """A flat half of five embeddings of 64: the last half of the third, and two more."""
    run = resolve(cells.config(str(tiny_base), "prompt text"), WorldShape())
    model, read = build_model(run.model), list[int]()
    weights = Weights(model, run.model, seed=7, on_bytes=read.append)
    name = "prompt.encoder.embedding.weight"
    whole, half = torch.empty(320), torch.empty(160)
    weights.read_into(name, Part(model.get_parameter(name), whole, 0))
    read.clear()
    weights.read_into(name, Part(model.get_parameter(name), half, 160))
    assert torch.equal(half, whole[160:])
    assert sum(read) == half.nbytes


def test_first_values_are_drawn_as_torch_draws_them(tiny_base: Path) -> None:
    """By (seed, name): no two parameters alike, the same again; spread as ``reset_parameters`` of each module does."""
    for method in ("p_tuning lstm", "prefix projection"):
        first, again = built(tiny_base, method), built(tiny_base, method)
        seen = set()
        for name, parameter in first.named_parameters():
            if not parameter.requires_grad:
                continue
            assert torch.equal(parameter, again.get_parameter(name))
            seen.add(tuple(parameter.flatten()[:4].tolist()))
            owner = first.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.Embedding):
                assert 0.8 < float(parameter.detach().std()) < 1.2
                continue
            fan_in = owner.in_features if isinstance(owner, nn.Linear) else 24
            largest = float(parameter.detach().abs().max())
            assert 0.75 / math.sqrt(fan_in) < largest <= 1 / math.sqrt(fan_in), name
        assert len(seen) == len([p for p in first.parameters() if p.requires_grad])


def test_bf16_computes_in_bf16(tiny_base: Path) -> None:
    model = built(tiny_base, "p_tuning lstm", compute="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    hidden = model.hidden_states(collate(cells.synthetic_data(packing=False), ROWS))
    assert hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["prompt", "p_tuning lstm", "prefix", "prefix projection"])
def test_what_is_saved_is_what_the_model_runs_on(tiny_base: Path, method: str) -> None:
    """Masters of more bits than bf16 has: an encoder sees them cast, as in training; without one they are kept."""
    run = resolve(cells.config(str(tiny_base), method, precision={"compute": "bf16"}), WorldShape())
    model = load_model(run.model, seed=7)
    assert model.prompt is not None
    assert isinstance(run.model.method, VirtualTokensMethod)
    masters = {name: p.detach().float() * 1.001 for name, p in model.prompt.named_parameters()}
    saved = to_save(run.model.method, model.causal_lm.config, masters, torch.bfloat16)
    for name, parameter in model.prompt.named_parameters():
        parameter.data.copy_(masters[name])
    assert torch.equal(saved.to(torch.bfloat16), model.prompt())
    assert saved.dtype == (torch.float32 if len(masters) == 1 else torch.bfloat16)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_activations_count_virtual_tokens(tiny_base: Path, method: str) -> None:
    """What forward keeps beside the parameters is what was planned, which grows with the virtual tokens."""

    def kept(count: int) -> tuple[int, int]:
        sections: dict[str, Any] = {
            "data": {"max_seq_len": 29},
            "train": {"micro_batch_size": 3},
            "activation_checkpointing": {"mode": "none"},
        }
        run = resolve(
            cells.config(str(tiny_base), {"type": method, "num_virtual_tokens": count}, **sections), WorldShape()
        )
        model = load_model(run.model, seed=0)
        batch = collate(cells.synthetic_data(packing=False), [0, 1, 2])
        given = [*model.parameters(), *model.buffers(), *(t for t in vars(batch).values() if isinstance(t, Tensor))]
        ignored = {t.untyped_storage().data_ptr() for t in given}
        saved: dict[int, int] = {}
        alive: list[Tensor] = []  # or another tensor may take its place

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ignored:
                saved[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(batch)
        assert loss.requires_grad
        assert sum(batch.seq_lens) <= 3 * 29
        tape = trace(run, seq_lens=batch.seq_lens, supervised=len(batch.labels))
        return sum(saved.values()), tape.kept_bytes

    (few, few_planned), (many, many_planned) = kept(2), kept(60)
    assert few == few_planned
    assert few < many == many_planned


def test_sequence_parallelism_is_refused(tiny_base: Path) -> None:
    class Shared(Fsdp2Sharding):
        sequence_parallel: int = 2

    run = resolve(cells.config(str(tiny_base), "prefix", "fsdp2"), WorldShape(1, 2))
    assert registry.unsupported(run) is None
    refusal = registry.unsupported(type(run)(**{**vars(run), "sharding": Shared()}))
    assert refusal is not None
    assert refusal.fix == "set sharding.sequence_parallel to 1, or method.type to lora"
    assert refusal.why.startswith(
        "sharding.sequence_parallel 2 splits the rows between ranks, and method.type prefix puts 5"
    )
    lora = resolve(cells.config(str(tiny_base), "lora", "fsdp2"), WorldShape(1, 2))
    assert registry.unsupported(type(run)(**{**vars(lora), "sharding": Shared()})) is None


@pytest.mark.parametrize(
    ("method", "setting", "reason"),
    [
        ("prefix", {"num_kv_shared_layers": 1}, "has num_kv_shared_layers: its layers do not all have keys"),
        ("prefix", {"kv_lora_rank": 16}, "has kv_lora_rank: its layers do not all have keys"),
        ("prefix", {"global_head_dim": 32}, "has global_head_dim: its layers do not all have keys"),
        ("p_tuning", {"hidden_size_per_layer_input": 8}, "has hidden_size_per_layer_input: it reads more of a token"),
    ],
)
def test_models_without_a_place_for_them_are_refused(
    tmp_path: Path, method: str, setting: dict[str, Any], reason: str
) -> None:
    build_base(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(ConfigError) as caught:
        resolve(cells.config(str(tmp_path), method), WorldShape())
    assert caught.value.what.startswith(f"method.type {method}: model.path is a llama model that {reason}")


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix"])
def test_a_vocabulary_that_grows_is_refused(tiny_base: Path, tmp_path: Path, method: str) -> None:
    """The new rows would be in no file. Spare rows of the base are in its own."""
    grown = {"model": {"add_tokens": ["<tool>"]}}
    with pytest.raises(ConfigError, match=f"the vocabulary grows by 1 rows, and what method.type {method} saves"):
        resolve(cells.config(str(tiny_base), method, **grown), WorldShape())
    build_tokenizer(tmp_path)
    tiny_model.build_model(tmp_path, vocab_size=300)
    assert resolve(cells.config(str(tmp_path), method, **grown), WorldShape()).model.tokens.new_rows == 0


def test_a_text_that_no_embedding_can_start_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    method = {"type": "prompt", "num_virtual_tokens": COUNT, "init_text": "東京"}
    build_base(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))
    run = resolve(cells.config(str(tmp_path), method), WorldShape())
    with pytest.raises(ConfigError, match="has a token without embedding"):
        init_token_ids(run.model)
