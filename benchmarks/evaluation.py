"""Time and memory of judging detections, against pycocotools, at val2017's size.

    python -m benchmarks.evaluation

5,000 images, 80 classes, 36,781 objects, 100 detections an image, most objects found more or less well. The twelve
numbers, and all that the evaluate stage tells of a split (AP by class and size, confusions, errors, calibration), each
in a process of its own that has ground truth and detections in memory, in turn. That the twelve are the same bits in
all is checked. Prints medians, and peaks of the whole process, of which detections as COCO results take the most.
"""

import argparse
import datetime
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, CLASSES, OBJECTS, FOUND = 5_000, 80, 36_781, 100
MIN_SCORE = 0.3  # as evaluate.picture_score
Rows = list[dict[str, Any]]


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    arguments = parser.parse_args()
    measured: dict[str, list[tuple[float, float, float, list[float]]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        for _ in range(arguments.rounds):
            for way, results in measured.items():
                results.append(measure(way, Path(name)))
    if any(result[3] != measured["pycocotools"][0][3] for results in measured.values() for result in results):
        raise SystemExit("the twelve numbers differ")
    print_table(measured)


def make(folder: Path) -> None:
    """truth.json and detections.json."""
    random = np.random.default_rng(1)
    image, kind = random.integers(1, IMAGES + 1, OBJECTS), random.integers(1, CLASSES + 1, OBJECTS)
    boxes = np.concatenate([random.uniform(0, 400, (OBJECTS, 2)), np.exp(random.uniform(2, 5.5, (OBJECTS, 2)))], axis=1)
    crowd = random.random(OBJECTS) < 0.01
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    columns = (image, kind, boxes.round(2), np.prod(boxes[:, 2:], axis=1).round(2), crowd.astype(int))
    truth = {
        "images": [{"id": number, "width": 640, "height": 640} for number in range(1, IMAGES + 1)],
        "categories": [{"id": number, "name": f"thing {number}"} for number in range(1, CLASSES + 1)],
        "annotations": rows(keys, columns),
    }
    (folder / "truth.json").write_text(json.dumps(truth))

    total = IMAGES * FOUND
    places = np.repeat(np.arange(1, IMAGES + 1), FOUND)
    kinds, scores = random.integers(1, CLASSES + 1, total), random.beta(1, 6, total)
    found = np.concatenate([random.uniform(0, 400, (total, 2)), np.exp(random.uniform(2, 5.5, (total, 2)))], axis=1)
    number = np.zeros(IMAGES + 1, np.int64)  # of an image's objects that were found so far
    for one in np.flatnonzero(random.random(OBJECTS) < 0.8):
        place = (image[one] - 1) * FOUND + number[image[one]]
        number[image[one]] += 1
        found[place] = np.maximum(boxes[one] + random.normal(0, 0.08, 4) * np.tile(boxes[one, 2:], 2), 1)
        kinds[place] = kind[one] if random.random() < 0.85 else kinds[place]
        scores[place] = random.beta(3, 2)
    keys = ("image_id", "category_id", "bbox", "score")
    (folder / "detections.json").write_text(json.dumps(rows(keys, (places, kinds, found.round(3), scores.round(6)))))


def rows(keys: tuple[str, ...], columns: tuple[np.ndarray, ...]) -> Rows:
    """A dict for each row of the columns."""
    return [dict(zip(keys, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)]


def measure(way: str, folder: Path) -> tuple[float, float, float, list[float]]:
    """Seconds, GiB before and at the peak, and the twelve numbers, of a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, way, folder))
    process.start()
    theirs.close()  # so that a process that fails is no endless wait
    result: tuple[float, float, float, list[float]] = ours.recv()
    process.join()
    return result


def work(pipe: Connection, way: str, folder: Path) -> None:
    """The process's life."""
    import pipeline.judging  # noqa: F401  (is not measured)

    truth = json.loads((folder / "truth.json").read_text())
    detections = json.loads((folder / "detections.json").read_text())
    before = gibibytes("VmRSS")
    start = time.perf_counter()
    numbers = WAYS[way](truth, detections)
    pipe.send((time.perf_counter() - start, before, gibibytes("VmHWM"), numbers))


def gibibytes(field: str) -> float:
    """Memory of this process, now (VmRSS) or at most (VmHWM)."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 2**20


def pycocotools(truth: dict[str, Any], detections: Rows) -> list[float]:
    """The twelve numbers by what defines them."""
    from pipeline.coco_reference import reference_evaluation

    return [float(number) for number in reference_evaluation(truth, detections).stats]


def ours(truth: dict[str, Any], detections: Rows) -> list[float]:
    """The twelve numbers as training and the stage make them."""
    from pipeline.coco_metrics import coco_evaluation

    return [float(number) for number in coco_evaluation(truth, detections).stats]


def whole(truth: dict[str, Any], detections: Rows) -> list[float]:
    """All that the stage tells of a split."""
    from pipeline.coco_metrics import coco_evaluation
    from pipeline.judging import judge

    evaluation = coco_evaluation(truth, detections)
    names = {category["id"]: category["name"] for category in truth["categories"]}
    judge(truth, detections, names, evaluation, MIN_SCORE)
    return [float(number) for number in evaluation.stats]


WAYS: dict[str, Callable[[dict[str, Any], Rows], list[float]]] = {
    "pycocotools": pycocotools,
    "the twelve numbers": ours,
    "all that the stage tells": whole,
}


def print_table(measured: dict[str, list[tuple[float, float, float, list[float]]]]) -> None:
    """A row for each way."""
    from pipeline.provenance import hardware

    machine = hardware()
    print(
        f"{IMAGES:,} images, {FOUND} detections each\n"
        f"{datetime.date.today()}, {machine['cpu']}, {machine['cpus']} cores"
        "\n\n| | seconds | share | GiB before | GiB at the peak |\n| --- | ---: | ---: | ---: | ---: |"
    )
    medians = {
        way: [statistics.median(column) for column in list(zip(*results, strict=True))[:3]]
        for way, results in measured.items()
    }
    for way, (seconds, before, peak) in medians.items():
        share = seconds / medians["pycocotools"][0]
        print(f"| {way} | {seconds:.2f} | {share:.3f} | {before:.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
