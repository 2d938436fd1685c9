"""What is answered before torch is imported, and what preparing data tells about it."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sft_dist.config.data_schema import DataConfig
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config, LoraMethod, Zero3Sharding
from sft_dist.config.shape import OTHER_NAMES
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import load_renderer
from sft_dist.data.prepare import counts_of, prepare_set
from sft_dist.data.prepared import open_prepared
from sft_dist.errors import ConfigError, DataError
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.train.preflight import preflight
from sft_dist.train.ready import prepare_run
from sft_dist.train.summary import long_rows_notice, notices
from tests.helpers import cells


def config(tmp_path: Path, **data: object) -> Config:
    (tmp_path / "rows.jsonl").write_text("{}")
    return Config.model_validate(
        {
            "model": {"path": "some/model"},
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}], **data},
            "train": {"global_batch_size": 1, "max_steps": 1},
            "output_dir": str(tmp_path / "run"),
        }
    )


def test_a_complete_config_passes(tmp_path: Path) -> None:
    preflight(config(tmp_path))


def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    there = config(tmp_path)
    missing = there.model_copy(update={"model": there.model.model_copy(update={"path": str(tmp_path / "absent")})})
    with pytest.raises(ConfigError, match=r"the folder .*absent does not exist"):
        preflight(missing)


def test_a_revision_of_a_folder_has_no_effect(tmp_path: Path) -> None:
    there = config(tmp_path)
    model = there.model.model_copy(update={"path": str(tmp_path), "revision": "main"})
    with pytest.raises(ConfigError, match=r"model\.revision is main, which has no effect"):
        preflight(there.model_copy(update={"model": model}))


def test_the_three_forms_of_a_template_pass(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    for template in ("chatml", "{% for m in messages %}{{ m.content }}{% endfor %}", str(tmp_path / "chat.jinja")):
        preflight(config(tmp_path, chat_template=template))


def test_a_template_that_is_not_there_or_no_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template: chatm is neither a file nor a built-in template") as e:
        preflight(config(tmp_path, chat_template="chatm"))
    assert e.value.fix == "did you mean chatml?"
    with pytest.raises(
        ConfigError, match=r"chat\.jinja is neither a file that exists, nor Jinja, nor a built-in template"
    ):
        preflight(config(tmp_path, chat_template="chat.jinja"))
    with pytest.raises(DataError, match=r"the template in data\.chat_template: line 1 is not valid Jinja"):
        preflight(config(tmp_path, chat_template="{% for %}"))


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    there, folder = config(tmp_path), tmp_path / "adapter"
    goes_on = there.model_copy(update={"method": LoraMethod(type="lora", init_from=str(folder))})
    with pytest.raises(ConfigError, match=r"method\.init_from: .*adapter is no folder here"):
        preflight(goes_on)
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"adapter has no adapter_config\.json"):
        preflight(goes_on)
    (folder / "adapter_config.json").write_text("{}")
    preflight(goes_on)


def test_a_deepspeed_file_that_is_not_there_or_wrong(tmp_path: Path) -> None:
    there, file = config(tmp_path), tmp_path / "ds.json"
    wanted = {"sharding": Zero3Sharding(strategy="zero3", deepspeed_config=str(file))}
    with pytest.raises(ConfigError, match=r"the DeepSpeed file .*ds\.json cannot be read"):
        preflight(there.model_copy(update=wanted))
    file.write_text('{"gradient_clipping": 1.0}')
    with pytest.raises(ConfigError, match=r"gradient_clipping is 1\.0, but optim\.max_grad_norm decides it"):
        preflight(there.model_copy(update=wanted))


def test_whatever_a_run_leaves_takes_the_folder(tmp_path: Path) -> None:
    there = config(tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints", "final"):
        (tmp_path / "run" / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match=rf"already holds a run \(it has {name}\)"):
            preflight(there)
        if name != "final":
            preflight(there, resume="auto")
        (tmp_path / "run" / name).rmdir()
    preflight(there)


@pytest.mark.parametrize("which", ["train", "eval"])
def test_a_source_that_is_not_there(tmp_path: Path, which: str) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        preflight(config(tmp_path, **{which: [{"path": str(tmp_path / "absent.jsonl")}]}))


@pytest.mark.parametrize(("name", "ours"), OTHER_NAMES.items())
def test_names_of_other_trainers_lead_to_keys_that_exist(name: str, ours: str, tmp_path: Path) -> None:
    section, key = ours.split(".")
    values = {"optim": "{type: adamw}", "method": "{type: lora}"}
    text = "model: {path: m}\ndata: {train: [{path: a}]}\ntrain: {global_batch_size: 1, max_steps: 1}\noutput_dir: o\n"
    (tmp_path / "c.yaml").write_text(text + (f"{section}: {values[section]}\n" if section in values else ""))
    with pytest.raises(ConfigError, match=f"it is called {ours} here"):
        load_config(tmp_path / "c.yaml", [f"{section}.{name}=1"])
    schema = json.dumps(Config.model_json_schema())
    assert f'"{key}"' in schema


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nowhere_at_all\n", "own.py:1: ModuleNotFoundError"),
        ("def other(): ...\n", "own.py has no function judge"),
    ],
)
def test_a_scorer_that_cannot_be_loaded_is_told_before_the_run_directory_is_taken(
    tmp_path: Path, tiny_base: Path, code: str, message: str
) -> None:
    (tmp_path / "own.py").write_text(code)
    scores = {"metrics": ["chrf", "custom"], "custom": f"{tmp_path / 'own.py'}:judge"}
    cfg = cells.whole_run(cells.config(str(tiny_base), "lora", "ddp", eval={"scores": scores}), tmp_path / "run")
    load = partial(load_renderer, str(tiny_base), None, None)
    with pytest.raises(ConfigError, match=message):
        prepare_run(resolve(cfg, WorldShape(1, 1)), cfg, load(), load, "never", taken=lambda: None)
    assert not Path(cfg.output_dir).exists()


def prepared(tmp_path: Path, base: Path, rows: list[object], **data: object) -> Counter[str]:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = DataConfig.model_validate({"train": [{"path": str(tmp_path / "rows.jsonl")}], **data})
    load = partial(load_renderer, str(base), None, None)
    folder = prepare_set(settings, Cache(tmp_path / "cache", load(), load))
    assert folder is not None
    (counts,) = counts_of(folder).values()
    assert open_prepared(folder).num_rows == counts["rows"]
    return counts


def row(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_truncated_rows_are_counted_by_what_became_of_them(tmp_path: Path, tiny_base: Path) -> None:
    rows = [row("a", "short"), row("a", "b" * 100), row("a" * 100, "short")]
    counts = prepared(tmp_path, tiny_base, rows, max_seq_len=64, over_length="truncate")
    assert (counts["rows"], counts["truncated_rows"], counts["unanswered_rows"]) == (2, 1, 1)
    assert notices(counts, 64) == [
        "1 row dropped: the answer begins after 64 tokens",
        f"1 row truncated, {counts['truncated_tokens']} tokens cut off",
    ]


def test_dropped_rows_are_counted(tmp_path: Path, tiny_base: Path) -> None:
    counts = prepared(tmp_path, tiny_base, [row("a", "b"), row("a", "b" * 100)], max_seq_len=64, over_length="drop")
    assert notices(counts, 64) == ["1 row longer than 64 tokens dropped"]


def test_rows_whose_tools_are_written_into_the_text_are_told(tmp_path: Path, tiny_base: Path) -> None:
    with_tools = {
        "conversations": [{"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "Where?"}],
        "tools": [{"name": "weather", "description": "", "parameters": {}}],
    }
    without = {"conversations": with_tools["conversations"]}
    counts = prepared(tmp_path, tiny_base, [with_tools, without], max_seq_len=512)
    assert counts["rewritten_rows"] == 1
    assert "1 row with tools" in notices(counts, 512)[0]


def test_nothing_to_tell(tmp_path: Path, tiny_base: Path) -> None:
    assert notices(prepared(tmp_path, tiny_base, [row("a", "b")]), 2048) == []


def test_rows_beyond_the_positions_of_the_model_are_told(tiny_base: Path) -> None:
    def told(method: str) -> str | None:
        model = resolve(cells.config(str(tiny_base), method), WorldShape()).model
        return long_rows_notice(np.array([3, 512, 510]), model)

    assert told("full") is None
    line = told("prompt")
    assert line is not None
    assert line.startswith(f"2 rows longer than the 512 positions that {tiny_base} was made for (517 tokens at most)")
    assert "set data.max_seq_len to 507" in line
