"""Batches of small shards: every pixel, box and id against what is computed by plain means."""

import dataclasses
import itertools
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from effdet import augment, composites, input_pipeline, records, sampling
from effdet.augment import Augmentation, RandAugment
from effdet.boxes import PADDING
from effdet.errors import EffdetError
from effdet.input_pipeline import NO_IMAGE, evaluation_batches, train_batches

SIZE = (64, 96)
PLAIN = Augmentation(horizontal_flip=False, jitter_min=1.0, jitter_max=1.0)
FULL = Augmentation(horizontal_flip=True, jitter_min=0.5, jitter_max=2.0)
EVERYTHING = dataclasses.replace(
    FULL, colour=0.5, rand_augment=RandAugment(2, 5.0), grid_mask=0.5, mosaic=0.5, mixup=0.5
)
HEIGHT, WIDTH = 60, 80


def picture(number):
    """A soft, varied picture: JPEG keeps it well, and each number has its own. uint8 [60, 80, 3]."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3))
    return np.round(tf.image.resize(coarse, (HEIGHT, WIDTH), "bicubic").numpy().clip(0, 255)).astype(np.uint8)


def jpeg(number):
    return tf.io.encode_jpeg(picture(number), quality=95, chroma_downsampling=False).numpy()


def example(number, encoded=None, boxes=((6, 8, 30, 40),), class_ids=None, is_crowd=None, size=(HEIGHT, WIDTH)):
    if encoded is None:
        encoded = jpeg(number)
    ids = range(len(boxes)) if class_ids is None else class_ids
    crowd = [0] * len(boxes) if is_crowd is None else is_crowd
    return records.encode_example(encoded, 100 + number, *size, list(boxes), list(ids), crowd, [1.0] * len(boxes))


def write(path, examples):
    with tf.io.TFRecordWriter(os.fspath(path)) as writer:
        for serialized in examples:
            writer.write(serialized)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eleven images, 100 to 110, in shards of 4, 4 and 3."""
    folder = tmp_path_factory.mktemp("shards")
    parts = [range(4), range(4, 8), range(8, 11)]
    return [write(folder / f"{i}.tfrecord", map(example, part)) for i, part in enumerate(parts)]


def train(
    paths,
    steps,
    start=0,
    batch_size=4,
    rank=0,
    num_ranks=1,
    augmentation=FULL,
    seed=1,
    workers=2,
    entries=None,
    max_boxes=3,
):
    dataset = train_batches(
        paths,
        image_size=SIZE,
        max_boxes=max_boxes,
        batch_size=batch_size,
        rank=rank,
        num_ranks=num_ranks,
        seed=seed,
        start=start,
        augmentation=augmentation,
        workers=workers,
        entries=entries,
    )
    return list(itertools.islice(dataset.as_numpy_iterator(), steps))


def evaluation(paths, batch_size=4, rank=0, num_ranks=1):
    dataset = evaluation_batches(
        paths, image_size=SIZE, max_boxes=3, batch_size=batch_size, rank=rank, num_ranks=num_ranks, workers=2
    )
    return list(dataset.as_numpy_iterator())


def assert_equal_batches(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], key)


def joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def test_shapes_are_static(shards):
    for dataset, dtype in (
        (
            train_batches(
                shards,
                image_size=SIZE,
                max_boxes=3,
                batch_size=2,
                rank=0,
                num_ranks=1,
                seed=1,
                start=0,
                augmentation=FULL,
                workers=1,
            ),
            tf.uint8,
        ),
        (
            evaluation_batches(shards, image_size=SIZE, max_boxes=3, batch_size=2, rank=0, num_ranks=1, workers=1),
            tf.float32,
        ),
    ):
        assert dataset.element_spec == {
            "image": tf.TensorSpec([2, *SIZE, 3], dtype),
            "content_size": tf.TensorSpec([2, 2], tf.int32),
            "boxes": tf.TensorSpec([2, 3, 4], tf.float32),
            "class_ids": tf.TensorSpec([2, 3], tf.int32),
            "image_id": tf.TensorSpec([2], tf.int64),
            "scale": tf.TensorSpec([2], tf.float32),
        }


