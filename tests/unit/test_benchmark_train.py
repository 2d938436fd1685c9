"""The benchmarks of training count and compare rightly; what they measure is theirs."""

from __future__ import annotations

import importlib
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import check, growth, train
from benchmarks.train_parts import environments
from benchmarks.train_parts.peer_memory import peak_bytes
from benchmarks.train_parts.point import Point, Report, rows_of
from benchmarks.train_parts.sizes import METHODS, SIZES, Step, flops, least_bytes
from sft_dist.data.packing import Packs

RATES = {"model": 4e8, "square": 8e8, "memory": 1e9}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_flops_are_those_that_torch_counts(method: str) -> None:
    """Of the products of matrices, where every position is supervised; without attention."""
    tokens = 8
    size = SIZES["33m"]
    model = LlamaForCausalLM(LlamaConfig(**size.llama, attn_implementation="eager"))
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    without_attention = flops(size, Step((1,) * tokens, tokens), method) - size.layers * tokens * size.hidden * 12
    assert without_attention == pytest.approx(counted, rel=2e-2 if method == "lora" else 1e-9)


@pytest.mark.parametrize("name", SIZES)
def test_least_bytes_are_those_of_the_parameters(name: str) -> None:
    """2 x 2 bytes a pass of a weight; of what is trained 4 for its gradient and 7 x 4 for AdamW."""
    size = SIZES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**size.llama, tie_word_embeddings=False))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    embedding = size.vocab * size.hidden
    assert least_bytes(size, "full") == 36 * matrices
    adapters = size.layers * size.block_adapters
    assert least_bytes(size, "lora") == 4 * (matrices - embedding) + 36 * adapters
    quantised = size.layers * size.block_weights
    of_4_bits = least_bytes(size, "qlora") - least_bytes(size, "lora")
    assert of_4_bits == pytest.approx(-2 * (2 - 0.516) * quantised, rel=1e-3)


def test_attention_counts_the_pairs_that_are_looked_at() -> None:
    """Of rows of 5 and 3 tokens 15 + 6, of eight rows of one token 8."""
    size = SIZES["33m"]
    rows, alone = (flops(size, Step(segments, 0), "full") for segments in ((5, 3), (1,) * 8))
    assert rows - alone == 12 * size.layers * size.hidden * (15 + 6 - 8)


def measured(side: str, number: int, rate: float, memory: int, losses: list[float]) -> train.Measured:
    return train.Measured(side, "full", 1024, number, 2.0, rate, 2e6 * rate, memory, None, 5.0, losses, {})


def test_ratios_are_of_neighbours() -> None:
    runs = [
        measured("sft_dist", 0, 200, 10, [2.0, 1.0]), measured("trl", 0, 100, 20, [2.0, 1.001]),
        measured("trl", 1, 50, 20, [2.0, 1.0]), measured("sft_dist", 1, 150, 10, [2.0, 1.0]),
        measured("sft_dist", 2, 220, 10, [2.0, 1.0]), measured("trl", 2, 100, 20, [2.0, 1.0]),
        *(measured(train.COMPILED, number, 250, 9, [2.0, 1.0]) for number in range(3)),
    ]  # fmt: skip
    rows = {row.side: row for row in train.rows_of(runs, RATES, SIZES["33m"])}
    assert rows["trl"].ratio == pytest.approx(2.2)
    assert rows["trl"].compiled_ratio == pytest.approx(2.5)
    assert rows[train.COMPILED].ratio == pytest.approx(0.8)
    assert rows["trl"].memory_ratio == 0.5
    assert rows["trl"].losses_differ == pytest.approx(1e-3)
    assert (rows["sft_dist"].ratio, rows["sft_dist"].losses_differ) == (1.0, 0.0)
    assert rows["sft_dist"].of_model == pytest.approx(200e6 / 4e8)
    assert rows["sft_dist"].flops_s == pytest.approx(400e6 / 8e8)
    console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    planned = replace(rows["sft_dist"], peak_gib=1.9, planned_gib=2.0)
    train.show([planned, rows["trl"]], RATES, {"axolotl": "no wheel"}, console)
    text = console.export_text()
    assert "full 1,024: a step takes 2,000 ms; its FLOPs 500 ms" in text
    assert "measured / planned 0.950" in text
    assert text.splitlines()[3].split()[2:6] == ["2.20", "x", "2.50", "x"], text
    assert "axolotl is left out: no wheel" in text


