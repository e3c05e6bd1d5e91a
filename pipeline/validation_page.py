"""The page a person reads about a data set: one HTML file that opens offline, charts and pictures inside it."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from pipeline.offender_pictures import Picture

COLOURS = {"train": "#1f6feb", "val": "#d1570b", "test": "#2f7d32"}
CLASSES_SHOWN = 100  # the most frequent
BAR_WIDTH = 120  # pixels, of the most frequent class
CHART_HEIGHT, COLUMN_WIDTH, GAP = 180, 30, 18  # pixels, of the histogram of sizes

TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Validation of the data set</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1f2328 }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .2rem .8rem; border-bottom: 1px solid #d1d9e0; text-align: left; vertical-align: top }
  thead th { border-bottom: 2px solid #59636e }
  .number { text-align: right; font-variant-numeric: tabular-nums }
  .verdict { border-left: .4rem solid; padding: .6rem 1rem; font-size: 1.1rem }
  .passed { border-color: #2f7d32; background: #eaf5ea }
  .warned { border-color: #b58900; background: #fdf6e3 }
  .failed { border-color: #c62828; background: #fdecea }
  td.ok { color: #2f7d32 } td.warning { background: #fdf6e3 } td.critical { background: #fdecea; font-weight: 600 }
  .note { color: #59636e }
  figure { display: inline-block; margin: 0 1rem .6rem 0; vertical-align: top }
  figcaption { color: #59636e; font-size: .85rem; line-height: 1.3; max-width: 23rem; overflow-wrap: anywhere }
  td { overflow-wrap: anywhere }
  svg text { font: 12px system-ui, sans-serif; fill: #59636e }
</style>
<h1>Validation of the data set</h1>
{% if critical %}<p class="verdict failed">Failed: {{ critical }} critical check{{ "s" if critical > 1 }}.
The pipeline stops here.{% if warnings %} {{ warnings }} warning{{ "s" if warnings > 1 }}.{% endif %}</p>
{% elif warnings or quarantined %}<p class="verdict warned">Passed
{%- if warnings %}, with {{ warnings }} warning{{ "s" if warnings > 1 }}{% endif %}.
{%- if quarantined %} What fails {{ quarantined }} critical check{{ "s" if quarantined > 1 }} is left out: see
quarantined below.{% endif %}</p>
{% else %}<p class="verdict passed">Passed: all {{ checks }} checks.</p>
{% endif %}
<table>
<thead><tr><th></th>{% for split in splits %}<th class="number">{{ split }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name in counts %}<tr><td>{{ name.replace("_", " ") }}</td>
{%- for split in splits %}<td class="number">{{ "{:,}".format(splits[split][name]) }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{% for failure in failed %}{% if loop.first %}
<h2>What failed</h2>
{% endif %}<h3>{{ failure.split }} {{ failure.table }}: {{ failure.expectation }}</h3>
<p>{{ failure.severity | capitalize }}
{%- if failure.first %}: {{ "{:,}".format(failure.count) }} record{{ "s" if failure.count > 1 }}
{%- if failure.count > failure.first | length %}, the first {{ failure.first | length }} here{% endif %}{% endif %}
{%- if failure.quarantined %}; quarantined, that is left out of shards and ground truth{% endif %}.</p>
{% if failure.first %}<table>
<thead><tr>{% for key in failure.first[0] %}<th>{{ key }}</th>{% endfor %}</tr></thead>
<tbody>
{% for record in failure.first %}<tr>{% for value in record.values() %}
{%- if value is float %}<td>{{ "{:.6g}".format(value) }}</td>{% else %}<td>{{ value }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{% endif %}{% for picture in failure.pictures %}<figure><img src="data:image/jpeg;base64,{{ picture.data }}" alt=""
 width="{{ picture.width }}" height="{{ picture.height }}"><figcaption>{% for line in picture.lines %}{{ line }}
{%- if not loop.last %}<br>{% endif %}{% endfor %}</figcaption></figure>
{% endfor %}{% endfor %}
<h2>Every check</h2>
<table>
<thead><tr><th>table</th><th>expected</th><th>severity</th>
{%- for split in splits %}<th class="number">{{ split }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><td>{{ row.table }}</td><td>{{ row.expectation }}</td><td>{{ row.severity }}</td>
{%- for split in splits %}{% set outcome = row.outcomes.get(split) -%}
{% if not outcome %}<td></td>{% elif outcome.success %}<td class="number ok">&#10003;</td>
{%- elif outcome.quarantined %}<td class="number warning">{{ "{:,}".format(outcome.count) }} quarantined</td>
{%- else %}<td class="number {{ row.severity }}">{{ "{:,}".format(outcome.count) }} fail</td>
{%- endif %}{% endfor %}</tr>
{% endfor %}</tbody>
</table>

<h2>Drift</h2>
{% if drift.baseline %}<p class="note">Population stability index of each split against data_baseline.json, 0 where
shares are the same, at most {{ drift.max_psi }} by validate.max_psi; below each the bin that moved most. A share below
{{ "{:.2%}".format(drift.share_floor) }} counts as that. <code>python -m pipeline.data_baseline</code> accepts this data
as the new baseline.</p>
<table>
<thead><tr><th></th>{% for split in splits %}<th>{{ split }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in drift_rows %}<tr><td>{{ name }}</td>{% for cell in cells %}
{%- if not cell %}<td class="note">not in the baseline</td>{% else -%}
<td{% if cell.over %} class="{{ cell.severity }}"{% endif %}>{{ "{:.3f}".format(cell.psi) }}
{%- for words in cell.words %}<br><span class="note">{{ words }}</span>{% endfor %}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{% else %}<p class="note">No baseline is accepted, so nothing was compared.
<code>python -m pipeline.data_baseline</code> accepts this data as one.</p>
{% endif %}
<h2>Box sizes</h2>
<p class="note">Share of each split's boxes by the side of a square of the same area, in pixels of the original.
COCO calls boxes small below 32 and large from 96 on.</p>
<svg width="{{ chart.width }}" height="{{ chart.height }}" viewBox="0 0 {{ chart.width }} {{ chart.height }}" role="img"
 aria-label="Box sizes">
{% for bar in chart.bars %}<rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}"
 fill="{{ bar.colour }}"><title>{{ bar.title }}</title></rect>
{% if bar.text %}<text x="{{ bar.x + bar.width / 2 }}" y="{{ bar.y - 3 }}" text-anchor="middle">{{ bar.text }}</text>
{% endif %}{% endfor %}
{%- for label in chart.labels %}<text x="{{ label.x }}" y="{{ chart.height - 26 }}" text-anchor="middle">
{{- label.text }}</text>
{% endfor %}
{%- for key in chart.legend %}<rect x="{{ key.x }}" y="{{ chart.height - 16 }}" width="12" height="12"
 fill="{{ key.colour }}"/>
<text x="{{ key.x + 17 }}" y="{{ chart.height - 6 }}">{{ key.text }}</text>
{% endfor %}</svg>

<h2>Classes</h2>
<p class="note">Boxes of each class, crowds not counted; the bar is the share of the split's boxes.
{%- if classes_left_out %} These are the {{ classes | length }} most frequent in train; {{ classes_left_out }} more
stand in report.json.{% endif %}</p>
<table>
<thead><tr><th class="number">id</th><th>name</th>
{%- for split in splits %}<th class="number">{{ split }}</th><th></th>{% endfor %}</tr></thead>
<tbody>
{% for row in classes %}<tr><td class="number">{{ row.id }}</td><td>{{ row.name }}</td>
{%- for cell in row.cells %}<td class="number">{{ "{:,}".format(cell.boxes) }}</td>
<td><svg width="{{ bar_width }}" height="12">
{%- if cell.width %}<rect y="1" width="{{ cell.width }}" height="10" fill="{{ cell.colour }}"/>{% endif -%}
</svg></td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
</html>
"""


