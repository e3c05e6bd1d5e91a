"""A folder as train leaves it: small shards and a small model, whose detections vary from image to image."""

import io
import json

import numpy as np
from PIL import ExifTags, Image

from effdet.boxes import yxyx_to_xywh
from effdet.config import model_config
from effdet.model import build
from effdet.records import encode_example, framed
from effdet.weights import published_variables
from pipeline.class_table import class_rows
from pipeline.files import write_json
from pipeline.model_files import write_model
from tests.effdet.published import formula_array

CLASSES = [
    {"class_id": 0, "category_id": 3, "name": "cat"},
    {"class_id": 1, "category_id": 7, "name": "dog | wolf"},
    {"class_id": 3, "category_id": 9, "name": "cat"},  # the name again, and a gap in the head before it
]
HEAD = 4  # classes of the head
SIDE = 128  # pixels of the input
# Where scores are as near to each other as random weights' are, an overlap that counts would turn a rounding into
# other detections.
STEADY_NMS = {"method": "hard", "iou_threshold": 0.8, "score_threshold": 0.25, "max_detections": 400}
PROVENANCE = {
    "versions": {"python": "3"},
    "begins_with": None,
    "ranks": [{"cpu": "Made Up", "cpus": 2, "gpus": ["H200"]}],
}


def picture(rng, kind="JPEG", orientation=1):
    """A file with this EXIF orientation, and the height and width of the picture that it turns into."""
    height, width = (int(side) for side in rng.integers(60, 200, 2))
    rough = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    options = {} if orientation == 1 else {"exif": tags}
    Image.fromarray(rough).resize((width, height)).save(file, kind, **options)
    return (file.getvalue(), height, width) if orientation < 5 else (file.getvalue(), width, height)


def write_split(folder, split, num_images, seed, apply_exif):
    """The split's shard and ground truth; its part of the manifest. Image 1 of each is a PNG, image 2 has no object.

    With apply_exif the JPEGs have the orientations 8, 6, 5, ... 1, 8 and so on.
    """
    rng = np.random.default_rng(seed)
    images, annotations, records = [], [], []
    for number in range(num_images):
        image_id = 100 * seed + number
        orientation = 8 - number % 8 if apply_exif and number != 1 else 1
        encoded, height, width = picture(rng, "PNG" if number == 1 else "JPEG", orientation)
        count = 0 if number == 2 else int(rng.integers(1, 4))
        corners = rng.uniform(0, 0.5, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.5, (count, 2))], axis=1)
        boxes = (boxes * [height, width, height, width]).astype(np.float32)
        rows = rng.integers(0, len(CLASSES), count)
        crowd = (rng.random(count) < 0.2).astype(int)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        class_ids = [CLASSES[row]["class_id"] for row in rows]
        record = encode_example(encoded, image_id, height, width, boxes, class_ids, crowd, area, orientation)
        records.append(record)
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width})
        for box, row, is_crowd, square in zip(boxes, rows, crowd, area, strict=True):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image_id,
                    "category_id": CLASSES[row]["category_id"],
                    "bbox": yxyx_to_xywh(box).tolist(),
                    "area": float(square),
                    "iscrowd": int(is_crowd),
                }
            )
    file = f"{split}-00000-of-00001.tfrecord"
    (folder / file).write_bytes(b"".join(piece for record in records for piece in framed(record)))
    categories = [{"id": row["category_id"], "name": row["name"]} for row in CLASSES]
    write_json(
        folder / f"ground_truth_{split}.json",
        {"images": images, "annotations": annotations, "categories": categories},
    )
    return {
        "images": num_images,
        "boxes": len(annotations),
        "empty_images": 1,
        "left_out": {},
        "shards": [{"file": file, "images": num_images}],
    }


def write_shards(folder, splits, apply_exif=False):
    """data/shards with these splits: name -> number of images."""
    folder.mkdir(parents=True)
    parts = {
        split: write_split(folder, split, count, 1 + seed, apply_exif)
        for seed, (split, count) in enumerate(splits.items())
    }
    manifest = {
        "format": 1,
        "num_classes": HEAD,
        "classes": CLASSES,
        "max_boxes": 10,
        "apply_exif": apply_exif,
        "splits": parts,
        "source": {},
    }
    write_json(folder / "manifest.json", manifest)


def weights(model):
    """Published name -> array: the published formula's, with heads that give scores and boxes of every size."""
    arrays = {name: formula_array(name, tuple(variable.shape)) for name, variable in published_variables(model).items()}
    arrays["class_net/class-predict/pointwise_kernel"] *= 0.3
    arrays["class_net/class-predict/bias"] -= 3
    arrays["box_net/box-predict/pointwise_kernel"] *= 0.08
    return arrays


def steady(arrays):
    """The same with heads that make as little of a rounding as trained ones do. STEADY_NMS goes with them."""
    arrays["class_net/class-predict/pointwise_kernel"] *= 0.1
    arrays["class_net/class-predict/bias"] += 1.7  # some hundred scores of an image are 0.3 or more
    arrays["box_net/box-predict/pointwise_kernel"] *= 0.1
    return arrays


def write_trained(folder, name="efficientdet-lite0", change=lambda arrays: arrays, apply_exif=False):
    """data/model with these weights."""
    folder.mkdir(parents=True)
    config = model_config(name, HEAD, (SIDE, SIDE))
    arrays = change(weights(build(config)))
    kept = {"kind": "ema", "epoch": 3, "step": 30, "selected_by": "val AP"}
    write_model(folder, config, class_rows(CLASSES), arrays, **kept, apply_exif=apply_exif)
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
