"""``sft-dist export`` as a user types it: what it writes, says and refuses, and that its proof finds what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from sft_dist.cli import main
from sft_dist.model import merge
from sft_dist.model.card import TrainedWith
from tests.helpers.moved import finished_run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["export", *map(str, arguments)])
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def qlora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights have moved, with what a finished run tells of itself."""
    folder = tmp_path_factory.mktemp("qlora")
    finished_run(tiny_base, folder, {"type": "qlora", "train_tokens": ["a", "<|im_end|>"]})
    lines = [
        {"step": 0, "eval_loss": 3.5, "eval_perplexity": 33.1},
        {"step": 1, "loss": 3.25, "num_tokens": 1000, "supervised_tokens": 400, "elapsed_s": 100.0, "cost_usd": 0.5},
        {"step": 2, "loss": 2.75, "num_tokens": 2000, "supervised_tokens": 500, "elapsed_s": 7200.0, "cost_usd": 1.25},
        {"step": 2, "eval_loss": 2.5, "eval_perplexity": 12.2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    receipt = {
        "identity": {"data.train": "17 rows in 4 sequences, 0123abcd"},
        "versions": {"torch": "2.13.0", "peft": "0.21"},
        "topology": {"device": "NVIDIA H100", "processes": 8, "nodes": 2, "strategy": "fsdp2"},
    }
    (folder / "receipt.json").write_text(json.dumps(receipt))
    return folder


def front_matter(folder: Path) -> dict[str, object]:
    _, text, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert body.startswith("\n# ")
    front: dict[str, object] = yaml.safe_load(text)
    return front


def test_a_merged_model_is_written_proven_and_told(qlora: Path, tiny_base: Path, export: Command) -> None:
    code, out, err = export(qlora, "--merge", "--base", "original", "--max-shard-size", "200KB")
    assert (code, err) == (0, "")
    folder = qlora / "merged"
    proven = re.search(
        r"merged = adapter to (\S+) \(rms, relative\); the model as it was trained differs by (\S+)", out
    )
    assert proven is not None
    assert float(proven[1]) < 1e-6
    assert float(proven[2]) > 1e-3
    assert "into the original weights" in out
    assert "--base dequantized is exactly the model that was trained" in out
    assert f"vllm serve {folder}\n" in out
    assert f"sft-dist chat {folder}\n" in out
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "README.md", "model.safetensors.index.json", "model-00001-of-00004.safetensors",
    } <= names  # fmt: skip
    assert not any("adapter" in name for name in names)
    assert not list(qlora.glob("*.unfinished"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    front, card = front_matter(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert front["base_model"] == str(tiny_base)
    assert front["library_name"] == "transformers"
    assert "license" not in front
    for told in (
        "17 rows in 4 sequences, 0123abcd", "- `unused`", "2, 3,000 tokens, 900 of them trained", "2.7500 in the last",
        "2.5000 after step 2", "2.00 h", "$1.25", "8 x NVIDIA H100 on 2 nodes, fsdp2", "torch 2.13.0, peft 0.21",
        "type: qlora", "merged = adapter to", "into the original weights",
    ):  # fmt: skip
        assert told in card, told


@pytest.mark.ci
def test_a_wrong_merge_is_found(qlora: Path, tmp_path: Path, export: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that went in at another scale: the folder does not get its name."""
    init = merge.Merge.__init__

    def wrong(self: merge.Merge, model: object, weights: object, adapter: object, dtype: object) -> None:
        init(self, model, weights, replace(adapter, scaling=adapter.scaling * 1.01), dtype)  # type: ignore

    monkeypatch.setattr(merge.Merge, "__init__", wrong)
    code, _, err = export(qlora, "--merge", "--out", tmp_path / "merged")
    assert code == 5
    assert "failed its proof" in err
    assert "more than 1e-04" in err
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.unfinished").is_dir()


@pytest.mark.ci
def test_an_adapter_is_proven_by_peft(qlora: Path, tmp_path: Path, export: Command) -> None:
    code, out, err = export(qlora, "--out", tmp_path / "adapter", "--dtype", "bf16")
    assert (code, err) == (0, "")
    assert re.search(r"by plain peft in a fresh process: equal to its source to \d\.\de-0\d", out)
    assert "--enable-lora --lora-modules" in out


@pytest.mark.ci
def test_a_whole_model_is_proven(tied_base: Path, tmp_path: Path, export: Command) -> None:
    finished_run(tied_base, tmp_path, "full")
    code, out, err = export(tmp_path, "--dtype", "fp16")
    assert (code, err) == (0, "")
    assert re.search(r"equal to its source to \d\.\de-0\d", out)
    assert "- weights in fp16" in (tmp_path / "model/README.md").read_text()


def test_what_was_not_checked_is_said(qlora: Path, tmp_path: Path, export: Command) -> None:
    code, out, _ = export(qlora, "--merge", "--no-check", "--out", tmp_path / "merged")
    assert code == 0
    assert "not checked (--no-check)" in out
    assert "- not checked (--no-check)" in (tmp_path / "merged/README.md").read_text()
    assert "into the dequantised nf4 weights, on which the adapter was trained" in out
    assert "--base original would take" in out


def test_the_card_of_an_adapter_says_how_its_base_was_stored(qlora: Path) -> None:
    trained = TrainedWith.in_card(qlora / "final")
    assert trained is not None
    assert trained.method.type == "qlora"
    assert front_matter(qlora / "final")["library_name"] == "peft"
    (other := qlora / "other").mkdir()
    assert TrainedWith.in_card(other) is None
    for text in ("# Another card", "---\nlicense: mit\n---\n", "---\nsft_dist: {method: 3}\n---\n", "---\n- x\n---\n"):
        (other / "README.md").write_text(text)
        assert TrainedWith.in_card(other) is None


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--merge", "--max-shard-size", "much"], 2, "is no size"),
        (["--base", "original"], 2, "without --merge"),
        (["--merge", "--base", "other"], 2, "dequantized"),
        (["--checkpoint", "latest"], 2, "has no complete checkpoint"),
        (["--merge", "--out", "/proc/merged", "--no-check"], 5, "cannot write|is left|are to be written"),
    ],
)
def test_mistakes(qlora: Path, export: Command, arguments: list[str], code: int, what: str) -> None:
    found, _, err = export(qlora, *arguments)
    assert found == code
    assert re.search(what, err)


def test_a_mistake_needs_no_torch(tmp_path: Path) -> None:
    """A path that is nothing is told before libraries of seconds are imported."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom sft_dist.checkpoint.source import find_source\n"
        "try:\n    find_source(Path(sys.argv[1]))\nexcept Exception as e:\n    print(e)\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "neither a run directory" in done.stdout
