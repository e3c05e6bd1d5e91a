"""Batches from TFRecord shards, for training and for evaluation, as tf.data.

Which records make a batch is decided in index space (sampling.py), so records are read by their place, and a run that
starts at any position reads nothing that came before it. Training pictures are cut while they are decoded and stay
uint8 until they are on the device: normalizing, masking of the padding and target assignment are the step's work.

An element is a dict of tensors with static shapes; B images, input of H x W pixels, M places for boxes:
image          uint8 (training) or float32 0..255, not rounded (evaluation) [B, H, W, 3] RGB; the picture stands at the
               top left, 0 elsewhere
content_size   int32 [B, 2], height and width of the picture inside the input
boxes          float32 [B, M, 4] yxyx, input pixels; 0 where there is no box
class_ids      int32 [B, M]; PADDING where there is no box
image_id       int64 [B]; NO_IMAGE where evaluation fills up its last batch
scale          float32 [B], input pixels -> pixels of the original
Boxes of crowds are left out: they are no target, and evaluation has its own ground truth. Of a sample of several
pictures image_id and scale are those of the first.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet import augment, composites, distortions, preprocess, records, sampling
from effdet.augment import Augmentation
from effdet.boxes import PADDING
from effdet.errors import EffdetError

NO_IMAGE = -1
JPEG_START = b"\xff\xd8\xff"
READERS = 2  # batches read and parsed at a time: one waits for the disk, one works
READY = 2  # batches waiting for the step
NO_PICTURE = records.encode_example(b"", NO_IMAGE, 1, 1, [], [], [], [])  # where a sample needs none
PICTURE_KEYS = ("encoded", "is_jpeg", "orientation", "window", "resized", "flip")

Batch: TypeAlias = dict[str, Any]  # of tensors; before an element is made, of some for each of its pictures, too


class Shards:
    """The records of some shards by number: those of the first shard, then those of the second, and so on."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads the records' headers. EffdetError where a file is damaged, or there is no record."""
        spans = [records.record_spans(path) for path in paths]
        self._paths = list(paths)
        self._shards = np.repeat(np.arange(len(paths)), [len(span) for span in spans])
        self._spans = np.concatenate([np.empty((0, 2), np.int64), *spans])
        if not len(self):
            names = ", ".join(map(str, paths)) or "no file"
            raise EffdetError(f"shards: expected at least one record, got none in {names}")

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.object_]:
        """The serialized records with these numbers: bytes [n]. Each file is read from front to back.

        EffdetError where a record is damaged; within tf.data it comes as a tf.errors.OpError with the same words.
        """
        serialized = np.empty(len(numbers), object)
        in_file_order = np.argsort(numbers)
        for shard, places in itertools.groupby(in_file_order, lambda place: self._shards[numbers[place]]):
            with self._paths[shard].open("rb", buffering=0) as file:
                for place in places:
                    offset, length = self._spans[numbers[place]].tolist()
                    serialized[place] = records.read_payload(file, offset, length)
        return serialized


def train_batches(
    shard_paths: Sequence[Path],
    *,
    image_size: tuple[int, int],
    max_boxes: int,
    batch_size: int,
    rank: int,
    num_ranks: int,
    seed: int,
    start: int,
    augmentation: Augmentation,
    workers: int,
    entries: NDArray[np.int64] | None = None,
) -> tf.data.Dataset:
    """A rank's training batches from position `start` of the stream on, without end (sampling.py says what it is).

    Args:
        shard_paths: in an order that is the same for all ranks and for a resumed run.
        image_size: height, width of the input, pixels.
        max_boxes: places for boxes an image; what an image has beyond is left out.
        batch_size: images a step and rank.
        seed: of order and augmentation.
        start: images that all ranks had before.
        workers: threads of this rank that read and decode.
        entries: the number of the record that each entry of an epoch shows (sampling.index_list); None: each record
            once.

    Raises:
        EffdetError: a shard is damaged, there is no record, or an entry has a number that no record has.
    """
    shards = Shards(shard_paths)
    numbers = np.arange(len(shards)) if entries is None else entries
    if not 0 <= numbers.min(initial=0) <= numbers.max(initial=0) < len(shards):
        raise EffdetError(
            f"entries: expected numbers of the {len(shards)} records, 0 to {len(shards) - 1}, got {numbers.min()} to "
            f"{numbers.max()}; make the list from the same shards"
        )
    samples = _Samples(shards, numbers, image_size, max_boxes, batch_size, rank, num_ranks, seed, start, augmentation)
    steps = tf.data.Dataset.counter()
    return _batches(steps, samples.load, samples.decode, image_size, batch_size, workers)


