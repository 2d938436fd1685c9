"""What the README shows must work as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.load import load_config
from sft_dist.config.scores_schema import ScoresConfig
from sft_dist.config.validate import validate
from sft_dist.data.sources import read_source
from sft_dist.launch.command import split_resume
from sft_dist.plan.machines import machines_of
from sft_dist.scores.answered import Answered
from sft_dist.scores.judge import score

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_the_configuration_and_the_commands_are_valid(name: str, tmp_path: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    (tmp_path / "support.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.S)[0], encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("launch/torchrun.sh")]
    commands = [command for command in commands if "support.yaml" in command]
    assert len(commands) == 4
    for command in commands:
        _, rest = split_resume(command[command.index("train") + 1 :])
        validate(load_config(tmp_path / rest[0], rest[1:]))


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_a_submission_asks_for_what_the_readme_shows(name: str, tmp_path: Path) -> None:
    run, cluster = re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)[:2]
    (tmp_path / "support.yaml").write_text(run + cluster, encoding="utf-8")
    config = load_config(tmp_path / "support.yaml")
    validate(config)
    assert machines_of(config.hardware).num_gpus == 2
    assert config.cluster.partition is not None


def test_both_readmes_show_the_same_settings() -> None:
    def settings(name: str) -> list[str]:
        block = re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)[0]
        return [line.split("#")[0].rstrip() for line in block.splitlines()]

    assert settings("README.md") == settings("README.ja.md")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("README.md", "within {p90:.1f} % of nine in ten of {count} published peaks"),
        ("README.ja.md", "公表された {count} 件のピーク測定値とも、その 9 割で誤差 {p90:.1f} % 以内"),
    ],
)
def test_the_accuracy_of_plans_is_that_of_its_page(name: str, sentence: str) -> None:
    page = (ROOT / "docs/plan_accuracy.md").read_text(encoding="utf-8")
    found = re.search(r"All (\d+) allocated peaks: .*, nine of ten to ([\d.]+)%", page)
    assert found is not None
    text = "".join((ROOT / name).read_text(encoding="utf-8").split())
    assert "".join(sentence.format(count=found[1], p90=float(found[2])).split()) in text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "README.md",
            "{trl_1024[0]} to {trl_1024[1]} times its tokens a second packed to 1,024 and {trl_4096[0]} to {trl_4096[1]}"
            " times packed to 4,096, with {trl_memory[0]} to {trl_memory[1]} of its memory; against LLaMA-Factory 0.9.5,"
            " {llamafactory_1024[0]} to {llamafactory_1024[1]} and {llamafactory_4096[0]} to {llamafactory_4096[1]} times",
        ),
        (
            "README.ja.md",
            "1,024 トークンのパックで {trl_1024[0]}〜{trl_1024[1]} 倍、4,096 トークンのパックで"
            " {trl_4096[0]}〜{trl_4096[1]} 倍、使うメモリは {trl_memory[0]}〜{trl_memory[1]} 倍です。LLaMA-Factory 0.9.5"
            " に対しては、それぞれ {llamafactory_1024[0]}〜{llamafactory_1024[1]} 倍、"
            "{llamafactory_4096[0]}〜{llamafactory_4096[1]} 倍",
        ),
    ],
)
def test_the_comparison_with_others_is_that_of_the_committed_results(name: str, sentence: str) -> None:
    rows = json.loads((ROOT / "benchmarks/results/train-cpu.json").read_text())["rows"]
    figures = {}
    for side in ("trl", "llamafactory"):
        own = [row for row in rows if row["side"] == side]
        for length in (1024, 4096):
            figures[f"{side}_{length}"] = _ends([row["ratio"] for row in own if row["length"] == length], 1)
        figures[f"{side}_memory"] = _ends([row["memory_ratio"] for row in own], 2)
    text = "".join((ROOT / name).read_text(encoding="utf-8").split())
    assert "".join(sentence.format(**figures).split()) in text


def test_the_page_on_speed_tells_the_committed_growth() -> None:
    found = json.loads((ROOT / "benchmarks/results/growth-cpu.json").read_text())
    scaling, waits = found["scaling"], found["rows"]["data_wait_ms"]["costs"]
    least, most = _ends(waits, 1)
    start = found["start"]
    soonest, latest = _ends(start["costs"], 1)
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for told in (
        f"a step against its tokens, 1,024 to 8,192 in rows of 256 | exponent {found['tokens']['exponent']:.2f} |",
        f"a step against its packs of 1,024, 1 to 8 | exponent {found['packs']['exponent']:.2f} |",
        f"a step of LoRA against its rank, 8 to 128 | exponent {found['rank']['exponent']:.2f} |",
        f"DDP | {scaling['ddp']['speedup']:.2f} times",
        f"| {scaling['fsdp2']['speedup']:.2f}; {scaling['fsdp2 once']['speedup']:.2f} |",
        f"| under ZeRO-3 | {scaling['zero3']['speedup']:.2f} |",
        f"| two runs that know nothing of each other, what the machine gives | {scaling['two runs']:.2f} |",
        f"| {least} to {most} ms a step,",
        f"imports ({start['imports_s']:.1f} s) to its first step ({start['first_step_s']:.1f} s)",
        f"1,000 to 16,000 rows | {soonest} to {latest} s |",
        f"| `sft-dist --help` | {start['help_s']:.2f} s |",
    ):
        assert told in page
    # "as described"
    assert all(of["heard"] == of["described"] for of in found["traffic"].values())
    assert all(held == described for points in found["ranks"].values() for _, held, described in points)


def test_the_page_on_speed_tells_the_committed_comparison_in_fp32() -> None:
    rows = json.loads((ROOT / "benchmarks/results/train-cpu-fp32.json").read_text())["rows"]
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    sides = {side: [row for row in rows if row["side"] == side] for side in ("sft_dist", "trl")}
    assert len(sides["trl"]) == 4
    for own, other in zip(sides["sft_dist"], sides["trl"], strict=True):
        method = {"full": "full", "lora": "LoRA"}[own["method"]]
        assert (own["method"], own["length"]) == (other["method"], other["length"])
        assert (
            f"| {method} | {own['length']:,} | {other['ratio']:.2f} | {other['memory_ratio']:.2f} |"
            f" {own['of_model']:.0%} | {other['of_model']:.0%} |".replace("%", " %")
        ) in page
    assert max(row["losses_differ"] for row in sides["trl"]) < 1e-5
    assert f"Losses differ by {max(row['losses_differ'] for row in sides['trl']):.1e}".replace("e-0", "e-") in page


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_every_picture_and_page_that_the_readme_names_is_there(name: str) -> None:
    named = re.findall(r"\]\(([^):#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert len([path for path in named if path.endswith(".png")]) == 3
    assert [path for path in named if not (ROOT / path).exists()] == []


def _ends(values: list[float], digits: int) -> tuple[str, str]:
    return f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"


def test_each_row_of_the_data_page_is_read_as_its_format(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("\n## Formats\n")[2].partition("\n## ")[0]
    rows = re.findall(r"```json\n(.*?)```", page, re.S)[0].splitlines()
    formats = re.findall(r"^\| `(\w+)` \|", page, re.M)[1:]  # below the heading
    assert len(rows) == len(formats) == 8
    for row, name in zip(rows, formats, strict=True):
        (tmp_path / "row.jsonl").write_text(row, encoding="utf-8")
        given = list(read_source(SourceConfig(path=str(tmp_path / "row.jsonl"), format=name)))  # type: ignore[arg-type]
        assert given == list(read_source(SourceConfig(path=str(tmp_path / "row.jsonl"))))


def test_the_scorer_of_the_docs_gives_an_empty_answer_nothing(tmp_path: Path) -> None:
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    name, code = re.findall(r"custom: scoring/units.py:(\w+)\n```\n\n```python\n(.*?)```", page, re.S)[0]
    (tmp_path / "units.py").write_text(code, encoding="utf-8")
    settings = ScoresConfig(metrics=["custom"], custom=f"{tmp_path / 'units.py'}:{name}")
    replies = {"1,000円です": 1.0, "": 0.0, "2,000円": 0.0, "about 1,000": 0.0}
    for answer, expected in replies.items():
        assert score([Answered("いくら？", answer, "1,000円", "x")], settings).values["custom"] == expected, answer
    assert score([Answered("?", "", "none", "x")], settings).values["custom"] == 0