def test_epochs_hold_each_image_once_and_the_remainder_is_carried(shards):
    # 11 images, 4 a step: 11 steps are 4 epochs
    ids = joined(train(shards, steps=11), "image_id").reshape(4, 11)
    np.testing.assert_array_equal(np.sort(ids, axis=1), [np.arange(100, 111)] * 4)
    assert len({tuple(epoch) for epoch in ids}) == 4


def test_two_ranks_are_one_rank_with_the_double_batch(shards):
    whole = train(shards, steps=5, batch_size=4)
    ranks = [train(shards, steps=5, batch_size=2, rank=rank, num_ranks=2) for rank in (0, 1)]
    both = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*ranks, strict=True)]
    assert_equal_batches(whole, both)


def test_more_ranks_than_shards_and_more_images_a_step_than_there_are(shards):
    # 4 ranks, 1 shard of 4 images, 3 images a rank: a step holds each image three times
    ids = [train(shards[:1], 1, batch_size=3, rank=rank, num_ranks=4)[0]["image_id"] for rank in range(4)]
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.repeat([100, 101, 102, 103], 3))


def test_number_of_workers_changes_nothing(shards):
    assert_equal_batches(train(shards, 5, workers=1), train(shards, 5, workers=4))


def test_a_later_start_goes_on_as_the_run_would_have(shards):
    assert_equal_batches(train(shards, 8)[5:], train(shards, 3, start=20))


def test_a_start_between_the_steps_of_one_batch_size_goes_on_in_the_same_order(shards):
    """As when other ranks go on: 6 images were seen, and now a step takes 4."""
    seen = [batch["image_id"] for batch in train(shards, 11)]
    later = [batch["image_id"] for batch in train(shards, 9, start=6)]
    np.testing.assert_array_equal(np.concatenate(later), np.concatenate(seen)[6:42])


def test_a_later_start_reads_no_record_of_earlier_steps(tmp_path):
    path = write(tmp_path / "a.tfrecord", map(example, range(8)))
    complete = train([path], 4, batch_size=2)
    _, consumed = sampling.entries(1, 8, np.arange(4))  # steps 0 and 1
    content = bytearray(path.read_bytes())
    for offset, length in records.record_spans(path)[consumed]:
        content[offset : offset + length] = b"\xff" * length
    path.write_bytes(content)
    assert_equal_batches(complete[2:], train([path], 2, start=4, batch_size=2))
    with pytest.raises(tf.errors.OpError, match=r"a\.tfrecord: the record at byte \d+ is damaged"):
        train([path], 1, batch_size=2)


def test_seeds_differ(shards):
    first, second = (joined(train(shards, 11, seed=seed), "image_id") for seed in (1, 2))
    assert np.mean(first == second) < 0.5


def test_any_sample_can_be_made_again_from_its_key(shards):
    """Pixels by decoding in full, cutting and resizing."""
    batches = train(shards, steps=9, seed=7)
    epochs, numbers = sampling.entries(7, 11, np.arange(36))
    draws = augment.draw(7, epochs, numbers)
    placed = augment.place(tf.constant(draws), tf.constant([[HEIGHT, WIDTH]] * 36), SIZE, FULL)
    windows, contents, flips = placed.window.numpy(), placed.content_size.numpy(), placed.flip.numpy()
    assert 0 < flips.sum() < 36
    assert (contents == SIZE).all(axis=1).any()
    assert (contents < SIZE).all(axis=1).any()
    np.testing.assert_array_equal(joined(batches, "image_id"), 100 + numbers)
    np.testing.assert_array_equal(joined(batches, "content_size"), contents)
    np.testing.assert_array_equal(joined(batches, "scale"), placed.scale)
    for i, image in enumerate(joined(batches, "image")):
        pixels = tf.io.decode_jpeg(jpeg(numbers[i]), channels=3, dct_method="INTEGER_ACCURATE").numpy()
        top, left, height, width = windows[i]
        resized = tf.image.resize(pixels[top : top + height, left : left + width], contents[i]).numpy()
        expected = np.zeros((*SIZE, 3), np.uint8)
        content_height, content_width = contents[i]
        expected[:content_height, :content_width] = np.floor(resized + 0.5)[:, :: -1 if flips[i] else 1]
        np.testing.assert_array_equal(image, expected)


