"""What augmentation does to the pictures of data/shards, as one picture to look at.

    python -m pipeline.contact_sheet                  # every row
    python -m pipeline.contact_sheet mosaic mixup     # the rows that have one of these words in their name

A row for each augmentation alone, as params.yaml says or, where it is off there, as strong as the row says; then what
training sees; last, the records that repeat_factor shows most often. All other rows show the same records. The input
pipeline itself makes them.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from effdet.augment import Augmentation, RandAugment
from effdet.boxes import PADDING
from effdet.distortions import OPERATIONS
from effdet.input_pipeline import Batch, train_batches
from pipeline import class_table, local, params
from pipeline.errors import PipelineError, run
from pipeline.files import read_json, written_whole
from pipeline.library_settings import augmentation_of, entries_of
from pipeline.rendering import Drawn, with_boxes, write_text
from pipeline.shard_files import MANIFEST, SHARDS, shard_paths

TILE = 320  # pixels to which an input's longer side is scaled
GAP = 6  # pixels between pictures
CAPTION = 24  # pixels above a row
BACKGROUND = (255, 255, 255)
SHOWN_MAGNITUDE = 5.0  # of RandAugment's operations where it is off
REPEATED = "the records that repeat_factor shows most often"
FORMATS = (".jpg", ".jpeg", ".png")


def main() -> None:
    """Reads the command line, and writes the sheet."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.contact_sheet", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="word", help="only rows with one of these in their name")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.jpg"), help="default contact_sheet.jpg")
    parser.add_argument("--images", type=int, default=6, help="pictures a row (default 6)")
    parser.add_argument("--seed", type=int, help="of what is drawn; default train.seed")
    arguments = parser.parse_args()
    if arguments.out.suffix.lower() not in FORMATS:
        raise PipelineError(f"--out: expected a name that ends in {', '.join(FORMATS)}, got {arguments.out}")
    if arguments.images < 1:
        raise PipelineError(f"--images: expected 1 or more, got {arguments.images}")
    settings, where = params.load(), local.load()
    chosen = {
        name: augmentation
        for name, augmentation in rows(settings.train.augment)
        if not arguments.words or any(word.lower() in name.lower() for word in arguments.words)
    }
    if not chosen:
        names = "; ".join(name for name, _ in rows(settings.train.augment))
        raise PipelineError(f"no row's name has {' or '.join(map(repr, arguments.words))} in it; the rows are: {names}")
    manifest = read_json(MANIFEST, "manifest of the shards")
    seed = settings.train.seed if arguments.seed is None else arguments.seed
    repeated = most_repeated(entries_of(settings.train, manifest, SHARDS), arguments.images)
    image_size, count, workers = settings.model.image_size, arguments.images, where.loader_workers
    shown = []
    for name, augmentation in chosen.items():
        entries = repeated if name == REPEATED else None
        shown.append((name, batch(manifest, image_size, augmentation, count, seed, workers, entries)))
    image_format = "PNG" if arguments.out.suffix.lower() == ".png" else "JPEG"
    with written_whole(arguments.out) as part:
        sheet(shown, class_table.labels(class_table.class_rows(manifest["classes"]))).save(
            part, image_format, quality=90
        )
    print(f"{arguments.out}: {len(shown)} rows of {arguments.images} pictures")


