"""The page a person reads about an evaluation: one HTML file that opens offline, pictures and curves inside it."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

WIDTH, HEIGHT, MARGIN = 460, 300, 40  # pixels of the precision-recall chart
COLOURS = ("#1f6feb", "#d1570b", "#2f7d32", "#8250df")  # one a curve

TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of {{ name }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1f2328 }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .2rem .8rem; border-bottom: 1px solid #d1d9e0; text-align: right }
  th:first-child, td:first-child { text-align: left }
  thead th { border-bottom: 2px solid #59636e }
  figure { margin: 0 0 1.5rem }
  figure img { max-width: 100%; display: block }
  figcaption, .note { color: #59636e }
  svg { max-width: 100% }
  svg text { font: 12px system-ui, sans-serif; fill: #59636e }
  svg path { stroke: #d1d9e0; fill: none }
  svg polyline { stroke-width: 2; fill: none }
</style>
<h1>Evaluation of {{ name }}</h1>
<p>{{ about }}
{% for split in splits %}
<br>Split {{ split.name }}, {{ split.used_for }}: {{ split.images }} images, {{ split.boxes }} boxes.
{% endfor %}
</p>

<h2>COCO metrics</h2>
<table>
<thead><tr><th></th>{% for split in splits %}<th>{{ split.name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name in splits[0].metrics %}
<tr><td>{{ name }}</td>{% for split in splits %}<td>{{ figure(split.metrics[name]) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
<p class="note">s, m, l: boxes under 32 x 32 pixels, up to 96 x 96, larger. none: the split has no such boxes.</p>
{% for split in splits %}

<h2>Precision and recall, {{ split.name }}</h2>
<svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}" role="img"
  aria-label="Precision against recall">
{% for tick in ticks %}
  <path d="M{{ tick.x }} {{ bottom }}V{{ top }}M{{ left }} {{ tick.y }}H{{ right }}"/>
  <text x="{{ tick.x }}" y="{{ bottom + 16 }}" text-anchor="middle">{{ tick.label }}</text>
  <text x="{{ left - 6 }}" y="{{ tick.y + 4 }}" text-anchor="end">{{ tick.label }}</text>
{% endfor %}
{% for curve in split.curves %}
  <polyline points="{{ curve.points }}" stroke="{{ curve.colour }}"/>
  <text x="{{ left + 12 }}" y="{{ bottom - 12 - 16 * loop.revindex0 }}" style="fill: {{ curve.colour }}">
    {{ curve.name }}</text>
{% endfor %}
  <text x="{{ (left + right) / 2 }}" y="{{ height - 4 }}" text-anchor="middle">recall</text>
  <text x="4" y="{{ top - 10 }}">precision, mean over classes</text>
</svg>

<h2>Classes, {{ split.name }}</h2>
<table>
<thead><tr><th>class</th><th>true boxes</th><th>AP</th><th>AP50</th><th>AP75</th></tr></thead>
<tbody>
{% for row in split.classes %}
<tr><td>{{ row.name }}</td><td>{{ row.boxes }}</td>
{% for name in ("AP", "AP50", "AP75") %}<td>{{ figure(row[name]) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% if split.pictures %}

<h2>Pictures, {{ split.name }}</h2>
<p class="note">Truth left, detections with a score of at least {{ picture_score }} right. The images are evenly spaced
over the split.</p>
{% for picture in split.pictures %}
<figure>
<img alt="truth and detections" src="data:image/jpeg;base64,{{ picture.base64 }}">
<figcaption>image {{ picture.image_id }}</figcaption>
</figure>
{% endfor %}
{% endif %}
{% endfor %}
</html>
"""


def page(name: str, about: str, splits: Sequence[Mapping[str, Any]], picture_score: float) -> str:
    """The page of a model's name, with what is to be known about it in a sentence or two.

    A split has "name", "images", "boxes", "used_for", "metrics" {name: value or None}, "classes" (rows of name, boxes,
    AP, AP50, AP75), "curves" {name: [(recall, precision), ...]} and "pictures" {image_id: JPEG bytes}.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        name=name,
        about=about,
        splits=[_drawn(split) for split in splits],
        picture_score=picture_score,
        figure=_figure,
        ticks=[{"x": _x(tick / 5), "y": _y(tick / 5), "label": f"{tick / 5:.1f}"} for tick in range(6)],
        width=WIDTH,
        height=HEIGHT,
        left=_x(0),
        right=_x(1),
        top=_y(1),
        bottom=_y(0),
    )


def _drawn(split: Mapping[str, Any]) -> dict[str, Any]:
    """The split with its curves as points of the chart and its pictures as text."""
    curves = [
        {"name": name, "colour": colour, "points": " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)}
        for (name, points), colour in zip(split["curves"].items(), COLOURS, strict=False)
    ]
    pictures = [
        {"image_id": image_id, "base64": base64.b64encode(jpeg).decode()}
        for image_id, jpeg in split["pictures"].items()
    ]
    return {**split, "curves": curves, "pictures": pictures}


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _x(recall: float) -> float:
    return MARGIN + recall * (WIDTH - 2 * MARGIN)


def _y(precision: float) -> float:
    return HEIGHT - MARGIN - precision * (HEIGHT - 2 * MARGIN)
