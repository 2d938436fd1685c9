"""Artefacts of a run or a checkpoint, for others to use: adapters, whole models, merged models; each proven."""