def rows(settings: params.Augment) -> Iterator[tuple[str, Augmentation]]:
    """Name and augmentation of each row."""
    whole = augmentation_of(settings)
    plain = Augmentation(horizontal_flip=False, jitter_min=1.0, jitter_max=1.0)
    yield "as it is", plain
    jittered = dataclasses.replace(
        plain, horizontal_flip=whole.horizontal_flip, jitter_min=whole.jitter_min, jitter_max=whole.jitter_max
    )
    flip = "flip, " if whole.horizontal_flip else ""
    yield f"{flip}scale {whole.jitter_min:g} to {whole.jitter_max:g}, crop", jittered
    strength = whole.colour or 1.0
    yield f"colour, strength {strength:g}{_off(whole.colour)}", dataclasses.replace(plain, colour=strength)
    magnitude = whole.rand_augment.magnitude if whole.rand_augment else SHOWN_MAGNITUDE
    for name in OPERATIONS:
        alone = RandAugment(layers=1, magnitude=magnitude, operations=(name,))
        text = f"RandAugment {name.replace('_', ' ')}, magnitude {magnitude:g}{_off(whole.rand_augment)}"
        if name != "identity":
            yield text, dataclasses.replace(plain, rand_augment=alone)
    for name, share, augmentation in (
        ("GridMask", whole.grid_mask, dataclasses.replace(plain, grid_mask=1.0)),
        ("mosaic", whole.mosaic, dataclasses.replace(jittered, mosaic=1.0)),
        ("mixup", whole.mixup, dataclasses.replace(jittered, mixup=1.0)),
    ):
        yield f"{name}, " + (f"of {share:.0%} of the pictures" if share else f"of all{_off(share)}"), augmentation
    yield "all, as params.yaml says", whole
    if settings.repeat_factor:
        yield REPEATED, plain


def most_repeated(entries: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` records by how often they stand in the entries, the most often first; from the start again after all."""
    records, copies = np.unique(entries, return_counts=True)
    return np.resize(records[np.argsort(-copies, kind="stable")], count)


def _off(value: Any) -> str:
    return "" if value else " (off in params.yaml)"


def batch(
    manifest: dict[str, Any],
    image_size: tuple[int, int],
    augmentation: Augmentation,
    images: int,
    seed: int,
    workers: int,
    entries: NDArray[np.int64] | None,
) -> Batch:
    """The first samples of a training run, of all records or of `entries`."""
    batches = train_batches(
        shard_paths(manifest, "train", SHARDS),
        image_size=image_size,
        max_boxes=manifest["max_boxes"],
        batch_size=images,
        rank=0,
        num_ranks=1,
        seed=seed,
        start=0,
        augmentation=augmentation,
        workers=workers,
        entries=entries,
    )
    first: Batch = next(batches.as_numpy_iterator())
    return first


def sheet(shown: Sequence[tuple[str, Batch]], labels: dict[int, str]) -> Image.Image:
    """The rows below each other. `labels`: class id -> name."""
    height, width = shown[0][1]["image"].shape[1:3]
    scale = TILE / max(height, width)
    strips = [_strip(text, samples, scale, labels) for text, samples in shown]
    canvas = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), BACKGROUND)
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return canvas


def _strip(text: str, samples: Batch, scale: float, labels: dict[int, str]) -> Image.Image:
    """A row: the text, and below it the pictures side by side, each in the place of a whole input."""
    keys = ("image", "content_size", "boxes", "class_ids")
    tiles = [
        _tile(dict(zip(keys, sample, strict=True)), scale, labels)
        for sample in zip(*(samples[key] for key in keys), strict=True)
    ]
    step = round(samples["image"].shape[2] * scale) + GAP
    height = CAPTION + max(tile.height for tile in tiles) + GAP
    strip = Image.new("RGB", (len(tiles) * step + GAP, height), BACKGROUND)
    write_text(strip, (GAP, 4), text)
    for column, tile in enumerate(tiles):
        strip.paste(tile, (GAP + column * step, CAPTION))
    return strip


def _tile(sample: dict[str, NDArray[Any]], scale: float, labels: dict[int, str]) -> Image.Image:
    """A sample's picture without its padding, with its boxes."""
    height, width = sample["content_size"].tolist()
    picture = Image.fromarray(sample["image"][:height, :width])
    size = max(1, round(width * scale)), max(1, round(height * scale))
    present = sample["class_ids"] != PADDING
    boxes = [
        Drawn(box * scale, class_id, labels[class_id])
        for box, class_id in zip(sample["boxes"][present], sample["class_ids"][present].tolist(), strict=True)
    ]
    return with_boxes(np.asarray(picture.resize(size, Image.Resampling.BILINEAR)), boxes)


if __name__ == "__main__":
    run(main)
