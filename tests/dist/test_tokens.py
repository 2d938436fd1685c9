"""Tokens that are added, and tokens that are trained by themselves: the same numbers on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from sft_dist.config.schema import Config
from sft_dist.data.loader import collate
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.model import build
from sft_dist.model import weights as weights_module
from sft_dist.model.untrained import untrained_tokens
from sft_dist.model.weights import Part, Weights, check_weights
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.train.summary import untrained_notice
from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.loaded import load_model
from tests.helpers.pool import WorldPool
from tests.helpers.tiny_model import build_model, build_tokenizer

World = Callable[[int], WorldPool]

pytestmark = pytest.mark.ci

ADDED = ["<tool>", "<|call|>", "<|result|>"]
# AdamW divides a gradient by its own size: where that is rounding noise, which other ranks round otherwise, an eps of 1e-8
# makes a full update of it (1 of 16,768 elements, 2e-5 apart). What is compared here are the gradients, not the noise.
GROWN = {"model": {"add_tokens": ADDED}, "optim": {"eps": 1e-5}}
TRAIN = {"global_batch_size": 7, "micro_batch_size": 2, "max_steps": 4, "seed": 3}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora"},
    "qlora": {"type": "qlora", "train_tokens": ["<|im_end|>", "a", *ADDED]},
    "head": {"type": "lora", "modules_to_save": ["lm_head"], "target_modules": "attention"},
}

# Among them the ids of the added tokens.
DATA = {"vocab": 259 + len(ADDED)}


@pytest.fixture(scope="module")
def base(tiny_base: Path, tied_base: Path) -> Callable[[str], str]:
    return lambda name: str(tied_base if name == "tied" else tiny_base)


@pytest.fixture(scope="module")
def alone(world: World) -> Callable[[str], Trained]:
    @cache
    def train(text: str) -> Trained:
        return world(1).run(cells.train, text, DATA)[0]

    return train


@pytest.mark.parametrize(
    ("model", "method", "strategy", "ranks"),
    [
        ("untied", "full", "fsdp2", 3), ("untied", "full", "zero3", 3), ("tied", "full", "fsdp2", 2),
        ("tied", "full", "zero3", 2), ("untied", "full", "ddp", 2), ("untied", "lora", "fsdp2", 2),
        ("tied", "lora", "fsdp2", 3), ("tied", "lora", "zero3", 3), ("untied", "lora", "ddp", 2),
        ("untied", "qlora", "zero3", 2), ("untied", "qlora", "fsdp2", 3), ("tied", "qlora", "ddp", 2),
        ("tied", "qlora", "zero1", 2), ("untied", "head", "zero3", 2), ("untied", "head", "fsdp2", 2),
    ],
)  # fmt: skip
def test_several_processes_equal_one(
    world: World, alone: Callable[[str], Trained], base: Callable[[str], str], model: str, method: str, strategy: str,
    ranks: int,
) -> None:  # fmt: skip
    """``cells.train`` also compares what each rank holds with what was described."""
    reference = alone(cells.dump(cells.config(base(model), METHODS[method], "ddp", train=TRAIN, **GROWN)))
    cfg = cells.config(base(model), METHODS[method], strategy, train=TRAIN, **GROWN)
    trained: list[Trained] = world(ranks).run(cells.train, cells.dump(cfg), DATA)
    assert reference.losses[-1] < reference.losses[0]
    for rank in trained:
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=1e-5)
    matrices = {n: w for n, w in reference.weights.items() if "embed_tokens" in n or "lm_head" in n}
    assert matrices
    for name, weight in matrices.items():
        np.testing.assert_allclose(trained[0].weights[name], weight, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_bf16_stays_near_one_process(
    world: World, alone: Callable[[str], Trained], base: Callable[[str], str], strategy: str
) -> None:
    """Rows are cast where they are read, under every strategy; tolerances as in ``test_parity``."""
    sections = {"train": TRAIN, "precision": {"compute": "bf16", "master": "fp32"}, **GROWN}
    reference = alone(cells.dump(cells.config(base("tied"), METHODS["lora"], "ddp", **sections)))
    cfg = cells.config(base("tied"), METHODS["lora"], strategy, **sections)
    trained: list[Trained] = world(2).run(cells.train, cells.dump(cfg), DATA)
    np.testing.assert_allclose(trained[0].losses, reference.losses, rtol=1e-2)
    np.testing.assert_allclose(trained[0].grad_norms, reference.grad_norms, rtol=5e-2)


@pytest.mark.parametrize("model", ["untied", "tied"])
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("zero3", 3)])
def test_new_rows_are_the_mean_on_every_rank(
    world: World, base: Callable[[str], str], model: str, strategy: str, ranks: int
) -> None:
    cfg = cells.dump(cells.config(base(model), "full", strategy, precision={"compute": "bf16"}, **GROWN))
    files = load_file(f"{base(model)}/model.safetensors")
    matrices = {"model.embed_tokens.weight", "lm_head.weight"} & files.keys()
    assert len(matrices) == (1 if model == "tied" else 2)
    for rank in world(ranks).run(first_values, cfg):
        for name in matrices:
            stored = files[name]
            mean = stored.double().mean(dim=0).bfloat16().float().numpy()
            got = rank[f"hf.{name}"]
            assert got.shape == (259 + len(ADDED), 64)
            np.testing.assert_array_equal(got[:259], stored.bfloat16().float().numpy())
            np.testing.assert_array_equal(got[259:], np.stack([mean] * len(ADDED)))


def test_any_part_of_a_grown_matrix(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that begin or end within a new row too; the mean is added up in pieces that do not divide the rows."""
    monkeypatch.setattr(weights_module, "SUMMED_AT_ONCE", 50 * 64)
    spec = resolve(cells.config(str(tiny_base), "full", **GROWN), WorldShape()).model
    weights = Weights(build.build_model(spec), spec, seed=0)
    stored = load_file(tiny_base / "model.safetensors")["lm_head.weight"]
    whole = torch.cat([stored, stored.double().mean(dim=0).float().expand(len(ADDED), -1)]).flatten()
    for start, stop in ((0, 262 * 64), (259 * 64 - 3, 260 * 64 + 7), (260 * 64 + 7, 262 * 64), (9, 9), (16768, 16768)):
        part = torch.empty(stop - start)
        weights.read_into("hf.lm_head.weight", Part(torch.nn.Parameter(part), part, start))
        torch.testing.assert_close(part, whole[start:stop], rtol=0, atol=0)


