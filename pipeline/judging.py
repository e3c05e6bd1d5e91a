"""A split's COCO results judged: figures, tables for `dvc plots`, the pictures, and the files that hold them."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effdet.boxes import xywh_to_yxyx
from pipeline import params
from pipeline.calibration import Calibration, calibration
from pipeline.class_table import Class, labels
from pipeline.coco_metrics import NOTHING_TO_FIND, SUMMARY, Truth, coco_evaluation, mean_precision, read_truth
from pipeline.coco_reference import verify
from pipeline.confusion import confusion, confusion_rows
from pipeline.error_breakdown import error_breakdown
from pipeline.files import checksum
from pipeline.matching import ImageScore, image_scores, match
from pipeline.rendering import Drawn, side_by_side
from pipeline.timings import timed

IOU_50, IOU_75 = 0, 5  # places among COCOeval's IoU thresholds 0.50, 0.55, ... 0.95
CURVES = {"IoU50": IOU_50, "IoU75": IOU_75}
SIZES = {"APs": 1, "APm": 2, "APl": 3}  # places among COCOeval's ranges of areas; 0 is all

Row = dict[str, Any]
ImagesOf = Callable[[Sequence[int]], Mapping[int, bytes]]  # image ids -> their JPEG or PNG bytes


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the results on a split are worth."""

    metrics: dict[str, float | None]  # of SUMMARY; None where the split has nothing to find
    per_class: list[Row]  # name, category_id, boxes, AP, AP50, AP75, APs, APm, APl
    curves: list[Row]  # recall, and mean precision over the classes at each of CURVES
    class_curves: dict[str, dict[str, list[float]]]  # class -> the same for it alone, where it has something to find
    errors: list[Row]  # as error_breakdown gives them
    calibration: Calibration
    confusion: NDArray[np.int64]  # [K+1,K+1] as pipeline.confusion counts, in the order of per_class
    images: list[ImageScore]  # the worst first


def judge(truth: Truth, results: list[Row], names: Mapping[int, str], evaluation: Any, min_score: float) -> Judged:
    """The results against every image of the truth, of which `evaluation` is coco_evaluation's. `names`: by category.

    min_score: of the detections that count in confusions and in an image's score.
    """
    categories = evaluation.params.catIds
    precision = evaluation.eval["precision"][..., -1]  # [IoU, recall, class, size]; 100 detections
    whole = precision[..., 0]
    boxes = np.array([row["category_id"] for row in truth["annotations"] if not row["iscrowd"]], np.int64)
    per_class = [
        {
            "name": names[category],
            "category_id": category,
            "boxes": int((boxes == category).sum()),
            "AP": _figure(mean_precision(whole[:, :, place])),
            "AP50": _figure(mean_precision(whole[IOU_50, :, place])),
            "AP75": _figure(mean_precision(whole[IOU_75, :, place])),
            **{name: _figure(mean_precision(precision[:, :, place, size])) for name, size in SIZES.items()},
        }
        for place, category in enumerate(categories)
    ]
    means = {name: _mean_over_classes(whole[iou]) for name, iou in CURVES.items()}
    curves = [
        {"recall": round(float(recall), 2), **{name: float(mean[place]) for name, mean in means.items()}}
        for place, recall in enumerate(evaluation.params.recThrs)
    ]
    matched = match(truth, results, min_score)
    return Judged(
        metrics=dict(zip(SUMMARY, map(_figure, evaluation.stats.tolist()), strict=True)),
        per_class=per_class,
        curves=curves,
        class_curves={
            names[category]: {name: whole[iou, :, place].tolist() for name, iou in CURVES.items()}
            for place, category in enumerate(categories)
            if (whole[:, :, place] > NOTHING_TO_FIND).all()
        },
        errors=error_breakdown(evaluation),
        calibration=calibration(evaluation),
        confusion=confusion(matched, categories),
        images=image_scores(matched),
    )


def _figure(value: float) -> float | None:
    return None if value == NOTHING_TO_FIND else value


