"""The shard stage: images with their objects as TFRecord shards, in one shuffle of the whole split.

data/shards/
  SPLIT-00000-of-00008.tfrecord   records of effdet.records; pictures are the files that came, byte for byte
  manifest.json                   the class table, and each shard with its counts and checksum
  ground_truth_SPLIT.json         of val and test: COCO json of the images in the shards, with all their annotations
  classes_train.json              of each record of train, in their order, the class ids in it

With shard.reencode the larger pictures of train are made smaller, and boxes and areas with them. Those of val and test
are not: a model is judged on the pictures that it will be given, and COCO's AP parts small from large objects by the
areas in the ground truth.
"""

import itertools
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from effdet.boxes import xywh_to_yxyx
from effdet.records import encode_example, framed
from pipeline import local, params
from pipeline.archive_workers import over_archive
from pipeline.coco import (
    COCO2017_CLASSES,
    ArchiveError,
    CocoTables,
    ImageArchive,
    class_table,
    num_classes,
    read_annotations,
    without,
)
from pipeline.errors import PipelineError
from pipeline.exif import orientation_of
from pipeline.files import checksum, read_json, write_json, written_whole
from pipeline.params import Coco2017Data, Reencode, TfrecordsData
from pipeline.raw_data import EXCLUSIONS, annotations_file, archive_file, splits
from pipeline.reencode import DAMAGED, smaller
from pipeline.timings import run_stage

OUT = Path("data/shards")
FORMAT = 1  # of manifest.json

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """What a process needs to write one shard. Columns are aligned; objects lie image by image."""

    path: Path
    file_names: list[str]  # [images]
    image_ids: Ids  # [images]
    sizes: Ids  # [images, 2] height, width; pixels
    first_objects: Ids  # [images + 1] where each image's objects begin
    boxes: NDArray[np.float32]  # [objects, 4] yxyx, pixels of the picture
    class_ids: Ids  # [objects]
    is_crowd: Ids  # [objects] 0 or 1
    area: NDArray[np.float32]  # [objects] square pixels


def head_of(data: params.Data) -> int | None:
    """K where the source has category ids 1 to K, of which some may be unused; None where classes lie dense."""
    if isinstance(data, TfrecordsData):
        return data.num_classes
    return COCO2017_CLASSES if isinstance(data, Coco2017Data) else None


# What goes in ---------------------------------------------------------------------------------------------------------


def without_empty_images(tables: CocoTables) -> CocoTables:
    """The tables without the images that have no annotation."""
    used = tables.images["id"].isin(tables.annotations["image_id"])
    return CocoTables(tables.images[used].reset_index(drop=True), tables.annotations, tables.categories)


def largest(annotations: pd.DataFrame, max_boxes: int) -> pd.DataFrame:
    """At most `max_boxes` annotations an image, in the order given: the largest boxes, crowds (no target) last."""
    ranked = annotations.assign(box_area=annotations["w"] * annotations["h"]).sort_values(
        ["iscrowd", "box_area"], ascending=[True, False], kind="stable"
    )
    rank = ranked.groupby("image_id").cumcount().sort_index()
    return annotations[rank < max_boxes]


