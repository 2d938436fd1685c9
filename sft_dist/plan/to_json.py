"""A dry run as JSON, for programs. ``docs/plan_schema.json`` describes it:

    python -m sft_dist.plan.to_json > docs/plan_schema.json

The document is the fields of ``Plan`` and what they already say: sums for each phase and which one is the peak, so that
a reader need not know which parts count. Imports no torch.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sft_dist.errors import ConfigError
from sft_dist.plan.result import Plan

# Higher when a field changes its meaning or goes; new fields leave it as it is.
SCHEMA_VERSION = 1

# In the run directory.
PLAN = "plan.json"

_PLAN = TypeAdapter(Plan)

# What is in the document, but follows from other fields: the definition it belongs to, its name and its schema.
_DERIVED: dict[str, dict[str, dict[str, Any]]] = {
    "Phase": {
        "allocated_bytes": {"type": "integer", "description": "What torch's allocator hands out: all but the context."},
        "total_bytes": {"type": "integer", "description": "All parts."},
    },
    "MemoryPlan": {
        "peak_phase": {"$ref": "#/$defs/PhaseName", "description": "The phase of the most total_bytes."},
    },
}


def plan_text(plan: Plan) -> str:
    """What ``plan.json`` holds."""
    return json.dumps(plan_json(plan), indent=1, ensure_ascii=False)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The document: lists, objects, text and numbers, ready for ``json.dumps``.

    Raises:
        ValueError: a figure is not finite, which is a defect of the plan: JSON has no such numbers.
    """
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **_PLAN.dump_python(plan, mode="json")}
    memory = document["memory"]
    for phase, written in zip(plan.memory.phases, memory["phases"], strict=True):
        written["allocated_bytes"] = phase.allocated_bytes
        written["total_bytes"] = phase.total_bytes
    memory["peak_phase"] = plan.memory.peak.name
    json.dumps(document, allow_nan=False)
    return document


def load_plan(document: dict[str, Any]) -> Plan:
    """The plan that ``plan_json`` wrote.

    Raises:
        ConfigError: another version, a field that is missing, unknown or of another type, or a sum that is not that of
            its parts.
    """
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"the plan has schema_version {version!r}, this program reads {SCHEMA_VERSION}",
            fix="make the plan again with sft-dist plan",
        )
    try:
        plan = _PLAN.validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"not the JSON of a plan: {place}: {first['msg']}", fix="make the plan again with sft-dist plan"
        ) from error
    different = _difference(document, plan_json(plan))
    if different is not None:
        raise ConfigError(
            f"not the JSON of a plan: {different} is unknown or does not agree with the rest",
            fix="make the plan again with sft-dist plan",
        )
    return plan


def _difference(given: Any, expected: Any, place: str = "") -> str | None:
    """Where two documents differ first, ``memory.phases.0.total_bytes``; None where nowhere."""
    if isinstance(given, dict) and isinstance(expected, dict):
        keys = [*expected, *(key for key in given if key not in expected)]
        pairs = [(str(key), given.get(key), expected.get(key), key in given and key in expected) for key in keys]
    elif isinstance(given, list) and isinstance(expected, list) and len(given) == len(expected):
        pairs = [(str(i), one, other, True) for i, (one, other) in enumerate(zip(given, expected, strict=True))]
    else:
        return None if given == expected else place
    for key, one, other, in_both in pairs:
        inner = f"{place}.{key}".removeprefix(".")
        found = _difference(one, other, inner) if in_both else inner
        if found is not None:
            return found
    return None


def plan_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the document."""
    schema = _PLAN.json_schema(mode="serialization")
    definitions: dict[str, Any] = schema["$defs"]
    definitions["PhaseName"] = dict(definitions["Phase"]["properties"]["name"], title="Phase name")
    definitions["Phase"]["properties"]["name"] = {"$ref": "#/$defs/PhaseName"}
    for name, fields in _DERIVED.items():
        definitions[name]["properties"] |= fields
        definitions[name]["required"] = [*definitions[name]["required"], *fields]
    schema["properties"] = {"schema_version": {"const": SCHEMA_VERSION}, **schema["properties"]}
    schema["required"] = ["schema_version", *schema["required"]]
    # Fields with a default, such as a phase's moment, are always written.
    for definition in (schema, *definitions.values()):
        if "properties" in definition:
            definition["required"] = list(definition["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """What ``docs/plan_schema.json`` holds."""
    return json.dumps(plan_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
