"""The confusion table: for what objects of each class were taken, of detections of a score that counts, at IoU 0.5."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.matching import IN_CROWD, Matched

NONE = "(none)"  # as truth: nothing was there; as what was found: the object was missed


def confusion(matched: Matched, categories: Sequence[int]) -> NDArray[np.int64]:
    """Counts [K+1,K+1], K the number of categories: rows are the truth, columns what was found, in their order.

    The last row counts detections of no object, the last column objects without a detection. Detections in crowds of
    their class are left out.
    """
    places = {category: place for place, category in enumerate(categories)}
    none = len(places)
    truth = np.array([places[category] for category in matched.object_categories.tolist()], np.int64)
    found = np.array([places[category] for category in matched.detection_categories.tolist()], np.int64)
    counts = np.zeros((none + 1, none + 1), np.int64)
    on_object = matched.objects >= 0
    objects = matched.objects[on_object]
    np.add.at(counts, (truth[objects], found[on_object]), 1)
    np.add.at(counts[none], found[(matched.objects < 0) & (matched.objects != IN_CROWD)], 1)
    np.add.at(counts[:, none], np.delete(truth, objects), 1)
    return counts


def confusion_rows(counts: NDArray[np.int64], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """A row for each object or detection, as DVC's template counts them: its class, and what it was taken for."""
    words = [*names, NONE]
    return [
        {"truth": words[row], "found": words[column]}
        for row, column in np.argwhere(counts).tolist()
        for _ in range(int(counts[row, column]))
    ]