def first_values(cfg_yaml: str) -> dict[str, np.ndarray[Any, Any]]:
    """What embedding and output layer start from, gathered."""
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    try:
        everything = strategy.full_parameters(trainable_only=False)
        return {n: t.float().numpy().copy() for n, t in everything if "embed_tokens" in n or "lm_head" in n}
    finally:
        strategy.close()


def test_nothing_grows_where_rows_are_spare(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    build_model(tmp_path, vocab_size=261)

    def described(added: list[str], **method: Any) -> tuple[int, int, tuple[int, ...]]:
        cfg = cells.config(str(tmp_path), {"type": "lora", **method}, model={"add_tokens": added})
        model = resolve(cfg, WorldShape()).model
        return model.vocab_size, model.tokens.new_rows, model.tokens.trained_ids

    assert described(ADDED[:2]) == (261, 0, (259, 260))
    assert described(ADDED) == (262, 1, (259, 260, 261))
    assert described(ADDED[:2], train_tokens=[]) == (261, 0, ())
    assert described([], train_tokens=["b", "<|im_end|>"]) == (261, 0, (2, 68))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding multiplies what it looks up by the root of the width, the trained rows too."""
    folder = tmp_path_factory.mktemp("gemma")
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.08, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["untied", "tied", "gemma"])
def test_it_is_what_peft_computes(base: Callable[[str], str], gemma: Path, model: str) -> None:
    """Loss and gradients of the rows against PEFT's layer, which makes a copy of the whole matrix."""
    path = str(gemma) if model == "gemma" else base(model)
    method = {"type": "lora", "target_modules": ["q_proj"], "train_tokens": ["<|im_end|>", "$", "e", "d"]}
    run = resolve(cells.config(path, method), WorldShape())
    ids = list(run.model.tokens.trained_ids)
    ours = load_model(run.model, seed=0)
    indices = {"embed_tokens": ids} | ({} if model != "untied" else {"lm_head": ids})
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], trainable_token_indices=indices)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    mine = {n.removeprefix("hf."): p for n, p in ours.named_parameters() if p.requires_grad}
    rows = [name for name in mine if "trainable_tokens_delta" in name]
    assert len(rows) == len(indices)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                mine[name].copy_(parameter)
    # No packing: each row by itself, and the tokens among those that occur.
    data = cells.synthetic_data(rows=12, packing=False)
    assert set(ids[1:]) & set(data.stores[0].input_ids.tolist())
    batch = collate(data, list(range(12)))
    loss = ours(batch)
    loss.backward()
    expected = torch.zeros(())
    for number in range(12):
        input_ids, supervised = (torch.from_numpy(part.astype("int64")) for part in data.row(number))
        labels = input_ids.where(supervised.bool(), -100)[1:]
        logits = theirs(input_ids=input_ids[None]).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert mine[name].grad is not None
            difference = (mine[name].grad - parameter.grad).norm() / parameter.grad.norm()
            assert float(difference) < 1e-5, name


