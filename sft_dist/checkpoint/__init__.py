"""Checkpoints: written complete or not at all, read back when written, resumed on any world under any strategy."""
