"""YAML as people write it: the YAML 1.2 core schema, no duplicate keys, and a writer that the reader agrees with.

PyYAML follows YAML 1.1, where ``2e-4`` is a string, ``no`` is false, ``1:30`` is 90 and ``2026-01-02`` is a date. In a
training configuration each of these is a trap, so the scalars here follow YAML 1.2, section 10.3.2 (core schema).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class DuplicateKey(yaml.MarkedYAMLError):
    """A mapping holds one key twice; YAML readers that keep the last one hide the first."""


class _Reader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not in construct_mapping: merge keys (<<) legally repeat keys there.
        node = super().compose_mapping_node(anchor)
        first_line: dict[tuple[str, str], int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key = (key_node.tag, key_node.value)
                if key in first_line:
                    problem = f"key '{key_node.value}' is given twice (first in line {first_line[key]})"
                    raise DuplicateKey(problem=problem, problem_mark=key_node.start_mark)
                first_line[key] = key_node.start_mark.line + 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        # YAML 1.1 reads a leading zero as octal; 1.2 writes octal as 0o17.
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)


# A table of its own, without the inherited YAML 1.1 entries.
_Reader.yaml_implicit_resolvers = {}
_Reader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Reader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Reader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Reader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Reader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])
_Reader.add_constructor("tag:yaml.org,2002:int", _Reader.construct_yaml_int)


class _Writer(yaml.SafeDumper):
    """Quotes a string that either YAML version would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a configuration is read by people: no &id001


_Writer.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Parses one YAML document.

    Raises:
        yaml.YAMLError: with ``problem_mark`` where the text is not YAML or a mapping repeats a key.
    """
    return yaml.load(text, Loader=_Reader)


def write_yaml(value: Any) -> str:
    """YAML text that ``read_yaml`` and YAML 1.1 readers turn into ``value`` again; keys keep their order."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


def describe_yaml_error(error: yaml.YAMLError) -> tuple[str, int | None]:
    """What is wrong in one line, and the line (from 1) where it is, if the parser knows."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split()), None
    mark = error.problem_mark or error.context_mark
    parts = [part for part in (error.context, error.problem) if part]
    return ", ".join(parts) or "not valid YAML", mark.line + 1 if mark else None
