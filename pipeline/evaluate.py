"""The evaluate stage: the model over every image of val, and of test where there is one, judged by COCO's metrics.

data/eval/
  metrics.json             which weights were judged on which split: the twelve numbers, AP by class and size, what AP50
                           would be without each kind of error, calibration, hashes, what pycocotools was asked
  breakdown.json           the two next to last of these, for `dvc metrics`
  detections_SPLIT.json    COCO results by image, best first, rounded as pipeline.coco_metrics.coco_results says
  per_class_SPLIT.csv, precision_recall_SPLIT.csv, errors_SPLIT.csv, calibration_SPLIT.csv, confusion_SPLIT.csv
                           for `dvc plots`
  pictures/SPLIT-ID.jpg    truth beside detections, of the worst and the best images
  index.html               all of it for a person, offline
data/timings/evaluate.json is beside: how long it took, no output of the stage.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from effdet.distributed import Ranks, connect, lost_ranks_named
from effdet.inference import prepare_device, run_detection
from effdet.input_pipeline import evaluation_batches
from effdet.postprocess import PostprocessConfig
from pipeline import local, params
from pipeline.class_table import class_rows, require_same
from pipeline.coco_metrics import coco_results
from pipeline.errors import PipelineError
from pipeline.evaluation_page import page
from pipeline.files import read_json, write_json, written_whole
from pipeline.judging import Row, judge_split, summary
from pipeline.launch import launch
from pipeline.launchers import WORKER, needs_launcher
from pipeline.model_files import MODEL_FILE, StoredModel, read_model, require_same_pictures
from pipeline.shard_files import MANIFEST, ground_truth_path, images_of, shard_paths
from pipeline.timings import Pace, run_stage

MODEL = Path("data/model")
OUT = Path("data/eval")
TIMINGS = Path("data/timings/evaluate.json")
MODULE = "pipeline.evaluate"
METRICS_FILE = "metrics.json"
BREAKDOWN_FILE = "breakdown.json"
PAGE_FILE = "index.html"

USED_FOR = {"val": "also used for selection", "test": "not used for selection"}
GATE_ORDER = ("test", "val")  # the gate looks at the first of these that the data has


def detect(
    stored: StoredModel, manifest: Mapping[str, Any], split: str, settings: params.Evaluate, ranks: Ranks
) -> tuple[list[Row], Row]:
    """COCO results on every image of a split, by image id, the best of an image first; and how long it took.

    On all ranks, each its part of the images; the results are rank 0's. PipelineError unless each image came once.
    """
    batches = evaluation_batches(
        shard_paths(manifest, split),
        image_size=stored.config.image_size,
        max_boxes=manifest["max_boxes"],
        batch_size=settings.batch_size,
        rank=ranks.rank,
        num_ranks=ranks.size,
        workers=local.load().loader_workers,
    )
    nms = PostprocessConfig(**settings.nms.model_dump())
    total = manifest["splits"][split]["images"]
    pace = Pace()
    with tqdm(total=total, desc=f"evaluate {split}", unit=" images", disable=True if ranks.rank else None) as bar:

        def progress(images: int) -> None:
            pace.batch(images)
            bar.update(images * ranks.size)

        found = run_detection(stored.model, stored.config, batches, nms, progress=progress)
    parts = ranks.gather((found.image_ids.tolist(), coco_results(found, stored.classes)))
    ids = sorted(image_id for image_ids, _ in parts for image_id in image_ids)
    expected = sorted(image["id"] for image in read_json(ground_truth_path(split), "ground truth")["images"])
    if ids != expected:
        raise PipelineError(
            f"evaluation: {split}: {len(ids)} images were detected on, {len(set(ids))} of them different, and the "
            f"ground truth has {len(expected)}; shards and ground truth are of different runs: `dvc repro shard`"
        )
    results = [result for _, part in parts for result in part]
    return sorted(results, key=lambda result: result["image_id"]), pace.figures(ranks.size)


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


def breakdown(splits: Mapping[str, Row]) -> Row:
    """The figures of `dvc metrics` that the gate's metrics.json has not."""
    return {
        split: {"AP50_without": figures["errors"], "calibration_error": figures["calibration_error"]}
        for split, figures in splits.items()
    }


def main(arguments: Sequence[str] = ()) -> None:
    """Reads data/shards and data/model, writes data/eval as a whole or not at all; here, or on the ranks it starts."""
    if list(arguments) not in ([], [WORKER]):
        raise PipelineError(f"{MODULE}: takes no arguments, got {' '.join(arguments)}; params.yaml says what to do")
    settings = params.load().evaluate
    where = local.load().model_copy(update={"elastic": None})  # ranks come and go while training only
    if not arguments and needs_launcher(settings.ranks, where):
        launch(MODULE, settings.ranks, where)
        return
    ranks = connect(settings.ranks)
    prepare_device()
    manifest = read_json(MANIFEST, "manifest of the shards")
    stored = read_model(MODEL)
    require_same(stored.classes, MODEL / MODEL_FILE, class_rows(manifest["classes"]), MANIFEST)
    require_same_pictures(stored.apply_exif, MODEL / MODEL_FILE, manifest["apply_exif"], MANIFEST)
    splits = [split for split in USED_FOR if split in manifest["splits"]]
    with lost_ranks_named():
        found = {split: detect(stored, manifest, split, settings, ranks) for split in splits}
    if ranks.rank == 0:
        write(manifest, stored, settings, found)


def write(
    manifest: Mapping[str, Any],
    stored: StoredModel,
    settings: params.Evaluate,
    found: Mapping[str, tuple[list[Row], Row]],
) -> None:
    """Judges the results on each split, and writes data/eval."""
    timings: dict[str, Row] = {split: {"detection": pace} for split, (_, pace) in found.items()}
    gate_split = next(split for split in GATE_ORDER if split in found)
    with written_whole(OUT) as folder:
        folder.mkdir()
        parts = {
            split: judge_split(
                folder,
                split,
                USED_FOR[split],
                ground_truth_path(split),
                results,
                partial(images_of, shard_paths(manifest, split)),
                stored.classes,
                settings,
                stored.apply_exif,
                timings[split],
            )
            for split, (results, _) in found.items()
        }
        figures = {split: part for split, (part, _) in parts.items()}
        judged = {
            "weights": stored.weights.model_dump(),
            "nms": settings.nms.model_dump(),
            "gate_split": gate_split,
            "splits": figures,
        }
        write_json(folder / METRICS_FILE, judged)
        write_json(folder / BREAKDOWN_FILE, breakdown(figures))
        shown = [shown for _, shown in parts.values()]
        text = page(stored.config.name, about(stored), shown, settings.picture_score)
        (folder / PAGE_FILE).write_text(text, encoding="utf-8")
    write_json(TIMINGS, timings)
    for split, part in figures.items():
        print(f"{summary(split, part)}; see {OUT / PAGE_FILE}")


if __name__ == "__main__":
    run_stage("evaluate", lambda: main(sys.argv[1:]))
