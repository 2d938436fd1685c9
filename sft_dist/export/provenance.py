"""What a run's own files say of it, as Markdown for a model card: method, data, steps, result, cost, versions.

Imports no torch. What a file does not tell is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_dist.checkpoint.identity import TRAINING_DATA
from sft_dist.config.schema import Config
from sft_dist.config.text import write_yaml
from sft_dist.metrics.logger import METRICS

RECEIPT = "receipt.json"


def training_section(
    config: Config,
    run_directory: Path | None,
    *,
    identity: Mapping[str, Any] | None = None,
    steps: int | None = None,
    state: str | None = None,
) -> str:
    """
    Args:
        run_directory: whose ``metrics.jsonl`` and ``receipt.json`` are read, where they are.
        identity: of the checkpoint; None: that of the receipt.
        steps: behind the checkpoint; None: all that ``metrics.jsonl`` has.
        state: which one of the run it is, in words.
    """
    receipt = read_receipt(run_directory)
    facts = {
        "base model": _base(config),
        "data": (identity or receipt.get("identity") or {}).get(TRAINING_DATA),
        **_measured(_lines(run_directory, steps)),
        "state": state,
        "global batch": f"{config.train.global_batch_size} sequences of up to {config.data.max_seq_len:,} tokens",
        "ran on": _topology(receipt.get("topology")),
        "versions": ", ".join(f"{name} {number}" for name, number in (receipt.get("versions") or {}).items()) or None,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None)
    sources = "\n".join(f"- `{source.path}`" for source in config.data.train)
    settings = {
        "method": config.method.model_dump(mode="json"),
        "precision": config.precision.model_dump(mode="json"),
        "optim": config.optim.model_dump(mode="json"),
        "seed": config.train.seed,
    }
    return (
        f"## Training\n\n| | |\n|---|---|\n{table}\n\nSources of the training data:\n\n{sources}\n\n"
        f"```yaml\n{write_yaml(settings)}```"
    )


def read_receipt(run_directory: Path | None) -> dict[str, Any]:
    """The receipt of a run; empty where there is none that can be read."""
    if run_directory is None:
        return {}
    try:
        receipt = json.loads((run_directory / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return receipt if isinstance(receipt, dict) else {}


def _base(config: Config) -> str:
    revision = f" at {config.model.revision}" if config.model.revision else ""
    added = (
        f", with the tokens {', '.join(f'`{t}`' for t in config.model.add_tokens)}" if config.model.add_tokens else ""
    )
    return f"`{config.model.path}`{revision}{added}"


def _lines(run_directory: Path | None, steps: int | None) -> list[dict[str, Any]]:
    """Of ``metrics.jsonl``, up to a step."""
    path = None if run_directory is None else run_directory / METRICS
    if path is None or not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a dying process
        if steps is None or line["step"] <= steps:
            lines.append(line)
    return lines


def _measured(lines: list[dict[str, Any]]) -> dict[str, str]:
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    facts = {}
    if trained:
        last = trained[-1]
        tokens = sum(line["num_tokens"] for line in trained)
        supervised = sum(line["supervised_tokens"] for line in trained)
        facts["steps"] = f"{last['step']:,}, {tokens:,} tokens, {supervised:,} of them trained"
        facts["training loss"] = f"{last['loss']:.4f} in the last step"
    if evaluated:
        last_evaluation = evaluated[-1]
        facts["evaluation loss"] = f"{last_evaluation['eval_loss']:.4f} after step {last_evaluation['step']:,}"
    elapsed = [line["elapsed_s"] for line in lines if isinstance(line.get("elapsed_s"), int | float)]
    spent = [line["cost_usd"] for line in lines if isinstance(line.get("cost_usd"), int | float)]
    if elapsed:
        facts["time"] = f"{max(elapsed) / 3600:,.2f} h to the last step"
    if spent:
        facts["cost"] = f"${max(spent):,.2f} to the last step"
    return facts


def _topology(topology: Mapping[str, Any] | None) -> str | None:
    if not topology:
        return None
    nodes = f" on {topology['nodes']} nodes" if topology.get("nodes", 1) > 1 else ""
    return f"{topology.get('processes')} x {topology.get('device')}{nodes}, {topology.get('strategy')}"
