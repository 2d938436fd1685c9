"""A run as one HTML page that needs nothing else: no address, no font; one script, its own.

Texts of the run reach the page through Jinja's autoescape and ``Markup.format`` only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from jinja2 import Template
from markupsafe import Markup

from sft_dist.cluster.verdict import Kind
from sft_dist.config.text import write_yaml
from sft_dist.data.audit.language import language
from sft_dist.pages.answer import visible
from sft_dist.pages.page import environment, only_these, template, text_of
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.plan.units import HOUR_S, count, duration, gib, percent, rate, step_seconds
from sft_dist.report.chart import draw
from sft_dist.report.charts import charts_of, figure, score_charts, score_title
from sft_dist.report.headline import headline
from sft_dist.report.model import Answer, Compared, ReportData, Sample, Unit
from sft_dist.report.redact import redacted_text
from sft_dist.report.series import evenly
from sft_dist.train.sessions import Session

# How much of samples a page has room for: prompts, answers of each, characters of each text.
MAX_SAMPLES, MAX_ANSWERS, MAX_CHARACTERS = 24, 6, 2000

MAX_EVENTS, MAX_FINDINGS, MAX_SOURCES, MAX_SESSIONS = 100, 40, 60, 200

# Columns of the table of scores between the first and the last evaluation.
MAX_EVALUATIONS = 8

STYLES: dict[Kind, str] = {
    "finished": "good", "working": "good", "starting": "plain", "waiting": "plain", "stopped": "warning",
    "ended": "warning", "unknown": "warning", "stuck": "error", "silent": "error", "failed": "error",
}  # fmt: skip

UNITS = {
    "seconds": step_seconds, "duration": duration, "bytes": gib, "count": count, "rate": rate, "usd": format_usd,
    "jpy": format_jpy,
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    figure: str
    told: str


def render(data: ReportData) -> str:
    """The page."""
    verdict = data.status.verdict
    line, error = map(redacted_text, headline(verdict))
    script = text_of(__package__, "chart.js")
    return _template().render(
        data=data,
        title=f"{data.folder.resolve().name}: {line}",
        verdict=line,
        error=error,
        verdict_style="error" if verdict.is_trouble else STYLES[verdict.kind],
        subject=_subject(data),
        cards=cards_of(data),
        charts=[draw(chart) for chart in charts_of(data)],
        score_charts=[draw(chart) for chart in score_charts(data.metrics)],
        scores=scores_of(data),
        totals=_totals(data),
        waste=[] if data.bill.waste is None else [(what, s) for what, s in data.bill.waste.shares() if s > 0],
        samples=data.samples[:MAX_SAMPLES],
        settings=None if data.settings is None else write_yaml(data.settings),
        limits={"events": MAX_EVENTS, "findings": MAX_FINDINGS, "sources": MAX_SOURCES, "sessions": MAX_SESSIONS},
        script=Markup(script),
        policy=only_these([script]),
        chart_style=Markup(text_of(__package__, "chart.css")),
        page_style=Markup(text_of(__package__, "run.css") + text_of(__package__, "page.css")),
    )


def _subject(data: ReportData) -> dict[str, str]:
    """What was trained, on what."""
    settings, topology = data.settings or {}, data.topology
    model, method = settings.get("model") or {}, settings.get("method") or {}
    steps = data.status.found.num_steps
    said = {
        "Run": str(data.folder.resolve()),
        "Base": str(model["path"]) if isinstance(model, dict) and model.get("path") else "",
        "Method": str(method["type"]) if isinstance(method, dict) and method.get("type") else "",
        "On": _machines(topology),
        "Steps": f"{data.status.step:,} of {steps:,}" if data.status.step is not None and steps else "",
        "Read": datetime.fromtimestamp(data.status.clock.now, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {name: value for name, value in said.items() if value}


def _machines(topology: dict[str, object]) -> str:
    if not topology:
        return ""
    nodes = topology.get("nodes", 1)
    on = f" on {nodes} nodes" if isinstance(nodes, int) and nodes > 1 else ""
    return f"{topology.get('processes')} x {topology.get('device')}{on}, {topology.get('strategy')}"


def cards_of(data: ReportData) -> list[Card]:
    """The few figures that everybody asks for."""
    metrics, found, bill = data.metrics, data.status.found, data.bill
    cards = []
    if found.measured is not None:
        last = found.measured.loss
        cards.append(Card("not finite" if last is None else f"{last:.4f}", f"loss at step {found.measured.step:,}"))
        if found.measured.eval_best is not None and found.measured.eval_last is not None:
            best = found.measured.eval_best
            cards.append(Card(f"{best[1]:.4f}", f"best evaluation, at step {best[0]:,}"))
    if bill.elapsed_s is not None:
        left = data.status.forecast
        rest = (
            f", about {duration(left.left_s)} left"
            if left is not None and data.status.verdict.kind == "working"
            else ""
        )
        cards.append(Card(duration(bill.elapsed_s), ("in all" if found.finished else "so far") + rest))
    if bill.usd is not None:
        jpy = bill.jpy(bill.usd)
        cards.append(Card(format_usd(bill.usd), "USD" + ("" if jpy is None else f", {format_jpy(jpy)} JPY")))
    if metrics.finite("num_tokens"):
        cards.append(Card(count(data.trained_tokens), "tokens trained"))
    if data.tokens_per_s is not None:
        mfu = metrics.steady("mfu")
        said = f", MFU {percent(statistics.fmean(mfu))}" if mfu else ""
        cards.append(Card(rate(data.tokens_per_s), f"tokens/s, mean{said}"))
    return cards


@dataclass(frozen=True)
class ScoreRow:
    """
    Args:
        shown: (step, value) of some evaluations, the first and the last among them.
    """

    name: str
    shown: list[float | None]
    first: float
    last: float


def scores_of(data: ReportData) -> dict[str, object] | None:
    """Of each score its value at some evaluations, and what became of it from the first to the last."""
    evaluations = data.metrics.evaluations
    if not evaluations:
        return None
    chosen = [evaluations[i] for i in evenly(len(evaluations), MAX_EVALUATIONS)]
    rows = []
    for key in data.metrics.score_keys():
        taken = data.metrics.scores(key)
        rows.append(ScoreRow(score_title(key), [e.scores.get(key) for e in chosen], taken[0][1], taken[-1][1]))
    return {
        "steps": [each.step for each in chosen],
        "rows": rows,
        "has_base": evaluations[0].step == 0,
        "left_out": len(evaluations) - len(chosen),
    }


def _totals(data: ReportData) -> str:
    """What was trained so far, in a line."""
    tokens, supervised = data.trained_tokens, sum(data.metrics.finite("supervised_tokens"))
    if not tokens:
        return ""
    share, steps = percent(supervised / tokens), len(data.metrics.steps)
    return f"{tokens:,} tokens were trained in {steps:,} steps, {share} of them supervised"


def figure_in(value: float | None, unit: Unit) -> str:
    return "-" if value is None else UNITS[unit](value)


def ratio(row: Compared) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}"


def cut(text: str) -> str:
    """Of a long text its beginning, and how much follows."""
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]} … ({left:,} more characters)"


def lang(text: str) -> Markup:
    """The attribute for a text in Japanese, Korean or Chinese characters, whose glyphs depend on it."""
    code = {"ja": "ja", "han": "ja", "hangul": "ko"}.get(language(text)[0])
    return Markup("") if code is None else Markup(' lang="{}"').format(code)


def between(sample: Sample) -> Sequence[Answer]:
    """Answers over time, the first and the last among them."""
    return [sample.answers[i] for i in evenly(len(sample.answers), MAX_ANSWERS)]


def ending(session: Session, *, is_last: bool, lives: bool) -> str:
    """How a start of the run ended."""
    if session.preempted_by is not None:
        return f"stopped by {session.preempted_by}, saved"
    if session.ended:
        return "finished"
    return "goes on" if is_last and lives else "cut short"


def change(row: ScoreRow) -> str:
    if not (math.isfinite(row.first) and math.isfinite(row.last)):
        return "-"
    difference = row.last - row.first
    return f"{'+' if difference > 0 else '-'}{figure(abs(difference))}" if difference else "0"


@lru_cache
def _template() -> Template:
    pages = environment()
    pages.filters |= {
        "number": lambda value: f"{value:,}",
        "percent": percent,
        "duration": duration,
        "usd": format_usd,
        "jpy": format_jpy,
        "hours": lambda seconds: f"{seconds / HOUR_S:,.2f}",
        "in_unit": figure_in,
        "ratio": ratio,
        "score": lambda value: "-" if value is None else figure(value),
        "change": change,
        "visible": visible,
        "cut": cut,
        "lang": lang,
        "between": between,
        "count": count,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
        "redacted": redacted_text,
    }
    pages.globals["ending"] = ending
    return template(__package__, "report.html.jinja", pages)
