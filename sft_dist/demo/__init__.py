"""``python -m sft_dist.demo``: a sharded fine-tuning run on two processes that anyone can start on a laptop."""
