"""The page a person reads about an evaluation: one HTML file that opens offline, pictures and curves inside it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from pipeline.confusion import NONE

WIDTH, HEIGHT, MARGIN = 460, 300, 40  # pixels of a chart
COLOURS = ("#1f6feb", "#d1570b", "#2f7d32", "#8250df")  # one a curve
SMALL_TABLE = 20  # classes up to which the whole confusion table is shown
CONFUSIONS = 15  # the most frequent, listed
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # of the table of classes

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
  .confusion td { text-align: center; border: 1px solid #fff; min-width: 2.5rem }
  .confusion th { border: 0 }
  .charts { display: flex; flex-wrap: wrap; gap: 2rem }
  .filter { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #d1d9e0; padding: .5rem 0; z-index: 1 }
  figure { margin: 0 0 1.5rem }
  figure img { max-width: 100%; display: block }
  figcaption, .note { color: #59636e }
  svg { max-width: 100% }
  svg text { font: 12px system-ui, sans-serif; fill: #59636e }
  svg path { stroke: #d1d9e0; fill: none }
  svg polyline { stroke-width: 2; fill: none }
  .bar { display: inline-block; height: .7rem; background: #1f6feb; vertical-align: baseline }
  [hidden] { display: none }
</style>
{% macro axes(x, y) %}
{% for tick in ticks %}
  <path d="M{{ tick.x }} {{ bottom }}V{{ top }}M{{ left }} {{ tick.y }}H{{ right }}"/>
  <text x="{{ tick.x }}" y="{{ bottom + 16 }}" text-anchor="middle">{{ tick.label }}</text>
  <text x="{{ left - 6 }}" y="{{ tick.y + 4 }}" text-anchor="end">{{ tick.label }}</text>
{% endfor %}
  <text x="{{ (left + right) / 2 }}" y="{{ height - 4 }}" text-anchor="middle">{{ x }}</text>
  <text x="4" y="{{ top - 10 }}">{{ y }}</text>
{% endmacro %}
<h1>Evaluation of {{ name }}</h1>
<p>{{ about }}
{% for split in splits %}
<br>Split {{ split.name }}, {{ split.used_for }}: {{ split.images }} images, {{ split.boxes }} boxes.
By {{ split.verified.evaluator }}, equal to {{ split.verified.against }} to the last digit over
{% if split.verified.of == "all" %}all images.{% else %}{{ split.verified.images }} images, {{ split.verified.of }}.
{% endif %}
{% endfor %}
</p>
<p class="filter"><label>Class <select id="class"><option value="">all</option>
{% for class in classes %}
<option>{{ class }}</option>
{% endfor %}
</select></label> <span class="note">filters the curves, the table of classes and the pictures</span></p>

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
{{ axes("recall", "precision, mean over classes or of the class chosen") }}
{% for group in split.curves %}
<g data-only="{{ group.of }}"{% if group.of %} hidden{% endif %}>
{% for curve in group.curves %}
  <polyline points="{{ curve.points }}" stroke="{{ curve.colour }}"/>
  <text x="{{ left + 12 }}" y="{{ bottom - 12 - 16 * loop.revindex0 }}" style="fill: {{ curve.colour }}">
    {{ curve.name }}</text>
{% endfor %}
</g>
{% endfor %}
</svg>

<h2>Classes, {{ split.name }}</h2>
<table>
<thead><tr><th>class</th><th>true boxes</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in split.classes %}
<tr data-classes="{{ [row.name] | tojson | forceescape }}"><td>{{ row.name }}</td><td>{{ row.boxes }}</td>
{% for name in columns %}<td>{{ figure(row[name]) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>

<h2>Errors, {{ split.name }}</h2>
<table>
<thead><tr><th>kind</th><th>number</th><th>AP50 without</th><th></th></tr></thead>
<tbody>
{% for row in split.errors %}
<tr><td>{{ row.error }}</td><td>{{ row.count }}</td><td>{{ figure(row.AP50_without) }}</td>
<td style="text-align: left"><span class="bar" style="width: {{ row.bar }}px"></span>
{{ "%+.3f" | format(row.AP50_gain or 0) }}</td></tr>
{% endfor %}
</tbody>
</table>
<p class="note">What AP50, {{ figure(split.metrics.AP50) }}, would be without each kind (TIDE, arXiv:2008.08115).
Classification: on an object of another class. Localisation: too far off one of its class, IoU 0.1 to 0.5.
Both: of another class and too far off.
Duplicate: on an object that a better detection has. Background: on nothing. Missed: objects that none of the first two
is about. Detections of all scores count; the gains do not add up.</p>

<h2>Confusions, {{ split.name }}</h2>
<p class="note">Of detections with a score of at least {{ picture_score }}, at IoU 0.5. Rows are the truth, columns what
was found; {{ nothing }} as truth: nothing was there, as what was found: the object was missed.</p>
{% if split.confusion %}
<table class="confusion">
<thead><tr><th></th>{% for name in split.confused_names %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in split.confusion %}
<tr><th>{{ split.confused_names[loop.index0] }}</th>
{% for cell in row %}<td style="background: {{ cell.colour }}">{{ cell.count }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% if split.confused %}
<table>
<thead><tr><th>most often confused</th><th>taken for</th><th>number</th><th>share of the class</th></tr></thead>
<tbody>
{% for row in split.confused %}
<tr><td>{{ row.truth }}</td><td style="text-align: left">{{ row.found }}</td><td>{{ row.count }}</td>
<td>{{ "%.1f" | format(100 * row.share) }} %</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}

<h2>Scores, {{ split.name }}</h2>
<div class="charts">
<svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}" role="img"
  aria-label="Share of right detections against score">
{{ axes("score", "share of the detections that is right at IoU 0.5") }}
  <path d="M{{ left }} {{ bottom }}L{{ right }} {{ top }}" style="stroke: #59636e; stroke-dasharray: 4"/>
  <polyline points="{{ split.reliability }}" stroke="#1f6feb"/>
</svg>
<table>
<thead><tr><th>score</th><th>detections</th><th>mean score</th><th>right</th></tr></thead>
<tbody>
{% for row in split.bins %}
<tr><td>{{ "%.1f" | format(row.from) }} to {{ "%.1f" | format(row.to) }}</td><td>{{ row.detections }}</td>
<td>{{ figure(row.score) }}</td><td>{{ figure(row.right) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="note">Expected calibration error {{ figure(split.calibration_error) }}: the mean distance from the diagonal,
weighted by detections. Above the diagonal scores are too modest, below it too bold.</p>
{% for group in split.pictures %}
{% if group.images %}

<h2>{{ group.title }} images, {{ split.name }}</h2>
<p class="note">By F1 at IoU 0.5 of the detections with a score of at least {{ picture_score }}: 2 right / (2 right +
wrong + missed). Truth left, those detections right.</p>
{% for picture in group.images %}
<figure data-classes="{{ picture.classes | tojson | forceescape }}">
<img alt="truth and detections" src="data:image/jpeg;base64,{{ picture.base64 }}">
<figcaption>image {{ picture.score.image_id }}: F1 {{ figure(picture.score.f1) }}, {{ picture.score.right }} right,
{{ picture.score.wrong }} wrong, {{ picture.score.missed }} missed</figcaption>
</figure>
{% endfor %}
{% endif %}
{% endfor %}
{% endfor %}
<script>
const choice = document.getElementById("class");
function filter() {
  const name = choice.value;
  for (const item of document.querySelectorAll("[data-classes]"))
    item.hidden = name !== "" && !JSON.parse(item.dataset.classes).includes(name);
  for (const item of document.querySelectorAll("[data-only]"))
    item.toggleAttribute("hidden", item.dataset.only !== name);
}
choice.addEventListener("change", filter);
filter();
</script>
</html>
"""