@dataclass(frozen=True)
class _Samples:
    """Training samples by step. A sample has a part for each slot of composites.py that some sample needs."""

    shards: Shards
    numbers: NDArray[np.int64]  # [entries] the record of each
    image_size: tuple[int, int]
    max_boxes: int
    batch_size: int
    rank: int
    num_ranks: int
    seed: int
    start: int
    augmentation: Augmentation

    def load(self, step: tf.Tensor) -> Batch:
        """What makes the samples of a step, all but the work on pixels."""
        slots = composites.slots(self.augmentation)
        types = [tf.string, tf.float64] * len(slots) + [tf.bool, tf.float64, tf.float64]
        *of_slots, mixed, centre, draws = tf.numpy_function(self._read, [step], types)
        num_draws = distortions.num_draws(self.augmentation)
        centre = tf.ensure_shape(centre, [self.batch_size, 2])
        mixed = tf.ensure_shape(mixed, [self.batch_size])
        parts = {
            slot: self._part(slot, serialized, placing, centre)
            for slot, serialized, placing in zip(slots, of_slots[::2], of_slots[1::2], strict=True)
        }
        joined = parts[composites.OWN]
        if len(parts) > 1:
            joined = composites.join(parts, centre, mixed, self.image_size, self.max_boxes)
        return {
            **{key: joined[key] for key in ("content_size", "boxes", "class_ids", "image_id", "scale")},
            "parts": tuple({key: part[key] for key in PICTURE_KEYS} for part in parts.values()),
            **({"centre": centre, "mixed": mixed} if len(parts) > 1 else {}),
            # tf.data's unbatch of tensors without elements is a segmentation fault (TensorFlow 2.21)
            **({"draws": tf.ensure_shape(draws, [self.batch_size, num_draws])} if num_draws else {}),
        }

    def decode(self, example: Batch) -> Batch:
        """The element that `load` prepared."""
        pictures = [functools.partial(_placed_picture, part) for part in example["parts"]]
        if len(pictures) > 1:
            how = example["centre"], example["mixed"], self.augmentation, self.image_size
            image = composites.compose(pictures, *how)
        else:
            image = pictures[0]()
        if distortions.num_draws(self.augmentation):
            image, boxes, class_ids = distortions.distort(
                image, example["boxes"], example["class_ids"], example["draws"], self.augmentation
            )
            example = {**example, "boxes": boxes, "class_ids": class_ids}
        return _element(example, image)

    def _read(self, step: np.int64) -> list[NDArray[Any]]:
        """For each slot the records and the random numbers of their places; then which samples are mixed, where
        mosaics' quarters meet, and the random numbers of the distortions."""
        positions = self.start + sampling.rank_positions(int(step), self.batch_size, self.rank, self.num_ranks)
        epochs, own = sampling.entries(self.seed, len(self.numbers), positions)
        chosen, centre = composites.choose(self.seed, positions, len(self.numbers), self.augmentation)
        used = chosen != composites.EMPTY
        serialized = np.empty(chosen.shape, object)
        serialized.fill(NO_PICTURE)  # np.full would cut off the zeros at its end
        serialized[used] = self.shards.read(self.numbers[chosen[used]])
        draws = (augment.draw(self.seed, epochs, own, slot) for slot in composites.slots(self.augmentation))
        of_slots = itertools.chain.from_iterable(zip(serialized, draws, strict=True))
        return [*of_slots, used[-1], centre, distortions.draw(self.seed, epochs, own, self.augmentation)]

    def _part(self, slot: int, serialized: tf.Tensor, draws: tf.Tensor, centre: tf.Tensor) -> Batch:
        """The pictures of a slot and their boxes, placed where the input is theirs."""
        example = _parse(tf.ensure_shape(serialized, [self.batch_size]), self.max_boxes)
        draws = tf.ensure_shape(draws, [self.batch_size, len(augment.DRAWS)])
        goal = composites.quarter(slot, centre, self.image_size) if self.augmentation.mosaic else self.image_size
        placement = augment.place(draws, example["size"], goal, self.augmentation)
        boxes, class_ids = augment.place_boxes(example["boxes"], example["class_ids"], placement)
        window, resized = _as_stored(placement, example["size"], example["orientation"])
        placed = {**placement._asdict(), "window": window, "resized": resized}
        return {**example, **placed, "boxes": boxes, "class_ids": class_ids}


