"""What is installed on each node: all of it has to be the same."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sft_dist import __version__
from sft_dist.doctor.finding import Finding, odd_ones
from sft_dist.runtime.code import code_digest

# What decides what is computed, and how processes talk.
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers", "safetensors", "numpy",
)  # fmt: skip
NOT_INSTALLED = "not installed"

# Other versions of these on one node end a run, or make its ranks compute something else; others only smell.
ESSENTIAL = (
    "python", "sft_dist", "code", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "CUDA",
    "NCCL",
)  # fmt: skip


def installed() -> dict[str, str]:
    """Versions by name, from the packages' metadata: nothing is imported.

    ``code`` is a digest of this project's own files, which a checkout may change without a new version.
    """
    found = {"python": platform.python_version(), "sft_dist": __version__, "code": code_digest()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


def check_versions(by_node: Mapping[str, Mapping[str, str]], order: Sequence[str]) -> list[Finding]:
    """Whether all nodes have the same.

    Args:
        by_node: what ``installed`` gave on each, and what torch was built with.
    """
    names = list(dict.fromkeys(name for versions in by_node.values() for name in versions))
    found = []
    for name in names:
        values = {node: versions[name] for node, versions in by_node.items() if name in versions}
        usual, odd = odd_ones(values, order)
        for node in odd:
            what = f"{_said(name, values[node])}, the others have {usual}"
            fix = f"install {_said(name, usual)} there, or use one environment that all nodes see"
            found.append(Finding("versions", node, "failed" if name in ESSENTIAL else "warning", what, fix, name))
    if found:
        return found
    any_node: Mapping[str, Any] = next(iter(by_node.values()), {})
    shown = ", ".join(f"{name} {any_node[name]}" for name in ("python", "torch", "transformers") if name in any_node)
    return [Finding("versions", "", "ok", f"the same on all nodes: {shown}" if len(by_node) > 1 else shown)]


def _said(name: str, value: str) -> str:
    return {"code": f"code of this project {value}"}.get(name, f"{name} {value}")
