"""The exports against the Keras model, loaded where nothing else is: outputs, sizes, batches, file formats, bytes."""

import dataclasses
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

from effdet import preprocess
from effdet.anchors import anchors
from effdet.boxes import PADDING
from effdet.config import model_config
from effdet.errors import EffdetError
from effdet.export import ENCODED_SIGNATURE, PIXELS, PIXELS_SIGNATURE, Classes, export_saved_model
from effdet.export_litert import LABELS_MEMBER, export_litert
from effdet.export_onnx import OPSET, export_onnx
from effdet.exported import is_exported, open_exported
from effdet.model import build
from effdet.postprocess import PostprocessConfig, detect
from effdet.weights import assign, published_variables
from tests.effdet.made_exif import TURNS, turned
from tests.effdet.published import formula_array

ROOT = Path(__file__).parents[2]
CLASSES = Classes([5, PADDING, 9], ["cat", "", "dog"])
D0 = ("efficientdet-d0", PostprocessConfig(score_threshold=0.6, max_detections=300))
LITE0 = ("efficientdet-lite0", PostprocessConfig(method="hard", score_threshold=0.68))
ORIENTATIONS = range(1, 9)
pytestmark = pytest.mark.slow


def made(name):
    """A small model whose scores and boxes vary."""
    config = model_config(name, 3, (128, 128))
    model = build(config)
    arrays = {key: formula_array(key, tuple(variable.shape)) for key, variable in published_variables(model).items()}
    arrays["class_net/class-predict/pointwise_kernel"] *= 0.3
    arrays["box_net/box-predict/pointwise_kernel"] *= 0.08
    assign(model, arrays)
    return model, config


def pixels(seed, height, width):
    rough = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height)))


def picture(seed, height, width, kind, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).convert(mode).save(file, kind)
    return file.getvalue()


def expected(model, config, postprocess, pixels):
    """What Keras says of one picture: its heads, and the detections."""
    image, size, scale = preprocess.resize(tf.constant(pixels), config.image_size)
    image = tf.image.pad_to_bounding_box(image, 0, 0, *config.image_size)
    heads = model(preprocess.normalize(image[None], size[None], config), training=False)
    found = detect(heads["class_logits"], heads["box_deltas"], anchors(config), scale[None], postprocess)
    return {key: value.numpy()[0] for key, value in (heads | found).items()}


@pytest.mark.parametrize(("name", "postprocess", "apply_exif"), [(*D0, False), (*LITE0, True)])
def test_saved_model(tmp_path, name, postprocess, apply_exif):
    model, config = made(name)
    classes = dataclasses.replace(CLASSES, apply_exif=apply_exif)
    export_saved_model(tmp_path / "out", model, config, postprocess, classes)
    assert open_exported(tmp_path / "out").apply_exif == apply_exif
    signatures = tf.saved_model.load(str(tmp_path / "out")).signatures
    pictures = [
        picture(1, 100, 170, "JPEG"),
        picture(2, 240, 60, "PNG"),
        picture(3, 128, 128, "JPEG", "L"),
        picture(4, 50, 50, "PNG", "RGBA"),
        *[turned(number, "<>"[number % 2], height=60, width=140, seed=number) for number in ORIENTATIONS],
    ]
    served = {key: value.numpy() for key, value in signatures[ENCODED_SIGNATURE](images=tf.constant(pictures)).items()}
    for place, encoded in enumerate(pictures):
        turn = TURNS[ORIENTATIONS[place - 4] if apply_exif and place >= 4 else 1]
        keras_says = expected(model, config, postprocess, turn(preprocess.decode(encoded).numpy()))
        assert_same({key: value[place] for key, value in served.items()}, keras_says)
    check_classes(served)
    with pytest.raises(tf.errors.InvalidArgumentError):
        signatures[ENCODED_SIGNATURE](images=tf.constant([b"no picture"]))
    one = signatures[ENCODED_SIGNATURE](images=tf.constant(pictures[:1]))
    assert_same(first(one), {key: value[0] for key, value in served.items()})
    # a PNG's pixels are the picture's, so both signatures must say the same
    png = np.asarray(Image.open(io.BytesIO(pictures[1])))
    from_pixels = signatures[PIXELS_SIGNATURE](pixels=tf.constant(np.stack([png, 255 - png])))
    assert_same(first(from_pixels), {key: value[1] for key, value in served.items()})


