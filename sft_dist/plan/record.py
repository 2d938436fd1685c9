"""Records one micro-batch of a model, forward and backward, without a GPU, its weights or its memory.

The trainer's own model runs under ``FakeTensorMode``: every operator runs on tensors that have a shape and no data.
What it allocates, frees and computes is written on a tape. Blocks that are alike are recorded once, so that 70B take as
long as 1B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sft_dist.data.batch import MicroBatch
from sft_dist.plan.recorder import Recorder
from sft_dist.plan.tape import Tape


class Traceable(Protocol):
    """What can be recorded: ``SftModel``, or another stack's model that is compared with it."""

    def __call__(self, batch: MicroBatch) -> Tensor:
        """The loss that backward starts from."""

    def blocks(self) -> dict[str, nn.Module]:
        """The decoder blocks by name, first to last."""


def shorten(model: Traceable, kinds: Sequence[object]) -> tuple[int, ...]:
    """Leaves only the blocks to record in a model; for each block that it had, the index of the one that is like it.

    Args:
        kinds: for each block what it is alike by: of equal ones one is recorded, beside the first block, which may have
            an input without gradient, and the last.
    """
    assert isinstance(model, nn.Module)
    chosen, recorded = _choose(kinds)
    _keep_blocks(model, list(model.blocks()), chosen)
    return recorded


def record(
    model: Traceable,
    batch: Callable[[], MicroBatch],
    *,
    kinds: Sequence[object],
    backward: bool = True,
    units: Sequence[nn.Module] = (),
) -> Tape:
    """Runs the model's forward and backward once on tensors without data.

    Args:
        model: an ``nn.Module`` on the meta device, with everything applied that the strategy does to it from outside
            (activation checkpointing, casts) and nothing sharded. It is used up.
        batch: makes the micro-batch; called under the fake mode.
        kinds: as of ``shorten``.
        backward: False records an evaluation: forward in eval mode, without gradients.
        units: inside the blocks, whose moments are marked.
    """
    return record_short(model, batch, recorded=shorten(model, kinds), backward=backward, units=units)


def record_short(
    model: Traceable,
    batch: Callable[[], MicroBatch],
    *,
    recorded: tuple[int, ...],
    backward: bool = True,
    units: Sequence[nn.Module] = (),
) -> Tape:
    """``record`` of a model with the blocks that ``shorten`` left.

    Args:
        recorded: what ``shorten`` said of it.
    """
    assert isinstance(model, nn.Module)
    kept = list(model.blocks().values())
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        inputs = batch()
        ignored = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        ignored |= {t.untyped_storage()._cdata for t in vars(inputs).values() if isinstance(t, Tensor)}
        recorder = Recorder(ignored)
        saved = _Saved(recorder, ignored)
        with ExitStack() as stack:
            stack.enter_context(_following(model, kept, recorder))
            stack.enter_context(_marking(units, recorder))
            stack.enter_context(recorder)
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t), torch.set_grad_enabled(backward):
                loss = model.train(backward)(inputs)
            recorder.segment, recorder.part = "head_backward", "activations"
            if backward:
                loss.backward()
    names = [f"block {i}" for i in range(len(kept))]
    return Tape(
        embed=recorder.take("embed"),
        forward=tuple(recorder.take(f"forward of {name}") for name in names),
        head=recorder.take("head"),
        head_backward=recorder.take("head_backward"),
        backward=tuple(recorder.take(f"backward of {name}") for name in names),
        embed_backward=recorder.take("embed_backward"),
        recorded=recorded,
        saved_bytes=(*(saved.bytes.get(f"forward of {name}", 0) for name in names),
                     sum(saved.bytes.get(name, 0) for name in ("embed", "head"))),
    )  # fmt: skip


@contextmanager
def recording() -> Iterator[Recorder]:
    """Records what runs inside, under the name ``embed``; call it under a fake mode."""
    with Recorder(set()) as recorder:
        yield recorder


@dataclass
class _Saved:
    """Adds up what autograd keeps, by the segment that keeps it first."""

    recorder: Recorder
    ignored: set[int]
    bytes: dict[str, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen | self.ignored:
            self.seen.add(storage._cdata)
            segment = self.recorder.segment
            self.bytes[segment] = self.bytes.get(segment, 0) + storage.nbytes()
        return tensor


def _choose(kinds: Sequence[object]) -> tuple[list[int], tuple[int, ...]]:
    """Blocks to record, and for every block the index among these of the one that stands for it.

    The first block, one of every other kind, and the last one, which stand for themselves: before the one and behind
    the other is something else than a block.
    """
    chosen = [0]
    stands: dict[object, int] = {}
    for i, kind in enumerate(kinds[1:], start=1):
        if kind not in stands:
            stands[kind] = i
            chosen.append(i)
    last = len(kinds) - 1
    if last not in chosen:
        chosen.append(last)
    position = {block: i for i, block in enumerate(chosen)}
    alike = [position.get(i, position[stands[kind]]) for i, kind in enumerate(kinds) if i]
    return chosen, (0, *alike)


def _keep_blocks(model: nn.Module, names: list[str], chosen: list[int]) -> None:
    """Leaves only the chosen blocks in the list that the model runs through."""
    parent_name = names[0].rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    assert isinstance(parent, nn.ModuleList), f"{parent_name} is no list of blocks"
    owner, _, attribute = parent_name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.ModuleList([parent[i] for i in chosen]))


def _make_fake(model: nn.Module) -> None:
    """Puts every parameter and buffer on a CPU that only has their shapes; what was tied stays tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                module._buffers[name] = made[id(buffer)]
        if hasattr(module, "rope_type"):
            # Frequencies that depend on the longest row are chosen by a value; their shapes do not depend on it.
            types: Any = module.rope_type
            plain: Any = dict.fromkeys(types, "default") if isinstance(types, dict) else "default"
            module.rope_type = plain


@contextmanager
def _following(model: nn.Module, blocks: list[nn.Module], recorder: Recorder) -> Iterator[None]:
    """Moves the recorder from segment to segment as the model runs."""
    handles = []

    def at(segment: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            recorder.segment = segment

        return enter

    def before(number: int) -> Callable[..., None]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.segment = f"forward of block {number}"
            if number == 0:
                hidden = next(
                    (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad), None
                )
                if hidden is not None:
                    hidden.register_hook(at("embed_backward"))

        return enter

    def after(number: int) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            first = next(t for t in tree_leaves(output) if isinstance(t, Tensor))
            if first.requires_grad:
                first.register_hook(at(f"backward of block {number}"))
            if number == len(blocks) - 1:
                recorder.segment, recorder.part = "head", "logits"

        return leave

    for number, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(before(number), with_kwargs=True, prepend=True))
        handles.append(block.register_forward_hook(after(number)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: recorder.call(p.grad, "gradients")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _marking(units: Sequence[nn.Module], recorder: Recorder) -> Iterator[None]:
    """Marks where passes of units begin and end."""
    handles: list[Any] = []

    def opened(*_: Any) -> None:
        recorder.mark("open")

    def closed(_module: nn.Module, _args: Any, output: Tensor) -> None:
        recorder.mark("close")
        if output.requires_grad:
            output.register_hook(opened)

    for unit in units:
        handles.append(unit.register_forward_pre_hook(opened))
        handles.append(unit.register_forward_hook(closed))
        for parameter in unit.parameters():
            handles.append(parameter.register_post_accumulate_grad_hook(lambda _: recorder.mark("reduce")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
