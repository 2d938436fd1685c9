"""docs/architecture.md is a map: every module has its place on it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What `make demo` says and trains: nobody looks for it on a map of the trainer.
UNNAMED = {"demo"}


def test_every_module_is_on_the_map() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("\n## Layers\n")[2].split("```")[1]
    named: dict[str, set[str]] = {}
    layer = ""
    for line in table.splitlines():
        # "| launch" stands beside the layer above it.
        begins = (
            re.match(r"(?: *\| )?([a-z]+)(?= |$)", line) if not line.startswith("   ") or "| " in line[:16] else None
        )
        layer = begins[1] if begins else layer
        named.setdefault(layer, set()).update(re.findall(r"\w+", line))
    missing = {
        str(module.relative_to(ROOT))
        for module in (ROOT / "sft_dist").glob("*/*.py")
        if module.stem not in ("__init__", "__main__") and module.stem not in named.get(module.parent.name, set())
    }
    assert {name for name in missing if name.split("/")[1] not in UNNAMED} == set()
    assert len(named) > 20
