"""``sft-dist replay``: a run comes out again from its receipt, and what is not as it was is told before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.ranks import Ranks
from tests.helpers.taught import write_rows

PATIENCE_S = 120

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a\n{% endif %}"
)


def command(*arguments: str, log: Path, size: int = 1) -> tuple[int | None, str]:
    """Exit code of all processes, and what they printed."""
    with Ranks(size, list(arguments), log) as ranks:
        codes = set(ranks.exit_codes(PATIENCE_S))
    assert len(codes) == 1, log.read_text()
    return codes.pop(), log.read_text()


def rows(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + {number}", "completion": f"= {n + number}"} for n in range(12)]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps on one process; beside it its rows, template and base."""
    folder = tmp_path_factory.mktemp("replay")
    shutil.copytree(tiny_base, folder / "base")
    (folder / "template.jinja").write_text(TEMPLATE)
    config = {
        "model": {"path": str(folder / "base")},
        "data": {
            "chat_template": str(folder / "template.jinja"), "max_seq_len": 128,
            "train": [{"path": str(write_rows(folder / "a.jsonl", rows(1))), "name": "sums"},
                      {"path": str(write_rows(folder / "b.jsonl", rows(2)))}],
            "eval": [{"path": str(write_rows(folder / "eval.jsonl", rows(3)))}],
        },
        "precision": {"compute": "fp32"},
        "sharding": {"strategy": "ddp"},
        "activation_checkpointing": {"mode": "none"},
        "optim": {"lr": 1.0e-3},
        "train": {"global_batch_size": 3, "micro_batch_size": 1, "max_steps": 4},
        "eval": {"every_steps": 2},
        "checkpoint": {"prove_final": False},
        "logging": {"wandb": {"mode": "disabled"}},
        "cluster": {"environment": {"MY_TOKEN": "s3cret"}},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    code, said = command("train", str(folder / "run.yaml"), log=folder / "log")
    assert code == 0, said
    return folder


def replay_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "replay.json").read_text())
    return found


def test_it_comes_out_to_the_bit(trained: Path, tmp_path: Path) -> None:
    receipt = json.loads((trained / "run/receipt.json").read_text())
    assert receipt["format"] == 2
    assert "s3cret" not in (trained / "run/receipt.json").read_text()
    assert list(receipt["inputs"]) == [
        "data.train.0 (sums)", f"data.train.1 ({trained / 'b.jsonl'})", f"data.eval.0 ({trained / 'eval.jsonl'})",
        "data.chat_template", "model (weights)", "model (config.json)", "model (tokenizer and its chat template)",
    ]  # fmt: skip
    code, said = command("replay", str(trained / "run"), log=tmp_path / "log")
    assert code == 0, said
    assert "all is as it was" in said
    assert ": bit-equal: " in said
    out = trained / "run-replay"
    found = replay_json(out)
    assert (found["is_equal"], found["weights"]["equal"], found["after"]) == (True, True, [])
    steps = {each["name"]: (each["steps"], each["first"]) for each in found["compared"]}
    assert steps == {"loss": (4, None), "grad_norm": (4, None), "eval_loss": (3, None)}
    tensors = [(folder / "final/model.safetensors").read_bytes() for folder in (trained / "run", out)]
    assert tensors[0] == tensors[1]
    code, said = command("replay", str(trained / "run"), log=tmp_path / "again")
    assert (code, f"{out} already holds a run" in said) == (2, True), said


@pytest.mark.ci
def test_another_strategy_on_two_processes_is_within_rounding(trained: Path, tmp_path: Path) -> None:
    overrides = ["sharding.strategy=fsdp2"]
    code, said = command(
        "replay",
        str(trained / "run/receipt.json"),
        "--out",
        str(tmp_path / "out"),
        *overrides,
        size=2,
        log=tmp_path / "log",
    )
    assert code == 0, said
    assert "changed by you:\n  sharding.strategy: ddp -> fsdp2" in said
    assert "may change last digits:" in said
    assert "processes: 1 -> 2" in said
    found = replay_json(tmp_path / "out")
    assert found["verdict"].startswith("within "), found
    assert "first difference at step " in found["verdict"]
    assert not found["is_equal"]
    assert all(each["largest"] < 1e-5 for each in found["compared"])
    assert "with      sharding.strategy: ddp -> fsdp2 (by you)" in said


