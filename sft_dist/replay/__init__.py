"""``sft-dist replay``: a run repeated from its receipt, and whether it came out the same."""
