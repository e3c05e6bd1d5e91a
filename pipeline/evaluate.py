"""The evaluate stage: the model over every image of val, and of test where there is one, judged by COCO's metrics.

data/eval/
  metrics.json             which weights were judged on which split: the twelve numbers, AP by class, hashes
  detections_SPLIT.json    COCO results by image, best first, rounded as pipeline.coco_metrics.coco_results says
  per_class_SPLIT.csv, precision_recall_SPLIT.csv   for `dvc plots`
  pictures/SPLIT-ID.jpg    truth beside detections
  index.html               all of it for a person, offline
"""

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from effdet.boxes import xywh_to_yxyx
from effdet.inference import prepare_device, run_detection
from effdet.input_pipeline import evaluation_batches
from effdet.postprocess import PostprocessConfig
from pipeline import local, params
from pipeline.class_table import Class, class_rows, labels, require_same
from pipeline.coco_metrics import NOTHING_TO_FIND, SUMMARY, coco_evaluation, coco_results, mean_precision
from pipeline.errors import run
from pipeline.evaluation_page import page
from pipeline.files import checksum, read_json, write_json, written_whole
from pipeline.model_files import MODEL_FILE, StoredModel, read_model, require_same_pictures
from pipeline.rendering import Drawn, side_by_side
from pipeline.shard_files import MANIFEST, ground_truth_path, shard_paths, spread_images

MODEL = Path("data/model")
OUT = Path("data/eval")
METRICS_FILE = "metrics.json"

USED_FOR = {"val": "also used for selection", "test": "not used for selection"}
GATE_ORDER = ("test", "val")  # the gate looks at the first of these that the data has
IOU_50, IOU_75 = 0, 5  # places among COCOeval's IoU thresholds 0.50, 0.55, ... 0.95
CURVES = {"IoU50": IOU_50, "IoU75": IOU_75}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the results on a split are worth."""

    metrics: dict[str, float | None]  # of SUMMARY; None where the split has nothing to find
    per_class: list[Row]  # name, category_id, boxes, AP, AP50, AP75
    curves: list[Row]  # recall, and mean precision over the classes at each of CURVES


def detect(stored: StoredModel, manifest: Mapping[str, Any], split: str, settings: params.Evaluate) -> list[Row]:
    """COCO results on every image of a split, by image id, the best of an image first."""
    batches = evaluation_batches(
        shard_paths(manifest, split),
        image_size=stored.config.image_size,
        max_boxes=manifest["max_boxes"],
        batch_size=settings.batch_size,
        rank=0,
        num_ranks=1,
        workers=local.load().loader_workers,
    )
    nms = PostprocessConfig(**settings.nms.model_dump())
    total = manifest["splits"][split]["images"]
    with tqdm(total=total, desc=f"evaluate {split}", unit=" images", disable=None) as bar:
        found = run_detection(stored.model, stored.config, batches, nms, progress=bar.update)
    return sorted(coco_results(found, stored.classes), key=lambda result: result["image_id"])


def judge(ground_truth: Path, results: list[Row], names: Mapping[int, str]) -> Judged:
    """The results against every image of the ground truth. `names`: category id -> label."""
    evaluation = coco_evaluation(ground_truth, results)
    categories = evaluation.params.catIds
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]; all sizes, 100 detections
    per_class = [
        {
            "name": names[category],
            "category_id": category,
            "boxes": len(evaluation.cocoGt.getAnnIds(catIds=[category], iscrowd=False)),
            "AP": _figure(mean_precision(precision[:, :, place])),
            "AP50": _figure(mean_precision(precision[IOU_50, :, place])),
            "AP75": _figure(mean_precision(precision[IOU_75, :, place])),
        }
        for place, category in enumerate(categories)
    ]
    means = {name: _mean_over_classes(precision[iou]) for name, iou in CURVES.items()}
    curves = [
        {"recall": round(float(recall), 2), **{name: float(mean[place]) for name, mean in means.items()}}
        for place, recall in enumerate(evaluation.params.recThrs)
    ]
    metrics = dict(zip(SUMMARY, map(_figure, evaluation.stats.tolist()), strict=True))
    return Judged(metrics, per_class, curves)


def _figure(value: float) -> float | None:
    return None if value == NOTHING_TO_FIND else value


def _mean_over_classes(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """[recall] of [recall, class], over the classes that the split has; zeros where it has none."""
    present = precision[:, (precision > NOTHING_TO_FIND).all(axis=0)]
    return present.mean(axis=1) if present.size else np.zeros(len(precision))


# Pictures -------------------------------------------------------------------------------------------------------------


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


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Rows as CSV; what is None stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def evaluate_split(
    folder: Path, split: str, manifest: Mapping[str, Any], stored: StoredModel, settings: params.Evaluate
) -> tuple[Row, Row]:
    """Detects, judges and draws; writes the split's files. Its part of metrics.json, and what the page shows of it."""
    results = detect(stored, manifest, split, settings)
    images = spread_images(shard_paths(manifest, split), settings.pictures)
    return judge_split(
        folder,
        split,
        USED_FOR[split],
        ground_truth_path(split),
        results,
        images,
        stored.classes,
        settings,
        stored.apply_exif,
    )


