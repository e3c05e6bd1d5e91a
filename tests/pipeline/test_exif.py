"""EXIF orientation without TensorFlow: Pillow's where the file is well formed, effdet's for every file.

And end to end: training, evaluation and whoever detects see the same picture. That the served signature does, too, is
held by tests/effdet/test_export.py, and that numbers are the same by test_evaluate_model.py and test_promote.py.
"""

import io
import random

import numpy as np
import pytest
import tensorflow as tf
from PIL import ExifTags, Image, ImageOps

from effdet import preprocess
from effdet.augment import Augmentation
from effdet.input_pipeline import evaluation_batches, train_batches
from effdet.records import encode_example, framed
from pipeline import exif
from pipeline.detectors import decode_picture
from pipeline.errors import PipelineError
from tests.effdet.made_exif import DAMAGED, TURNS, WHOLE, jpeg, turned


def both(file):
    """Of the bytes, and of the image that Pillow opens."""
    with Image.open(io.BytesIO(file)) as image:
        return exif.orientation_of(file), exif.orientation(image)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("number", range(1, 9))
def test_as_pillow_says_and_turns(number, order):
    file = turned(number, order)
    assert both(file) == (number, number)
    with Image.open(io.BytesIO(file)) as image:
        assert image.getexif()[ExifTags.Base.Orientation] == number
        expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(exif.upright(image, number), expected)
        np.testing.assert_array_equal(TURNS[number](np.asarray(image)), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", WHOLE)
def test_as_pillow_says_wherever_it_stands(name):
    with Image.open(io.BytesIO(WHOLE[name])) as image:
        assert image.getexif().get(ExifTags.Base.Orientation) == 6
    assert both(WHOLE[name]) == (6, 6)


def test_several_pictures_in_one_file():
    """MPO, as phones write it: the first picture's EXIF, which Pillow writes behind nothing or behind JFIF."""
    picture, tags, file = Image.open(io.BytesIO(jpeg())), Image.Exif(), io.BytesIO()
    tags[ExifTags.Base.Orientation] = 8
    picture.save(file, "MPO", save_all=True, append_images=[picture], exif=tags)
    with Image.open(file) as image:
        assert image.format == "MPO"
        assert image.getexif()[ExifTags.Base.Orientation] == 8
    assert both(file.getvalue()) == (8, 8)
    assert int(preprocess.orientation(file.getvalue())) == 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_other_files_have_none(kind):
    tags, file = Image.Exif(), io.BytesIO()
    tags[ExifTags.Base.Orientation] = 6
    Image.open(io.BytesIO(jpeg())).save(file, kind, exif=tags)
    assert Image.open(file).getexif()[ExifTags.Base.Orientation] == 6
    assert both(file.getvalue()) == (1, 1)
    assert int(preprocess.orientation(file.getvalue())) == 1


def test_image_is_as_good_as_before():
    with Image.open(io.BytesIO(turned(6))) as image:
        assert exif.orientation(image) == exif.orientation(image) == 6
        np.testing.assert_array_equal(image, Image.open(io.BytesIO(jpeg())))
        with pytest.raises(PipelineError, match="the image's file is closed; ask before its pixels are loaded"):
            exif.orientation(image)


def spoiled(count):
    """Files that once were whole: cut, with bytes changed near the beginning, or put together of pieces."""
    values = random.Random(1)
    whole = [turned(3, "<"), turned(6, ">"), *WHOLE.values(), jpeg()]
    telling = [0x00, 0x01, 0x02, 0x03, 0x06, 0x08, 0x12, 0x2A, 0xD8, 0xDA, 0xE1, 0xFF]
    for _ in range(count):
        file = bytearray(values.choice(whole))
        way = values.randrange(4)
        if way == 0:
            del file[values.randrange(len(file)) :]
        elif way == 1:
            file = file[: values.randrange(2, 40)] + values.randbytes(values.randrange(200))
        elif way == 2:
            start = values.randrange(2, 60)
            del file[start : start + values.randrange(1, 20)]
        else:
            for _ in range(values.randrange(1, 6)):
                file[values.randrange(80)] = values.choice([*telling, values.randrange(256)])
        yield bytes(file)


@pytest.mark.parametrize("name", DAMAGED)
def test_orientation_that_does_not_count(name):
    assert exif.orientation_of(DAMAGED[name]) == 1


@pytest.mark.slow
def test_as_effdet_says_for_every_file():
    files = list(spoiled(2000))
    theirs = [int(number) for number in tf.data.Dataset.from_tensor_slices(files).map(preprocess.orientation)]
    assert [exif.orientation_of(file) for file in files] == theirs
    assert min(theirs.count(number) for number in (1, 3, 6)) > 30  # else agreement would mean little


@pytest.mark.slow
@pytest.mark.parametrize("apply_exif", [True, False])
def test_training_and_evaluation_see_what_a_detector_does(tmp_path, apply_exif):
    """Of all orientations, at a scale of 1; boxes are where the records have them, in the picture that is seen."""
    files = {number: turned(number, seed=number, height=48, width=64) for number in range(1, 9)}
    box = np.float32([[3, 5, 30, 20]])
    with (tmp_path / "a.tfrecord").open("wb") as shard:
        for number, file in files.items():
            orientation = exif.orientation_of(file) if apply_exif else 1
            size = (48, 64) if orientation < 5 else (64, 48)
            shard.writelines(framed(encode_example(file, number, *size, box, [0], [0], [405.0], orientation)))
    asked = {"image_size": (64, 64), "max_boxes": 2, "batch_size": 8, "rank": 0, "num_ranks": 1, "workers": 1}
    shards = [tmp_path / "a.tfrecord"]
    (judged,) = evaluation_batches(shards, **asked)
    plain = Augmentation(horizontal_flip=False, jitter_min=1.0, jitter_max=1.0)
    trained = next(iter(train_batches(shards, seed=1, start=0, augmentation=plain, **asked)))
    places = {image_id: place for place, image_id in enumerate(trained["image_id"].numpy().tolist())}
    for place, (number, file) in enumerate(files.items()):
        seen = decode_picture(file, "a test", apply_exif)
        height, width = seen.shape[:2]
        assert (height, width) == ((64, 48) if apply_exif and number >= 5 else (48, 64))
        for batch, here, tolerance in ((judged, place, 0), (trained, places[number], 12)):  # of two kinds of decoding
            assert batch["image_id"][here] == number
            assert batch["content_size"][here].numpy().tolist() == [height, width]
            picture = batch["image"][here].numpy().astype(float)
            assert abs(picture[:height, :width] - seen).max() <= tolerance
            assert not picture[height:].any()
            assert not picture[:, width:].any()
            np.testing.assert_array_equal(batch["boxes"][here], [*box, [0, 0, 0, 0]])
        mirrored = abs(seen.astype(float) - seen[:, ::-1]).max(), abs(seen.astype(float) - seen[::-1]).max()
        assert min(mirrored) > 60  # so that a wrong turn would show
