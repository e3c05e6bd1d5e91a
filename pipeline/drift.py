"""How far a data set lies from an accepted one: counts in fixed bins, and their population stability index.

The index of two lists of shares a and b is the sum of (a - b) * ln(a / b) (S. Siddiqi, Credit Risk Scorecards, 2006,
where below 0.1 is read as no change and above 0.25 as a large one).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.coco import CocoTables

CLASSES, BOX_SIZES, BOXES_AN_IMAGE, IMAGE_SIZES = "classes", "box sizes", "boxes an image", "image sizes"
# Pixels, side of a square of the same area. 32 and 96 part COCO's small, medium, large.
BOX_EDGES = (0, 8, 16, 32, 64, 96, 192, 384)
IMAGE_EDGES = (0, 64, 128, 256, 384, 448, 512, 576, 640, 768, 1024, 1536, 2048, 4096)
BOXES_EDGES = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55)
FLOOR = 1e-4  # a smaller share, or none, counts as this: the index has a logarithm of it
NAMED = 5  # classes in a message
COLUMNS = ["quantity", "psi", "moved_most", "class_problem"]

Counts = dict[str, int]  # of a quantity: label of the bin -> boxes or images
Distributions = dict[str, dict[str, Counts]]  # {split: {quantity: counts}}


def class_counts(found: CocoTables) -> pd.DataFrame:
    """The categories with the number of their boxes, crowds not counted."""
    objects = found.annotations[found.annotations["iscrowd"] == 0]
    counts = objects["category_id"].value_counts()
    return found.categories.assign(boxes=found.categories["id"].map(counts).fillna(0).astype(np.int64))


def distributions(found: CocoTables) -> dict[str, Counts]:
    """The counts of each quantity. Crowds are no boxes here, but in `box sizes`."""
    classes = class_counts(found).drop_duplicates("id").sort_values("id")
    objects = found.annotations.loc[found.annotations["iscrowd"] == 0, "image_id"].value_counts()
    return {
        CLASSES: {f"{row.id} {row.title}": row.boxes for row in classes.rename(columns={"name": "title"}).itertuples()},
        BOX_SIZES: _histogram(_sides(found.annotations, "w", "h"), BOX_EDGES),
        BOXES_AN_IMAGE: _histogram(found.images["id"].map(objects).fillna(0).to_numpy(), BOXES_EDGES, whole=True),
        IMAGE_SIZES: _histogram(_sides(found.images, "width", "height"), IMAGE_EDGES),
    }


def _sides(table: pd.DataFrame, width: str, height: str) -> Any:
    """Sides of the squares of the same areas, float64 [n], of what has an area."""
    w, h = (table[name].to_numpy(np.float64) for name in (width, height))
    return np.sqrt((w * h)[(w > 0) & (h > 0)])


def _histogram(values: Any, edges: Sequence[int], whole: bool = False) -> Counts:
    """Counts from each edge up to the next, which is not in it; the last has no upper edge."""
    counts = np.histogram(values, [*edges, np.inf])[0].tolist()
    return dict(zip(_labels(edges, whole), counts, strict=True))


def _labels(edges: Sequence[int], whole: bool = False) -> list[str]:
    """Of the bins; of `whole` numbers the last that is in it."""
    pairs = [(low, high - 1 if whole else high) for low, high in itertools.pairwise(edges)]
    return [f"{low}" if low == high else f"{low}-{high}" for low, high in pairs] + [f"{edges[-1]}+"]


LABELS = {  # of the quantities whose bins are the same for every data set
    BOX_SIZES: _labels(BOX_EDGES),
    BOXES_AN_IMAGE: _labels(BOXES_EDGES, whole=True),
    IMAGE_SIZES: _labels(IMAGE_EDGES),
}


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """The counts as shares of their sum; of nothing all are 0."""
    total = max(sum(counts.values()), 1)
    return {label: count / total for label, count in counts.items()}


def stability_index(now: Mapping[str, int], accepted: Mapping[str, int]) -> tuple[float, str]:
    """The index of two counts, and words on the bin that adds most to it: how its share moved."""
    here, there = shares(now), shares(accepted)
    parts = {}
    for label in [*here, *(label for label in there if label not in here)]:
        a, b = (max(found.get(label, 0.0), FLOOR) for found in (here, there))
        parts[label] = (a - b) * math.log(a / b)
    most = max(parts, key=lambda label: parts[label])
    words = f"{most}: {there.get(most, 0):.1%} to {here.get(most, 0):.1%}" if parts[most] else ""
    return round(sum(parts.values()), 6), words  # rounded: the last bits of a logarithm are a machine's own


def drift_table(now: Mapping[str, Counts], accepted: Mapping[str, Counts]) -> pd.DataFrame:
    """A row for each quantity of a split, with COLUMNS."""
    rows = [
        (name, *stability_index(counts, accepted[name]), _other(counts, accepted[name]) if name == CLASSES else None)
        for name, counts in now.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"class_problem": object})


def _other(now: Counts, accepted: Counts) -> str | None:
    """Words on the classes, by id and name, that only one of them has."""
    new, gone = ([label for label in one if label not in other] for one, other in ((now, accepted), (accepted, now)))
    parts = [("not in the baseline", new), ("in the baseline alone", gone)]
    words = [
        f"{what}: {', '.join(labels[:NAMED])}{', ...' * (len(labels) > NAMED)}" for what, labels in parts if labels
    ]
    return "; ".join(words) or None
