"""A training run that takes seconds: a tiny network on a handful of pictures.

`python -m tests.pipeline.tiny_training FOLDER` runs it in a process of its own, or as a rank that a launcher started.
--at STEP WHAT lets something happen before the batch of STEP is handed out, on the last rank: see HAPPENINGS.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import tensorflow as tf

from effdet.config import BACKBONES, Backbone
from effdet.distributed import Ranks, connect, lost_ranks_named, train_elastically
from effdet.records import encode_example, framed
from pipeline import params, training_run
from pipeline.errors import run
from pipeline.files import read_json, write_json
from pipeline.local import Local
from tests.effdet.tiny import CONFIG

ROOT = Path(__file__).parents[2]
IMAGES = {"train": 10, "val": 5}
CLASSES = [{"class_id": i, "category_id": 10 + i, "name": name} for i, name in enumerate("abc")]


def make_shards(folder: Path) -> dict[str, Any]:
    """Shards of random pictures and boxes, and their manifest, as the shard stage writes them."""
    folder.mkdir(parents=True)
    splits = {split: make_split(folder, split, count) for split, count in IMAGES.items()}
    manifest = {
        "format": 1,
        "num_classes": 3,
        "classes": CLASSES,
        "max_boxes": 4,
        "apply_exif": True,  # the pictures have no EXIF; the word is handed on
        "splits": splits,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def make_split(folder: Path, split: str, count: int) -> dict[str, Any]:
    values = np.random.default_rng(count)
    images, annotations = [], []
    file = f"{split}-00000-of-00001.tfrecord"
    with (folder / file).open("wb") as shard:
        for image_id in range(1, count + 1):
            height, width = values.integers(60, 100, 2).tolist()
            corners = values.uniform(0, 0.5, (3, 2)) * (height, width)
            boxes = np.concatenate([corners, corners + values.uniform(0.2, 0.5, (3, 2)) * (height, width)], axis=1)
            class_ids = values.integers(0, 3, 3)
            pixels = values.integers(0, 256, (height, width, 3)).astype(np.uint8)
            encoded = tf.io.encode_jpeg(pixels).numpy()
            areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
            record = encode_example(encoded, image_id, height, width, boxes, class_ids, np.zeros(3, int), areas)
            shard.writelines(framed(record))
            images.append({"id": image_id, "height": height, "width": width})
            annotations += [
                {
                    "id": len(annotations) + i,
                    "image_id": image_id,
                    "category_id": 10 + int(class_ids[i]),
                    "bbox": [box[1], box[0], box[3] - box[1], box[2] - box[0]],
                    "area": area,
                    "iscrowd": 0,
                }
                for i, (box, area) in enumerate(zip(boxes.tolist(), areas.tolist(), strict=True))
            ]
    categories = [{"id": row["category_id"], "name": row["name"]} for row in CLASSES]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / f"ground_truth_{split}.json", truth)
    return {"images": count, "shards": [{"file": file, "images": count}]}


def settings(**train: Any) -> params.Params:
    """params.yaml with a short training: 4 epochs of 2 or 3 steps of 4 images."""
    whole = params.load(ROOT / "params.yaml")
    short = {
        "ranks": 1,
        "batch_size": 4,
        "accumulate": 1,
        "epochs": 4,
        "schedule_epochs": 4,
        "warmup_epochs": 0.5,
        "precision": "float32",
        "jit_compile": False,
        "init_from": None,
        "freeze": None,
        "evaluate_every": 2,
        "early_stopping": None,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
    }
    return whole.model_copy(update={"train": whole.train.model_copy(update={**short, **train})})


def make_run(folder: Path, local: dict[str, Any] | None = None, **train: Any) -> training_run.Run:
    """A run below `folder`, where make_shards has made shards/; checkpoints/ and model/ are its own."""
    given = settings(**train)
    return run_of(folder, given, local or {}, connect(given.train.ranks))


def run_of(folder: Path, given: params.Params, local: dict[str, Any], ranks: Ranks, *elastic: Any) -> training_run.Run:
    where = Local(**{"checkpoint_dir": str(folder / "checkpoints"), "loader_workers": 1, **local})
    manifest = read_json(folder / "shards" / "manifest.json", "manifest")
    with mock.patch.dict(BACKBONES, {"tiny": Backbone(width=0.25, depth=0.3, lite=True)}):
        return training_run.Run(given, where, CONFIG, manifest, folder / "shards", folder / "model", ranks, *elastic)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at", nargs=2, metavar=("STEP", "WHAT"))
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that a batch takes")
    parser.add_argument("--train", type=json.loads, default={}, help="parameters")
    parser.add_argument("--local", type=json.loads, default={})
    parser.add_argument("--others", type=json.loads, default={}, help="parameters of all ranks but rank 0")
    asked = parser.parse_args()
    sizes = [os.environ[name] for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE") if name in os.environ]
    given = {"ranks": int((sizes or ["1"])[0]), **asked.train}

    def train(ranks: Ranks, *elastic: Any) -> None:
        own = settings(**{**given, **(asked.others if ranks.rank else {})})
        made = run_of(asked.folder, own, asked.local, ranks, *elastic)
        if asked.at and ranks.rank == ranks.size - 1:
            before(made, int(asked.at[0]), HAPPENINGS[asked.at[1]])
        if asked.slow:
            before(made, None, lambda: time.sleep(asked.slow))
        with lost_ranks_named():
            made.train()

    if os.environ.get("HOROVOD_ELASTIC"):
        train_elastically(train)
    else:
        train(connect(given["ranks"]))


def before(made: training_run.Run, step: int | None, happens: Callable[[], None]) -> None:
    """Lets something happen where the batch of `step`, or of any, is asked for."""
    batches = made.training_data

    def watched(start: int) -> Any:
        for number, batch in zip(itertools.count(made.trainer.state.step), batches(start), strict=False):
            if step in (None, number):
                happens()
            yield batch

    made.training_data = watched


def kill_all() -> None:
    """Every process of this job, the launcher too, and this one last."""
    job = [process for process in psutil.process_iter(["cmdline"]) if sys.argv[1] in (process.info["cmdline"] or [])]
    for process in sorted(job, key=lambda process: process.pid == os.getpid()):
        process.kill()


def kill_launcher() -> None:
    """The launcher alone; nobody else hears of it."""
    for process in psutil.Process().parents():
        if any(word.endswith("/horovodrun") for word in process.cmdline()):
            process.kill()


HAPPENINGS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill-all": kill_all,
    "kill-launcher": kill_launcher,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


if __name__ == "__main__":
    run(main)
