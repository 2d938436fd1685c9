"""Parts of ``benchmarks/train.py``; what a peer runs imports nothing of this project."""
