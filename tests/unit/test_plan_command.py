"""``sft-dist plan`` as a user calls it: what it prints and writes, how it ends, and what it says of mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.cli import main
from sft_dist.config.load import load_config
from sft_dist.plan.dry_run import dry_run
from sft_dist.plan.machines import machines_of
from sft_dist.plan.to_json import load_plan
from tests.helpers import figures

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "configs/recipes").glob("*.yaml") if path.stem != "demo")
QLORA_7B = str(ROOT / "configs/recipes/7b_qlora_1xa100_40.yaml")

Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    """Calls the command in an empty folder; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_and_fits(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, [f"output_dir={tmp_path}"])
    made = dry_run(config, machines_of(config.hardware)).plan
    assert made.memory.verdict == "fits"
    assert made.memory.allocated.low < made.memory.allocated.value < made.memory.allocated.high
    assert made.time.total.low <= made.time.total.value <= made.time.total.high
    assert 0.05 < made.time.mfu <= made.time.hfu < 0.9
    assert made.cost.chosen is not None
    assert made.data.basis == "assumed"
    assert any("--examples" in warning for warning in made.warnings)


@pytest.mark.ci
def test_the_page_on_clusters_tells_what_is_planned(
    plan: Called, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path))  # nothing that was measured of this machine
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8").partition("| run |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines()[2:]]
    recipe, count = "", 0
    for run, taken, hours, cost in rows:
        named = re.findall(r"`(.*?)`", run)[0]
        recipe = named if named.endswith(".yaml") else recipe
        more = [] if named.endswith(".yaml") else named.split()
        stated = ("--examples", "20k", "--tokens-per-example", "500")
        code, out, _ = plan(str(ROOT / "configs/recipes" / recipe), *stated, *more)
        said = " ".join(out.split())
        usd, jpy = re.findall(r"\$([\d.]+) \(¥([\d,]+)\)", cost)[0]
        assert (code, f"peak allocated {taken.split()[0]} (" in said) == (0, True), said
        # "11 (10-15) min", "1 h 25 min (1 h 17 min-1 h 36 min)"
        assert re.search(
            rf"{hours.removesuffix(' min')}(?: min)? \([^)]*\)(?: min)?, \${usd} \([^)]*\), ¥{jpy} ", said
        ), said
        count += 1
    assert count == 5


def test_what_is_printed_is_written(plan: Called, tmp_path: Path) -> None:
    code, out, err = plan(QLORA_7B, "--examples", "10k", "--tokens-per-example", "400", "--html", "page/plan.html")
    assert (code, err) == (0, "")
    assert "Fits on 1 x A100-SXM-40GB" in out
    written = load_plan(json.loads((tmp_path / "runs/7b_qlora_1xa100_40/plan.json").read_text()))
    assert written.data.rows == 10_000
    assert f"{written.memory.peak.allocated_bytes / 2**30:.1f}" in out
    assert "Fits on 1 x A100-SXM-40GB" in (tmp_path / "page/plan.html").read_text()
    code, out, _ = plan(QLORA_7B, "--examples", "10k", "--tokens-per-example", "400", "--json")
    assert code == 0
    assert load_plan(json.loads(out)) == written


def test_the_plan_of_a_run_that_has_begun_stays(plan: Called, tmp_path: Path) -> None:
    stated = ["--examples", "10k", "--tokens-per-example", "400"]
    assert plan(QLORA_7B, *stated)[0] == 0
    folder = tmp_path / "runs/7b_qlora_1xa100_40"
    before = (folder / "plan.json").read_text()
    (folder / "config.yaml").touch()
    code, out, err = plan(QLORA_7B, *stated, "--gpu", "h100")
    assert (code, "Fits on 1 x H100-SXM" in out) == (0, True)
    assert err == "runs/7b_qlora_1xa100_40 holds a run: its plan.json stays as it is\n"
    assert (folder / "plan.json").read_text() == before


def test_what_does_not_fit_ends_with_3(plan: Called) -> None:
    code, out, _ = plan(QLORA_7B, "method={type: full}", "--gpu", "rtx4090")
    assert code == 3
    assert "Does not fit on 1 x RTX4090" in out


def test_machines_of_the_command_line(plan: Called) -> None:
    code, out, _ = plan(
        QLORA_7B, "--gpu", "H100", "--gpus", "4", "--nodes", "2", "--fx", "150", "sharding.strategy=fsdp2"
    )
    assert code == 0
    assert "Fits on 8 x H100-SXM" in out
    assert "¥150" in out
    assert "nodes are joined by infiniband-ndr-x8" in plan(
        QLORA_7B, "--gpu", "H100", "--gpus", "4", "--nodes", "2", "--verbose", "sharding.strategy=fsdp2"
    )[1].replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a100"], ["A100-SXM-80GB or A100-SXM-40GB"]),
        (["--gpu", "rtx4091"], ["RTX4090"]),
        (["model.path=meta-llama/Llama-3.1-9B"], ["meta-llama/Llama-3.1-8B", "model fetch"]),
        (["model.path=mistralai/Mixtral-8x7B-v0.1"], ["mixture of"]),
        (["hardware.network=foo", "--nodes", "2"], ["infiniband"]),
        (["sharding.sequence_parallel=3", "--gpus", "8"], ["does not divide"]),
        (["--examples", "0", "--tokens-per-example", "100"], ["nothing to train"]),
        (["--examples", "10k"], ["go together"]),
        (["hardware.price_per_hour=1", "hardware.owned={price_per_kwh: 0.2}"], ["hardware.owned"]),
    ],
)  # fmt: skip
def test_mistakes(plan: Called, arguments: list[str], words: list[str]) -> None:
    code, out, err = plan(QLORA_7B, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "fix:" in err
    for word in words:
        assert word in err


def test_time_and_memory_of_a_plan_of_70b(tmp_path: Path) -> None:
    """Beside what every command that needs torch pays: its imports. The second plan finds what the first one recorded."""
    recipe = str(ROOT / "configs/recipes/70b_lora_4xa100.yaml")
    imports = [sys.executable, "-c", "import torch, transformers, peft"]
    command = [sys.executable, "-m", "sft_dist", "plan", recipe, f"output_dir={tmp_path}"]
    environment = {
        "SFT_DIST_CACHE": str(tmp_path / "cache"),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment["PYTHONPATH"] = str(ROOT)
    seconds = []
    for arguments in (imports, command, command):
        started = time.process_time(), children_seconds()
        ended = subprocess.run(arguments, capture_output=True, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr
        seconds.append(children_seconds() - started[1])
    figures.lines.append(
        f"70B planned in {seconds[1] / seconds[0]:.2f} x the imports, again in {seconds[2] - seconds[0]:.1f} s more"
    )
    assert seconds[1] <= 2.0 * seconds[0]
    # A second of its own, on a machine where other tests make every second longer.
    assert seconds[2] - seconds[0] <= 0.25 * seconds[0]


def children_seconds() -> float:
    """CPU time of processes that have ended: what others do meanwhile does not count."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
