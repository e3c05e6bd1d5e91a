"""The model card of a release: what the model is, what it was made of, how good it is, how it is run. Markdown."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from effdet.export_onnx import OPSET
from pipeline.class_table import labels
from pipeline.coco_metrics import SUMMARY
from pipeline.export_check import BEST, HIGH_SCORE, AveragePrecision, Comparison
from pipeline.files import megabytes
from pipeline.gate import Decision, Difference
from pipeline.model_files import StoredModel

SPLITS = ("train", "val", "test")  # in the order of the tables

TEMPLATE = """\
# {{ config.name }}, {{ classes | length }} classes

An EfficientDet object detector (arXiv:1911.09070). It takes a picture of any size, scales it to fit
{{ config.image_size[0] }} x {{ config.image_size[1] }} pixels (height x width), and gives up to
{{ nms.max_detections }} boxes with class and score.

{% if apply_exif %}
It was trained on pictures turned as their EXIF orientation says. The SavedModel turns the files that it is given; who
gives pixels turns them, as below.
{% else %}
It was trained on pictures as they are stored, and takes them so, whatever their EXIF orientation says.
{% endif %}

Classes: {% for row in classes %}{{ row.name }}{{ ", " if not loop.last }}{% endfor %}.

## How to run it

{% if "saved_model" in files %}
```python
import tensorflow as tf

detect = tf.saved_model.load("saved_model").signatures["serving_default"]
found = detect(images=tf.constant([open("picture.jpg", "rb").read()]))  # JPEG or PNG bytes, a batch
for place in range(found["count"][0]):
    print(found["class_names"][0, place], found["scores"][0, place], found["boxes"][0, place])
```

`boxes` are `[top, left, bottom, right]` in pixels of the picture{{ ", turned" if apply_exif else " as it came in" }};
the best score comes first. The signature `pixels` takes `uint8` pictures `[B, height, width, 3]` (RGB) instead.

{% endif %}
{% if "model.onnx" in files %}
```python
import numpy as np, onnxruntime
from PIL import Image{{ ", ImageOps" if apply_exif }}

session = onnxruntime.InferenceSession("model.onnx")
names = [output.name for output in session.get_outputs()]
pixels = np.asarray({{ opened }}.convert("RGB"))[None]  # a batch of equal sizes
found = dict(zip(names, session.run(names, {"pixels": pixels})))  # boxes, scores, classes, count
```

ONNX opset {{ opset }}; the table of classes is `classes` in its metadata.

{% endif %}
{% for name in files if name.endswith(".tflite") %}
{% if loop.first %}
```python
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image{{ ", ImageOps" if apply_exif }}

pixels = np.asarray({{ opened }}.convert("RGB"))[None]  # one
found = Interpreter("{{ name }}").get_signature_runner()(pixels=pixels)  # boxes, scores, classes, count
```

A LiteRT file is a zip archive, too, with `labels.txt` and `classes.json`.

{% endif %}
{% endfor %}
`sha256sum -c checksums.sha256` checks the files.

| for serving | MB | compared with the model that was judged |
| --- | ---: | --- |
{% for path, outcome in exports.items() %}
| `{{ path.name }}` | {{ megabytes(path) }} | {{ outcome.words() }} |
{% endfor %}

They ran on images of {{ gate_split }}; compared were detections that score at least {{ high_score }}, at full precision
the {{ best }} best of each image, too. int8 is judged by its AP over all of val.
Boxes and scores are computed in float32 in all of them; float16 and int8 concern the network.

| beside them | what it is |
| --- | --- |
| `model.json`, `weights.safetensors` | configuration and weights, to train on from |
| `classes.json` | class ids of the model, category ids of the annotations, names |
| `decision.json` | the gate's decision, every rule with its figures |
| `provenance.json` | hashes of what it was made of; parameters, versions and hardware of the training |

Made by {{ made_of.project }}. The commit that all of it comes from is that of the version's tag,
`git show detector@VERSION`.

## Data

| split | images | boxes | images without objects | left out |
| --- | ---: | ---: | ---: | --- |
{% for name, split in data.items() %}
| {{ name }} | {{ split.images }} | {{ split.boxes }} | {{ split.empty_images }} | {{ left_out(split.left_out) }} |
{% endfor %}

The data's version, as it stands in dvc.lock: `data/shards` `{{ made_of.dvc_lock["data/shards"] }}`.
{% for name, facts in made_of.data.items() %}
{% for fact, value in facts.items() %}
{{ name | capitalize }} {{ fact | replace("_", " ") }}: `{{ value }}`.
{% endfor %}
{% endfor %}

## Training

{{ "Averaged (EMA)" if weights.kind == "ema" else "Raw" }} weights of epoch {{ weights.epoch }}
(step {{ weights.step }}), selected by {{ weights.selected_by }}.
Training began with {{ made_of.training.begins_with or "random weights" }}; its precision, versions of libraries and
hardware stand in `provenance.json`:
{%- for rank in made_of.training.ranks %} {{ rank.cpus }} CPUs {{ rank.cpu }}
{%- if rank.gpus %} with {{ rank.gpus | join(", ") }}{% endif %}{{ ";" if not loop.last else "." }}
{%- endfor +%}

| parameter | value |
| --- | --- |
{% for name, value in parameters %}
| {{ name }} | {{ cell(value) }} |
{% endfor %}

## Metrics

COCO's, over every image of a split.
{% for name, split in judged.items() %}
{{ name | capitalize }} was {{ split.used_for }}.
{% endfor %}
In brackets: where the figure of {{ gate_split }} would lie, had other images like these been drawn (bootstrap over
images, confidence {{ likely.confidence }}).