def page(name: str, about: str, splits: Sequence[Mapping[str, Any]], picture_score: float) -> str:
    """The page of a model's name, with what is to be known about it in a sentence or two.

    A split is what pipeline.judging.judge_split gives for it.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        name=name,
        about=about,
        splits=[_drawn(split) for split in splits],
        classes=sorted({row["name"] for split in splits for row in split["judged"].per_class}),
        columns=COLUMNS,
        nothing=NONE,
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
    """The split with its curves as points of a chart, its confusions as cells and its pictures as text."""
    judged = split["judged"]
    recalls = [row["recall"] for row in judged.curves]
    names = [key for key in judged.curves[0] if key != "recall"]
    means = {name: [row[name] for row in judged.curves] for name in names}
    curves = [_curves(of, recalls, each) for of, each in [("", means), *judged.class_curves.items()]]
    class_names = [row["name"] for row in judged.per_class]
    greatest = max([row["AP50_gain"] or 0 for row in judged.errors]) or 1
    return {
        **split,
        "curves": curves,
        "classes": judged.per_class,
        "errors": [{**row, "bar": round(200 * max(0, row["AP50_gain"] or 0) / greatest)} for row in judged.errors],
        "confused_names": [*class_names, NONE],
        "confusion": _cells(judged.confusion) if len(class_names) <= SMALL_TABLE else [],
        "confused": _confused(judged.confusion, class_names),
        "reliability": _points((row["score"], row["right"]) for row in judged.calibration.bins),
        "bins": judged.calibration.bins,
        "pictures": [
            {
                "title": group["title"],
                "images": [
                    {"score": score, "base64": base64.b64encode(jpeg).decode(), "classes": classes}
                    for score, jpeg, classes in group["images"]
                ],
            }
            for group in split["pictures"]
        ],
    }


def _curves(of: str, recalls: Sequence[float], precisions: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The curves of a class, or of the mean over all where `of` is empty."""
    drawn = [
        {"name": name, "colour": colour, "points": _points(zip(recalls, values, strict=True))}
        for (name, values), colour in zip(precisions.items(), COLOURS, strict=False)
    ]
    return {"of": of, "curves": drawn}


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in pairs)


def _cells(counts: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
    """Each count with a colour by its share of the row: right ones blue, others orange."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    last = len(counts) - 1
    return [
        [
            {"count": int(count) or "", "colour": _colour(share, right=row == column != last)}
            for column, (count, share) in enumerate(zip(counts[row], shares[row], strict=True))
        ]
        for row in range(len(counts))
    ]


def _colour(share: float, *, right: bool) -> str:
    red, green, blue = (31, 111, 235) if right else (209, 87, 11)
    return f"rgba({red}, {green}, {blue}, {0.6 * share:.2f})"


def _confused(counts: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes that were taken for each other most often."""
    pairs = [
        {"truth": names[row], "found": names[column], "count": int(count), "share": count / counts[row].sum()}
        for (row, column), count in np.ndenumerate(counts[:-1, :-1])
        if count and row != column
    ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:CONFUSIONS]


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _x(recall: float) -> float:
    return MARGIN + recall * (WIDTH - 2 * MARGIN)


def _y(precision: float) -> float:
    return HEIGHT - MARGIN - precision * (HEIGHT - 2 * MARGIN)
