"""What other stacks' sharding puts between the segments of a tape."""

from __future__ import annotations

from benchmarks.peers.inventory import WIDTHS, Group, Inventory
from benchmarks.peers.setup import Setup
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.tape import Segment, Tape
from sft_dist.plan.timeline import Timeline

# Whose models compute the loss themselves.
LOSS_INSIDE = ("hf", "fsdp_qlora")
# DeepSpeed's defaults, in elements.
ZERO_REDUCE_BUCKET, ZERO_PREFETCH_BUCKET, ZERO_MAX_LIVE, ZERO_SUB_GROUP = 500_000_000, 50_000_000, 10**9, 10**9


class PeerTimeline(Timeline):
    """Nothing between the segments; with accumulation, gradients are there already."""

    def __init__(self, setup: Setup, counted: Inventory, tape: Tape, hidden_bytes: int) -> None:
        # Not the base's: it wants a run of our own.
        self.tape, self.num_blocks = tape, len(tape.recorded)
        self.setup, self.counted, self.hidden_bytes = setup, counted, hidden_bytes
        self.accumulating = False
        self.on_host: dict[int, int] = {}

    def after_forward(self, ledger: Ledger, block: int) -> None:
        """With activation offload what a layer keeps leaves as the next one runs."""
        if "activations" in self.setup.offload and block:
            self._to_host(ledger, block - 1)

    def before_backward(self, ledger: Ledger, block: int | None) -> None:
        """It is back one layer ahead."""
        for needed in (block, block - 1) if block is not None else ():
            if needed in self.on_host:
                ledger.add("activations", self.on_host.pop(needed), f"fetching what layer {needed} kept")

    def _to_host(self, ledger: Ledger, block: int) -> None:
        kept = self.tape.saved_bytes[self.tape.recorded[block]]
        kept = min(kept, self.hidden_bytes) if self.setup.checkpointing != "none" else kept
        self.on_host[block] = kept
        ledger.add("activations", -kept)

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        self.accumulating = not first
        self.before = ledger.now["gradients"]

    def after_backward(self, ledger: Ledger, block: int) -> None:
        """An update in backward drops each gradient with it."""
        if self.setup.in_backward:
            self._step(ledger, self.counted.layer)

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        if self.setup.in_backward:
            self._step(ledger, self.counted.root)

    def _step(self, ledger: Ledger, group: Group) -> None:
        if self.setup.foreach:  # of one weight at a time
            ledger.touch("temporaries", group.largest_bytes, "update in backward")
        ledger.add("gradients", self.before - ledger.now["gradients"])

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        ledger.play(segment.gradients_move if self.accumulating else segment, moment)

    def reduced_bytes(self, gradients: int) -> int:
        """Of accumulated gradients after the last micro-batch."""
        return gradients


class Ddp(PeerTimeline):
    """Gradients and buckets of their size: ``gradient_as_bucket_view`` is off where nobody sets it."""

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        super().begin(ledger, first=first, last=last)
        self.buckets = gradient_bytes(self.setup, self.counted)
        ledger.add("communication", self.buckets)

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        ledger.add("communication", -self.buckets)