| |{% for name in judged %} {{ name }} |{% endfor +%}
| --- |{% for name in judged %} ---: |{% endfor +%}
{% for metric in metrics %}
| {{ metric }} |{% for name, split in judged.items() %} {{ figure(split.metrics[metric]) }}
{%- if name == gate_split and likely.intervals[metric] %}
 ({{ likely.intervals[metric] | map("figure") | join(" to ") }})
{%- endif %} |{% endfor +%}
{% endfor %}

| AP of class |{% for name in judged %} {{ name }} |{% endfor +%}
| --- |{% for name in judged %} ---: |{% endfor +%}
{% for name in class_names %}
| {{ cell(name) }} |{% for split in judged.values() %} {{ figure(split.per_class[name]) }} |{% endfor +%}
{% endfor %}

Post-processing: {{ nms.method }} non-maximum suppression by class,
{{ "sigma %s" % nms.sigma if nms.method == "gaussian" else "IoU over %s" % nms.iou_threshold }}; scores over
{{ nms.score_threshold }}.
These settings favour recall: set your own score threshold on top.

## Limits

- It knows the {{ classes | length }} classes above. What is none of them is left out, or taken for one of them.
- The figures hold for pictures like the {{ data[gate_split].images }} of {{ gate_split }}, at
  {{ config.image_size[0] }} x {{ config.image_size[1] }} pixels. Other cameras, light, places or sizes of objects were
  not measured: judge it on pictures of your own first.
{% if judged[gate_split].metrics.APs is none %}
- {{ gate_split | capitalize }} has no objects under 32 x 32 pixels: how it finds those was not measured.
{% else %}
- Objects under 32 x 32 pixels: AP {{ figure(judged[gate_split].metrics.APs) }}, against
  {{ figure(judged[gate_split].metrics.AP) }} over all.
{% endif %}
{% if "test" not in judged %}
- There was no test split: the figures are of the pictures by which the weights were chosen, and so rather high.
{% endif %}
- A score orders detections; it is no probability.
- It was not made or measured for decisions on the safety or the rights of people, nor for telling people apart.

## Licences

| | |
| --- | --- |
| data | {{ cell(made_of.licences.data or not_stated) }} |
| weights that training began with | {{ cell(made_of.licences.initial_weights or not_stated) }} |

## Gate

**{{ decision.decision | capitalize }}**, on {{ gate_split }}, which was {{ judged[gate_split].used_for }}.

| rule | candidate | required | |
| --- | --- | --- | --- |
{% for rule in decision.rules %}
| {{ cell(rule.rule) }} |{% for text in rule.words() %} {{ cell(text) }} |{% endfor +%}
{% endfor %}
{% if decision.differences %}

Against the champion, on the same pictures; the interval is a paired bootstrap's over images, at a confidence of
{{ decision.differences.confidence }}.

| | champion | difference | from | to |
| --- | ---: | ---: | ---: | ---: |
{% for name, theirs, one in differences %}
| {{ cell(name) }} | {{ figure(theirs) }}
{%- for value in (one.difference, one.low, one.high) %} | {{ signed(value) }}{% endfor %} |
{% endfor %}
{% endif %}
"""


@dataclass(frozen=True)
class Likely:
    """Intervals of the gate split's figures."""

    confidence: float
    intervals: Mapping[str, tuple[float, float] | None]  # metric of SUMMARY; None where there was nothing to find


def model_card(
    stored: StoredModel,
    manifest: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    likely: Likely,
    decision: Decision,
    exports: Mapping[Path, Comparison | AveragePrecision],
    made_of: Mapping[str, Any],
) -> str:
    """The card. `evaluation` is evaluate's metrics.json, `manifest` the shards', `exports` the files to serve.

    `made_of`: the release's provenance.
    """
    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["figure"] = _figure
    judged = {split: evaluation["splits"][split] for split in SPLITS if split in evaluation["splits"]}
    return environment.from_string(TEMPLATE).render(
        config=stored.config,
        classes=stored.classes,
        weights=stored.weights,
        nms=evaluation["nms"],
        data={split: manifest["splits"][split] for split in SPLITS if split in manifest["splits"]},
        judged=judged,
        metrics=SUMMARY,
        class_names=labels(stored.classes).values(),
        gate_split=evaluation["gate_split"],
        decision=decision,
        differences=_differences(decision),
        likely=likely,
        figure=_figure,
        signed=lambda value: "none" if value is None else f"{round(value, 3) + 0.0:+.3f}",
        cell=lambda text: text.replace("|", "\\|"),
        left_out=_left_out,
        made_of=made_of,
        parameters=_flat(made_of["parameters"]),
        not_stated="not stated: ask whoever trained it before you pass it on",
        exports=exports,
        files=[path.name for path in exports],
        megabytes=lambda path: f"{megabytes(path):.1f}",
        high_score=HIGH_SCORE,
        best=BEST,
        opset=OPSET,
        apply_exif=stored.apply_exif,
        opened='ImageOps.exif_transpose(Image.open("picture.jpg"))'
        if stored.apply_exif
        else 'Image.open("picture.jpg")',
    )


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _left_out(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count) or "none"


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names as params.yaml has them, with dots, and values as JSON."""
    rows = []
    for name, value in parameters.items():
        nested = isinstance(value, Mapping)
        rows += _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", json.dumps(value))]
    return rows


def _differences(decision: Decision) -> list[tuple[str, float | None, Difference]]:
    """What, the champion's figure, and by how much the candidate's is above it."""
    if not (decision.champion and decision.differences):
        return []
    by_name = (
        ("", decision.champion.metrics, decision.differences.metrics),
        ("AP of ", decision.champion.per_class, decision.differences.per_class),
    )
    return [(of + name, theirs[name], one) for of, theirs, found in by_name for name, one in found.items()]
