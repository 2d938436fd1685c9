"""Merging holds no model: two of its tensors and what Python and torch are, whatever its size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.merge import METHODS, make_adapter, make_base, measure
from tests.helpers import figures


@pytest.mark.full
@pytest.mark.parametrize(("method", "dtype"), [("lora", "bf16"), ("dora", "bf16"), ("qlora", "bf16"), ("lora", "fp32")])
def test_a_model_of_two_billion_parameters(tmp_path: Path, method: str, dtype: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", METHODS[method])
    # In fp32 nothing is rounded, and the logits of the two are compared too.
    merged = measure(adapter, tmp_path / "out", dtype=dtype, check=dtype == "fp32")
    figures.lines.append(f"merge of 2.1B, {method} in {dtype}: {merged}")
    assert merged.written_bytes > 2e9 * (4 if dtype == "fp32" else 2)
    assert merged.peak_bytes < merged.bound_bytes
    for folder in (tmp_path / "base", tmp_path / "out"):
        for file in folder.glob("*.safetensors"):
            file.unlink()