def test_the_frozen_matrices_are_neither_copied_nor_given_a_gradient(base: Callable[[str], str]) -> None:
    run = resolve(cells.config(base("untied"), {"type": "lora", "train_tokens": ["a"]}), WorldShape())
    model = load_model(run.model, seed=0)
    shapes: list[tuple[int, ...]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ not in ("t", "detach"):  # views
                leaves = torch.utils._pytree.tree_leaves(result)
                shapes.extend(tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor))
            return result

    with Recorder():
        model(collate(cells.synthetic_data(), [0, 1])).backward()
    assert (1, 64) in shapes
    assert (259, 64) not in shapes


@pytest.mark.parametrize(
    ("method", "added", "what"),
    [
        ({"type": "full"}, ["<|im_end|>", "<x>"], "model.add_tokens: the tokenizer of MODEL has <|im_end|> already"),
        ({"type": "lora", "train_tokens": ["<x>"]}, [], "method.train_tokens: the tokenizer of MODEL has no token <x>"),
        ({"type": "lora", "train_tokens": ["a"]}, ["<x>"], "model.add_tokens: the vocabulary grows, and an adapter that does not train the new rows would have none of them in its files"),
        ({"type": "lora", "train_tokens": []}, ["<x>"], "model.add_tokens: the vocabulary grows, and an adapter that does not train the new rows would have none of them in its files"),
        ({"type": "lora", "train_tokens": ["a"], "modules_to_save": ["embed_tokens", "lm_head"]}, [], "method.train_tokens has no effect: method.modules_to_save trains the whole embedding and output layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tiny_base: Path, method: dict[str, Any], added: list[str], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(cells.config(str(tiny_base), method, model={"add_tokens": added}), WorldShape())
    assert caught.value.what == what.replace("MODEL", str(tiny_base))


def test_whole_matrices_hold_the_rows_that_are_new(tiny_base: Path) -> None:
    method = {"type": "lora", "modules_to_save": ["embed_tokens", "lm_head"]}
    run = resolve(cells.config(str(tiny_base), method, **GROWN), WorldShape())
    assert not any("token_adapter" in p.name for p in run.model.parameters)


def test_an_adapter_goes_on_from_another(world: World, tiny_base: Path, tmp_path: Path) -> None:
    cfg = cells.config(str(tiny_base), METHODS["qlora"], "fsdp2", **GROWN)
    trained = world(2).run(cells.train_and_export, cells.dump(cfg), str(tmp_path / "final"))[0]
    goes_on = METHODS["qlora"] | {"init_from": str(tmp_path / "final")}
    for strategy, ranks in (("zero3", 3), ("ddp", 1)):
        again = world(ranks).run(first_logits, cells.dump(cells.config(str(tiny_base), goes_on, strategy, **GROWN)))[0]
        for mine, theirs in zip(again, trained, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)
    other = goes_on | {"train_tokens": ["<|im_end|>", "b", *ADDED]}
    with pytest.raises(CheckpointError, match="has rows of the tokens"):
        check_weights(resolve(cells.config(str(tiny_base), other, **GROWN), WorldShape()).model)


def first_logits(cfg_yaml: str) -> list[np.ndarray[Any, Any]]:
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    data = cells.synthetic_data()
    try:
        logits = cells.all_logits(strategy, collate(data, list(cells.PROBE_ROWS)))
        assert logits.shape[1] == 259 + len(ADDED), dist.get_rank()
        return [part.numpy() for part in logits.split([len(data.row(row)[0]) for row in cells.PROBE_ROWS])]
    finally:
        strategy.close()


@pytest.fixture
def reserved(tmp_path: Path) -> Path:
    """A base whose rows of <|im_start|> and <|im_end|> are equal in the output layer, and zero rows behind them."""
    build_tokenizer(tmp_path)
    build_model(tmp_path, vocab_size=264)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][1] = tensors["lm_head.weight"][2]
    tensors["model.embed_tokens.weight"][0] = 0
    save_file(tensors, file, {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("method", "added", "occurring", "untrained"),
    [
        ({"type": "lora"}, [], [1, 2], [1, 2]),
        ({"type": "lora"}, [], [2], [2]),
        ({"type": "qlora", "train_tokens": ["<|im_end|>"]}, [], [1, 2], [1]),
        ({"type": "full"}, [], [0, 1, 2], []),
        ({"type": "full", "freeze": ["embed_tokens"]}, [], [0, 1, 2], [0]),
        ({"type": "lora", "modules_to_save": ["lm_head"]}, [], [0, 1, 2], [0]),
        ({"type": "lora"}, ["<tool>"], [2, 259], [2]),
        ({"type": "lora", "train_tokens": []}, ["<tool>"], [2, 259], [2, 259]),
        ({"type": "lora"}, [], [], []),
    ],
)  # fmt: skip
def test_untrained_special_tokens_are_found(
    reserved: Path, method: dict[str, Any], added: list[str], occurring: list[int], untrained: list[int]
) -> None:
    spec = resolve(cells.config(str(reserved), method, model={"add_tokens": added}), WorldShape()).model
    special = [0, 1, 2, *range(259, 259 + len(added))]
    assert untrained_tokens(spec, occurring, special) == untrained


def test_the_fix_of_untrained_tokens(reserved: Path) -> None:
    model = resolve(cells.config(str(reserved), "lora", model={"add_tokens": ["<tool>"]}), WorldShape()).model
    line = untrained_notice(["<|im_start|>"], model)
    assert line.endswith('set method.train_tokens to ["<tool>", "<|im_start|>"]')
    named = json.loads(line.rpartition("method.train_tokens to ")[2])
    again = cells.config(str(reserved), {"type": "lora", "train_tokens": named}, model={"add_tokens": ["<tool>"]})
    assert untrained_tokens(resolve(again, WorldShape()).model, [1], [0, 1, 2]) == []


def test_which_special_tokens_occur() -> None:
    data = cells.synthetic_data()
    present = set(data.stores[0].input_ids.tolist())
    assert data.occurring([0, 1, 2, *range(3, 80)]) == sorted(present & set(range(80)))
    assert data.occurring([]) == []