def page(report: Mapping[str, Any], pictures: Sequence[Sequence[Picture]]) -> str:
    """The page of a report.json; `pictures` are those of each of its `failed`."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    severities = [failure["severity"] for failure in report["failed"] if not failure["quarantined"]]
    classes = sorted(report["classes"], key=lambda row: -row["boxes"]["train"])
    return environment.from_string(
        TEMPLATE
    ).render(
        critical=severities.count("critical"),
        warnings=severities.count("warning"),
        quarantined=len(report["failed"]) - len(severities),
        checks=len(report["checks"]),
        splits=report["splits"],
        counts=list(report["splits"]["train"]),
        failed=sorted(
            _with_pictures(report["failed"], pictures), key=lambda failure: failure["severity"]
        ),  # critical first
        rows=_rows(report["checks"]),
        drift=report["drift"],
        drift_rows=_drift_rows(report["drift"], list(report["splits"])),
        chart=_size_chart(report["box_sizes"]),
        classes=_with_bars(classes[:CLASSES_SHOWN], classes),
        classes_left_out=max(0, len(classes) - CLASSES_SHOWN),
        bar_width=BAR_WIDTH,
    )


def _with_pictures(failed: list[dict[str, Any]], pictures: Sequence[Sequence[Picture]]) -> list[dict[str, Any]]:
    return [
        {
            **failure,
            "pictures": [
                {
                    "data": base64.b64encode(picture.jpeg).decode(),
                    "width": picture.width,
                    "height": picture.height,
                    "lines": picture.lines,
                }
                for picture in of_failure
            ],
        }
        for failure, of_failure in zip(failed, pictures, strict=True)
    ]


def _drift_rows(drift: Mapping[str, Any], splits: list[str]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Each quantity with a cell for every split, None where the baseline has no such split."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for split, rows in drift["splits"].items():
        for row in rows:
            cells.setdefault(row["quantity"], {})[split] = {
                "psi": row["psi"],
                "over": row["psi"] > drift["max_psi"] or row["class_problem"],
                "severity": drift["severity"],
                "words": [words for words in (row["moved_most"], row["class_problem"]) if words],
            }
    return [(quantity, [of_splits.get(split) for split in splits]) for quantity, of_splits in cells.items()]


def _rows(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each expectation with its outcome in every split where it was held."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for outcome in checks:
        key = outcome["table"], outcome["expectation"]
        row = rows.setdefault(key, {**outcome, "outcomes": {}})
        row["outcomes"][outcome["split"]] = outcome
    return list(rows.values())


def _size_chart(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Columns side by side, one a split, for each step of size."""
    edges, boxes = sizes["edges"], sizes["boxes"]
    shares = {split: [count / max(sum(counts), 1) for count in counts] for split, counts in boxes.items()}
    highest = max(max(values) for values in shares.values()) or 1
    step = COLUMN_WIDTH * len(boxes) + GAP
    ground = CHART_HEIGHT + 16  # room above for the figures
    texts = [f"{low}-{high}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]}+"]
    return {
        "width": step * len(edges),
        "height": ground + 44,
        "bars": [
            {
                "x": number * step + COLUMN_WIDTH * place + GAP // 2,
                "y": ground - round(CHART_HEIGHT * share / highest),
                "width": COLUMN_WIDTH - 2,
                "height": round(CHART_HEIGHT * share / highest),
                "colour": COLOURS[split],
                "title": f"{split}, {texts[number]} px: {boxes[split][number]:,} boxes",
                "text": f"{share:.0%}" if share >= 0.005 else "",
            }
            for place, (split, values) in enumerate(shares.items())
            for number, share in enumerate(values)
        ],
        "labels": [{"x": number * step + step / 2, "text": text} for number, text in enumerate(texts)],
        "legend": [{"x": 9 + 80 * place, "colour": COLOURS[split], "text": split} for place, split in enumerate(boxes)],
    }


def _with_bars(shown: list[dict[str, Any]], classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shown rows with a bar for each split, in one scale over all."""
    splits = list(classes[0]["boxes"])
    totals = {split: max(sum(row["boxes"][split] for row in classes), 1) for split in splits}
    highest = max(row["boxes"][split] / totals[split] for row in classes for split in splits) or 1
    return [
        {
            **row,
            "cells": [
                {
                    "boxes": row["boxes"][split],
                    "width": round(BAR_WIDTH * row["boxes"][split] / totals[split] / highest),
                    "colour": COLOURS[split],
                }
                for split in splits
            ],
        }
        for row in shown
    ]
