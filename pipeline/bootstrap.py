"""The bootstrap over images: between which bounds would a figure lie, had other images been judged?

The images are drawn anew, with repetition, as many as there are; a model is judged on each draw, two models on the same
one; and this is repeated. The share `confidence` in the middle of the figures, or of their differences, is the
interval. What is drawn depends on the seed and the number of images alone.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.coco_metrics import NOTHING_TO_FIND, SUMMARY, Detections, read_truth
from pipeline.resampled_metrics import matched


@dataclasses.dataclass(frozen=True)
class Interval:
    """A metric of two models, and how sure their difference is. None: not defined, there was nothing to find."""

    candidate: float | None
    champion: float | None
    difference: float | None  # candidate - champion
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Differences:
    """What two models differ by."""

    metrics: dict[str, Interval]  # of SUMMARY
    per_class: dict[int, Interval]  # category id -> AP


def draws(images: int, resamples: int, seed: int) -> NDArray[np.uint16]:
    """How often each image is drawn in each resample: [resamples, images]."""
    random = np.random.default_rng(seed)
    drawn = np.empty((resamples, images), np.uint16)
    for row in drawn:
        row[:] = np.bincount(random.integers(0, images, images), minlength=images)
    return drawn


def difference(
    ground_truth: Path,
    candidate: Detections,
    champion: Detections,
    *,
    resamples: int,
    seed: int,
    confidence: float,
) -> Differences:
    """Both judged against every image of the ground truth (COCO json), with intervals for each difference.

    PipelineError where a detection is of an image that the ground truth has not.
    """
    truth = read_truth(ground_truth, [*candidate, *champion])
    drawn = draws(len(truth["images"]), resamples, seed)
    figures = [_figures(truth, detections, drawn) for detections in (candidate, champion)]
    columns = [_interval(ours, theirs, confidence) for ours, theirs in zip(figures[0].T, figures[1].T, strict=True)]
    categories = sorted(category["id"] for category in truth["categories"])
    return Differences(
        metrics=dict(zip(SUMMARY, columns[: len(SUMMARY)], strict=True)),
        per_class=dict(zip(categories, columns[len(SUMMARY) :], strict=True)),
    )


def intervals(
    ground_truth: Path, detections: Detections, *, resamples: int, seed: int, confidence: float
) -> dict[str, tuple[float, float] | None]:
    """One model judged against every image of the ground truth (COCO json): metric of SUMMARY -> its interval.

    None where there was nothing to find. PipelineError where a detection is of an image that the ground truth has not.
    """
    truth = read_truth(ground_truth, detections)
    columns = _figures(truth, detections, draws(len(truth["images"]), resamples, seed)).T[: len(SUMMARY)]
    return {
        name: _bounds(values[1:][values[1:] != NOTHING_TO_FIND], confidence) if values[0] != NOTHING_TO_FIND else None
        for name, values in zip(SUMMARY, columns, strict=True)
    }


def _figures(truth: Mapping[str, Any], detections: Detections, drawn: NDArray[np.uint16]) -> NDArray[np.float64]:
    """SUMMARY and AP of each class, on the images as they are and in each draw: [1 + resamples, 12 + K]."""
    model = matched(truth, detections, int(drawn.max()))
    found = [model.figures(draw) for draw in (np.ones(drawn.shape[1], np.uint16), *drawn)]
    return np.stack([np.concatenate([figures.metrics, figures.per_class]) for figures in found])


def _bounds(values: NDArray[np.float64], confidence: float) -> tuple[float, float] | None:
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return low, high


def _interval(candidate: NDArray[np.float64], champion: NDArray[np.float64], confidence: float) -> Interval:
    """Of a metric's values: first on the images as they are, then in each resample. Both lack the same ones."""
    defined = candidate != NOTHING_TO_FIND
    if not defined[0]:
        return Interval(None, None, None, None, None)
    low, high = _bounds((candidate - champion)[1:][defined[1:]], confidence) or (None, None)
    return Interval(float(candidate[0]), float(champion[0]), float(candidate[0] - champion[0]), low, high)
