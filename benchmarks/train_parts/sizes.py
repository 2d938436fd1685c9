"""Models that the benchmarks of training train, and what a step of one cannot do without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RANK = 16
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "r": RANK, "alpha": 2 * RANK},
    "qlora": {"type": "qlora", "r": RANK, "alpha": 2 * RANK},
}

# Bytes of a frozen weight as it is stored. NF4: 4 bits, 8 for the scale of 64, 32 for that of 256 scales.
STORED_BYTES = {"lora": 2, "qlora": 0.5 + 1 / 64 + 4 / 64 / 256}


@dataclass(frozen=True)
class Step:
    """One optimizer step. Args: segments: lengths of all rows in it; supervised: tokens."""

    segments: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        return sum(self.segments)


@dataclass(frozen=True)
class Size:
    """Of a Llama.

    Args:
        wide: width of the MLP.
        steps: of a run, by length of the packs.
        methods, lengths: that are measured where nothing else is asked for.
    """

    vocab: int
    hidden: int
    wide: int
    layers: int
    heads: int
    kv_heads: int
    steps: dict[int, int]
    methods: tuple[str, ...] = tuple(METHODS)
    lengths: tuple[int, ...] = (1024, 4096)
    needs_gpu: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Input and output sizes of a block's linear layers."""
        kv = self.hidden * self.kv_heads // self.heads
        attention = [(self.hidden, self.hidden)] * 2 + [(self.hidden, kv)] * 2
        return attention + [(self.hidden, self.wide)] * 2 + [(self.wide, self.hidden)]

    @property
    def block_weights(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def block_adapters(self) -> int:
        return RANK * sum(inputs + outputs for inputs, outputs in self.linears)

    @property
    def llama(self) -> dict[str, Any]:
        """Arguments of Transformers' ``LlamaConfig``."""
        return {
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.wide,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
        }  # fmt: skip


SIZES = {
    "33m": Size(8192, 512, 1536, 8, 8, 4, steps={1024: 20, 4096: 10}),
    # Llama 2 of 7B. Full fine-tuning of it takes more than a GPU has.
    "7b": Size(
        32_000, 4096, 11_008, 32, 32, 32, steps={4096: 12}, methods=("lora", "qlora"), lengths=(4096,), needs_gpu=True
    ),
}


def flops(size: Size, step: Step, method: str) -> float:
    """Of a step's products, forward and backward, nothing computed twice counted twice.

    2 a weight and token forward, 2 more for the gradient of its input, 2 more for its own where it is trained; logits
    at the supervised positions only. Attention: 2 products of d a pair and head forward, 4 backward; pairs are causal.
    """
    pairs = sum(length * (length + 1) / 2 for length in step.segments)
    attention = size.layers * pairs * size.hidden * (4 + 8)
    factor = 6 if method == "full" else 4
    products = factor * (size.layers * size.block_weights * step.tokens + size.hidden * size.vocab * step.supervised)
    adapters = 0 if method == "full" else 6 * size.layers * size.block_adapters * step.tokens
    return products + attention + adapters


def least_bytes(size: Size, method: str) -> float:
    """That a step reads and writes of weights, gradients and moments at least; what activations take is not in it.

    A weight is read in forward and in backward, in bf16 or as it is stored. Of one that is trained the gradient is
    written in fp32, and AdamW reads weight, gradient and two moments, and writes all but the gradient.
    """
    blocks, ends = size.layers * size.block_weights, 2 * size.vocab * size.hidden
    trained = 2 * 2 + 4 + 4 * (4 + 3)
    if method == "full":
        return (blocks + ends) * trained
    # The embedding is read by rows, and the output layer is not quantised.
    frozen = 2 * (STORED_BYTES[method] * blocks + STORED_BYTES["lora"] * ends / 2)
    return frozen + size.layers * size.block_adapters * trained
