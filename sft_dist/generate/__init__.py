"""Answers of what a run made: in the terminal, for a file of prompts, and over HTTP."""
