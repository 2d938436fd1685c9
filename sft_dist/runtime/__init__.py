"""Processes: who this rank is, how ranks talk, and what they draw at random."""
