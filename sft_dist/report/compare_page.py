"""Several runs as one HTML page: their curves over each other, by steps, tokens or hours."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from jinja2 import Template
from markupsafe import Markup

from sft_dist.metrics.train_loss import LOSS_OF_STEPS
from sft_dist.pages.page import environment, only_these, template, text_of
from sft_dist.report.chart import HUES, Chart, Dots, Line, draw
from sft_dist.report.charts import MAX_SCORES, WITH_THE_LOSS, cumulative, is_share_score, score_title
from sft_dist.report.compare import Comparison
from sft_dist.report.compare_words import facts
from sft_dist.report.headline import headline
from sft_dist.report.model import ReportData
from sft_dist.report.redact import redacted_text
from sft_dist.report.series import curve

# Column, title, whether the smoothed curve stands for it.
CURVES = (("loss", "Training loss", True), ("lr", "Learning rate", False), ("grad_norm", "Gradient norm", True),
          ("tokens_per_s", "Tokens a second", True))  # fmt: skip

# Points of each curve: several share the page.
MAX_POINTS = 300

Places = dict[str, tuple[float, ...]]


def render_comparison(comparison: Comparison) -> str:
    """The page."""
    names = [row.name for row in comparison.rows]
    script = text_of("sft_dist.report", "chart.js")
    charts = comparison_charts(comparison.reports, names)
    return _template().render(
        title=", ".join(names),
        names=names,
        hues=HUES,
        verdicts=[redacted_text(headline(report.status.verdict)[0]) for report in comparison.reports],
        facts=facts(comparison.rows),
        differences=comparison.differences,
        loss_of_steps=LOSS_OF_STEPS,
        charts=[draw(chart) for chart in charts],
        kinds=list(charts[0].ends) if charts else [],
        script=Markup(script),
        policy=only_these([script]),
        chart_style=Markup(text_of("sft_dist.report", "chart.css")),
        page_style=Markup(text_of("sft_dist.report", "run.css") + text_of("sft_dist.report", "page.css")),
    )


def comparison_charts(reports: Sequence[ReportData], names: Sequence[str]) -> list[Chart]:
    """Curves and scores that any of the runs has; what all runs can count is along the horizontal axis."""
    places = [cumulative(report.metrics) for report in reports]
    measured = [each for each, report in zip(places, reports, strict=True) if report.metrics.steps]
    if not measured:
        return []
    kinds = [kind for kind in ("steps", "tokens", "hours") if all(kind in each for each in measured)]
    ends = {kind: (0.0, max(each[kind][-1] for each in measured) or 1.0) for kind in kinds}
    charts = [_scored("eval_loss", "Evaluation loss", reports, names, places, ends)]
    for column, title, is_noisy in CURVES:
        lines = [
            Line(
                name,
                curve({kind: each[kind] for kind in kinds}, values, smooths=is_noisy, max_points=MAX_POINTS),
                hue=hue,
                shows_raw=False,
            )
            for hue, (name, each, values) in enumerate(
                zip(names, places, (report.metrics.column(column) for report in reports), strict=True)
            )
            if any(value is not None for value in values)
        ]
        if lines:
            charts.append(Chart(column, title, _told(lines), ends, lines, is_small=column != "loss"))
    keys = dict.fromkeys(key for report in reports for key in report.metrics.score_keys() if key not in WITH_THE_LOSS)
    charts += [_scored(key, score_title(key), reports, names, places, ends) for key in list(keys)[:MAX_SCORES]]
    shown = [chart for chart in charts if chart.lines or chart.dots]
    return sorted(shown, key=lambda chart: chart.key != "loss")


def _told(lines: Sequence[Line]) -> str:
    return "Smoothed." if any(line.curve.smooth for line in lines) else ""


def _scored(
    key: str,
    title: str,
    reports: Sequence[ReportData],
    names: Sequence[str],
    places: Sequence[Places],
    ends: dict[str, tuple[float, float]],
) -> Chart:
    """One score of all runs."""
    dots = []
    for hue, (report, name, each) in enumerate(zip(reports, names, places, strict=True)):
        taken = report.metrics.scores(key)
        if taken and report.metrics.steps:
            x = {kind: tuple(_at(step, report.metrics.steps, each[kind]) for step, _ in taken) for kind in ends}
            dots.append(Dots(name, x, tuple(value for _, value in taken), hue=hue))
    chart_key = "".join(letter if letter.isalnum() else "-" for letter in key)
    return Chart(chart_key, title, "", ends, dots=dots, is_small=True, is_share=is_share_score(key))


def _at(step: int, steps: Sequence[int], places: Sequence[float]) -> float:
    """Where a run was after a step: at 0 before its first."""
    done = bisect_right(steps, step)
    return places[done - 1] if done else 0.0


@lru_cache
def _template() -> Template:
    pages = environment()
    return template("sft_dist.report", "compare.html.jinja", pages)
