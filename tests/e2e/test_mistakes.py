"""What a user sees after a mistake: the right exit code, one line what, one line how to fix it, no stack trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist import cli

Result = tuple[int, str]


def alpaca(n: int = 3) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(n)]


@pytest.fixture
def train(tmp_path: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs ``train`` on a config that is right but for the changes; returns (exit code, stderr)."""

    def run(
        rows: object = None, *, text: str | None = None, overrides: tuple[str, ...] = (), **sections: Any
    ) -> Result:
        data = tmp_path / "rows.jsonl"
        if text is None:
            text = "\n".join(json.dumps(row) for row in (alpaca() if rows is None else rows))  # type: ignore[attr-defined]
        data.write_text(text)
        config: dict[str, Any] = {
            "model": {"path": str(tiny_base)},
            "data": {"train": [{"path": str(data)}], "max_seq_len": 128},
            "precision": {"compute": "fp32"},
            "train": {"global_batch_size": 2, "max_steps": 1},
            "checkpoint": {"prove_final": False},
            "logging": {"wandb": {"mode": "disabled"}},
            "output_dir": str(tmp_path / "run"),
        }
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["train", str(tmp_path / "config.yaml"), *overrides])
        err = capfd.readouterr().err
        assert "Traceback" not in err
        code = exit_info.value.code
        assert code == 0 or ("error: " in err and "\n  fix: " in err), err
        assert isinstance(code, int)
        return code, err

    return run


def test_the_config_that_the_mistakes_are_made_in_is_right(train: Callable[..., Result], tmp_path: Path) -> None:
    assert train()[0] == 0
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_missing_file(train: Callable[..., Result]) -> None:
    code, err = train(data={"train": [{"path": "nowhere/rows.jsonl"}], "max_seq_len": 128})
    assert code == 4
    assert "nowhere/rows.jsonl" in err


def test_missing_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", str(tmp_path / "absent.yaml")])
    assert exit_info.value.code == 2
    assert "absent.yaml" in capfd.readouterr().err


def test_unknown_key(train: Callable[..., Result]) -> None:
    code, err = train(overrides=("train.micro_batch=2",))
    assert code == 2
    assert "train.micro_batch" in err
    assert "micro_batch_size" in err


def test_wrong_type(train: Callable[..., Result]) -> None:
    code, err = train(overrides=("train.global_batch_size=many",))
    assert code == 2
    assert "train.global_batch_size" in err
    assert "many" in err


def test_paged_moments_on_a_cpu(train: Callable[..., Result], tmp_path: Path) -> None:
    code, err = train(optim={"paged": True}, sharding={"strategy": "ddp"})
    assert code == 2
    assert "optim.paged is true, but CUDA's managed memory needs a GPU" in err
    assert list((tmp_path / "run").iterdir()) == [], "before anything is prepared"


def test_what_deepspeed_cannot(train: Callable[..., Result]) -> None:
    code, err = train(optim={"type": "adafactor"}, sharding={"strategy": "zero2"})
    assert code == 2
    assert "optim.type adafactor needs whole rows and columns of a matrix" in err


def test_virtual_tokens_before_packed_rows(train: Callable[..., Result]) -> None:
    code, err = train(method={"type": "prompt", "num_virtual_tokens": 4})
    assert code == 2
    assert "data.packing is best_fit, but method.type prompt puts 4 virtual tokens in front of every row" in err
    assert "set data.packing to none" in err


def test_malformed_json_names_file_line_and_column(train: Callable[..., Result]) -> None:
    code, err = train(text='{"prompt": "a", "completion": "b"}\n{"prompt": "a", completion}\n')
    assert code == 4
    assert "rows.jsonl:2" in err


def test_row_without_an_answer(train: Callable[..., Result]) -> None:
    code, err = train([*alpaca(2), {"instruction": "Say it.", "input": "", "output": "  "}])
    assert code == 4
    assert "rows.jsonl:3" in err


def test_empty_file(train: Callable[..., Result]) -> None:
    code, err = train(text="")
    assert code == 4
    assert "rows.jsonl" in err


def test_all_labels_masked(train: Callable[..., Result]) -> None:
    """Every assistant turn says that it is context only."""
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0}]
    code, err = train([{"messages": turn}])
    assert code == 4
    assert "rows.jsonl:1" in err


def test_over_long_row_under_error(train: Callable[..., Result]) -> None:
    rows = [*alpaca(1), {"instruction": "Repeat.", "input": "", "output": "again " * 100}]
    code, err = train(rows)
    assert code == 4
    assert "rows.jsonl:2" in err
    assert "data.max_seq_len=128" in err
    assert "data.over_length" in err


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_over_long_row_under_another_policy_trains(train: Callable[..., Result], policy: str) -> None:
    rows = [*alpaca(1), {"instruction": "Repeat.", "input": "", "output": "again " * 100}]
    assert train(rows, overrides=(f"data.over_length={policy}",))[0] == 0


def test_nothing_left_after_dropping(train: Callable[..., Result]) -> None:
    rows = [{"instruction": "Repeat.", "input": "", "output": "again " * 100}]
    code, err = train(rows, overrides=("data.over_length=drop",))
    assert code == 4
    assert "none of 1 rows is left" in err


def test_model_folder_without_weights(train: Callable[..., Result], tiny_base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    code, err = train(model={"path": str(bare)})
    assert code == 5
    assert str(bare) in err
    assert "safetensors" in err


def test_truncated_weights(train: Callable[..., Result], tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_base.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    code, err = train(model={"path": str(broken)})
    assert code == 5
    assert str(broken) in err
    assert train()[0] == 0, "a run that never started does not claim its directory"


def test_weights_of_another_model(train: Callable[..., Result], tiny_base: Path, tmp_path: Path) -> None:
    """Transformers would fill the missing layer with random weights and go on."""
    grown = tmp_path / "grown"
    grown.mkdir()
    for file in tiny_base.iterdir():
        (grown / file.name).write_bytes(file.read_bytes())
    config = json.loads((grown / "config.json").read_text())
    (grown / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    code, err = train(model={"path": str(grown)})
    assert code == 5
    assert "missing keys" in err


def test_model_that_is_nowhere(train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, err = train(model={"path": "no-such/model"})
    assert code == 2
    assert "no-such/model" in err


def test_output_directory_that_cannot_be_written(train: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, err = train(output_dir=str(tmp_path / "file" / "run"))
    assert code == 2
    assert "output_dir" in err


def test_run_directory_already_used(train: Callable[..., Result], tmp_path: Path) -> None:
    assert train()[0] == 0
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*"))
    code, err = train()
    assert code == 2
    assert "already holds a run" in err
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")) == before, "nothing is lost"


def test_a_mistake_in_the_data_can_be_mended_in_place(train: Callable[..., Result]) -> None:
    assert train(text="")[0] == 4
    assert train()[0] == 0


def test_divergence_stops_the_run(train: Callable[..., Result], tmp_path: Path) -> None:
    code, err = train(
        overrides=("train.max_steps=6", "optim.lr=1e30", "optim.max_grad_norm=null", "optim.warmup_ratio=0")
    )
    assert code == 6
    assert "optim.lr" in err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "non_finite" in lines[-1]
    assert not (tmp_path / "run/final").exists()
