"""Answers on a GPU: the same words as on the CPU, and a base that is quantised there.

Skipped without a CUDA device. Run with ``pytest tests/gpu``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from sft_dist.checkpoint.source import find_newest_source
from sft_dist.data.messages import Message
from sft_dist.generate.engine import Sampling
from sft_dist.generate.load import load
from tests.helpers.taught import PAIRS, teach
from tests.helpers.trained_run import train_run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_answers_as_on_the_cpu(tiny_base: Path, tmp_path: Path, lora: bool) -> None:
    loaded = load(
        find_newest_source(str(teach(tiny_base, tmp_path / "taught", lora=lora))), device="cuda", dtype="fp32"
    )
    for asked, answered in PAIRS:
        prompt = loaded.prompter.chat([Message("user", asked)])
        assert loaded.engine.answer(loaded.tuned, prompt, Sampling(40)).text == answered


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_answers_with_and_without_its_adapter(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    run = train_run(tiny_base, tmp_path, method={"type": "qlora", "r": 16, "quantization": {"type": kind}})
    loaded = load(find_newest_source(str(run)), device="auto", dtype="auto", with_base=True)
    assert loaded.about.endswith(torch.cuda.get_device_name())
    prompt = loaded.prompter.chat([Message("user", PAIRS[0][0])])
    assert loaded.engine.answer(loaded.tuned, prompt, Sampling(40)).text == PAIRS[0][1]
    assert loaded.base is not None
    assert loaded.engine.answer(loaded.base, prompt, Sampling(40)).text != PAIRS[0][1]
