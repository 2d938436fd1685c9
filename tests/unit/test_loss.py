"""The loss against torch's cross-entropy, and a whole packed model against Transformers' own on separate rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sft_dist.config.schema import FullMethod
from sft_dist.data.loader import collate, empty_micro_batch
from sft_dist.model import loss as loss_module
from sft_dist.model.describe import describe_model
from sft_dist.model.loss import LossHead, linear_cross_entropy_sum
from sft_dist.model.token_rows import TokenLossHead
from tests.helpers.cells import synthetic_data
from tests.helpers.loaded import load_model

ROWS, HIDDEN, VOCAB = 37, 16, 53


class Recorder(TorchDispatchMode):
    """Counts operators and keeps the shapes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(func.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.shapes.append(tuple(tensor.shape))
        return result


def example(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (rows,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in fp64 of the same numbers."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(h @ w.T, labels, reduction="sum")
    grad_hidden, grad_weight = torch.autograd.grad(loss, (h, w))
    return loss.detach(), grad_hidden, grad_weight


def relative_error(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_rows", [1, 5, 36, 37, 1000, None])
def test_values_and_gradients_are_those_of_cross_entropy(chunk_rows: int | None) -> None:
    hidden, weight, labels = example()
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=chunk_rows)
    loss.backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(hidden.grad, grad_hidden) < 1e-6
    assert relative_error(weight.grad, grad_weight) < 1e-6


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("chunk_rows", [5, None])
def test_smoothed_labels_are_those_of_torch(chunk_rows: int | None, smoothing: float) -> None:
    hidden, weight, labels = example()
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=chunk_rows, smoothing=smoothing)
    (loss * (3 / 7)).backward()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = F.cross_entropy(h @ w.T, labels, reduction="sum", label_smoothing=smoothing)
    grad_hidden, grad_weight = torch.autograd.grad(expected * (3 / 7), (h, w))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(hidden.grad, grad_hidden) < 1e-6
    assert relative_error(weight.grad, grad_weight) < 1e-6


def test_labels_are_smoothed_in_training_alone() -> None:
    hidden, weight, labels = example()
    head = LossHead.from_linear(nn.Linear(HIDDEN, VOCAB, bias=False))
    head.weight = nn.Parameter(weight.detach())
    head.label_smoothing = 0.2
    logits = hidden @ weight.T
    smooth = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2)
    assert float(head(hidden, labels)) == pytest.approx(float(smooth), rel=1e-6)
    head.eval()
    assert float(head(hidden, labels)) == pytest.approx(
        float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-6
    )


@pytest.mark.parametrize("factor", [2 / 1000, 3 / 7, 1.0])
def test_backward_scales_by_the_incoming_gradient(factor: float) -> None:
    hidden, weight, labels = example()
    (linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=10) * factor).backward()
    _, grad_hidden, grad_weight = reference(hidden, weight, labels)
    assert relative_error(hidden.grad, grad_hidden * factor) < 1e-6
    assert relative_error(weight.grad, grad_weight * factor) < 1e-6


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = example()
    with torch.no_grad():
        hidden *= 1e3
    loss = linear_cross_entropy_sum(hidden, weight, labels)
    assert float(loss) == pytest.approx(float(reference(hidden, weight, labels)[0]), rel=1e-6)


@pytest.mark.parametrize("chunk_rows", [5, 37])
def test_bf16_keeps_the_sums_in_fp32(chunk_rows: int) -> None:
    hidden, weight, labels = example(torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=chunk_rows)
    loss.backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    assert loss.dtype == torch.float32
    # A bf16 logit has 8 bits, an error of 2^-9 of its size (about 10 here); the sum averages it out.
    assert float(loss) == pytest.approx(float(expected), rel=2e-3)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    # Unit roundoff 2^-9 in the logits (absolute 1e-2), in their gradient and in the result.
    assert relative_error(hidden.grad, grad_hidden) < 1.5e-2
    assert relative_error(weight.grad, grad_weight) < 1.5e-2


