"""A model as a detector: the numbers of evaluation, whatever the pictures' sizes, and exports in groups of one size."""

import io
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from effdet.boxes import PADDING
from effdet.export import CLASSES_FILE, PIXELS, PIXELS_SIGNATURE, Classes
from effdet.inference import Detections, Found, run_detection
from effdet.input_pipeline import evaluation_batches
from effdet.postprocess import PostprocessConfig
from pipeline.class_table import class_rows
from pipeline.coco_metrics import coco_results, coco_rows
from pipeline.detectors import (
    decode_picture,
    export_detection,
    in_batches,
    keras_detection,
    new_folder,
    open_detector,
)
from pipeline.errors import PipelineError
from pipeline.model_files import read_model
from pipeline.shard_files import spread_images
from tests.pipeline.judged_model import CLASSES, write_shards, write_trained

NMS = PostprocessConfig(max_detections=20)


def encoded(mode, kind, size=(30, 20)):
    """A picture file whose left half is dark and whose right half is bright."""
    values = np.full((size[1], size[0]), 40, np.uint8)
    values[:, size[0] // 2 :] = 200
    file = io.BytesIO()
    Image.fromarray(values).convert("RGB").convert(mode).save(file, kind)
    return file.getvalue()


# A Keras model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_trained(folder / "model")
    write_shards(folder / "shards", {"val": 7})
    return folder


@pytest.mark.slow
def test_numbers_are_those_of_evaluation_to_the_last_bit(trained):
    stored = read_model(trained / "model")
    shard = trained / "shards" / "val-00000-of-00001.tfrecord"
    batches = evaluation_batches(
        [shard], image_size=(128, 128), max_boxes=10, batch_size=3, rank=0, num_ranks=1, workers=1
    )
    expected = run_detection(stored.model, stored.config, batches, NMS)
    files = spread_images([shard], 7)
    assert list(files) == expected.image_ids.tolist()
    pictures = [decode_picture(content, "a test") for content in files.values()]
    assert len({picture.shape for picture in pictures}) > 3
    found = open_detector(str(trained / "model"), NMS, batch_size=3).detect(pictures)
    assert len(found) == 7
    for place, here in enumerate(found):
        count = expected.counts[place]
        assert count > 0
        np.testing.assert_array_equal(here.boxes, expected.boxes[place, :count])
        np.testing.assert_array_equal(here.scores, expected.scores[place, :count])
        np.testing.assert_array_equal(here.class_ids, expected.class_ids[place, :count])
    # a picture's numbers depend on no other
    alone = keras_detection(stored, NMS, 3)(pictures[5:6])
    np.testing.assert_array_equal(alone[0].boxes, found[5].boxes)
    np.testing.assert_array_equal(alone[0].scores, found[5].scores)
    assert keras_detection(stored, NMS, 3)([]) == []


# Exports --------------------------------------------------------------------------------------------------------------


def brightness(calls):
    """An export's `run`: finds a box as large as the picture, its mean as score, and twice where that is odd."""

    def run(pixels):
        calls.append(pixels.shape)
        count, height, width = pixels.shape[:3]
        means = pixels.reshape(count, -1).mean(axis=1)
        return {
            "boxes": np.tile(np.float32([0, 0, height, width]), (count, 3, 1)),
            "scores": np.tile(means[:, None], 3).astype(np.float32),
            "class_ids": np.zeros([count, 3], np.int32),
            "count": (1 + means % 2).astype(np.int32),
        }

    return run


def test_export_gets_pictures_of_one_size_and_they_come_back_in_order():
    calls = []
    sizes = [(4, 6), (8, 2), (4, 6), (4, 6), (8, 2), (5, 5)]
    pictures = [np.full((*size, 3), 10 + place, np.uint8) for place, size in enumerate(sizes)]
    found = export_detection(brightness(calls), 2, "a test")(pictures)
    assert calls == [(2, 4, 6, 3), (1, 4, 6, 3), (2, 8, 2, 3), (1, 5, 5, 3)]
    assert [here.scores.tolist() for here in found] == [[10], [11, 11], [12], [13, 13], [14], [15, 15]]
    assert [here.boxes[0].tolist() for here in found] == [[0, 0, *size] for size in sizes]
    assert [len(here.class_ids) for here in found] == [1, 2, 1, 2, 1, 2]


def test_export_of_raw_heads_is_named():
    raw = export_detection(lambda pixels: {"class_logits": pixels, "box_deltas": pixels}, 2, "raw.onnx")
    with pytest.raises(PipelineError, match=r"raw\.onnx: gives the network's raw outputs \(box_deltas, class_logits\)"):
        raw([np.zeros((4, 6, 3), np.uint8)])


def write_saved_model(folder):
    """A SavedModel that finds one box as large as the picture, of class 2; its score is the first pixel's red / 256."""

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name=PIXELS)])
    def detect(pixels):
        shape = tf.shape(pixels)
        box = tf.cast(tf.stack([0, 0, shape[1], shape[2]]), tf.float32)
        return {
            "boxes": tf.tile(box[None, None], [shape[0], 2, 1]),
            "scores": tf.cast(pixels[:, 0, :2, 0], tf.float32) / 256,
            "classes": tf.fill([shape[0], 2], 2),
            "count": tf.fill(shape[:1], 1),
        }

    tf.saved_model.save(tf.Module(), str(folder), signatures={PIXELS_SIGNATURE: detect})
    (folder / CLASSES_FILE).parent.mkdir()
    (folder / CLASSES_FILE).write_text(Classes([3, PADDING, 9], ["cat", "", "cow"]).to_json())


