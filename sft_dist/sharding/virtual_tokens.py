"""What virtual tokens in front of every row do not go together with."""

from __future__ import annotations

from sft_dist.config.schema import VirtualTokensMethod
from sft_dist.run import Run
from sft_dist.sharding.refusal import Refusal


def unsupported(run: Run) -> Refusal | None:
    """Why the run cannot have its method of virtual tokens, or None. That data is not packed, ``validate`` checks."""
    method = run.model.method
    # Not every strategy has the key.
    ranks = run.sharding.model_dump().get("sequence_parallel", 1)
    if not isinstance(method, VirtualTokensMethod) or ranks == 1:
        return None
    return Refusal(
        f"sharding.sequence_parallel {ranks} splits the rows between ranks, and method.type {method.type} puts "
        f"{method.num_virtual_tokens} virtual tokens in front of every whole row",
        "set sharding.sequence_parallel to 1, or method.type to lora",
    )
