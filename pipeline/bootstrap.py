"""The paired bootstrap: between which bounds does the difference of two models lie, had other images been judged?

The images are drawn anew, with repetition, as many as there are; both models are judged on the same draw; and this is
repeated. The share `confidence` in the middle of the differences is the interval. What is drawn depends on the seed and
the number of images alone.
"""

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.coco_metrics import NOTHING_TO_FIND, SUMMARY, Detections, read_truth
from pipeline.resampled_metrics import Figures, matched


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
    models = [matched(truth, detections, int(drawn.max())) for detections in (candidate, champion)]
    whole = np.ones(drawn.shape[1], np.uint16)
    figures = [np.stack([_row(model.figures(draw)) for draw in (whole, *drawn)]) for model in models]  # [1 + n, 12 + K]
    columns = [_interval(ours, theirs, confidence) for ours, theirs in zip(figures[0].T, figures[1].T, strict=True)]
    categories = sorted(category["id"] for category in truth["categories"])
    return Differences(
        metrics=dict(zip(SUMMARY, columns[: len(SUMMARY)], strict=True)),
        per_class=dict(zip(categories, columns[len(SUMMARY) :], strict=True)),
    )


def _row(figures: Figures) -> NDArray[np.float64]:
    return np.concatenate([figures.metrics, figures.per_class])


def _interval(candidate: NDArray[np.float64], champion: NDArray[np.float64], confidence: float) -> Interval:
    """Of a metric's values: first on the images as they are, then in each resample. Both lack the same ones."""
    defined = candidate != NOTHING_TO_FIND
    if not defined[0]:
        return Interval(None, None, None, None, None)
    differences = (candidate - champion)[1:][defined[1:]]
    low = high = None
    if differences.size:
        low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Interval(float(candidate[0]), float(champion[0]), float(candidate[0] - champion[0]), low, high)
