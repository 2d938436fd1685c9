"""What a run tells: the console, metrics.jsonl and W&B."""
