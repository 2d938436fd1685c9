"""``python -m sft_dist.launch torchrun|accelerate|deepspeed|srun ...``: what the scripts of launch/ run.

Imports the standard library alone, so that a package that is missing is told in two lines.
"""

from __future__ import annotations

import importlib
import os
import sys

CONFIG_ERROR = 2  # the exit code of ``ConfigError``, which may be what cannot be imported


def main() -> int:
    """Runs a launcher's module with the arguments behind its name, and returns the exit code."""
    name, *arguments = sys.argv[1:]
    # Warnings of torch's C++ parts, such as of a node without a name in the DNS, are for those who work on torch. It is
    # read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        meeting = importlib.import_module("sft_dist.launch.meeting")
        launcher = importlib.import_module(f"sft_dist.launch.{name}")
    except ModuleNotFoundError as error:
        print(
            f"error: launch/{name}.sh: {sys.executable} has no package {error.name}\n"
            "  fix: activate the environment that sft_dist is installed in, or install it: pip install -e .",
            file=sys.stderr,
        )
        return CONFIG_ERROR
    with meeting.noted_exit(as_task=name == "srun"):
        sys.exit(launcher.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
