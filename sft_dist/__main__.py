"""``python -m sft_dist`` is the console script ``sft-dist``."""

from sft_dist.cli import main

if __name__ == "__main__":
    main()
