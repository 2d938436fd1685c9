"""The proof of ``final/``: a fresh process loads it with plain transformers and peft and finds the trained model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sft_dist.checkpoint import fresh_process
from sft_dist.config.schema import QloraMethod
from sft_dist.data.batch import MicroBatch
from sft_dist.data.chat_template import TemplateSample
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import CheckpointError
from sft_dist.model.spec import Dtype, ModelSpec
from sft_dist.runtime.signals import STOPPING
from sft_dist.sharding.strategy import Strategy

# Root mean square of the difference over that of the logits. Two correct programs in fp32 differ by about 1e-6; each
# rounding to bf16 is 2^-9, and a deep model adds up some hundreds of them.
TOLERANCE: dict[Dtype, float] = {"fp32": 1e-4, "bf16": 5e-2}

NUM_PROBES = 2
MAX_PROBE_TOKENS = 512
MAX_PROBE_POSITIONS = 32

# Until a signal has ended this process, where it is one that ends it.
SIGNAL_TAKES_S = 5.0

# What a launcher tells its processes; the fresh one is nobody's process.
LAUNCHER_VARIABLES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PET_", "GROUP_", "ROLE_")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Probe:
    """A training row, the positions that are compared, and the trained model's logits there ([positions, V] fp32)."""

    input_ids: list[int]
    positions: list[int]
    logits: Tensor


def take_probes(strategy: Strategy, data: PreparedData, device: torch.device) -> list[Probe]:
    """Logits of the model in memory on rows of the training data; every rank must call it.

    The rows are the first and the middle one; of long rows the beginning, of many positions some spread over the row.
    """
    probes = []
    for row in sorted({0, data.num_rows // 2})[:NUM_PROBES]:
        ids = torch.from_numpy(data.row(row)[0][:MAX_PROBE_TOKENS].astype("int64"))
        positions = torch.linspace(0, len(ids) - 1, min(MAX_PROBE_POSITIONS, len(ids))).long().unique()
        batch = MicroBatch(
            input_ids=ids[None],
            position_ids=torch.arange(len(ids))[None],
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            supervised_index=positions,
            labels=ids[positions],
            seq_lens=(len(ids),),
        )
        logits = strategy.infer(batch.to(device), logits=True)
        probes.append(Probe(ids.tolist(), positions.tolist(), logits.float().cpu()))
    return probes


def prove_artefact(
    folder: Path, spec: ModelSpec, weights: Mapping[str, str], probes: list[Probe], sample: TemplateSample | None
) -> None:
    """Loads ``folder`` in a fresh process on the CPU and compares it with what is expected of it.

    Args:
        weights: digests of the trained weights by the names that transformers and peft give them.
        probes: of the model in memory.
        sample: a row through the chat template that was trained with; None: trained without one.

    Raises:
        CheckpointError: it does not load, or is not the trained model; ``folder`` stays as it is.
    """
    with tempfile.TemporaryDirectory(prefix="sft_dist_proof_") as temporary:
        expected = Path(temporary)
        write_expected(expected, spec, weights, probes, sample)
        require_proof(folder, expected, fix="the checkpoints are kept")


def require_proof(folder: Path, expected: Path, *, fix: str) -> None:
    """Lets a fresh process compare ``folder`` with what the folder ``expected`` says.

    Args:
        fix: what is there in its place.

    Raises:
        CheckpointError: it does not load, or is not what is expected.
    """
    # -P: the folder of the script is no place to import from.
    command = [sys.executable, "-P", fresh_process.__file__, str(folder), str(expected)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if -done.returncode in STOPPING:
        # It was sent to all processes of a job, and meant the run; here it may be on its way.
        signal.raise_signal(-done.returncode)
        time.sleep(SIGNAL_TAKES_S)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        findings = [f"it does not load: {last}"]
    else:
        findings = json.loads((expected / fresh_process.FINDINGS).read_text(encoding="utf-8"))
    if findings:
        raise CheckpointError(
            f"{folder} failed its proof: " + "; ".join(findings[: fresh_process.MAX_SHOWN]),
            fix=f"{fix}; please report this, with the versions of transformers and peft",
        )


def write_expected(
    folder: Path, spec: ModelSpec, weights: Mapping[str, str], probes: list[Probe], sample: TemplateSample | None
) -> None:
    """What the fresh process compares with, in files that it reads without this project."""
    save_file({str(n): probe.logits.contiguous() for n, probe in enumerate(probes)}, folder / fresh_process.LOGITS)
    description = {
        "method": spec.method.type,
        "quantization": spec.method.quantization.model_dump() if isinstance(spec.method, QloraMethod) else None,
        "dtype": spec.compute,
        "stored": spec.compute,
        "vocabulary": spec.vocab_size if spec.tokens.new_rows else None,
        "weights": dict(weights),
        "probes": [{"input_ids": probe.input_ids, "positions": probe.positions} for probe in probes],
        "template": None if sample is None else asdict(sample),
        "tolerance": TOLERANCE[spec.compute],
        "references": None,
    }
    (folder / fresh_process.EXPECTED).write_text(json.dumps(description), encoding="utf-8")


def _environment() -> dict[str, str]:
    """This process' environment without what its launcher put there, and without GPUs, which training still holds.

    Offline: a base from the hub is read where training read it, from the cache.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith(LAUNCHER_VARIABLES)
    }
    return kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