def test_boxes_stay_on_their_objects(tmp_path):
    """A white rectangle on black in a PNG: where it comes to lie is read from the pixels."""
    rectangle = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rectangle[12:40, 20:50] = 255
    png = tf.io.encode_png(rectangle).numpy()
    path = write(tmp_path / "a.tfrecord", [example(0, png, boxes=[(12, 20, 40, 50)])])
    found = 0
    for batch in train([path], steps=8):
        for image, boxes in zip(batch["image"], batch["boxes"], strict=True):
            rows, columns = (np.flatnonzero(image[..., 0].max(axis) > 127) for axis in (1, 0))
            if len(rows):
                bright = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
                np.testing.assert_allclose(boxes[0], bright, atol=0.51)  # half a pixel, and rounding
                found += 1
    assert found > 24  # of 32; a cut may miss the rectangle


def test_crowds_and_boxes_without_area_are_no_targets(tmp_path):
    boxes = [(0, 0, 30, 40), (5, 5, 20, 20), (7, 7, 7, 9)]
    serialized = example(0, boxes=boxes, class_ids=[5, 6, 7], is_crowd=[1, 0, 0])
    batch = train([write(tmp_path / "a.tfrecord", [serialized])], 1, batch_size=1, augmentation=PLAIN)[0]
    np.testing.assert_array_equal(batch["class_ids"], [[6, PADDING, PADDING]])
    # 60 x 80 into 64 x 96: ratio 64 / 60; the width is round(85.33) = 85 of 80
    expected = np.float32([5 * 64 / 60, 5 * 85 / 80, 20 * 64 / 60, 20 * 85 / 80])
    np.testing.assert_allclose(batch["boxes"][0], [expected, np.zeros(4), np.zeros(4)], rtol=1e-6)


def test_image_without_boxes(tmp_path):
    path = write(tmp_path / "a.tfrecord", [example(0, boxes=[])])
    for batch in (*train([path], 1), evaluation([path])[0]):
        assert (batch["class_ids"] == PADDING).all()
        assert not batch["boxes"].any()


def grey_jpeg():
    return tf.io.encode_jpeg(picture(0)[..., :1], quality=95)


def grey_png():
    return tf.io.encode_png(picture(0)[..., :1])


def png_with_alpha():
    return tf.io.encode_png(np.concatenate([picture(0), np.full((HEIGHT, WIDTH, 1), 9, np.uint8)], axis=2))


@pytest.mark.parametrize("encode", [grey_jpeg, grey_png, png_with_alpha])
def test_other_pictures_come_as_rgb(tmp_path, encode):
    path = write(tmp_path / "a.tfrecord", [example(0, encode().numpy())])
    source = picture(0) if encode is png_with_alpha else np.repeat(picture(0)[..., :1], 3, axis=2)
    expected = tf.image.resize(source, (64, 85)).numpy()
    for batch in (train([path], 1, batch_size=1, augmentation=PLAIN)[0], evaluation([path], batch_size=1)[0]):
        image = batch["image"][0, :, :85].astype(np.float32)
        assert np.abs(image - expected).mean() < 2
        if encode is not png_with_alpha:
            np.testing.assert_array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 4), (2, 2), (3, 5)])