def first(outputs):
    return {key: value.numpy()[0] for key, value in outputs.items()}


SCORE, CORNER = 5e-4, 0.1  # pixels; random weights make much of a rounding


def assert_same(ours, theirs):
    """Each detection of one side has its counterpart on the other, but for those that one side may just have missed.

    Of nearly equal scores either may come first: other kernels round differently.
    """
    our_classes, their_classes = (side.get("classes", side.get("class_ids")) for side in (ours, theirs))
    assert theirs["count"] > 5
    kept = [side["scores"][: side["count"]] for side in (ours, theirs)]
    assert np.ptp(kept[1]) > 10 * SCORE  # else agreement would mean nothing
    same = (
        (our_classes[:, None] == their_classes)
        & (abs(ours["scores"][:, None] - theirs["scores"]) < SCORE)
        & (abs(ours["boxes"][:, None] - theirs["boxes"]).max(axis=2) < CORNER)
    )
    last = max(scores.min() for scores in kept) + SCORE
    assert same.any(axis=1)[ours["scores"] > last].all()
    assert same.any(axis=0)[theirs["scores"] > last].all()
    assert (abs(np.sort(ours["scores"]) - np.sort(theirs["scores"]))[-5:] < SCORE).all()


def check_classes(served):
    """Category ids and names follow from classes, empty places included."""
    filled = np.arange(served["classes"].shape[1]) < served["count"][:, None]
    assert ((served["classes"] != PADDING) == filled).all()
    for class_id, category_id, name in [(PADDING, PADDING, b""), (0, 5, b"cat"), (1, PADDING, b""), (2, 9, b"dog")]:
        here = served["classes"] == class_id
        assert (served["category_ids"][here] == category_id).all()
        assert (served["class_names"][here] == name).all()


# ONNX -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "postprocess"), [LITE0, D0])
def test_onnx(tmp_path, name, postprocess):
    model, config = made(name)
    path = tmp_path / "model.onnx"
    export_onnx(path, model, config, postprocess, CLASSES)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    exported = open_exported(path)
    for pictures in (
        np.stack([pixels(seed, 100, 170) for seed in (1, 2, 3)]),  # larger than the input, wide
        pixels(4, 90, 40)[None],  # smaller, high
        np.stack([pixels(seed, *config.image_size) for seed in (5, 6)]),
    ):
        found = exported.run(pictures)
        for place, one in enumerate(pictures):
            assert_same({key: value[place] for key, value in found.items()}, expected(model, config, postprocess, one))
    assert exported.category_ids.tolist() == CLASSES.category_ids
    assert exported.class_names == CLASSES.names


def test_onnx_says_what_it_is(tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(path, *made("efficientdet-lite0"), LITE0[1], dataclasses.replace(CLASSES, apply_exif=True))
    assert open_exported(path).apply_exif
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain == ""] == [("", OPSET)]
    (pixels_in,) = model.graph.input
    assert pixels_in.name == PIXELS
    assert [d.dim_param or d.dim_value for d in pixels_in.type.tensor_type.shape.dim] == ["batch", "height", "width", 3]
    outputs = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    assert outputs == {
        "boxes": ["batch", 100, 4],
        "scores": ["batch", 100],
        "classes": ["batch", 100],
        "count": ["batch"],
    }


# LiteRT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "postprocess"), [LITE0, D0])
def test_litert(tmp_path, name, postprocess):
    model, config = made(name)
    path = tmp_path / "model.tflite"
    export_litert(path, model, config, postprocess, CLASSES)
    exported = open_exported(path)
    for one in (pixels(1, 100, 170), pixels(2, 240, 60), pixels(3, *config.image_size), pixels(4, 50, 50)):
        found = exported.run(one[None])
        assert_same({key: value[0] for key, value in found.items()}, expected(model, config, postprocess, one))
    assert exported.category_ids.tolist() == CLASSES.category_ids
    assert exported.class_names == CLASSES.names
    with zipfile.ZipFile(path) as archive:
        assert archive.read(LABELS_MEMBER) == b"cat\n\ndog\n"
    assert not any(operator.startswith("Flex") for operator in operators(path))


def operators(path):
    interpreter = Interpreter(str(path))
    return [operator["op_name"] for operator in interpreter._get_ops_details()]


