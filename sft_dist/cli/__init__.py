"""The commands, one module a topic: ``sft-dist`` and ``python -m sft_dist``. Imports no torch at module level."""

from sft_dist.cli.app import main

__all__ = ["main"]
