"""Takes out of settings and texts what nobody else may see. What looks like a secret is one."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "(hidden)"

# Words of a name that say so wherever they stand, and those that do as the last one.
SECRET_WORDS = {
    "secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey", "auth",
    "authorization", "bearer",
}  # fmt: skip
SECRET_LAST_WORDS = {"token", "key"}

# Mappings whose values are hidden whatever their names: environment variables.
ENVIRONMENTS = {"environment", "env"}

# Hugging Face, OpenAI and others, GitHub, Slack, AWS, W&B.
TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|xox[abprs]-[\w-]{8,}|A[KS]IA[A-Z0-9]{12,}|wandb_v\d_\w{8,}|local-[0-9a-f]{40})"
)
WANDB_KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
ASSIGNMENT = re.compile(r"""([A-Za-z_][\w.-]*)(=)("[^"]*"|'[^']*'|[^\s;&|]+)""")

# Digests, which 40 hexadecimal digits are too.
DIGESTS = {"revision", "commit", "digest", "sha"}


def redacted(settings: Any, *, name: str = "") -> Any:
    """A copy of lists, mappings and scalars without secrets."""
    if isinstance(settings, dict):
        if _last_word(name) in ENVIRONMENTS:
            return dict.fromkeys(settings, HIDDEN)
        return {key: redacted(value, name=str(key)) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [redacted(value, name=name) for value in settings]
    if settings is None or isinstance(settings, bool):
        return settings
    if not isinstance(settings, str):  # the share of rows with a foreign_token is none, a PIN is one
        return HIDDEN if SECRET_WORDS & set(_words(name)) else settings
    return HIDDEN if is_secret(name) else redacted_text(settings, is_digest=_last_word(name) in DIGESTS)


def is_secret(name: str) -> bool:
    """Whether a key or a variable of this name holds a secret: ``HF_TOKEN`` does, ``max_tokens`` does not."""
    words = _words(name)
    return bool(words) and (bool(SECRET_WORDS & set(words)) or words[-1] in SECRET_LAST_WORDS)


def redacted_text(text: str, *, is_digest: bool = False) -> str:
    """A text without what looks like a token, a password in an address, or a value given to a secret name.

    Args:
        is_digest: 40 hexadecimal digits are one, and no key.
    """
    text = TOKENS.sub(HIDDEN, text)
    text = IN_ADDRESS.sub(HIDDEN, text)
    text = ASSIGNMENT.sub(lambda found: f"{found[1]}={HIDDEN}" if is_secret(found[1]) else found[0], text)
    return text if is_digest else WANDB_KEY.sub(HIDDEN, text)


def _last_word(name: str) -> str:
    return (_words(name) or [""])[-1]


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) if word]