def test_a_method_at_which_a_peer_fails_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "_rates", lambda threads, size: RATES)
    for peer in train.PEERS.values():
        monkeypatch.setattr(type(peer), "install", lambda self: None)

    def run(work: Any, side: str, python: str, method: str, length: int, number: int, *_: Any) -> train.Measured:
        if (side, method, number) == ("llamafactory", "full", 1):
            raise train.PeerFailedError("at 1,024 it ended with 1: ValueError: no kernel")
        if (side, method) == (train.COMPILED, "lora"):
            raise train.PeerFailedError("at 1,024 it ended with 7: no compiler")
        return replace(measured(side, number, 100, 10, [1.0]), method=method)

    monkeypatch.setattr(train, "_run", run)
    monkeypatch.setattr(train, "Workload", lambda folder, size: None)
    path = tmp_path / "result.json"
    cells = ["--methods", "full", "lora", "--lengths", "1024", "--peers", "trl", "llamafactory"]
    train.main([*cells, "--json", str(path)])
    rows = {(row["method"], row["side"]) for row in json.loads(path.read_text())["rows"]}
    both = {("full", "sft_dist"), ("full", "trl"), ("lora", "sft_dist"), ("lora", "trl")}
    assert rows == both | {("lora", "llamafactory"), ("full", train.COMPILED)}
    said = capsys.readouterr().out
    assert "llamafactory, full is left out: at 1,024 it ended with 1: ValueError: no kernel" in said
    assert "sft_dist, compiled, lora is left out: at 1,024 it ended with 7: no compiler" in said


def test_the_error_of_a_peer_is_told_not_its_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "Traceback\nValueError: no kernel\n  0%|   | 0/20 [00:00<?, ?it/s]\n"
    failed = SimpleNamespace(returncode=1, stdout="", stderr=stderr)
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: failed)
    work: Any = SimpleNamespace(
        folder=tmp_path, base=tmp_path, adapter=tmp_path, size=SIZES["33m"], config=lambda *_, **__: tmp_path / "c.yaml",
        packs=lambda config: (tmp_path / "packs", []),
    )  # fmt: skip
    with pytest.raises(train.PeerFailedError, match="at 1,024 it ended with 1: ValueError: no kernel"):
        train._run(work, "trl", "python", "full", 1024, 0, "bf16", 1)


def test_a_peer_that_this_python_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_rates", lambda threads, size: RATES)
    monkeypatch.setattr(train, "Workload", lambda folder, size: None)
    asked = []

    def run(work: Any, side: str, python: str, method: str, length: int, number: int, *_: Any) -> train.Measured:
        asked.append((side, python))
        return measured(side, number, 100, 10, [1.0])

    monkeypatch.setattr(train, "_run", run)
    shown: dict[str, str] = {}
    monkeypatch.setattr(train, "show", lambda rows, rates, absent, console: shown.update(absent))
    monkeypatch.setattr(environments.importlib.util, "find_spec", lambda name: None if name == "axolotl" else name)
    cell = ["--methods", "full", "--lengths", "1024", "--rounds", "1"]
    train.main([*cell, "--peers", "trl", "axolotl", "--here"])
    assert shown == {"axolotl": "the Python that runs this does not have it"}
    assert asked == [(side, sys.executable) for side in (*train.OWN, "trl")]
    asked.clear()
    train.main([*cell, "--peers", "--no-compiled"])
    assert asked == [("sft_dist", sys.executable)]


def test_packs_of_llamafactory_number_the_rows() -> None:
    source = (Path(train.__file__).parent / "train_parts" / "peer_llamafactory.py").read_text()
    scope: dict[str, Any] = {"Any": Any, "Dataset": SimpleNamespace(from_list=list)}
    exec(source[source.index("def as_neat_packs") : source.index("def main")], scope)
    pack = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "seq_lengths": [2, 3]}
    assert scope["as_neat_packs"]([pack]) == [
        {"input_ids": pack["input_ids"], "labels": pack["labels"], "attention_mask": [1, 1, 2, 2, 2]}
    ]


def test_packs_of_axolotl_begin_positions_anew_at_every_row() -> None:
    source = (Path(train.__file__).parent / "train_parts" / "peer_axolotl.py").read_text()
    scope: dict[str, Any] = {"Any": Any, "Dataset": SimpleNamespace(from_list=list)}
    exec(source[source.index("def as_samples") : source.index("def main")], scope)
    pack = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "seq_lengths": [2, 3]}
    (sample,) = scope["as_samples"]([pack])
    assert sample.pop("position_ids") == [0, 1, 0, 1, 2]
    assert sample == {
        "input_ids": pack["input_ids"], "labels": pack["labels"], "attention_mask": [1] * 5, "length": 5
    }  # fmt: skip