def test_litert_is_laid_out_for_the_input_size(tmp_path):
    """A runtime that plans its memory once takes pictures of the model's size without more ado."""
    model, config = made("efficientdet-lite0")
    export_litert(tmp_path / "model.tflite", model, config, LITE0[1], CLASSES, "float16")
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    (image,) = interpreter.get_input_details()
    assert image["dtype"] == np.uint8
    assert image["shape"].tolist() == [1, 128, 128, 3]
    assert image["shape_signature"].tolist() == [1, -1, -1, 3]


def test_litert_precisions(tmp_path):
    """Smaller files of the same model: its scores are near, and not equal."""
    model, config = made("efficientdet-lite0")
    one = pixels(5, 128, 128)
    heads = expected(model, config, LITE0[1], one)["class_logits"]
    calibration = [pixels(seed, 128, 128) for seed in range(8)]
    size, error = {}, {}
    for precision in ("float32", "float16", "int8"):
        path = tmp_path / f"{precision}.tflite"
        export_litert(path, model, config, None, CLASSES, precision, calibration)
        ours = open_exported(path).run(one[None])
        assert ours["box_deltas"].shape == (1, config.num_anchors, 4)
        error[precision] = abs(ours["class_logits"][0] - heads).std() / heads.std()
        size[precision] = path.stat().st_size
    assert error["float32"] < 1e-3 < error["int8"] < 0.9  # random nets amplify rounding; what it costs is judged by AP
    assert error["float32"] < error["float16"] < error["int8"]
    assert size["float16"] < 0.6 * size["float32"]
    assert size["int8"] < 0.4 * size["float32"]
    assert "QUANTIZE" in operators(tmp_path / "int8.tflite")


def test_int8_for_others_than_lite(tmp_path):
    model, config = made("efficientdet-d0")
    with pytest.raises(EffdetError, match="for lite models only, efficientdet-d0 is none"):
        export_litert(tmp_path / "model.tflite", model, config, None, CLASSES, "int8", [pixels(1, 9, 9)])
    lite, config = made("efficientdet-lite0")
    with pytest.raises(EffdetError, match="no pictures to calibrate with"):
        export_litert(tmp_path / "model.tflite", lite, config, None, CLASSES, "int8")
    assert not list(tmp_path.iterdir())


# All ------------------------------------------------------------------------------------------------------------------


def test_raw_heads(tmp_path):
    model, config = made("efficientdet-d0")
    one = pixels(1, 100, 170)
    says = expected(model, config, D0[1], one)
    export_onnx(tmp_path / "model.onnx", model, config, None, CLASSES)
    export_litert(tmp_path / "model.tflite", model, config, None, CLASSES)
    for path in tmp_path.iterdir():
        ours = open_exported(path).run(one[None])
        assert ours.keys() == {"class_logits", "box_deltas"}
        for name, heads in ours.items():
            assert abs(heads[0] - says[name]).max() < 1e-3 * says[name].std(), (path.suffix, name)


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite", "saved_model/saved_model.pb"])
def test_file_that_is_no_model(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"no model")
    model = path if path.suffix != ".pb" else path.parent
    assert is_exported(model)
    with pytest.raises(EffdetError, match="not an exported model that can be read"):
        open_exported(model)


EXPORT = """
import sys
from pathlib import Path
import tensorflow as tf
from effdet.export import export_saved_model
from effdet.export_litert import export_litert
from effdet.export_onnx import export_onnx
from tests.effdet.test_export import CLASSES, LITE0, made, pixels
out, (model, config), calibration = Path(sys.argv[1]), made("efficientdet-lite0"), [pixels(1, 128, 128)]
out.mkdir()
export_saved_model(out / "saved_model", model, config, LITE0[1], CLASSES)
if out.name == "b":  # TensorFlow numbers functions through the life of a process
    tf.function(lambda: tf.while_loop(lambda i: i < 3, lambda i: [i + 1], [tf.constant(0)]))()
export_onnx(out / "model.onnx", model, config, LITE0[1], CLASSES)
for precision in ("float32", "float16", "int8"):
    export_litert(out / f"{precision}.tflite", model, config, LITE0[1], CLASSES, precision, calibration)
"""


def test_fresh_processes_write_the_same_bytes(tmp_path):
    for name, seed in (("a", "1"), ("b", "2")):
        variables = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path / name)], cwd=ROOT, env=variables, check=True)
    files = [{path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*")} for name in ("a", "b")]
    assert files[0].keys() == files[1].keys()
    for name, path in files[0].items():
        assert path.is_dir() or path.read_bytes() == files[1][name].read_bytes(), name
