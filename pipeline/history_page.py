"""Champions over time: the versions of the model as a table for the terminal, and as a page with AP drawn over them."""

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

WIDTH, HEIGHT, LEFT, MARGIN = 860, 300, 48, 40  # pixels of the chart
TICKS = (
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
)  # of AP, between two lines of the chart: at most seven lines


@dataclass(frozen=True)
class Version:
    """A registered version."""

    name: str  # v1.2.3
    commit: str
    date: datetime.datetime
    author: str
    message: str  # its first line says why

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.name))


@dataclass(frozen=True)
class Assignment:
    """A version that was put in a stage."""

    stage: str
    version: str
    date: datetime.datetime
    author: str
    message: str
    tag: str  # NAME#STAGE#NUMBER

    @property
    def number(self) -> int:
        return int(self.tag.rpartition("#")[2])

    @property
    def day(self) -> str:
        return day(self.date)


@dataclass(frozen=True)
class Judged:
    """How a version was judged."""

    decision: str
    split: str  # and whether it was used for selection, too
    metrics: Mapping[str, float | None]  # on that split
    data: str  # hash of the shards: only figures on the same data compare

    def words(self) -> str:
        figures = ", ".join(f"{name} {figure(self.metrics.get(name))}" for name in ("AP", "AP50", "AP75"))
        return f"{self.decision} on {self.split}: {figures}"


def day(date: datetime.datetime) -> str:
    """In UTC, whoever asks."""
    return date.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M")


def figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def table(
    versions: Sequence[Version], judged: Mapping[str, Judged], now: Mapping[str, str], made: Sequence[Assignment]
) -> str:
    """For the terminal. `now`: stage -> the version in it."""
    if not versions:
        return "no version is registered"
    blocks = [_version_rows(versions, judged, now), _assignment_rows(made)]
    return "\n\n".join(_aligned(rows) for rows in blocks if len(rows) > 1)


def _version_rows(
    versions: Sequence[Version], judged: Mapping[str, Judged], now: Mapping[str, str]
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("version", "AP", "AP50", "on", "data", "stages", "registered (UTC)", "by", "commit", "why")
    ]
    for version in reversed(versions):
        found = judged[version.name]
        stages = ", ".join(stage for stage, name in now.items() if name == version.name)
        figures = (figure(found.metrics.get("AP")), figure(found.metrics.get("AP50")), found.split.split()[0])
        told = (day(version.date), version.author, version.commit[:10], _why(version.message))
        rows.append((version.name, *figures, found.data[:8], stages or "-", *told))
    return rows


def _assignment_rows(made: Sequence[Assignment]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("date (UTC)", "stage", "version", "by", "why")]
    return rows + [(one.day, one.stage, one.version, one.author, _why(one.message)) for one in reversed(made)]


def _why(message: str) -> str:
    return message.splitlines()[0] if message else ""


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Versions of {{ name }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1f2328 }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #d1d9e0; text-align: left; vertical-align: top }
  thead th { border-bottom: 2px solid #59636e }
  .note { color: #59636e }
  svg { max-width: 100% }
  svg text { font: 12px system-ui, sans-serif; fill: #59636e }
  svg path { stroke: #d1d9e0; fill: none }
  svg polyline { stroke: #1f6feb; stroke-width: 2; fill: none }
  svg circle { fill: #fff; stroke: #1f6feb; stroke-width: 2 }
  svg circle.now { fill: #1f6feb }
</style>
<h1>Versions of {{ name }}</h1>
{% if not points %}
<p>No version with a measured AP is registered.</p>
{% else %}
<h2>AP over versions</h2>
<svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}" role="img"
  aria-label="AP over versions">
{% for tick in ticks %}
  <path d="M{{ left }} {{ tick.y }}H{{ right }}"/>
  <text x="{{ left - 6 }}" y="{{ tick.y + 4 }}" text-anchor="end">{{ tick.label }}</text>
{% endfor %}
{% for line in lines %}
  <polyline points="{{ line }}"/>
{% endfor %}
{% for point in points %}
  <circle cx="{{ point.x }}" cy="{{ point.y }}" r="5"{% if point.stages %} class="now"{% endif %}>
    <title>{{ point.name }}: AP {{ point.ap }}</title></circle>
  <text x="{{ point.x }}" y="{{ point.y - 12 }}" text-anchor="middle">
    {{- point.ap }}{{ " (%s)" % point.stages if point.stages }}</text>
  {% if point.named %}
  <text x="{{ point.x }}" y="{{ height - 18 }}" text-anchor="middle">{{ point.name }}</text>
  {% endif %}
{% endfor %}
</svg>
<p class="note">A full point is in a stage now. A line joins versions that were judged on the same data; figures on
other data do not compare.</p>
{% endif %}
{% for title, rows in tables if rows | length > 1 %}

<h2>{{ title }}</h2>
<table>
<thead><tr>{% for text in rows[0] %}<th>{{ text }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows[1:] %}
<tr>{% for text in row %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endfor %}
</html>
"""


def page(
    name: str,
    versions: Sequence[Version],
    judged: Mapping[str, Judged],
    now: Mapping[str, str],
    made: Sequence[Assignment],
) -> str:
    """One HTML file that opens offline."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        name=name,
        **_chart(versions, judged, now),
        tables=[
            ("The versions", _version_rows(versions, judged, now)),
            ("Who put which where", _assignment_rows(made)),
        ],
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - MARGIN,
    )


def _chart(versions: Sequence[Version], judged: Mapping[str, Judged], now: Mapping[str, str]) -> dict[str, Any]:
    """Points and lines of the chart, in pixels."""
    drawn = [
        (one.name, judged[one.name].data, ap)
        for one in versions
        if (ap := judged[one.name].metrics.get("AP")) is not None
    ]
    if not drawn:
        return {"points": [], "lines": [], "ticks": []}
    least, most = min(ap for *_, ap in drawn), max(ap for *_, ap in drawn)
    between = next(size for size in TICKS if round((most - least) / size, 6) <= 5)
    first, last = math.floor(round(least / between, 6)), math.floor(round(most / between, 6)) + 1
    low, high = first * between, last * between
    step = (WIDTH - LEFT - MARGIN) / len(drawn)

    def y(ap: float) -> float:
        return round(HEIGHT - MARGIN - (ap - low) / (high - low) * (HEIGHT - 2 * MARGIN), 1)

    points: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    data_before = None
    every = -(-len(drawn) // 14)  # so many names stand beside each other
    for place, (name, data, ap) in enumerate(drawn):
        x = round(LEFT + (place + 0.5) * step, 1)
        stages = ", ".join(stage for stage, version in now.items() if version == name)
        shown = stages or place % every == 0
        points.append(
            {"name": name, "x": x, "y": y(ap), "ap": f"{ap:.4f}" if shown else "", "stages": stages, "named": shown}
        )
        if data != data_before:
            lines.append([])
        lines[-1].append(f"{x},{y(ap)}")
        data_before = data
    ticks = [{"y": y(tick * between), "label": f"{tick * between:.3f}"} for tick in range(first, last + 1)]
    return {"points": points, "lines": [" ".join(line) for line in lines], "ticks": ticks}
