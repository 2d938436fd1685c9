"""Writes the golden files anew: ``python -m tests.golden.regenerate``. Read the difference before you commit it."""

from __future__ import annotations

from tests.golden.conversations import CONVERSATIONS
from tests.golden.families import FAMILIES
from tests.golden.golden import golden_path, golden_text


def main() -> None:
    for family_name, family in FAMILIES.items():
        renderer = family.renderer()
        for name, conversation in CONVERSATIONS.items():
            path = golden_path(family_name, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(golden_text(renderer, conversation), encoding="utf-8")


if __name__ == "__main__":
    main()