def test_tokens_a_second_leave_out_the_first_steps() -> None:
    content = [Step((100,), 60)] * 10
    ends = [50.0, 51.0, 52.0, 53.0, *(53.0 + 0.5 * n for n in range(1, 7))]
    report = {"ends": ends, "started": 40.0, "peak_bytes": 1, "losses": [1.0] * 10, "versions": {}}
    run = train.measured_of(report, content, SIZES["33m"], side="trl", method="full", length=1024, number=0)
    assert run.tokens_per_s == pytest.approx(200)
    assert run.step_s == pytest.approx(0.5)
    assert run.step_flops == flops(SIZES["33m"], content[0], "full")
    assert run.first_step_s == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_size_that_needs_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--size", "7b"])
    assert end.value.code == 2
    assert "--size 7b needs a CUDA GPU" in capsys.readouterr().err


def result(ratio: float, memory: float, side: str = "trl") -> dict[str, Any]:
    return {"rows": [{"side": side, "method": "lora", "length": 1024, "ratio": ratio, "memory_ratio": memory}]}


@pytest.mark.parametrize(
    ("ratio", "memory", "good"), [(2.0, 0.7, True), (1.75, 0.75, True), (1.6, 0.7, False), (2.5, 0.8, False)]
)
def test_the_guard_compares_ratios(ratio: float, memory: float, good: bool) -> None:
    found = check.compare(result(2.0, 0.7), result(ratio, memory))
    assert all(each.is_good for each in found) is good


def test_the_guard_knows_cells_by_their_length() -> None:
    row = {"side": "trl", "method": "lora", "memory_ratio": 0.7}
    both = {"rows": [row | {"length": 1024, "ratio": 2.0}, row | {"length": 4096, "ratio": 1.0}]}
    found = check.compare(both, {"rows": [row | {"length": 1024, "ratio": 1.5}]})
    assert [each.is_good for each in found] == [False, True]


def test_the_guard_does_not_compare_us_with_ourselves() -> None:
    ours = {"rows": [row for side in train.OWN for row in result(1.0, 1.0, side)["rows"]]}
    with pytest.raises(ValueError, match="nothing that was measured"):
        check.compare(ours, ours)


def test_losses_of_a_step_are_the_sum_of_its_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(train.__file__).parent / "train_parts")
    peer_report = importlib.import_module("peer_report")
    monkeypatch.setattr(peer_report.importlib.metadata, "version", lambda name: "0")
    task = {"accumulation": 2, "report": str(tmp_path / "report")}
    peer_report.write_report(task, "trl", peer_report.Clock(), [1.0, 2.0, 3.0, 4.0])
    assert json.loads((tmp_path / "report").read_text())["losses"] == [3.0, 7.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU it is torch's own figure")
def test_peak_memory_is_in_bytes() -> None:
    assert peak_bytes() == pytest.approx(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rel=0.01)


def test_the_guard_needs_something_to_compare() -> None:
    with pytest.raises(ValueError, match="nothing that was measured"):
        check.compare(result(2.0, 0.7), result(2.0, 0.7, side="another"))


def test_the_guard_ends_with_1_where_something_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = tmp_path / "committed.json"
    committed.write_text(json.dumps(result(2.0, 0.7)))
    for ratio, code in ((2.1, 0), (1.0, 1)):

        def measure(arguments: list[str], ratio: float = ratio) -> None:
            assert arguments[arguments.index("--peers") + 1 :] == ["trl"]
            Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(result(ratio, 0.7)))

        monkeypatch.setattr(train, "main", measure)
        assert check.main(["--committed", str(committed)]) == code
    assert "worse" in capsys.readouterr().out


def test_exponents_are_slopes() -> None:
    assert growth.exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert growth.exponent([1, 2, 4, 8], [5, 5, 5, 5]) == pytest.approx(0)
    assert growth.exponent([1, 10, 100], [1, 100, 10_000]) == pytest.approx(2)


def test_rows_of_a_point_have_one_length() -> None:
    point = Point({}, segment=30, segments=2, packs=3, steps=1)
    data = rows_of(point, 100)
    assert isinstance(data.packs, Packs)
    assert data.num_sequences == 3 * (1 + 3 + 1)
    assert set(data.num_tokens.tolist()) == {60}
    assert set(data.lengths.tolist()) == {30}
    assert Report(step_s=[1.0, 5.0, 2.0]).seconds == 2.0


def test_results_that_are_committed_are_of_this_workload() -> None:
    for path in sorted((Path(train.__file__).parent / "results").glob("train-*.json")):
        committed = json.loads(path.read_text())
        assert {row["method"] for row in committed["rows"]} <= set(METHODS)
        assert committed["versions"][train.OURS]["torch"]
