"""What the user said last, out of a prompt that a chat template has written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from sft_dist.data.messages import Message
from sft_dist.errors import SftError

# Stand for what is said: words that no template writes.
_FIRST, _ANSWER, _LAST = "quilt", "mango", "zebra"


@dataclass(frozen=True)
class UserTurn:
    """
    Args:
        before, after: what a template writes around the last turn of the user, up to the answer.
    """

    before: str
    after: str

    def said(self, prompt: str) -> str | None:
        """None: the prompt does not end with a turn of the user."""
        if not prompt.endswith(self.after):
            return None
        rest = prompt.removesuffix(self.after)
        begin = rest.rfind(self.before)
        if begin < 0 or self.after in rest[begin:]:  # an answer has begun behind it
            return None
        return rest[begin + len(self.before) :].strip() or None


def user_turn(render: Callable[[Sequence[Message]], str]) -> UserTurn | None:
    """Found by writing two conversations and looking at what they have in common around the user's words.

    Args:
        render: messages as the text that an answer goes on from.

    Returns:
        None: the template cannot write them, or the user's words have nothing in front that tells where they begin.
    """
    try:
        alone = render([Message("user", _LAST)])
        later = render([Message("user", _FIRST), Message("assistant", _ANSWER), Message("user", _LAST)])
    except SftError:
        return None
    parts = [text.rpartition(_LAST) for text in (alone, later)]
    if parts[0][2] != parts[1][2] or not parts[0][1]:
        return None
    before = _common_end(parts[0][0], parts[1][0])
    return UserTurn(before, parts[0][2]) if before.strip() else None


def _common_end(one: str, other: str) -> str:
    pairs = zip(reversed(one), reversed(other), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - same :]