def evaluation_batches(
    shard_paths: Sequence[Path],
    *,
    image_size: tuple[int, int],
    max_boxes: int,
    batch_size: int,
    rank: int,
    num_ranks: int,
    workers: int,
) -> tf.data.Dataset:
    """A rank's part of all images, each image once over all ranks, the same number of batches on every rank.

    Where images run out a batch is filled up with places whose image_id is NO_IMAGE and whose picture means nothing.
    Arguments and errors as for `train_batches`.
    """
    shards = Shards(shard_paths)

    def read(step: np.int64) -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
        positions = sampling.rank_positions(int(step), batch_size, rank, num_ranks)
        return shards.read(np.minimum(positions, len(shards) - 1)), positions < len(shards)

    def load(step: tf.Tensor) -> Batch:
        serialized, present = tf.numpy_function(read, [step], [tf.string, tf.bool])
        present = tf.ensure_shape(present, [batch_size])
        example = _parse(tf.ensure_shape(serialized, [batch_size]), max_boxes)
        image_id = tf.where(present, example["image_id"], NO_IMAGE)
        class_ids = tf.where(present[:, None], example["class_ids"], PADDING)
        return {**example, "image_id": image_id, "class_ids": class_ids}

    def decode(example: Batch) -> Batch:
        picture = preprocess.upright(preprocess.decode(example["encoded"]), example["orientation"])
        image, content_size, scale = preprocess.resize(picture, image_size)
        placed = {"content_size": content_size, "boxes": example["boxes"] / scale, "scale": scale}
        return _element({**example, **placed}, image)

    num_batches = -(-len(shards) // (batch_size * num_ranks))
    steps = tf.data.Dataset.range(num_batches)
    return _batches(steps, load, decode, image_size, batch_size, workers)


def _parse(serialized: tf.Tensor, max_boxes: int) -> Batch:
    example = records.parse_examples(serialized, max_boxes)
    return {
        "encoded": example["encoded"],
        "is_jpeg": tf.strings.substr(example["encoded"], 0, len(JPEG_START)) == JPEG_START,
        "image_id": example["image_id"],
        "orientation": example["orientation"],
        "size": tf.stack([example["height"], example["width"]], axis=1),
        "boxes": example["boxes"],
        "class_ids": tf.where(example["is_crowd"], PADDING, example["class_ids"]),
    }


def _as_stored(placement: augment.Placement, sizes: tf.Tensor, orientations: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Windows [n, 4] and the sizes [n, 2] they are resized to, of pictures of these sizes, before these are turned.

    The placement's are those of upright pictures; EXIF's orientations from 5 on have rows that are stored as columns.
    """
    size = tf.cast(sizes, tf.int32)
    corner, kept = placement.window[:, :2], placement.window[:, 2:]
    reversed_axes = [
        tf.reduce_any(orientations[:, None] == numbers, axis=1) for numbers in ([3, 4, 7, 8], [2, 3, 6, 7])
    ]
    corner = tf.where(tf.stack(reversed_axes, axis=1), size - corner - kept, corner)
    lying = (orientations >= 5)[:, None]
    corner, kept, resized = (
        tf.where(lying, upright[:, ::-1], upright) for upright in (corner, kept, placement.content_size)
    )
    return tf.concat([corner, kept], axis=1), resized


def _placed_picture(part: Batch) -> tf.Tensor:
    """The window of a record's picture, resized, turned and mirrored as placed: uint8 [h, w, 3]."""
    encoded, window = part["encoded"], part["window"]
    pixels = tf.cond(
        part["is_jpeg"],
        # the exact DCT costs no more than the fast one and keeps edges
        lambda: tf.image.decode_and_crop_jpeg(encoded, window, 3, dct_method="INTEGER_ACCURATE"),
        lambda: _cut(tf.image.decode_image(encoded, channels=3, expand_animations=False), window),
    )
    resized = tf.raw_ops.ResizeBilinear(images=pixels[None], size=part["resized"], half_pixel_centers=True)[0]
    image = preprocess.upright(tf.cast(resized + 0.5, tf.uint8), part["orientation"])  # rounds: the cast cuts off
    return tf.cond(part["flip"], lambda: tf.reverse(image, [1]), lambda: image)


def _cut(pixels: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    top, left, height, width = tf.unstack(window)
    return pixels[top : top + height, left : left + width]


def _element(example: Batch, image: tf.Tensor) -> Batch:
    keys = ("content_size", "boxes", "class_ids", "image_id", "scale")
    return {"image": image, **{key: example[key] for key in keys}}


def _batches(
    steps: tf.data.Dataset,
    load: Callable[[tf.Tensor], Batch],
    decode: Callable[[Batch], Batch],
    image_size: tuple[int, int],
    batch_size: int,
    workers: int,
) -> tf.data.Dataset:
    """Batches of steps: `load` gives all records of a step, `decode` makes an element of one of them.

    padded_batch pads the pictures while it copies them, which it has to do anyway.
    """
    images = steps.map(load, num_parallel_calls=READERS).prefetch(1).unbatch()
    elements = images.map(decode, num_parallel_calls=workers)
    shapes = {key: spec.shape for key, spec in elements.element_spec.items()}
    shapes["image"] = tf.TensorShape([*image_size, 3])
    batches = elements.padded_batch(batch_size, shapes, drop_remainder=True).prefetch(READY)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # it would take threads beyond `workers`, and time to find out
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1  # pictures are the unit of parallel work
    return batches.with_options(options)