class Sharded(PeerTimeline):
    """A layer's weights are gathered while it runs, in backward the next one's too; the root's all the time.

    FSDP1 (torch ``fsdp/_runtime_utils.py``): gathers go straight into the unit; the gradient of a flat parameter is put
    together from those of its weights, which are there until then; BACKWARD_PRE prefetches a unit whose forward ran
    with gradients, which none inside a reentrant checkpoint did. There a hook that waits for the gradient of a frozen
    unit's inputs is removed when backward ends: until then it holds the input of every reentrant checkpoint, and its
    gradient. Without synchronisation, in all micro-batches but the last, gradients stay whole. Fabric puts frozen and
    trained parameters into one flat parameter, whose gradient is as large as it is.
    FSDP2: gathers are copied out of a buffer; the reduce-scatter of one layer is alive while the next one runs.
    """

    flat = True

    def __init__(self, setup: Setup, counted: Inventory, tape: Tape, hidden_bytes: int) -> None:
        super().__init__(setup, counted, tape, hidden_bytes)
        self.whole = {name: self._whole(group) for name, group in (("layer", counted.layer), ("root", counted.root))}
        self.reduced = {name: self._reduced(g) for name, g in (("layer", counted.layer), ("root", counted.root))}
        self.kept = 0
        self.offloaded = "parameters" in setup.offload  # and gradients with them, as they are reduced
        self.stays_whole = setup.accumulates and setup.stack in ("hf", "litgpt", "fsdp_qlora") and not self.offloaded
        reentrant = setup.reentrant and setup.checkpointing == "full" and not setup.fsdp_outside
        self.keeps_inputs = self.flat and setup.method != "full" and reentrant
        self.prefetches = not (self.flat and reentrant)
        self.held = 0
        self.waiting = 0  # gradients of the head, which the root reduces at the end
        self.fetched: int | None = None

    def _whole(self, group: Group) -> int:
        width = WIDTHS[self.setup.autocast] if self.setup.autocast else WIDTHS[_seen(self.setup)]
        parts = self.setup.tensor_parallel
        adapters = 0 if self.setup.adapters_ignored else group.adapters
        return (group.frozen_bytes + group.packed_bytes + (group.trained + adapters) * width) // parts

    def _reduced(self, group: Group) -> int:
        if self.setup.stack == "litgpt":
            return self._whole(group) if group.adapters + group.trained else 0
        adapters = 0 if self.setup.adapters_ignored else group.adapters
        return (group.trained + adapters) * WIDTHS[_seen(self.setup)] // self.setup.tensor_parallel

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        super().begin(ledger, first=first, last=last)
        ledger.add("gather_buffers", self.whole["root"], "gathering the root")
        self.kept = ledger.now["gradients"]

    def before_forward(self, ledger: Ledger, block: int) -> None:
        ledger.add("gather_buffers", self.whole["layer"], f"gathering layer {block}")

    def after_forward(self, ledger: Ledger, block: int) -> None:
        super().after_forward(ledger, block)
        if not self.setup.shard_grad_op:
            ledger.add("gather_buffers", -self.whole["layer"])

    def before_backward(self, ledger: Ledger, block: int | None) -> None:
        super().before_backward(ledger, block)
        if self.setup.shard_grad_op:
            return
        if block is None:
            if self.prefetches and self.setup.stack in LOSS_INSIDE:  # the root's hook is on the loss
                ledger.add("gather_buffers", self.whole["layer"], "gathering the last layer ahead")
                self.fetched = self.num_blocks - 1
            return
        if self.fetched != block:
            ledger.add("gather_buffers", self.whole["layer"], f"gathering layer {block} again")
        if block and self.prefetches:
            ledger.add("gather_buffers", self.whole["layer"], f"gathering layer {block - 1} ahead")
            self.fetched = block - 1

    def after_backward(self, ledger: Ledger, block: int) -> None:
        self._reduce(ledger, "layer", f"reducing layer {block}")
        super().after_backward(ledger, block)
        ledger.add("gather_buffers", -self.whole["layer"])
        if self.keeps_inputs:
            # The gradient of this input is that of the next layer's output, which the tape counts while it runs.
            more = self.hidden_bytes * (2 if self.held else 1)
            ledger.add("activations", more)
            self.held += more

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        self._reduce(ledger, "root", "reducing the root")
        super().end(ledger, first=first, last=last)
        ledger.add("gather_buffers", -self.whole["root"])
        ledger.add("activations", -self.held)
        self.held = 0

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        ledger.play(segment, moment)  # what is there already is of flat parameters: these are their parts
        if segment is self.tape.head_backward:
            self.waiting = ledger.now["gradients"] - self.kept

    def reduced_bytes(self, gradients: int) -> int:
        if not self.stays_whole:
            return gradients
        numel = self.counted.total("trained") + self.counted.total("adapters")
        return numel * self._gradient_width() // self.setup.sharded_by

    def _gradient_width(self) -> int:
        return WIDTHS[self.setup.stored if self.setup.method == "full" else self.setup.adapters]

    def _reduce(self, ledger: Ledger, name: str, moment: str) -> None:
        size = self.reduced[name]
        if self.setup.adapters_ignored:
            return
        if self.flat:
            # Zeros stand in for the gradients of frozen weights until all are one.
            parts = ledger.now["gradients"] - self.kept - (self.waiting if name == "layer" else 0)
            whole = max(2 * size - parts, size) if self.setup.stack == "litgpt" else size
            ledger.touch("communication", whole, moment)
        waiting = self.waiting if name == "layer" else 0
        ledger.add("gradients", self.kept + waiting - ledger.now["gradients"])
        if self.offloaded:
            return
        if not self.stays_whole:
            size = size // WIDTHS[_seen(self.setup)] * self._gradient_width() // self.setup.sharded_by
        if not self.accumulating:
            ledger.add("gradients", size, moment)
            self.kept += size
        elif not self.stays_whole:
            ledger.touch("gradients", size, moment)