def test_evaluation_shows_each_image_once_over_all_ranks(shards, num_ranks, batch_size):
    ranks = [evaluation(shards, batch_size, rank, num_ranks) for rank in range(num_ranks)]
    assert {len(batches) for batches in ranks} == {-(-11 // (num_ranks * batch_size))}
    batches = list(itertools.chain(*ranks))
    ids = joined(batches, "image_id")
    np.testing.assert_array_equal(np.sort(ids[ids != NO_IMAGE]), np.arange(100, 111))
    assert (joined(batches, "class_ids")[ids == NO_IMAGE] == PADDING).all()


def test_evaluation_pictures_are_decoded_as_tensorflow_does_and_not_rounded(shards):
    batch = evaluation(shards)[0]
    ids = batch["image_id"] - 100
    for number, image in zip(ids, batch["image"], strict=True):
        expected = tf.image.resize(tf.io.decode_jpeg(jpeg(number), channels=3), (64, 85)).numpy()
        np.testing.assert_array_equal(image[:, :85], expected)
        assert not image[:, 85:].any()
        assert np.any(image % 1)
    np.testing.assert_array_equal(batch["content_size"], [[64, 85]] * 4)
    np.testing.assert_allclose(batch["scale"], [60 / 64] * 4)
    np.testing.assert_allclose(batch["boxes"][:, 0], [np.array([6, 8, 30, 40]) * 64 / 60] * 4, rtol=1e-6)


def test_no_record_is_named(tmp_path):
    with pytest.raises(EffdetError, match=r"empty\.tfrecord"):
        input_pipeline.Shards([write(tmp_path / "empty.tfrecord", [])])
    with pytest.raises(EffdetError, match="no file"):
        input_pipeline.Shards([])


# The entries of an epoch ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_epoch_shows_each_entry_of_the_list_once(shards):
    # 14 entries, 4 a step: 7 steps are 2 epochs
    entries = np.array([0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10])
    batches = train(shards, steps=7, entries=entries)
    ids = joined(batches, "image_id").reshape(2, 14)
    np.testing.assert_array_equal(np.sort(ids, axis=1), [100 + entries] * 2)
    # copies of a record are placed each in its way
    assert len(np.unique(joined(batches, "scale")[ids.ravel() == 110])) == 6


@pytest.mark.slow
def test_each_record_once_is_the_same_as_no_list(shards):
    assert_equal_batches(train(shards, 3), train(shards, 3, entries=np.arange(11)))


@pytest.mark.parametrize("entries", [[0, 11], [-1, 3]])
def test_entries_without_a_record_are_named(shards, entries):
    with pytest.raises(EffdetError, match=r"expected numbers of the 11 records, 0 to 10, got (0 to 11|-1 to 3)"):
        train(shards, 1, entries=np.array(entries))


# Everything that is off by default ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(shards):
    """Six steps of four samples each."""
    return train(shards, 6, augmentation=EVERYTHING)


@pytest.mark.slow
def test_every_kind_of_sample_is_well_formed(everything, shards):
    assert_equal_batches(everything, train(shards, 6, augmentation=EVERYTHING, workers=4))
    sizes, boxes, class_ids = (joined(everything, key) for key in ("content_size", "boxes", "class_ids"))
    assert ((sizes >= 1) & (sizes <= SIZE)).all()
    assert {image.dtype for image in joined(everything, "image")} == {np.dtype(np.uint8)}
    for image, (height, width) in zip(joined(everything, "image"), sizes, strict=True):
        assert not image[height:].any()
        assert not image[:, width:].any()
        assert image[height - 1].any()  # no row or column of padding counts as picture
        assert image[:, width - 1].any()
        assert len(np.unique(image[:height, :width])) > 20
    present = class_ids != PADDING
    assert (np.diff(present.astype(int), axis=1) <= 0).all()  # in front
    assert not boxes[~present].any()
    assert (boxes[present][:, 2:] > boxes[present][:, :2]).all()
    assert (boxes.min() >= 0) & (boxes <= np.tile(sizes, 2)[:, None]).all()
    _, own = sampling.entries(1, 11, np.arange(24))
    np.testing.assert_array_equal(joined(everything, "image_id"), 100 + own)


@pytest.mark.slow
def test_ranks_and_a_later_start_change_no_sample(everything, shards):
    """Two ranks of two samples a step, from the ninth sample on."""
    ranks = [train(shards, 4, 8, 2, rank, 2, augmentation=EVERYTHING) for rank in (0, 1)]
    both = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*ranks, strict=True)]
    assert_equal_batches(everything[2:], both)


@pytest.mark.slow
def test_a_later_start_reads_only_what_its_own_samples_need(tmp_path):
    """Of mosaics and mixtures, too: every other record is damaged."""
    path = write(tmp_path / "a.tfrecord", map(example, range(40)))
    augmentation = dataclasses.replace(FULL, mosaic=0.6, mixup=0.5)
    complete = train([path], 10, augmentation=augmentation)[8:]
    chosen, _ = composites.choose(1, np.arange(32, 40), 40, augmentation)
    needed = np.setdiff1d(chosen, composites.EMPTY)
    assert 10 < len(needed) < 35
    content = bytearray(path.read_bytes())
    for offset, length in np.delete(records.record_spans(path), needed, axis=0):
        content[offset : offset + length] = b"\xff" * length
    path.write_bytes(content)
    assert_equal_batches(complete, train([path], 2, start=32, augmentation=augmentation))
    with pytest.raises(tf.errors.OpError, match="is damaged"):
        train([path], 1, augmentation=augmentation)


