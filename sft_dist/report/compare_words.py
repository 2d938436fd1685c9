"""The figures of a comparison as text, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.units import GIB, HOUR_S, count, duration, gib, rate
from sft_dist.report.charts import figure, titled
from sft_dist.report.compare import Row


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _step(row: Row) -> str | None:
    if row.step is None:
        return None
    return f"{row.step:,}" + (f" of {row.num_steps:,}" if row.num_steps else "")


def facts(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(what, a text for each run); what no run has is left out, and ``-`` stands where one lacks it."""

    def of(what: Callable[[Row], float | None], text: Callable[[float], str]) -> list[str]:
        return ["-" if (value := what(row)) is None else text(value) for row in rows]

    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    said: list[tuple[str, list[str]]] = [
        ("state", [row.state for row in rows]),
        ("step", [_step(row) or "-" for row in rows]),
        ("train loss", of(lambda row: row.train_loss, _loss)),
        ("best eval", of(lambda row: row.best_eval_loss, _loss)),
        ("last eval", of(lambda row: row.last_eval_loss, _loss)),
        *(
            (titled(name), ["-" if name not in row.scores else figure(row.scores[name]) for row in rows])
            for name in names
        ),
        ("time", of(lambda row: row.hours, lambda hours: duration(hours * HOUR_S))),
        ("USD", of(lambda row: row.usd, format_usd)),
        ("JPY", of(lambda row: row.jpy, format_jpy)),
        ("tokens", of(lambda row: row.tokens or None, count)),
        ("tokens/s", of(lambda row: row.tokens_per_s, rate)),
        ("peak memory", of(lambda row: row.peak_memory_gib, lambda size: gib(size * GIB))),
        ("strategy", [row.strategy or "-" for row in rows]),
        ("devices", [row.devices or "-" for row in rows]),
    ]
    return [(what, texts) for what, texts in said if any(text != "-" for text in texts)]