def _mean_over_classes(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """[recall] of [recall, class], over the classes that the split has; zeros where it has none."""
    present = precision[:, (precision > NOTHING_TO_FIND).all(axis=0)]
    return present.mean(axis=1) if present.size else np.zeros(len(precision))


# Pictures -------------------------------------------------------------------------------------------------------------


def worst_and_best(images: Sequence[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """Of images, the worst first, `count` or all: the worst, the worst first, and the best, the best first."""
    count = min(count, len(images))
    worst, best = count - count // 2, count // 2
    return list(images[:worst]), list(images[::-1][:best])


def pictures(
    images: Mapping[int, bytes],
    truth: Iterable[Row],
    results: Iterable[Row],
    classes: Mapping[int, tuple[int, str]],
    min_score: float,
    apply_exif: bool = False,
) -> dict[int, bytes]:
    """Each image with its truth beside its detections of at least min_score: image id -> JPEG bytes.

    `truth` and `results` have COCO's keys; `classes`: category id -> class id, label; `apply_exif`: they refer to the
    pictures as their EXIF orientation turns them.
    """
    boxes: dict[int, tuple[list[Drawn], list[Drawn]]] = {image_id: ([], []) for image_id in images}
    for annotation in truth:
        if annotation["image_id"] in boxes:
            mark = " (crowd)" if annotation["iscrowd"] else ""
            boxes[annotation["image_id"]][0].append(_drawn(annotation, classes, mark))
    for result in results:
        if result["image_id"] in boxes and result["score"] >= min_score:
            boxes[result["image_id"]][1].append(_drawn(result, classes, f" {result['score']:.2f}"))
    return {
        # the best detection last, so that it lies on top
        image_id: side_by_side(encoded, boxes[image_id][0], boxes[image_id][1][::-1], apply_exif)
        for image_id, encoded in images.items()
    }


def _drawn(row: Row, classes: Mapping[int, tuple[int, str]], mark: str) -> Drawn:
    class_id, label = classes[row["category_id"]]
    return Drawn(xywh_to_yxyx(np.array(row["bbox"])), class_id, label + mark)


# Files ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rows_file(path: Path) -> Iterator[Callable[[Iterable[Row]], None]]:
    """Gives a function that adds rows to a JSON array, one a line: there may be more of them than memory holds."""
    with path.open("w") as file:
        separator = "[\n"

        def add(rows: Iterable[Row]) -> None:
            nonlocal separator
            for row in rows:
                file.write(separator + json.dumps(row, sort_keys=True))
                separator = ",\n"

        yield add
        file.write("\n]\n" if separator == ",\n" else "[\n\n]\n")


def write_results(path: Path, results: Iterable[Row]) -> None:
    """COCO results as JSON, one a line."""
    with rows_file(path) as add:
        add(results)


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows as CSV; what is None stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def judge_split(
    folder: Path,
    split: str,
    used_for: str,
    ground_truth: Path,
    results: list[Row],
    images_of: ImagesOf,
    table: Sequence[Class],
    settings: params.Evaluate,
    apply_exif: bool,
    seconds: Row,
) -> tuple[Row, Row]:
    """Judges COCO results, draws the worst and the best images, and writes the split's files.

    Its part of metrics.json, and what the page shows of it. `apply_exif`: as for `pictures`. `seconds` gets what took
    how long. PipelineError where a figure is not pycocotools'.
    """
    names = labels(table)
    classes = {row.category_id: (row.class_id, names[row.class_id]) for row in table}
    truth = read_truth(ground_truth, results)
    with timed(seconds, "judging"):
        evaluation = coco_evaluation(truth, results)
        by_category = {category: label for category, (_, label) in classes.items()}
        judged = judge(truth, results, by_category, evaluation, settings.picture_score)
    with timed(seconds, "checking"):
        verified = verify(truth, results, evaluation, settings.verify)
    chosen = worst_and_best(judged.images, settings.pictures)
    images = images_of([score.image_id for scores in chosen for score in scores])
    drawn = pictures(images, truth["annotations"], results, classes, settings.picture_score, apply_exif)

    write_results(folder / f"detections_{split}.json", results)
    _write_tables(folder, split, judged)
    (folder / "pictures").mkdir(exist_ok=True)
    for image_id, jpeg in drawn.items():
        (folder / "pictures" / f"{split}-{image_id}.jpg").write_bytes(jpeg)

    figures = {
        "images": len(truth["images"]),
        "boxes": sum(row["boxes"] for row in judged.per_class),
        "used_for": used_for,
        "ground_truth": checksum(ground_truth, "sha256"),
        "detections": checksum(folder / f"detections_{split}.json", "sha256"),
        "verified": {"evaluator": f"hotcoco {importlib.metadata.version('hotcoco')}", **verified},
        "metrics": judged.metrics,
        "per_class": {row["name"]: row["AP"] for row in judged.per_class},
        "per_class_by_size": {row["name"]: {size: row[size] for size in SIZES} for row in judged.per_class},
        "errors": {row["error"]: row["AP50_without"] for row in judged.errors},
        "calibration_error": judged.calibration.error,
    }
    seen = _classes_in(truth, results, by_category, settings.picture_score)
    shown = {
        "name": split,
        "judged": judged,
        "pictures": [
            {"title": title, "images": [(score, drawn[score.image_id], seen[score.image_id]) for score in scores]}
            for title, scores in zip(("Worst", "Best"), chosen, strict=True)
        ],
    }
    return figures, {**figures, **shown}


def _write_tables(folder: Path, split: str, judged: Judged) -> None:
    """What dvc.yaml's plots draw."""
    write_table(folder / f"per_class_{split}.csv", judged.per_class, list(judged.per_class[0]))
    write_table(folder / f"precision_recall_{split}.csv", judged.curves, ["recall", *CURVES])
    write_table(folder / f"errors_{split}.csv", judged.errors, list(judged.errors[0]))
    bins = ["from", "to", "detections", "score", "right"]
    write_table(folder / f"calibration_{split}.csv", judged.calibration.bins, bins)
    rows = confusion_rows(judged.confusion, [row["name"] for row in judged.per_class])
    write_table(folder / f"confusion_{split}.csv", rows, ["truth", "found"])


def _classes_in(
    truth: Truth, results: Iterable[Row], names: Mapping[int, str], min_score: float
) -> dict[int, list[str]]:
    """Image id -> the classes that are in it, or were found there: what the page filters by."""
    seen: dict[int, set[str]] = {image["id"]: set() for image in truth["images"]}
    for row in (*truth["annotations"], *(row for row in results if row["score"] >= min_score)):
        seen[row["image_id"]].add(names[row["category_id"]])
    return {image_id: sorted(found) for image_id, found in seen.items()}


def summary(split: str, figures: Mapping[str, Any]) -> str:
    """A split's part of metrics.json in a line."""
    ap, ap50 = (_words(figures["metrics"][name]) for name in ("AP", "AP50"))
    return f"{split}: AP {ap}, AP50 {ap50} over {figures['images']} images"


def _words(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
