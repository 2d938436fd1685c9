"""Amounts of money as text. Nothing is rounded before it is written here."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

MAN, OKU = 10_000, 100_000_000


def format_usd(usd: float) -> str:
    """``$1,234`` from 1,000 on, ``$12.34`` below, two digits that count below a cent: ``$0.0042``."""
    return _signed("$", usd, whole_from=1000, decimals=2)


def format_jpy(jpy: float) -> str:
    """``¥1,234,000``: whole yen; below ten yen with two digits that count: ``¥3.4``, ``¥0.042``."""
    return _signed("¥", jpy, whole_from=10, decimals=1)


def format_jpy_japanese(jpy: float) -> str:
    """``12.3万円``, ``1.23億円``: three digits, as amounts are said in Japanese; below 10,000 yen ``1,234円``."""
    for unit, word in ((OKU, "億"), (MAN, "万")):
        digits = _three_digits(abs(jpy) / unit)
        if Decimal(digits.replace(",", "")) >= 1:
            return f"{'-' if jpy < 0 else ''}{digits}{word}円"
    return format_jpy(jpy).replace("¥", "") + "円"


def _signed(sign: str, amount: float, *, whole_from: float, decimals: int) -> str:
    value = abs(amount)
    if value >= whole_from:
        decimals = 0
    elif 0 < value < 10**-decimals:
        # The place of the second digit that counts.
        decimals = 1 - Decimal(value).adjusted()
    return f"{'-' if amount < 0 else ''}{sign}{_rounded(value, decimals)}"


def _three_digits(value: float) -> str:
    decimals = max(0, 2 - Decimal(value).adjusted()) if value >= 1 else 2
    text = _rounded(value, decimals)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _rounded(value: float, decimals: int) -> str:
    """Half up, as people round money, of the number as it is written."""
    return f"{Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP):,}"
