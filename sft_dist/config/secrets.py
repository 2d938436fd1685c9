"""Keeps passwords and keys out of what others read: trackers, reports, cards."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "[hidden]"

# Names of settings and environment variables whose values are secrets.
_NAMES = re.compile(
    r"(?i)(^|[_.-])(token|secret|password|passwd|pwd|passphrase|api_?key|access_?key|private_?key|credentials?)($|[_.-])"
)

# Values that are secrets whatever they are called: keys of Hugging Face, W&B, OpenAI, AWS, GitHub, Slack; passwords in
# URLs.
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d_[A-Za-z0-9_]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bA[KS]IA[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bxox[abprs]-[\w-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of settings, as JSON has them, with ``HIDDEN`` in place of what looks like a secret.

    Args:
        name: of the setting that ``value`` is of.
    """
    if isinstance(value, dict):
        return {key: without_secrets(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each, name) for each in value]
    if isinstance(value, str):
        return HIDDEN if value and _NAMES.search(name) else _VALUES.sub(HIDDEN, value)
    return value
