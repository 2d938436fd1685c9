"""The training run: assembly, the loop, one step, evaluation."""