def white_rectangle():
    rectangle = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rectangle[12:40, 20:50] = 255
    return example(0, tf.io.encode_png(rectangle).numpy(), boxes=[(12, 20, 40, 50)])


def inside(boxes, margin):
    """Which pixels of the input lie in a box, with `margin` pixels around it: bool [H, W]."""
    rows, columns = (np.arange(size) + 0.5 for size in SIZE)
    found = np.zeros(SIZE, bool)
    for top, left, bottom, right in boxes:
        down, across = (
            (at > low - margin) & (at < high + margin)
            for at, low, high in ((rows, top, bottom), (columns, left, right))
        )
        found |= down[:, None] & across
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "dark"),
    [
        ({"mosaic": 1.0}, 114),  # what is no picture is grey
        ({"mixup": 1.0}, 57),  # half of it
        ({"rand_augment": RandAugment(2, 4.0, ("rotate", "shear_x", "translate_y"))}, 114),
    ],
)
def test_boxes_stay_on_their_objects_in_every_composition(tmp_path, options, dark):
    """One record alone: a white rectangle on black, in every quarter and on both sides of a mixture."""
    path = write(tmp_path / "a.tfrecord", [white_rectangle()])
    augmentation = dataclasses.replace(FULL, jitter_min=0.7, jitter_max=1.3, **options)
    found = 0
    for batch in train([path], steps=5, augmentation=augmentation, batch_size=8, max_boxes=4):
        for image, boxes, ids in zip(batch["image"], batch["boxes"], batch["class_ids"], strict=True):
            boxes = boxes[ids != PADDING]
            assert image[~inside(boxes, 1)].max(initial=0) <= dark
            if "rand_augment" not in options:  # a turned rectangle does not fill its box
                assert image[inside(boxes, -1)].min(initial=255) >= (127 if "mixup" in options else 255)
            found += len(boxes)
    assert found > 30


# Pictures that are turned ---------------------------------------------------------------------------------------------

TURNS = {  # how Pillow undoes an orientation: the method that makes the upright picture of the stored one
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turned_and_upright(number, orientation, dct_method):
    """The same picture as a JPEG that is to be turned, and as an upright PNG."""
    stored = tf.io.decode_jpeg(jpeg(number), channels=3, dct_method=dct_method).numpy()
    turn = TURNS[orientation]
    upright = stored if turn is None else np.asarray(Image.fromarray(stored).transpose(turn))
    size, boxes = upright.shape[:2], [(6, 8, 30, 40)]
    png = tf.io.encode_png(upright).numpy()
    of_jpeg, of_png = (
        records.encode_example(encoded, 100 + number, *size, boxes, [0], [0], [1.0], turn_by)
        for encoded, turn_by in ((jpeg(number), orientation), (png, 1))
    )
    return of_jpeg, of_png


@pytest.mark.slow
@pytest.mark.parametrize("of", [train, evaluation])
def test_pictures_are_turned_as_their_records_say(tmp_path, of):
    dct_method = "INTEGER_ACCURATE" if of is train else ""
    pairs = [turned_and_upright(number, number, dct_method) for number in TURNS]
    paths = [write(tmp_path / f"{i}.tfrecord", [pair[i] for pair in pairs]) for i in (0, 1)]
    options = {"steps": 4} if of is train else {}
    turned, upright = (of([path], batch_size=8, **options) for path in paths)
    for one, other in zip(turned, upright, strict=True):
        # interpolated from the other end, a value may fall on the other side of a half
        difference = np.abs(one["image"].astype(float) - other["image"].astype(float))
        assert difference.max() <= (1 if of is train else 1e-3)
        assert difference.mean() < 0.01
        for key in ("content_size", "boxes", "class_ids", "image_id", "scale"):
            np.testing.assert_array_equal(one[key], other[key], key)
    assert len(turned) == (4 if of is train else 1)
