"""Backbones of others: what is taken of them, and what is refused."""

from pathlib import Path

import h5py
import keras
import matplotlib.cbook
import numpy as np
import pytest
import tensorflow as tf

from effdet import backbone_weights, weight_sources
from effdet.backbone import features
from effdet.config import model_config
from effdet.errors import EffdetError
from effdet.torch_file import read_torch_file
from effdet.weights import published_variables
from tests.effdet.published import formula_array
from tests.effdet.test_weights import Named, small_net, write_torch_file


def test_lite0_from_the_package_knows_imagenet():
    """With the package's own classifier on top, a photograph of a rear admiral is a "military uniform"."""
    config = model_config("efficientdet-lite0", 1, (224, 224))
    images = keras.Input((224, 224, 3))
    net = keras.Model(images, features(images, config))
    weight_sources.load(net, config, "imagenet")
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = tf.image.decode_jpeg(file.read())[:512]
    pixels = tf.image.resize(photograph, (224, 224), antialias=True)
    top = net((pixels[None] - config.pixel_mean) / config.pixel_std)[5].numpy()  # [1,7,7,320]

    (path,) = (
        Path(file.locate())
        for file in backbone_weights.importlib.metadata.files(backbone_weights.LITE0_PACKAGE)
        if file.suffix == ".pth"
    )
    tensors = read_torch_file(path)
    assert len(tensors) == 296
    head = top @ tensors["_conv_head.weight"][:, :, 0, 0].T
    deviation = np.sqrt(tensors["_bn1.running_var"] + 1e-3)
    head = (head - tensors["_bn1.running_mean"]) / deviation * tensors["_bn1.weight"] + tensors["_bn1.bias"]
    logits = np.clip(head, 0, 6).mean(axis=(0, 1, 2)) @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    assert np.argmax(logits) == 652  # "military uniform"
    assert np.exp(logits[652]) / np.exp(logits).sum() > 0.2  # of 1,000; trained with label smoothing


def test_lite_backbones_without_weights():
    config = model_config("efficientdet-lite1", 1)
    with pytest.raises(EffdetError, match="no ImageNet weights of efficientnet-lite1"):
        weight_sources.load(small_net(), config, "imagenet")


def test_missing_package(monkeypatch):
    config = model_config("efficientdet-lite0", 1)
    monkeypatch.setattr(backbone_weights, "LITE0_PACKAGE", "no-such-package-here")
    with pytest.raises(EffdetError, match="no-such-package-here is not installed"):
        weight_sources.load(small_net(), config, "imagenet")


def test_imagenet_weights_without_network(monkeypatch):
    def fail(include_top, weights):
        raise Exception("URL fetch failure on https://example.org/b0.h5")  # as keras.utils.get_file

    monkeypatch.setattr(keras.applications, "EfficientNetB0", fail)
    config = model_config("efficientdet-d0", 1)
    with pytest.raises(EffdetError, match=r"efficientnet-b0 could not be fetched: URL fetch failure(.|\n)*connect"):
        weight_sources.load(small_net(), config, "imagenet")


