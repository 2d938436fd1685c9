"""From data files to batches: sources, chat template, mask, packs, loader."""