def deal(byte_counts: Ids, images_per_shard: int, seed: int) -> list[Ids]:
    """Which images each shard holds, and in which order: a shuffle of all, even in number and in bytes.

    Images of like size are dealt out together, one to each shard, in random order. So shards differ by at most one
    image, and in bytes by little more than the images of one deal do.
    """
    rng = np.random.default_rng(seed)
    num_images = len(byte_counts)
    num_shards = -(-num_images // images_per_shard)
    num_deals = -(-num_images // num_shards)
    shuffled = rng.permutation(num_images)  # among images of one size no order of the file survives
    deals = np.full(num_deals * num_shards, -1)
    deals[:num_images] = shuffled[np.argsort(-byte_counts[shuffled], kind="stable")]
    dealt = rng.permuted(deals.reshape(num_deals, num_shards), axis=1)
    return [rng.permutation(shard[shard >= 0]) for shard in dealt.T]


def byte_counts(archive: Path, images: pd.DataFrame) -> Ids:
    """The size of each image's file. PipelineError names the first image whose file is not in the archive."""
    sizes = []
    with ImageArchive(archive) as opened:
        for image_id, file_name in zip(images["id"], images["file_name"], strict=True):
            try:
                sizes.append(opened.member(file_name).file_size)
            except ArchiveError as error:
                raise PipelineError(f"image {image_id}: {error}") from None
    return np.array(sizes, np.int64)


def expected_bytes(sizes: Ids, images: pd.DataFrame, reencode: Reencode | None) -> Ids:
    """About how many bytes of each file will be in a shard: a picture's go with its pixels."""
    if reencode is None:
        return sizes
    longer = images[["height", "width"]].to_numpy().max(axis=1)
    scale = np.minimum(1, reencode.max_side / np.maximum(1, longer))
    return np.asarray(sizes * scale**2, np.int64)


def class_ids_of(annotations: pd.DataFrame, classes: list[dict[str, Any]]) -> Ids:
    """The class of each annotation. PipelineError where a category is not in the class table."""
    class_ids = annotations["category_id"].map({row["category_id"]: row["class_id"] for row in classes})
    _require_known(annotations, class_ids.notna(), "category_id", "the categories of train")
    return np.asarray(class_ids, np.int64)


def plan(folder: Path, split: str, tables: CocoTables, classes: list[dict[str, Any]], order: list[Ids]) -> list[Shard]:
    """One Shard for each element of `order`, the positions of its images."""
    positions = pd.Index(tables.images["id"]).get_indexer(tables.annotations["image_id"])  # [objects]
    _require_known(tables.annotations, positions >= 0, "image_id", "the split's images")
    by_image = np.argsort(positions, kind="stable")
    annotations = tables.annotations.iloc[by_image]
    boxes = xywh_to_yxyx(annotations[["x", "y", "w", "h"]].to_numpy()).astype(np.float32)
    class_ids = class_ids_of(annotations, classes)
    counts = np.bincount(positions, minlength=len(tables.images))
    ends = np.cumsum(counts)
    shards = []
    for number, members in enumerate(order):
        rows = np.concatenate([np.arange(ends[m] - counts[m], ends[m]) for m in members])
        images = tables.images.iloc[members]
        shards.append(
            Shard(
                path=folder / f"{split}-{number:05d}-of-{len(order):05d}.tfrecord",
                file_names=images["file_name"].tolist(),
                image_ids=images["id"].to_numpy(),
                sizes=images[["height", "width"]].to_numpy(),
                first_objects=np.concatenate([[0], np.cumsum(counts[members])]),
                boxes=boxes[rows],
                class_ids=class_ids[rows],
                is_crowd=annotations["iscrowd"].to_numpy()[rows],
                area=annotations["area"].to_numpy(np.float32)[rows],
            )
        )
    return shards


def _require_known(annotations: pd.DataFrame, known: ArrayLike, column: str, where: str) -> None:
    unknown = annotations[~np.asarray(known)]
    if len(unknown):
        raise PipelineError(
            f"annotation {unknown['id'].iloc[0]}: {column} {unknown[column].iloc[0]} is not among {where}"
            f" ({len(unknown)} such annotations); run `dvc repro validate`"
        )


# What comes out -------------------------------------------------------------------------------------------------------


def record_of(
    archive: ImageArchive, shard: Shard, index: int, apply_exif: bool, reencode: Reencode | None
) -> tuple[bytes, bool]:
    """The tf.Example of one image of the shard, and whether its picture was made smaller."""
    encoded = archive.read(shard.file_names[index])
    orientation = orientation_of(encoded) if apply_exif else 1
    height, width = shard.sizes[index].tolist()
    objects = slice(shard.first_objects[index], shard.first_objects[index + 1])
    boxes, area = shard.boxes[objects], shard.area[objects]
    try:
        made = smaller(encoded, orientation, reencode) if reencode else None
    except DAMAGED as error:
        raise PipelineError(
            f"{archive.path}: {shard.file_names[index]}: cannot be decoded: {error};"
            " validate.decode_fraction: 1.0 in params.yaml finds all such files"
        ) from None
    if made:
        scale_y, scale_x = made.height / height, made.width / width
        boxes, area = boxes * np.array([scale_y, scale_x, scale_y, scale_x]), area * (scale_y * scale_x)
        encoded, height, width = made
        orientation = 1
    example = encode_example(
        encoded,
        int(shard.image_ids[index]),
        height,
        width,
        boxes,
        shard.class_ids[objects],
        shard.is_crowd[objects],
        area,
        orientation,
    )
    return example, made is not None


def write_shard(archive: ImageArchive, shard: Shard, apply_exif: bool, reencode: Reencode | None) -> dict[str, Any]:
    """Writes the shard's file and returns its row of the manifest."""
    crc = num_reencoded = 0
    with shard.path.open("wb") as file:
        for index in range(len(shard.file_names)):
            example, is_reencoded = record_of(archive, shard, index, apply_exif, reencode)
            num_reencoded += is_reencoded
            for piece in framed(example):
                crc = google_crc32c.extend(crc, piece)
                file.write(piece)
        size = file.tell()
    return {
        "file": shard.path.name,
        "images": len(shard.file_names),
        "reencoded": num_reencoded,
        "bytes": size,
        "crc32c": f"{crc:08x}",  # of the file; a SHA-256 would take three times as long as to encode the records
    }


def ground_truth(tables: CocoTables) -> dict[str, list[dict[str, Any]]]:
    """The tables as COCO json, in their order; boxes xywh."""
    boxes = tables.annotations[["x", "y", "w", "h"]].to_numpy().tolist()
    annotations = tables.annotations[["id", "image_id", "category_id", "area", "iscrowd"]]
    return {
        "images": tables.images.to_dict("records"),
        "annotations": [
            {**record, "bbox": box} for record, box in zip(annotations.to_dict("records"), boxes, strict=True)
        ],
        "categories": tables.categories.to_dict("records"),
    }


def classes_in_images(shard: Shard) -> list[list[int]]:
    """Of each image of the shard the class ids of its objects, no crowds: sorted, each once."""
    class_ids, is_crowd = shard.class_ids.tolist(), shard.is_crowd.tolist()
    ends = shard.first_objects.tolist()
    return [
        sorted({class_ids[row] for row in range(start, end) if not is_crowd[row]})
        for start, end in itertools.pairwise(ends)
    ]


def write_shards(
    shards: list[Shard], split: str, apply_exif: bool, reencode: Reencode | None, workers: int
) -> list[dict[str, Any]]:
    """Writes the shards' files; returns their rows of the manifest, in their order."""
    work = partial(write_shard, apply_exif=apply_exif, reencode=reencode)
    rows = []
    images = sum(len(shard.file_names) for shard in shards)
    with tqdm(total=images, desc=f"shard {split}", unit=" images", disable=None) as bar:
        for row in over_archive(archive_file(split), workers, work, shards):
            rows.append(row)
            bar.update(row["images"])
    return rows


def shard_split(
    folder: Path,
    split: str,
    found: CocoTables,
    classes: list[dict[str, Any]],
    settings: params.Shard,
    apply_exif: bool,
    workers: int,
) -> dict[str, Any]:
    """Writes a split's shards, and its ground truth where it is judged on; returns its part of the manifest."""
    accepted = without(found, read_json(EXCLUSIONS, "list of what is left out")[split])
    # A model is judged on empty images too: they are where it must find nothing.
    is_train = split == "train"
    kept = accepted if settings.keep_empty_images or not is_train else without_empty_images(accepted)
    if kept.images.empty:
        raise PipelineError(
            f"{annotations_file(split)}: no images left of {len(found.images)}:"
            f" {len(found.images) - len(accepted.images)} stand in {EXCLUSIONS},"
            f" {len(accepted.images)} have no annotations and params.yaml says shard.keep_empty_images: false"
        )
    in_shards = CocoTables(kept.images, largest(kept.annotations, settings.max_boxes), kept.categories)
    reencode = settings.reencode if is_train else None
    sizes = expected_bytes(byte_counts(archive_file(split), kept.images), kept.images, reencode)
    shards = plan(folder, split, in_shards, classes, deal(sizes, settings.images_per_shard, settings.seed))
    rows = write_shards(shards, split, apply_exif, reencode, workers)
    if is_train:
        images = ",\n".join(json.dumps(image) for shard in shards for image in classes_in_images(shard))
        (folder / "classes_train.json").write_text(f"[\n{images}\n]\n")  # a line an image
    else:
        write_json(folder / f"ground_truth_{split}.json", ground_truth(kept))
    return {
        "images": len(kept.images),
        "boxes": len(in_shards.annotations),
        "empty_images": len(kept.images) - int(in_shards.annotations["image_id"].nunique()),
        "reencoded": sum(row["reencoded"] for row in rows),
        "left_out": {
            "excluded_images": len(found.images) - len(accepted.images),
            "excluded_annotations": len(found.annotations) - len(accepted.annotations),
            "empty_images": len(accepted.images) - len(kept.images),
            "boxes_above_max_boxes": len(kept.annotations) - len(in_shards.annotations),
        },
        "shards": rows,
    }


def remove_leftovers() -> None:
    """Removes what killed runs left behind: no reader takes it for shards, but it takes up the disk."""
    for part in OUT.parent.glob(f".{OUT.name}.*.part"):  # as written_whole names it, with the process's id
        process = part.name.split(".")[-2]
        if process.isdigit() and not _is_another_running(int(process)):
            shutil.rmtree(part, ignore_errors=True)


def _is_another_running(process: int) -> bool:
    if process == os.getpid():  # in containers one run's id is easily the next one's
        return False
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def main() -> None:
    """Reads data/raw and data/exclusions.json, writes data/shards as a whole or not at all."""
    given = params.load()
    workers = local.load().loader_workers
    train = read_annotations(annotations_file("train"))
    classes = class_table(train.categories, head_of(given.data))
    remove_leftovers()
    with written_whole(OUT) as folder:
        folder.mkdir()
        parts = {}
        for split in splits():
            found = train if split == "train" else read_annotations(annotations_file(split))
            parts[split] = shard_split(folder, split, found, classes, given.shard, given.data.apply_exif, workers)
        manifest = {
            "format": FORMAT,
            "apply_exif": given.data.apply_exif,
            "num_classes": num_classes(train.categories, head_of(given.data)),
            "classes": classes,
            "max_boxes": given.shard.max_boxes,
            "source": {split: {"annotations_sha256": checksum(annotations_file(split), "sha256")} for split in parts},
            "splits": parts,
        }
        write_json(folder / "manifest.json", manifest)
    for split, part in parts.items():
        left_out = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in part["left_out"].items() if count)
        print(
            f"{split}: {part['images']} images, {part['boxes']} boxes in {len(part['shards'])} shards"
            + (f"; {part['reencoded']} pictures made smaller" if part["reencoded"] else "")
            + (f"; left out: {left_out}" if left_out else "")
        )


if __name__ == "__main__":
    run_stage("shard", main)
