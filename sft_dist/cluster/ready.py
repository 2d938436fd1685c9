"""The scripts in ``slurm/`` for the recipes: ``python -m sft_dist.cluster.ready`` in the checkout renders them.

They are the same on every machine: planned without what this one has measured, and for stated data.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from sft_dist.cluster.resources import planned_run, resources_of
from sft_dist.cluster.script import render_train
from sft_dist.config.load import load_config
from sft_dist.config.validate import validate
from sft_dist.runtime.quiet import quiet_libraries

RECIPES, SCRIPTS = Path("configs/recipes"), Path("slurm")
# What `make demo` trains needs no cluster.
WITHOUT_SCRIPT = ("demo",)
# Names beside those of the recipes: the usual machine for that model and method.
USUAL = {"70b_lora": "70b_lora_8xh100", "70b_qlora": "70b_qlora_2xa100", "8b_full": "8b_full_2xa100"}


def recipes(checkout: Path) -> dict[str, Path]:
    """Recipes by the name of their script, without its ending."""
    found = {path.stem: path for path in sorted((checkout / RECIPES).glob("*.yaml")) if path.stem not in WITHOUT_SCRIPT}
    return {
        f"train_{name}": path for name, path in {**found, **{name: found[at] for name, at in USUAL.items()}}.items()
    }


def ready_script(recipe: Path, *, name: str) -> str:
    """The script that trains a recipe, or what is like it.

    Args:
        name: of the script's file, without its ending, and of its job.
    """
    from sft_dist.plan.dry_run import STAND_IN

    config = load_config(recipe)
    validate(config, source=str(recipe))
    resources = resources_of(config, planned_run(config, assumed=STAND_IN))
    about = {
        "recipe": f"{RECIPES}/{recipe.name}",
        "data": f"{STAND_IN.rows:,} rows of {STAND_IN.tokens_per_row:g} tokens",
    }
    return render_train(config, resources, None, name=name, about=about)


def main() -> None:
    """Writes the scripts and removes those without a recipe."""
    checkout = Path.cwd()
    wanted = recipes(checkout)
    if not wanted:
        sys.exit(f"there are no recipes in {checkout / RECIPES}: start this in the checkout")
    quiet_libraries()
    for path in (checkout / SCRIPTS).glob("*.sbatch"):
        if path.stem not in wanted:
            path.unlink()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFT_DIST_CACHE"] = cache
        for name, recipe in wanted.items():
            path = checkout / SCRIPTS / f"{name}.sbatch"
            path.write_text(ready_script(recipe, name=name), encoding="utf-8")
            path.chmod(0o755)
            print(path.relative_to(checkout))


if __name__ == "__main__":
    main()
