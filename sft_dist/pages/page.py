"""Pages that need nothing else: no address, no font, no file beside them.

A template of ``environment`` gets its texts through autoescape. ``style`` is the part of the style sheet that all pages
share: colours in light and dark, type that has Japanese too, headings, panels, tables.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup


def environment() -> Environment:
    """For a template; filters are the caller's to add."""
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def template(package: str, name: str, environment: Environment) -> Template:
    """The template of this name in a package; it finds ``style`` among its globals."""
    environment.globals["style"] = style()
    return environment.from_string(text_of(package, name))


@lru_cache
def style() -> Markup:
    return Markup(text_of(__package__, "style.css"))


def text_of(package: str, name: str) -> str:
    """A file that is installed with a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def only_these(scripts: Sequence[str], *, own_server: bool = False) -> str:
    """A Content-Security-Policy under which a page asks no host for anything and runs these scripts alone.

    Args:
        own_server: the page may ask the server that it comes from, send it forms and show pages of it in frames.
    """
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; "
    if own_server:
        return (
            policy + "form-action 'self'; connect-src 'self'; frame-src 'self'; img-src data:; frame-ancestors 'none'"
        )
    return policy + "form-action 'none'"
