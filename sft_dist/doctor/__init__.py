"""``sft-dist doctor``: whether machines can do what a run needs of them, found in seconds, before the run."""
