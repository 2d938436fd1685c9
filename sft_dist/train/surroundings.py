"""What a run computes with and on, beside what it reads: versions, code, machine, environment. Imports no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sft_dist import __version__
from sft_dist.runtime.code import code_digest, code_here
from sft_dist.runtime.machine import cpu_name, driver_version
from sft_dist.runtime.meeting import LAUNCHER

# All that have a part in numbers, or in speed and memory.
LIBRARIES = (
    "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "numpy",
)  # fmt: skip

# Variables by which libraries round otherwise: threads and the order of sums, kernels, the way of collectives.
ENVIRONMENT = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "ATEN_CPU_CAPABILITY", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO",
)  # fmt: skip


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Of Python, of this project and of libraries; one that is not installed is left out."""
    found = {"python": platform.python_version(), "sft_dist": __version__}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code() -> dict[str, Any]:
    """This project's code: a digest of its files, and where it is a checkout its commit and whether it was changed."""
    here = code_here()
    return {"digest": code_digest(), "commit": here.commit, "changed": here.changed}


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of ``ENVIRONMENT`` that are set."""
    return {name: env[name] for name in ENVIRONMENT if name in env}


def machine() -> dict[str, str | None]:
    return {"cpu": cpu_name(), "driver": driver_version()}


def launcher(env: Mapping[str, str] = os.environ) -> str | None:
    """What started the processes; None: the process was started by itself."""
    if "RANK" not in env:
        return None
    return env.get(LAUNCHER) or ("torchrun" if "TORCHELASTIC_RUN_ID" in env else "another one")