def test_bf16_gradients_of_many_chunks_do_not_stop_growing() -> None:
    """A bf16 sum of equal terms stands still after 256 of them."""
    hidden, weight, labels = example(torch.bfloat16, rows=1)
    hidden = hidden.detach().expand(1024, HIDDEN).contiguous()
    labels = labels.expand(1024)
    linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=1).backward()
    assert relative_error(weight.grad, reference(hidden, weight, labels)[2]) < 1.5e-2


@pytest.mark.parametrize("row_multiple", [1, 16])
def test_in_bf16_the_factor_of_the_loss_is_not_rounded(row_multiple: int) -> None:
    """world_size / supervised tokens, rounded to bf16, would change every gradient of a step by up to 1 / 256."""
    factor = 1.50390625 / 256  # half-way between two bf16 numbers
    once: list[Any] = []
    scaled: list[Any] = []
    for grads, f in ((once, 1.0), (scaled, factor)):
        hidden, weight, labels = example(torch.bfloat16)
        (linear_cross_entropy_sum(hidden, weight, labels, row_multiple=row_multiple) * f).backward()
        grads += [hidden.grad, weight.grad]
    for plain, small in zip(once, scaled, strict=True):
        # Single elements are rounded up or down; their projection on the unscaled gradient shows a common factor.
        measured = (small.double() * plain.double()).sum() / plain.double().square().sum()
        assert float(measured) == pytest.approx(factor, rel=5e-4)


