"""Amounts of money for people. Imports no torch."""

from __future__ import annotations


def format_usd(amount: float) -> str:
    """``$0.0042``, ``$12.30``, ``$123``, ``$1,234``: cents below a hundred, two digits below a cent."""
    if amount >= 99.995:
        return f"${amount:,.0f}"
    if amount >= 0.01 or amount == 0:
        return f"${amount:.2f}"
    return f"${amount:.2g}"


def format_jpy(amount: float) -> str:
    """``¥0.63``, ``¥6.3``, ``¥14,190``: the yen has no smaller coin, but a million tokens can cost less."""
    if amount >= 9.95 or amount == 0:
        return f"¥{amount:,.0f}"
    return f"¥{amount:.2g}"