@pytest.mark.parametrize(
    ("mean", "deviation", "error"),
    [
        # as in Keras' ImageNet files: deviations stand where variances should, the last rescaling makes up for it
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "with 16 blocks, got Keras model sequential.* with 0"),
        ((0.5, 0.5, 0.5), (0.229, 0.224, 0.225), "takes pixels of mean .127.5"),
        ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5), r"and deviation \[127\.4"),
    ],
)
def test_application_of_another_normalization(mean, deviation, error):
    application = keras.Sequential(
        [
            keras.Input((64, 64, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Normalization(name="normalization"),
            keras.layers.Rescaling([value**-0.5 for value in deviation]),
        ]
    )
    for variable in application.get_layer("normalization").variables:
        if variable.name in ("mean", "variance"):
            variable.assign(mean if variable.name == "mean" else deviation)
    config = model_config("efficientdet-d0", 1)
    with pytest.raises(EffdetError, match=error):
        weight_sources.load(small_net(), config, application)


@pytest.mark.parametrize(
    ("mean", "variance", "words"),
    [
        ((10**13,), (10**13,), r"a mean of \[10000000000000\]"),  # 36 TiB, in a file of 6 KB
        ((3,), (10**13,), r"a mean of \[3\] and a variance of \[10000000000000\]"),
        ((4,), (4,), r"other channels than three: its normalization has a mean of \[4\]"),
        ((1, 3), (3, 3), r"a variance of \[3, 3\]"),
        ((0,), (0,), r"a mean of \[0\]"),
        ((1, 1, 1, 3), (3,), r"takes pixels of mean \[0\. 0\. 0\.\]"),  # as Keras has them, with values of others
        ((), (), r"takes pixels of mean \[0\. 0\. 0\.\]"),
    ],
)
def test_a_normalization_of_another_shape(tmp_path, mean, variance, words):
    with h5py.File(tmp_path / "b0.h5", "w") as file:
        file.create_dataset("stem_conv/stem_conv/kernel:0", (3, 3, 3, 32), "f4")
        for leaf, shape in (("mean", mean), ("variance", variance)):
            chunks = (1000,) if shape == (10**13,) else None
            file.create_dataset(f"normalization/normalization/{leaf}:0", shape, "f4", chunks=chunks)
    with pytest.raises(EffdetError, match=words):
        weight_sources.load(small_net(), model_config("efficientdet-d0", 1), tmp_path / "b0.h5")


# --- EfficientNets of keras.applications, as objects and as files -------------------------------


@pytest.fixture(scope="module")
def application():
    """B0 with its classifier; its weights are the formula's."""
    made = keras.applications.EfficientNetB0(include_top=True, weights=None, input_shape=(64, 64, 3), classes=7)
    for layer in made.layers:
        if not isinstance(layer, keras.layers.Normalization):
            for variable in layer.variables:
                variable.assign(formula_array(f"{layer.name}/{variable.name}", variable.shape))
    return made


def without_top(application):
    return keras.Model(application.input, application.get_layer("top_activation").output)


def write_keras2(path, application, normalization=None):
    """As Keras 2 published them: LAYER/LAYER/NAME:0, a depthwise kernel by a name of its own."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in application.layers]
        for layer in application.layers:
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [f"{layer.name}/{variable.name}:0".encode() for variable in layer.variables]
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            for variable in layer.variables:
                leaf = "depthwise_kernel" if depthwise else variable.name
                group[f"{layer.name}/{leaf}:0"] = (normalization or {}).get(leaf, np.asarray(variable))
    return path


def save_keras3(path, application):
    application.save_weights(path)
    return path


def save_whole(path, application):
    application.save(path)
    return path


FILES = {
    "published": lambda folder, made: write_keras2(folder / "efficientnetb0.h5", made),
    "published without top": lambda folder, made: write_keras2(folder / "efficientnetb0_notop.h5", without_top(made)),
    "Keras 3": lambda folder, made: save_keras3(folder / "b0.weights.h5", made),
    "Keras 3 without top": lambda folder, made: save_keras3(folder / "b0.weights.h5", without_top(made)),
    "whole model": lambda folder, made: save_whole(folder / "b0.h5", made),
}


def features_net(config):
    images = keras.Input((64, 64, 3))
    return keras.Model(images, features(images, config))


def set_by(source, config):
    net = features_net(config)
    loaded = weight_sources.load(net, config, source)
    assert loaded.backbone_only
    assert loaded.variables == len(published_variables(net))
    return {name: np.asarray(variable) for name, variable in published_variables(net).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_file_sets_what_the_object_sets(tmp_path, application, kind):
    config = model_config("efficientdet-d0", 1, (64, 64))
    expected = set_by(application, config)
    assert np.array_equal(
        expected["efficientnet-b0/stem/conv2d/kernel"], formula_array("stem_conv/kernel", (3, 3, 3, 32))
    )
    found = set_by(FILES[kind](tmp_path, application), config)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deviation", "words"),
    [
        ((0.229, 0.224, 0.225), None),  # as published: deviations where variances should stand
        ((0.229**2, 0.224**2, 0.225**2), None),
        ((0.5, 0.5, 0.5), "takes pixels of mean"),
    ],
)
def test_the_normalization_of_a_file(tmp_path, application, deviation, words):
    config = model_config("efficientdet-d0", 1, (64, 64))
    statistics = {"mean": np.float32([0.485, 0.456, 0.406]), "variance": np.float32(deviation)}
    path = write_keras2(tmp_path / "b0.h5", application, statistics)
    if words is None:
        assert set_by(path, config)
    else:
        with pytest.raises(EffdetError, match=words):
            set_by(path, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "words"),
    [
        ("efficientdet-d1", "expected efficientnet-b1 with 23 blocks, got .* with 16"),
        ("efficientdet-lite0", "expected efficientnet-lite0"),
    ],
)
def test_another_efficientnet(tmp_path, application, detector, words):
    config = model_config(detector, 1, (64, 64))
    for source in (application, write_keras2(tmp_path / "b0.h5", application)):
        with pytest.raises(EffdetError, match=words):
            weight_sources.load(small_net(), config, source)


@pytest.mark.slow
def test_a_file_without_one_of_its_layers(tmp_path, application):
    path = write_keras2(tmp_path / "b0.h5", application)
    with h5py.File(path, "r+") as file:
        del file["block3a_se_reduce"]
    with pytest.raises(EffdetError, match="has no block3a_se_reduce/kernel"):
        weight_sources.load(small_net(), model_config("efficientdet-d0", 1), path)


def test_a_torch_file_of_another_network(tmp_path):
    path = write_torch_file(tmp_path / "w.pth", {}, {})
    with pytest.raises(EffdetError, match="is not efficientnet-lite0"):
        weight_sources.load(small_net(), model_config("efficientdet-lite0", 1), path)
    with pytest.raises(EffdetError, match="holds efficientnet-lite0, and the backbone of efficientdet-d0"):
        weight_sources.load(small_net(), model_config("efficientdet-d0", 1), path)


def test_a_torch_file_that_asks_for_code(tmp_path):
    victim = tmp_path / "victim"
    path = write_torch_file(tmp_path / "w.pth", {"w": Named("os", "mkdir", str(victim))}, {})
    with pytest.raises(EffdetError, match=r"it asks for os\.mkdir"):
        weight_sources.load(small_net(), model_config("efficientdet-lite0", 1), path)
    assert not victim.exists()