def test_export_in_place_of_a_model(tmp_path):
    write_saved_model(tmp_path / "my-model")
    detector = open_detector(str(tmp_path / "my-model"), NMS)
    assert [(row.class_id, row.category_id, row.name) for row in detector.classes] == [(0, 3, "cat"), (2, 9, "cow")]
    assert (detector.name, detector.stored) == ("my-model", None)
    pictures = [np.full((4, 6, 3), 64, np.uint8), np.full((8, 2, 3), 128, np.uint8), np.full((4, 6, 3), 192, np.uint8)]
    found = detector.detect(pictures)
    assert [here.scores.tolist() for here in found] == [[0.25], [0.5], [0.75]]
    assert [here.boxes.tolist() for here in found] == [[[0, 0, 4, 6]], [[0, 0, 8, 2]], [[0, 0, 4, 6]]]
    assert coco_rows(5, found[1], detector.classes)[0]["category_id"] == 9
    assert not detector.apply_exif
    for options in (
        {"name": "efficientdet-d0"},
        {"image_size": (64, 64)},
        {"classes": tmp_path},
        {"ema": False},
        {"apply_exif": True},
    ):
        with pytest.raises(PipelineError, match=r"my-model: an exported model brings its .* leave out --model"):
            open_detector(str(tmp_path / "my-model"), NMS, **options)


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_evaluation():
    boxes = np.float32([[1, 2, 30.12345, 40.6], [0, 0, 5, 5], [3, 3, 9, 9]])
    scores, class_ids = np.float32([0.91234567, 0.5, 0.4]), np.int32([3, 2, 1])
    table = class_rows(CLASSES)  # which has no class 2
    padded = Detections(np.array([17]), boxes[None], scores[None], class_ids[None], np.array([3], np.int32))
    rows = coco_rows(17, Found(boxes, scores, class_ids), table)
    assert rows == coco_results(padded, table)
    assert [(row["category_id"], row["image_id"]) for row in rows] == [(9, 17), (7, 17)]
    assert coco_rows(17, Found(boxes[:0], scores[:0], class_ids[:0]), table) == []


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG")],
)
def test_every_kind_of_picture_comes_as_rgb(mode, kind):
    picture = decode_picture(encoded(mode, kind), "a test")
    assert (picture.shape, picture.dtype) == ((20, 30, 3), np.uint8)
    assert picture[:, :12].mean() < 60  # so is a CMYK picture not turned into its negative
    assert picture[:, -12:].mean() > 180


def test_decoding_is_that_of_the_evaluation():
    content = encoded("RGB", "JPEG")
    expected = tf.image.decode_image(content, channels=3, expand_animations=False)
    np.testing.assert_array_equal(decode_picture(content, "a test"), expected)


@pytest.mark.parametrize("content", [b"", b"words", encoded("RGB", "JPEG")[:-200], encoded("RGB", "PNG")[:60]])
def test_what_cannot_be_decoded_is_named(content):
    with pytest.raises(PipelineError, match=r"^here/x\.jpg: cannot be decoded: [A-Za-z][^{\[]*$"):
        decode_picture(content, "here/x.jpg")


def test_batches_are_loaded_one_ahead():
    started, lock = [], threading.Lock()

    def load(item):
        with lock:
            started.append(item)
        return item * 10

    batches = in_batches(load, list(range(10)), 3)
    assert next(batches) == [0, 10, 20]
    assert max(started) <= 5  # the next batch, and none after it
    assert list(batches) == [[30, 40, 50], [60, 70, 80], [90]]
    assert list(in_batches(load, [], 3)) == []


def test_error_while_loading_comes_out():
    def load(item):
        if item == 4:
            raise PipelineError("no 4")
        return item

    batches = in_batches(load, list(range(10)), 3)
    assert next(batches) == [0, 1, 2]
    with pytest.raises(PipelineError, match="no 4"):
        next(batches)


def test_folder_with_something_in_it_is_not_written_over(tmp_path):
    new_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    new_folder(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(PipelineError, match="is there already"):
            new_folder(taken)