def with_rows_of_tokens(smoothing: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Hidden states, frozen weight, labels, two ids and their rows; loss and the gradients of both in fp64."""
    hidden, weight, labels = example()
    ids, rows = torch.tensor([3, 20]), torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(5))
    rows.requires_grad_()
    labels[:4] = torch.tensor([3, 20, 3, 20])
    h, r = (t.detach().double().requires_grad_() for t in (hidden, rows))
    logits = h @ weight.detach().double().index_copy(0, ids, r).T
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return hidden, weight.detach(), labels, ids, rows, (loss, *torch.autograd.grad(loss, (h, r)))


@pytest.mark.parametrize("row_multiple", [1, 16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_some_tokens_are_trained_by_themselves(row_multiple: int, smoothing: float) -> None:
    hidden, weight, labels, ids, rows, expected = with_rows_of_tokens(smoothing)
    loss = linear_cross_entropy_sum(
        hidden, weight, labels, rows=rows, row_ids=ids, row_multiple=row_multiple, smoothing=smoothing
    )
    for ours, exact in zip((loss, *torch.autograd.grad(loss, (hidden, rows))), expected, strict=True):
        assert relative_error(ours, exact) < 1e-6


def test_the_output_layer_with_such_rows_smooths_its_labels() -> None:
    hidden, weight, labels, ids, rows, expected = with_rows_of_tokens(0.2)
    head: Any = SimpleNamespace(
        token_rows=SimpleNamespace(default=rows, ids=ids), weight=weight, row_multiple=1, smoothing=0.2
    )
    assert relative_error(TokenLossHead.forward(head, hidden, labels), expected[0]) < 1e-6


def test_no_rows_give_a_zero_with_a_graph_and_zero_gradients() -> None:
    hidden, weight, labels = example(rows=0)
    loss = linear_cross_entropy_sum(hidden, weight, labels)
    assert float(loss) == 0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) == 0


def test_a_frozen_weight_costs_no_gradient() -> None:
    hidden, weight, labels = example()
    weight.requires_grad_(False)
    with Recorder() as recorder:
        loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=10)
    loss.backward()
    assert weight.grad is None
    assert relative_error(hidden.grad, reference(hidden, weight, labels)[1]) < 1e-6
    # [V, h] appears as the weight's transpose alone, never as a new tensor.
    assert (VOCAB, HIDDEN) not in recorder.shapes


def test_frozen_hidden_states_cost_no_gradient() -> None:
    hidden, weight, labels = example()
    hidden.requires_grad_(False)
    linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=10).backward()
    assert hidden.grad is None
    assert relative_error(weight.grad, reference(hidden, weight, labels)[2]) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_no_gradient_is_computed(mode: Callable[[], Any]) -> None:
    hidden, weight, labels = example()
    with mode(), Recorder() as recorder:
        loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=10)
    assert not loss.requires_grad
    products = [name for name in recorder.operators if name in ("mm", "matmul")]
    assert len(products) == 4, "one product a chunk: the logits"
    assert not {"exp_", "scatter_add_", "empty_like", "zeros_like"} & set(recorder.operators)


@pytest.mark.parametrize("chunk_rows", [1, 8])
def test_logits_never_exist_for_more_rows_than_a_chunk(chunk_rows: int) -> None:
    hidden, weight, labels = example()
    with Recorder() as recorder:
        linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=chunk_rows).backward()
    logits = {shape[0] for shape in recorder.shapes if len(shape) == 2 and shape[1] == VOCAB and shape[0] != HIDDEN}
    assert max(logits) == chunk_rows


def test_the_default_chunk_fits_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = example()
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 10 * VOCAB * 4 + 3)
    with Recorder() as recorder:
        linear_cross_entropy_sum(hidden, weight, labels)
    assert (
        max(shape[0] for shape in recorder.shapes if len(shape) == 2 and shape[1] == VOCAB and shape[0] != HIDDEN) == 10
    )


def test_a_chunk_has_a_row_even_when_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = example()
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)
    assert float(linear_cross_entropy_sum(hidden, weight, labels).detach()) == pytest.approx(
        float(reference(hidden, weight, labels)[0]), rel=1e-6
    )


def test_the_head_gives_logits_without_labels_and_keeps_the_layers_weight() -> None:
    linear = nn.Linear(HIDDEN, VOCAB, bias=False)
    head = LossHead.from_linear(linear)
    hidden, _, labels = example()
    assert head.weight is linear.weight
    torch.testing.assert_close(head(hidden), linear(hidden))
    assert float(head(hidden, labels)) == pytest.approx(float(reference(hidden, linear.weight, labels)[0]), rel=1e-6)


# The whole model


@pytest.mark.parametrize("base", ["tiny_base", "tied_base"])
def test_a_packed_model_equals_transformers_on_separate_rows(base: str, request: pytest.FixtureRequest) -> None:
    """Loss and every gradient: a tied embedding gets those of both its uses."""
    folder: Path = request.getfixturevalue(base)
    data = synthetic_data(rows=6)
    model = load_model(describe_model(str(folder), None, FullMethod(), "fp32"), seed=0)
    loss = model(collate(data, list(range(6))))
    loss.backward()

    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    expected = torch.zeros(())
    for row in range(6):
        ids, mask = (torch.from_numpy(part.astype("int64")) for part in data.row(row))
        logits = plain(input_ids=ids[None]).logits[0]
        labels = torch.where(mask.bool(), ids, -100)
        expected = expected + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    expected.backward()

    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    gradients = {name.removeprefix("hf."): p.grad for name, p in model.named_parameters()}
    assert set(gradients) == {name for name, _ in plain.named_parameters()}
    assert ("lm_head.weight" in gradients) == (base == "tiny_base")
    for name, parameter in plain.named_parameters():
        assert relative_error(gradients[name], parameter.grad.double()) < 1e-5, name


def test_rows_of_a_pack_do_not_see_each_other(tiny_base: Path) -> None:
    """Position by position: changing one row leaves the losses of the others bit-equal."""
    data = synthetic_data(rows=3)
    model = load_model(describe_model(str(tiny_base), None, FullMethod(), "fp32"), seed=0).eval()
    with torch.no_grad():
        together = float(model(collate(data, [0, 1, 2])))
        alone = sum(float(model(collate(data, [row]))) for row in range(3))
    assert together == pytest.approx(alone, rel=1e-6)


def test_an_empty_micro_batch_reaches_every_parameter_with_zeros(tiny_base: Path) -> None:
    model = load_model(describe_model(str(tiny_base), None, FullMethod(), "fp32"), seed=0)
    loss = model(empty_micro_batch())
    loss.backward()
    assert float(loss) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) == 0, name
