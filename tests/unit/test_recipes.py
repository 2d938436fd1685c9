"""Every recipe against its model's true architecture: it loads, it resolves, and it fits the GPUs that it names.

``tests/architectures`` holds the ``config.json`` of each model by its hub id, without what does not change the shape.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from sft_dist.config.load import load_config
from sft_dist.config.schema import FullMethod
from sft_dist.config.validate import validate
from sft_dist.hardware.gpus import Gpu, find_gpu
from sft_dist.model.describe import describe_model
from sft_dist.plan.activations import trace
from sft_dist.plan.memory import TIGHT_SHARE, memory_phases
from sft_dist.plan.states import GIB, state_bytes
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from tests.helpers import figures

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ROOT / "tests/architectures"
RECIPES = sorted(path for path in (ROOT / "configs/recipes").glob("*.yaml") if path.stem != "demo")

# Published numbers of parameters.
PARAMETERS = {
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "tokyotech-llm/Llama-3.1-Swallow-8B-Instruct-v0.3": 8_030_261_248,
    "llm-jp/llm-jp-3-13b-instruct": 13_707_924_480,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "google/gemma-7b-it": 8_537_680_896,
    "google/gemma-3-1b-it": 999_885_952,
}


@dataclass(frozen=True)
class Header:
    """What the comment of a recipe says.

    Args:
        states_gib: of one GPU.
    """

    world: WorldShape
    gpu: Gpu
    states_gib: float
    command: list[str]


def header(recipe: Path) -> Header:
    comment = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    found = re.search(r" on (?:(\d+) x )?(\d+) x ([AH]100 \d+ GB)\. States: ([\d.]+) GiB a GPU\.", comment)
    assert found, f"{recipe.name}: the first line says model, GPUs and states"
    nodes, gpus, gpu, states = found.groups()
    command = re.search(r"#   (launch/(?:.*\\\n#)?.*)", comment)
    assert command, f"{recipe.name}: the second line is the command"
    words = shlex.split(command[1].replace("\\\n#", " "))
    return Header(WorldShape(int(nodes or 1), int(gpus)), find_gpu(gpu), float(states), words)


def architecture(model: str) -> Path:
    return ARCHITECTURES / model.replace("/", "--")


@cache
def resolved(recipe: Path) -> Run:
    config = load_config(recipe)
    validate(config)
    folder = architecture(config.model.path)
    assert folder.is_dir(), f"{config.model.path} has no config.json in {ARCHITECTURES}"
    return resolve(load_config(recipe, [f"model.path={folder}"]), header(recipe).world)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_states_fit_the_gpus_that_it_names(recipe: Path) -> None:
    run, said = resolved(recipe), header(recipe)
    states = state_bytes(run).total
    assert run.activation_checkpointing.mode == "full"
    peak = max(memory_phases(run, trace(run), None), key=lambda phase: phase.total_bytes)
    figures.lines.append(
        f"recipe {recipe.stem}: states {states / GIB:.1f}, peak {peak.total_bytes / GIB:.1f} GiB of "
        f"{said.gpu.usable_bytes / GIB:.1f} a GPU ({peak.name}: {peak.moment})"
    )
    assert peak.total_bytes <= TIGHT_SHARE * said.gpu.usable_bytes
    assert said.states_gib == round(states / GIB, 1), "the comment tells the states of a GPU"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_command_starts_it_on_these_gpus(recipe: Path) -> None:
    said, command = header(recipe), header(recipe).command
    assert command[0] == "launch/torchrun.sh"
    assert command[-2:] == ["train", f"configs/recipes/{recipe.name}"]
    assert command[command.index("--nproc-per-node") + 1] == str(said.world.ranks_per_node)
    nodes = command[command.index("--nnodes") + 1] if "--nnodes" in command else "1"
    assert nodes == str(said.world.num_nodes)
    run = resolved(recipe)
    assert run.output_dir == f"runs/{recipe.stem}"
    assert run.batch.global_batch_size % (run.batch.micro_batch_size * said.world.size) == 0, "no rank runs short"


@pytest.mark.parametrize("model", PARAMETERS)
def test_the_architectures_are_the_true_ones(model: str) -> None:
    spec = describe_model(str(architecture(model)), None, FullMethod(), "bf16")
    assert spec.num_trainable == PARAMETERS[model]


def test_every_size_has_its_recipe() -> None:
    wanted = {
        "7b_qlora_1xa100_40", "7b_lora_1xa100_80", "8b_full_2xa100", "13b_qlora_1xa100", "70b_qlora_2xa100",
        "70b_lora_4xa100", "70b_lora_8xh100", "70b_full_8xh100_offload", "70b_full_2x8xh100",
    }  # fmt: skip
    assert wanted <= {recipe.stem for recipe in RECIPES}
    used = {load_config(recipe).model.path for recipe in RECIPES}
    assert used == PARAMETERS.keys() == {folder.name.replace("--", "/") for folder in ARCHITECTURES.iterdir()}