class Fsdp2(Sharded):
    flat = False

    def __init__(self, setup: Setup, counted: Inventory, tape: Tape, hidden_bytes: int) -> None:
        super().__init__(setup, counted, tape, hidden_bytes)
        self.buffered = self.reducing = 0

    def before_forward(self, ledger: Ledger, block: int) -> None:
        size = self.whole["layer"]
        ledger.add("gather_buffers", size, f"gathering layer {block}")
        ledger.add("gather_buffers", -self.buffered)
        self.buffered = size
        ledger.add("gather_buffers", size, f"gathering layer {block}")

    def before_backward(self, ledger: Ledger, block: int | None) -> None:
        PeerTimeline.before_backward(self, ledger, block)
        size = self.whole["layer"]
        if self.setup.shard_grad_op:
            ledger.add("gather_buffers", -self.buffered)
            self.buffered = 0
            return
        if block is None:
            ledger.add("gather_buffers", size - self.buffered, "gathering the last layer ahead")
            self.buffered = size
            return
        ledger.add("gather_buffers", size, f"gathering layer {block} again")
        ledger.add("gather_buffers", -self.buffered)
        self.buffered = 0
        if block:
            ledger.add("gather_buffers", size, f"gathering layer {block - 1} ahead")
            self.buffered = size

    def _reduce(self, ledger: Ledger, name: str, moment: str) -> None:
        ledger.add("communication", -self.reducing)
        wider = 2 if self.setup.stack == "titan" else 1  # torchtitan reduces in fp32, others in what was computed
        self.reducing = self.reduced[name] * wider
        ledger.add("communication", self.reducing, moment)
        super()._reduce(ledger, name, moment)
        if name == "root":
            ledger.add("communication", -self.reducing)
            self.reducing = 0


class Zero(PeerTimeline):
    """DeepSpeed: buckets, the gradients of this rank's share in 16 bits until the update (of stage 1 all of them), and
    under stage 3 what its default knobs keep gathered (a bound)."""

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        super().begin(ledger, first=first, last=last)
        numel = self.counted.total("trained") + self.counted.total("adapters")
        self.buckets = 2 * 2 * min(ZERO_REDUCE_BUCKET, numel)
        ledger.add("communication", self.buckets, "buckets")
        self.live = 0
        if self.setup.sharding == "zero3":
            weights = self.counted.total("frozen_bytes") + 2 * self.counted.total("trained")
            self.live = min(weights, 2 * (ZERO_MAX_LIVE + ZERO_PREFETCH_BUCKET))
        ledger.add("gather_buffers", self.live, "gathered")
        if first and "optimizer" not in self.setup.offload:
            ledger.add("gradients", 2 * numel // (1 if self.setup.sharding == "zero1" else self.setup.sharded_by))

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        ledger.play(segment.gradients_move, moment)

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        ledger.add("communication", -self.buckets)
        ledger.add("gather_buffers", -self.live)


def zero_update_bytes(setup: Setup, counted: Inventory) -> int:
    """DeepSpeed makes the gradients of a rank's share fp32 for the update; stage 3 those of one sub-group at a time."""
    share = (counted.total("trained") + counted.total("adapters")) // setup.sharded_by
    return 4 * (min(share, ZERO_SUB_GROUP) if setup.sharding == "zero3" else share)


def timeline_of(setup: Setup, counted: Inventory, tape: Tape, hidden_bytes: int) -> PeerTimeline:
    kind = {"none": PeerTimeline, "ddp": Ddp, "fsdp1": Sharded, "fsdp2": Fsdp2}.get(setup.sharding, Zero)
    return kind(setup, counted, tape, hidden_bytes)


def gradient_bytes(setup: Setup, counted: Inventory) -> int:
    """Of all that trains, whole."""
    adapters = counted.total("adapters") * WIDTHS[setup.adapters]
    return adapters + counted.total("trained") * WIDTHS[_seen(setup) if setup.sharding != "none" else setup.stored]


def _seen(setup: Setup) -> str:
    """The dtype in which a module sees what trains."""
    if setup.autocast and setup.sharding.startswith("fsdp"):
        return setup.autocast
    if setup.stack == "titan":
        return "bf16"
    return setup.stored if setup.method == "full" else setup.adapters