@pytest.mark.ci
def test_an_override_that_learns_otherwise_is_named(trained: Path, tmp_path: Path) -> None:
    code, said = command(
        "replay", str(trained / "run"), "--out", str(tmp_path / "out"), "train.seed=5", log=tmp_path / "log"
    )
    assert code == 5, said
    assert replay_json(tmp_path / "out")["verdict"].startswith("differs by ")
    assert "with      train.seed: 0 -> 5 (by you)" in said


@pytest.fixture
def moved(trained: Path) -> Path:
    """Its inputs, put back after the test."""
    kept = {path: path.read_bytes() for path in (trained / "b.jsonl", trained / "template.jinja")}
    kept |= {path: path.read_bytes() for path in (trained / "base").iterdir() if path.is_file()}
    yield trained
    for path, content in kept.items():
        path.write_bytes(content)


def change(folder: Path, what: str) -> None:
    if what == "row":
        text = (folder / "b.jsonl").read_text()
        (folder / "b.jsonl").write_text(text.replace("= 7", "= 8", 1))
    elif what == "template":
        (folder / "template.jinja").write_text(TEMPLATE.replace("a\\n", "b\\n") + " ")
    else:
        path = folder / "base/model.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("what", "exit_code", "named"),
    [("row", 4, "data.train.1 ("), ("template", 4, "data.chat_template: "), ("weights", 5, "model (weights): ")],
)
def test_what_changes_the_numbers_ends_it(moved: Path, tmp_path: Path, what: str, exit_code: int, named: str) -> None:
    change(moved, what)
    for more in (["--check"], []):
        code, said = command(
            "replay", str(moved / "run"), "-o", str(tmp_path / "out"), *more, log=tmp_path / f"log{more}"
        )
        assert code == exit_code, said
        assert f"changes the numbers:\n  {named}" in said
        assert said.count(" -> ") == 2, "in the list and in the error, and nothing else differs"
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_all_processes_end_as_the_one_that_finds_what_changes_the_numbers(moved: Path, tmp_path: Path) -> None:
    change(moved, "row")
    out = tmp_path / "out"
    code, said = command("replay", str(moved / "run"), "-o", str(out), log=tmp_path / "log", size=2)
    assert code == 4, said
    assert said.count("changes the numbers:\n  data.train.1 (") == 1
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.ci
def test_anyway_goes_on_and_says_what_came_of_it(moved: Path, tmp_path: Path) -> None:
    change(moved, "row")
    code, said = command("replay", str(moved / "run"), "-o", str(tmp_path / "out"), "--anyway", log=tmp_path / "log")
    assert code == 5, said
    assert "differs by " in said
    assert any(each["name"] == "data.train" for each in replay_json(tmp_path / "out")["after"])


def test_a_check_imports_no_torch_and_writes_nothing(trained: Path, tmp_path: Path) -> None:
    before = sorted(trained.rglob("*"))
    code = (
        "import sys\nfrom sft_dist.cli import main\n"
        f"try: main(['replay', {str(trained / 'run')!r}, '--check'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    env = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "changes the numbers" not in done.stdout
    assert sorted(trained.rglob("*")) == before


def test_an_old_receipt_and_a_strange_file(trained: Path, tmp_path: Path) -> None:
    receipt = json.loads((trained / "run/receipt.json").read_text())
    for key in ("settings", "inputs", "code", "machine", "environment"):
        del receipt[key]
    (tmp_path / "receipt.json").write_text(json.dumps(receipt | {"format": 1}))
    code, said = command("replay", str(tmp_path), log=tmp_path / "log")
    assert code == 2
    assert "it lacks: the settings of the run, digests of what it read, the code of this project" in said
    (tmp_path / "receipt.json").write_text("{")
    code, said = command("replay", str(tmp_path), log=tmp_path / "strange")
    assert (code, "is no receipt of a run" in said) == (2, True)
