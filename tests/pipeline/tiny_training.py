"""A training run that takes seconds: a tiny network on a handful of pictures.

`python -m tests.pipeline.tiny_training FOLDER [STEP]` runs it in a process of its own, or as a rank of horovodrun. The
last rank is killed (-9) before STEP.
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf

from effdet.config import BACKBONES, Backbone
from effdet.distributed import connect
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


def make_run(folder: Path, **train: Any) -> training_run.Run:
    """A run below `folder`, where make_shards has made shards/; checkpoints/ and model/ are its own."""
    given = settings(**train)
    where = Local(checkpoint_dir=str(folder / "checkpoints"), loader_workers=1)
    manifest = read_json(folder / "shards" / "manifest.json", "manifest")
    with mock.patch.dict(BACKBONES, {"tiny": Backbone(width=0.25, depth=0.3, lite=True)}):
        ranks = connect(given.train.ranks)
        return training_run.Run(given, where, CONFIG, manifest, folder / "shards", folder / "model", ranks)


def main() -> None:
    # INIT_FROM: a path that rank 0 alone is told
    source = os.environ.get("INIT_FROM")
    other = "nowhere" if source and os.environ.get("HOROVOD_RANK", "0") != "0" else source
    options = {"init_from": other, "allow_head_mismatch": bool(source)}
    made = make_run(Path(sys.argv[1]), ranks=int(os.environ.get("HOROVOD_SIZE", "1")), **options)
    if len(sys.argv) > 2 and made.ranks.rank == made.ranks.size - 1:
        die_before(made, int(sys.argv[2]))
    made.train()


def die_before(made: training_run.Run, step: int) -> None:
    """Kills this process, as kill -9 does, where it asks for the batch of `step`."""
    batches = made.training_data

    def dying(start_step: int) -> Any:
        for number, batch in zip(itertools.count(start_step), batches(start_step), strict=False):
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    made.training_data = dying


if __name__ == "__main__":
    run(main)
