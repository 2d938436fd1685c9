"""What a row of a length asks of the model's positions, outside a training, whose own rows ``resolve`` has checked."""

from __future__ import annotations

from sft_dist.errors import ConfigError
from sft_dist.model.build import SftModel
from sft_dist.model.support import dynamic_rope


def num_positions(model: SftModel) -> int | None:
    """Tokens that a row may have beside its virtual ones; None: any number."""
    positions: int | None = getattr(model.causal_lm.config, "max_position_embeddings", None)
    return None if positions is None else positions - _num_virtual(model)


def most_tokens(model: SftModel) -> int | None:
    """As ``num_positions``, and no more than let a row be computed without regard to the rows before it."""
    positions, rope = num_positions(model), dynamic_rope(model.causal_lm.config)
    if rope is None or not rope.has_memory:
        return positions
    alone = rope.from_tokens - _num_virtual(model)
    return alone if positions is None else min(positions, alone)


def depends_on_neighbours(model: SftModel, longest: int, *, what: str) -> str | None:
    """Why a row of ``longest`` tokens has to be alone in its forward pass, and has to be computed anew when it grows.

    Args:
        what: such a row is called.

    Raises:
        ConfigError: even so it would depend on other passes.
    """
    rope = dynamic_rope(model.causal_lm.config)
    whole = longest + _num_virtual(model)
    if rope is None or whole <= rope.from_tokens:
        return None
    beyond = (
        f"{what} of up to {whole:,} tokens: in rows of more than {rope.from_tokens:,} the model has rotary frequencies"
    )
    if rope.has_memory:
        raise ConfigError(f"{beyond} that depend on the rows before", fix=f"keep to {rope.from_tokens:,} tokens")
    return f"{beyond} of their own"


def _num_virtual(model: SftModel) -> int:
    return 0 if model.prompt is None else model.prompt.count