def judge_split(
    folder: Path,
    split: str,
    used_for: str,
    ground_truth: Path,
    results: list[Row],
    images: Mapping[int, bytes],
    table: Sequence[Class],
    settings: params.Evaluate,
    apply_exif: bool,
) -> tuple[Row, Row]:
    """Judges COCO results and draws them on `images` (image id -> JPEG or PNG bytes); as evaluate_split otherwise.

    `apply_exif`: as for `pictures`.
    """
    names = labels(table)
    classes = {row.category_id: (row.class_id, names[row.class_id]) for row in table}
    truth = read_json(ground_truth, "ground truth")
    judged = judge(ground_truth, results, {category: label for category, (_, label) in classes.items()})
    drawn = pictures(images, truth["annotations"], results, classes, settings.picture_score, apply_exif)

    write_results(folder / f"detections_{split}.json", results)
    write_table(folder / f"per_class_{split}.csv", judged.per_class)
    write_table(folder / f"precision_recall_{split}.csv", judged.curves)
    (folder / "pictures").mkdir(exist_ok=True)
    for image_id, jpeg in drawn.items():
        (folder / "pictures" / f"{split}-{image_id}.jpg").write_bytes(jpeg)

    figures = {
        "images": len(truth["images"]),
        "boxes": sum(row["boxes"] for row in judged.per_class),
        "used_for": used_for,
        "ground_truth": checksum(ground_truth, "sha256"),
        "detections": checksum(folder / f"detections_{split}.json", "sha256"),
        "metrics": judged.metrics,
        "per_class": {row["name"]: row["AP"] for row in judged.per_class},
    }
    curves = {name: [(row["recall"], row[name]) for row in judged.curves] for name in CURVES}
    return figures, {**figures, "name": split, "classes": judged.per_class, "curves": curves, "pictures": drawn}


def about(stored: StoredModel) -> str:
    """What the page says of a trained model."""
    height, width = stored.config.image_size
    kind = "Averaged (EMA)" if stored.weights.kind == "ema" else "Raw"
    turned = "Pictures are turned as their EXIF orientation says.\n" if stored.apply_exif else ""
    return (
        f"Input {height} x {width} pixels, {len(stored.classes)} classes.\n{turned}"
        f"{kind} weights of epoch {stored.weights.epoch}\n"
        f"(step {stored.weights.step}), selected by {stored.weights.selected_by}."
    )


def main() -> None:
    """Reads data/shards and data/model, writes data/eval as a whole or not at all."""
    prepare_device()
    settings = params.load().evaluate
    manifest = read_json(MANIFEST, "manifest of the shards")
    stored = read_model(MODEL)
    require_same(stored.classes, MODEL / MODEL_FILE, class_rows(manifest["classes"]), MANIFEST)
    require_same_pictures(stored.apply_exif, MODEL / MODEL_FILE, manifest["apply_exif"], MANIFEST)
    splits = [split for split in USED_FOR if split in manifest["splits"]]
    gate_split = next(split for split in GATE_ORDER if split in splits)
    with written_whole(OUT) as folder:
        folder.mkdir()
        parts = {split: evaluate_split(folder, split, manifest, stored, settings) for split in splits}
        judged = {
            "weights": stored.weights.model_dump(),
            "nms": settings.nms.model_dump(),
            "gate_split": gate_split,
            "splits": {split: figures for split, (figures, _) in parts.items()},
        }
        write_json(folder / METRICS_FILE, judged)
        shown = [shown for _, shown in parts.values()]
        text = page(stored.config.name, about(stored), shown, settings.picture_score)
        (folder / "index.html").write_text(text, encoding="utf-8")
    for split, (figures, _) in parts.items():
        print(f"{summary(split, figures)}; see {OUT / 'index.html'}")


def summary(split: str, figures: Mapping[str, Any]) -> str:
    """A split's part of metrics.json in a line."""
    ap, ap50 = (_words(figures["metrics"][name]) for name in ("AP", "AP50"))
    return f"{split}: AP {ap}, AP50 {ap50} over {figures['images']} images"


def _words(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    run(main)
