"""Weights from every source: what is set, what is taken of it, and what is refused with nothing set.

TensorFlow checkpoints are slow: a process of its own tries each first.
"""

import dataclasses
import json
import pickle
import tempfile

import h5py
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from effdet import weight_sources
from effdet.config import model_config
from effdet.errors import EffdetError
from effdet.model import build
from effdet.weights import published_variables, save_weights
from tests.effdet.published import expected_variables, formula_array
from tests.effdet.published_files import (
    averaged,
    raw_arrays,
    save_tensors,
    write_archive,
    write_checkpoint,
    write_h5,
    write_hostile_index,
    write_object_checkpoint,
)
from tests.effdet.tiny import CONFIG, tiny_model

HEAD = (
    "class_net/class-predict/depthwise_kernel",
    "class_net/class-predict/pointwise_kernel",
    "class_net/class-predict/bias",
)


def values(model):
    return {name: np.asarray(variable) for name, variable in published_variables(model).items()}


def same(arrays, expected):
    return arrays.keys() == expected.keys() and all(np.array_equal(arrays[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def raw(model):
    return raw_arrays(model)


@pytest.fixture(autouse=True)
def fresh(model):
    """Every test begins with other weights than any source has."""
    for variable in model.variables:
        variable.assign(np.full(variable.shape, 0.125))


def fresh_values(model):
    return {name: np.full(variable.shape, 0.125, np.float32) for name, variable in published_variables(model).items()}


def refused(model, source, words, **options):
    """The words of the error; the model is as it was."""
    with pytest.raises(EffdetError, match=words) as caught:
        weight_sources.load(model, CONFIG, source, **options)
    assert same(values(model), fresh_values(model))
    return str(caught.value)


# --- sources that hold the whole model ----------------------------------------------------------


def checkpoint_folder(path, raw):
    write_checkpoint(path / "efficientdet-lite0" / "model", raw)
    return path / "efficientdet-lite0"


SOURCES = {
    "folder": checkpoint_folder,
    "prefix": lambda path, raw: write_checkpoint(path / "model.ckpt-300", raw),
    "archive": lambda path, raw: write_archive(
        path / "efficientdet-lite0.tar.gz", checkpoint_folder(path / "made", raw)
    ),
    "tgz": lambda path, raw: write_archive(path / "d.tgz", checkpoint_folder(path / "made", raw), top="."),
    "objects": lambda path, raw: write_object_checkpoint(path / "ckpt-5", raw),
    "objects below a model's name": lambda path, raw: write_object_checkpoint(path / "ckpt-5", raw, "efficientdet-d0/"),
}


@pytest.mark.slow
@pytest.mark.parametrize("ema", [True, False], ids=["ema", "raw"])
@pytest.mark.parametrize("kind", SOURCES)
def test_tensorflow_checkpoints(tmp_path, model, raw, kind, ema):
    source = SOURCES[kind](tmp_path, raw)
    loaded = weight_sources.load(model, CONFIG, str(source), ema=ema)
    assert same(values(model), averaged(raw) if ema else raw)
    assert (loaded.variables, loaded.averaged) == (len(raw), len(raw) if ema else 0)
    assert not loaded.backbone_only
    assert loaded.left_out == ()


@pytest.mark.slow
def test_where_a_variable_has_no_average_it_is_taken_itself(tmp_path, model, raw):
    twins = {name: array for name, array in averaged(raw).items() if "moving_" not in name}
    loaded = weight_sources.load(model, CONFIG, write_checkpoint(tmp_path / "model", raw, twins))
    assert same(values(model), {**raw, **twins})
    assert loaded.averaged == len(twins) < len(raw)


@pytest.mark.slow
def test_averages_alone_are_enough_unless_they_are_refused(tmp_path, model, raw):
    write_checkpoint(tmp_path / "model", {}, averaged(raw), state=False)
    weight_sources.load(model, CONFIG, tmp_path)
    assert same(values(model), averaged(raw))


@pytest.mark.slow
def test_averages_alone_are_nothing_without_ema(tmp_path, model, raw):
    write_checkpoint(tmp_path / "model", {}, averaged(raw), state=False)
    refused(model, tmp_path, f"{len(raw)} do not fit", ema=False)


@pytest.mark.parametrize("whole", [False, True], ids=["weights", "model"])
@pytest.mark.parametrize("model_name", ["", "efficientdet-lite0/"])
def test_keras_h5(tmp_path, model, raw, model_name, whole):
    loaded = weight_sources.load(model, CONFIG, write_h5(tmp_path / "w.h5", raw, model_name, whole))
    assert same(values(model), raw)
    assert loaded.averaged == 0


@pytest.mark.parametrize("place", ["w.safetensors", "."])
def test_own_weights(tmp_path, model, raw, place):
    safetensors.numpy.save_file(raw, tmp_path / ("w.safetensors" if place != "." else "weights.safetensors"))
    weight_sources.load(model, CONFIG, tmp_path / place)
    assert same(values(model), raw)


@pytest.mark.slow
def test_loaded_says_what_it_was(tmp_path, model, raw):
    source = write_archive(tmp_path / "efficientdet-lite0.tar.gz", checkpoint_folder(tmp_path, raw))
    assert str(weight_sources.load(model, CONFIG, source)) == (
        f"efficientdet-lite0.tar.gz: TensorFlow checkpoint model: {len(raw)} variables set, "
        f"{len(raw)} of them moving averages"
    )


# --- which checkpoint of a folder ---------------------------------------------------------------


@pytest.mark.slow
def test_the_file_checkpoint_names_the_newest(tmp_path, model, raw):
    write_checkpoint(tmp_path / "model.ckpt-2", raw)
    write_checkpoint(tmp_path / "model.ckpt-10", {name: array + 1 for name, array in raw.items()}, {})
    weight_sources.load(model, CONFIG, tmp_path)  # checkpoint names model.ckpt-10, in another folder
    assert same(values(model), {name: array + 1 for name, array in raw.items()})


@pytest.mark.slow
def test_a_folder_whose_checkpoint_is_named_as_ours_are(tmp_path, model, raw):
    write_checkpoint(tmp_path / "step-100", raw, {})
    weight_sources.load(model, CONFIG, tmp_path)
    assert same(values(model), raw)


@pytest.mark.slow
def test_without_that_file_one_checkpoint_is_clear_and_two_are_listed(tmp_path, model, raw):
    write_checkpoint(tmp_path / "a", raw, {})
    (tmp_path / "checkpoint").unlink()
    weight_sources.load(model, CONFIG, tmp_path)
    assert same(values(model), raw)
    save_tensors(tmp_path / "b", {"x": np.zeros(1, np.float32)})
    with pytest.raises(EffdetError, match="expected one TensorFlow checkpoint, got a, b; give the prefix"):
        weight_sources.load(model, CONFIG, tmp_path)


@pytest.mark.parametrize("named", ["../model", "/etc/passwd", "other"])
def test_a_file_checkpoint_that_names_what_is_not_in_the_folder(tmp_path, model, raw, named):
    write_checkpoint(tmp_path / "model", raw)
    write_checkpoint(tmp_path / "folder" / "mine", raw)
    (tmp_path / "folder" / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
    refused(model, tmp_path / "folder", f"names '{named}', and the folder has mine")


@pytest.mark.parametrize(
    ("name", "words"), [("none", "no such file or folder"), (".", "got none"), ("w.txt", "expected weights")]
)
def test_what_is_no_source(tmp_path, model, name, words):
    (tmp_path / "w.txt").write_text("x")
    refused(model, tmp_path / name, words)


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.slow
def test_every_name_that_does_not_fit_is_listed(tmp_path, model, raw):
    arrays = dict(raw)
    del arrays["box_net/box-predict/bias"]
    arrays["box_net/box-9/bias"] = np.zeros(3, np.float32)
    arrays["class_net/class-0/bias"] = np.zeros(5, np.float32)
    words = refused(model, write_checkpoint(tmp_path / "model", arrays), "3 do not fit")
    assert words.splitlines()[1:] == [
        "missing: box_net/box-predict/bias",
        "unexpected: box_net/box-9/bias",
        "shape of class_net/class-0/bias: expected [16], got [5]",
    ]


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [pytest.param("checkpoint", marks=pytest.mark.slow), "h5", "safetensors"])
def test_numbers_that_are_not_finite(tmp_path, model, raw, kind, number):
    arrays = {**raw, "class_net/class-0/bias": np.full(16, number, np.float32)}
    if kind == "checkpoint":
        source = write_checkpoint(tmp_path / "model", arrays, {})
    elif kind == "h5":
        source = write_h5(tmp_path / "w.h5", arrays)
    else:
        source = tmp_path / "w.safetensors"
        safetensors.numpy.save_file(arrays, source)
    refused(model, source, "NaN or infinite numbers in 1\nclass_net/class-0/bias")


@pytest.mark.slow
def test_only_the_average_counts_where_it_is_taken(tmp_path, model, raw):
    arrays = {**raw, "class_net/class-0/bias": np.full(16, np.nan, np.float32)}
    weight_sources.load(model, CONFIG, write_checkpoint(tmp_path / "model", arrays, averaged(raw)))
    assert same(values(model), averaged(raw))


@pytest.mark.slow
def test_words_for_numbers(tmp_path, model, raw):
    arrays = {**raw, "class_net/class-0/bias": np.array(["x"] * 16)}
    refused(
        model,
        write_checkpoint(tmp_path / "model", arrays, {}, state=False),
        "expected floating-point numbers, got string",
    )


# --- another class head -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("theirs", [2, 5])
@pytest.mark.parametrize("kind", ["checkpoint", "h5", "safetensors"])
def test_another_number_of_classes(tmp_path, model, theirs, kind):
    other = raw_arrays(tiny_model(dataclasses.replace(CONFIG, num_classes=theirs)))
    if kind == "checkpoint":
        source = write_checkpoint(tmp_path / "model", other, {})
    elif kind == "h5":
        source = write_h5(tmp_path / "w.h5", other)
    else:
        source = tmp_path / "w.safetensors"
        save_weights(source, other)
    words = refused(model, source, "2 do not fit")
    assert f"shape of {HEAD[2]}: expected [27], got [{9 * theirs}]" in words
    assert f"{theirs} classes there, 3 here: with allow_head_mismatch" in words

    loaded = weight_sources.load(model, CONFIG, source, allow_head_mismatch=True)
    expected = {name: array for name, array in other.items() if name not in HEAD}
    assert same(values(model), expected | {name: fresh_values(model)[name] for name in HEAD})
    assert loaded.left_out == HEAD
    assert f"class head left out: {theirs} classes there, 3 here; it starts fresh" in str(loaded)


@pytest.mark.slow
def test_with_as_many_classes_the_head_is_taken(tmp_path, model, raw):
    loaded = weight_sources.load(model, CONFIG, write_checkpoint(tmp_path / "model", raw), allow_head_mismatch=True)
    assert same(values(model), averaged(raw))
    assert loaded.left_out == ()


@pytest.mark.slow
def test_no_other_mismatch_is_allowed(tmp_path, model):
    other = raw_arrays(tiny_model(dataclasses.replace(CONFIG, num_classes=5, fpn_channels=24)))
    source = write_checkpoint(tmp_path / "model", other)
    refused(model, source, r"shape of box_net/box-predict/pointwise_kernel", allow_head_mismatch=True)


@pytest.mark.slow
def test_a_head_that_is_missing_is_no_mismatch(tmp_path, model, raw):
    arrays = {name: array for name, array in raw.items() if name not in HEAD}
    refused(model, write_checkpoint(tmp_path / "m", arrays), f"missing: {HEAD[0]}", allow_head_mismatch=True)


@pytest.mark.slow
def test_a_head_of_no_number_of_classes_is_no_mismatch(tmp_path, model, raw):
    arrays = {**raw, HEAD[2]: np.zeros(10, np.float32)}  # nine anchors a cell
    source = write_checkpoint(tmp_path / "m", arrays, {})
    refused(model, source, r"class-predict/bias: expected \[27\], got \[10\]", allow_head_mismatch=True)


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_file_cut_short(tmp_path, model, raw):
    write_checkpoint(tmp_path / "model", raw)
    (data,) = tmp_path.glob("*.data-*")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    refused(model, tmp_path, "cannot be read")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_a_flipped_bit(tmp_path, model, raw, part):
    prefix = write_checkpoint(tmp_path / "model", raw, {}, state=False)
    file = prefix.with_suffix(f".{part}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    refused(model, prefix, "cannot be read|do not fit|are named and not there")


@pytest.mark.slow
def test_an_index_of_nothing(tmp_path, model):
    (tmp_path / "model.index").write_bytes(b"\0" * 100)
    refused(model, tmp_path, "cannot be read as a TensorFlow checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("fault", ["negative", "huge", "no entry"])
def test_an_index_that_ends_tensorflow(tmp_path, model, fault, archived, monkeypatch):
    """Its checksums are right, and TensorFlow ends its process on it: that is not this one, and no file is left."""
    write_hostile_index(tmp_path / "d0" / "model.index", fault)
    (tmp_path / "d0" / "model.data-00000-of-00001").write_bytes(bytes(4))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    source = write_archive(tmp_path / "d0.tar.gz", tmp_path / "d0") if archived else tmp_path / "d0" / "model"
    words = refused(model, source, "cannot be read as a TensorFlow checkpoint: TensorFlow is ended by it, signal 6")
    assert words.startswith(f"{source}: ")
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_an_index_of_one_number_is_read(tmp_path):
    """What the hostile ones are but for their fault."""
    write_hostile_index(tmp_path / "model.index", None)
    (tmp_path / "model.data-00000-of-00001").write_bytes(bytes(4))
    with weight_sources.opened(tmp_path / "model") as found:
        assert found.shapes == {"a/b": (1,)}


@pytest.mark.slow
def test_an_archive_is_named_and_not_the_temporary_folder(tmp_path, model, raw):
    write_checkpoint(tmp_path / "d0" / "model", raw)
    (tmp_path / "d0" / "model.index").write_bytes(b"\0" * 100)
    words = refused(model, write_archive(tmp_path / "d0.tar.gz", tmp_path / "d0"), "cannot be read as a TensorFlow")
    assert words.startswith(f"{tmp_path / 'd0.tar.gz'}: ")
    (tmp_path / "d0" / "checkpoint").write_text("")
    words = refused(model, write_archive(tmp_path / "d0.tar.gz", tmp_path / "d0"), "its file checkpoint names 'none'")
    assert words.startswith(f"{tmp_path / 'd0.tar.gz'}: ")


@pytest.mark.slow
def test_an_object_graph_of_nothing(tmp_path, model):
    save_tensors(tmp_path / "model", {"_CHECKPOINTABLE_OBJECT_GRAPH": np.array(b"\xff\xff\xff")})
    refused(model, tmp_path, "cannot be read as a TensorFlow checkpoint")


@pytest.mark.parametrize("content", [b"", b"no weights", b"\xff" * 64])
@pytest.mark.parametrize("name", ["w.h5", "w.safetensors", "w.tar.gz"])
def test_files_of_something_else(tmp_path, model, name, content):
    (tmp_path / name).write_bytes(content)
    refused(model, tmp_path / name, "cannot be read")


def test_safetensors_cut_short(tmp_path, model, raw):
    path = tmp_path / "w.safetensors"
    save_weights(path, raw)
    path.write_bytes(path.read_bytes()[:-4])
    refused(model, path, "cannot be read")


def test_h5_cut_short(tmp_path, model, raw):
    path = write_h5(tmp_path / "w.h5", raw)
    content = path.read_bytes()
    for length in (len(content) - 64, len(content) // 2, 600):
        path.write_bytes(content[:length])
        refused(model, path, "cannot be read|damaged")


class Call:
    """Pickles as a call that makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        import os

        return os.mkdir, (self.folder,)


def test_a_pickle_with_foreign_globals(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Call(victim)))
    config = model_config("efficientdet-lite0", 1)
    with pytest.raises(EffdetError, match=r"w\.pth: not a weights file that can be read: it asks for posix\.mkdir"):
        weight_sources.load(tiny_model(), config, tmp_path / "w.pth")
    assert not victim.exists()


# --- h5 files that lead elsewhere ---------------------------------------------------------------


def leads_elsewhere(path, raw, kind):
    """The weight file with one array that lies in another file."""
    name = "class_net/class_net/class-0/bias:0"
    write_h5(path, raw)
    secret = path.with_name("secret.h5")
    with h5py.File(secret, "w") as file:
        file["x"] = raw["class_net/class-0/bias"]
    (path.with_name("secret.bin")).write_bytes(raw["class_net/class-0/bias"].tobytes())
    with h5py.File(path, "r+") as file:
        del file[name]
        if kind == "external link":
            file[name] = h5py.ExternalLink("secret.h5", "/x")
        elif kind == "soft link":
            file[name] = h5py.SoftLink("/class_net/class_net/class-0/pointwise_kernel:0")
        elif kind == "external storage":
            where = [(str(path.with_name("secret.bin")), 0, 64)]
            file.create_dataset(name, (16,), np.float32, external=where)
        elif kind == "virtual":
            layout = h5py.VirtualLayout((16,), np.float32)
            layout[:] = h5py.VirtualSource(secret, "x", shape=(16,))
            file.create_virtual_dataset(name, layout)
        elif kind == "loop":
            file[name] = file["class_net"]
        elif kind == "bomb":
            file.create_dataset(name, (16,), np.float32, chunks=(1 << 26,), maxshape=(None,), compression="gzip")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("external link", "bias:0 is a link to elsewhere"),
        ("soft link", "bias:0 is a link to elsewhere"),
        ("external storage", "its numbers lie in other files"),
        ("virtual", "its numbers lie in other files"),
        ("loop", "is there twice"),
        ("bomb", "unpacks to far more than its 16 numbers"),
    ],
)
def test_h5_that_leads_elsewhere(tmp_path, model, raw, kind, words):
    refused(model, leads_elsewhere(tmp_path / "w.h5", raw, kind), words)


@pytest.mark.parametrize("kind", [np.int64, np.bool_])
def test_safetensors_of_whole_numbers(tmp_path, model, raw, kind):
    arrays = {name: array.astype(kind) for name, array in raw.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    words = refused(model, tmp_path / "w.safetensors", f"expected floating-point numbers, got others in {len(raw)}")
    assert f"\nclass_net/class-0/bias: {np.dtype(kind)}" in words


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_safetensors_of_other_floating_point_numbers(tmp_path, model, raw, kind):
    arrays = {name: tf.cast(array, kind).numpy() for name, array in raw.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    weight_sources.load(model, CONFIG, tmp_path / "w.safetensors")
    assert same(values(model), {name: array.astype(np.float32) for name, array in arrays.items()})


def test_safetensors_of_a_type_that_numpy_has_not(tmp_path):
    name = "class_net/class-0/bias"
    header = {name: {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with (
        weight_sources.opened(tmp_path / "w.safetensors") as found,
        pytest.raises(EffdetError, match=rf"w\.safetensors: {name}: cannot be read"),
    ):
        found.read(name)


def test_h5_of_whole_numbers(tmp_path, model, raw):
    arrays = {**raw, "class_net/class-0/bias": np.arange(16)}
    refused(
        model, write_h5(tmp_path / "w.h5", arrays), "class_net/class-0/bias: expected floating-point numbers, got int64"
    )


def test_files_are_those_that_are_read(tmp_path, raw):
    prefix = write_checkpoint(tmp_path / "model", raw)
    (tmp_path / "model.meta").write_text("a graph")
    expected = ["model.index", "model.data-00000-of-00001"]
    assert [path.name for path in weight_sources.files(tmp_path)] == expected
    assert [path.name for path in weight_sources.files(prefix)] == expected
    h5 = write_h5(tmp_path / "w.h5", raw)
    assert weight_sources.files(h5) == [h5]


def test_the_number_of_classes_is_known_before_a_model_is_built(tmp_path, raw):
    with weight_sources.opened(write_h5(tmp_path / "w.h5", raw)) as found:
        assert weight_sources.num_classes(found, CONFIG) == 3
    other = {name: array for name, array in raw.items() if name not in HEAD}
    with (
        weight_sources.opened(write_h5(tmp_path / "other.h5", other)) as found,
        pytest.raises(EffdetError, match=r"other\.h5: expected a detector's weights, and it has no class_net"),
    ):
        weight_sources.num_classes(found, CONFIG)


def test_a_backbone_alone_is_no_detector(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    with (
        pytest.raises(EffdetError, match=r"w\.pth: holds a backbone alone; expected a detector"),
        weight_sources.opened(tmp_path / "w.pth"),
    ):
        pytest.fail("it was opened")


@pytest.mark.slow
def test_what_was_opened_is_loaded_without_unpacking_again(tmp_path, model, raw):
    source = SOURCES["archive"](tmp_path, raw)
    with weight_sources.opened(source) as found:
        assert weight_sources.num_classes(found, CONFIG) == 3
        source.unlink()
        loaded = weight_sources.load(model, CONFIG, found)
    assert same(values(model), averaged(raw))
    assert loaded.what == "efficientdet-lite0.tar.gz: TensorFlow checkpoint model"


# --- the published network ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientdet-d0", "efficientdet-lite0"])
def test_networks_as_published(tmp_path, name):
    """Every published name, of scalars too (d0's WSM): from a .tar.gz, an object-based checkpoint and an .h5."""
    config = model_config(name, 90, (128, 128))
    net = build(config)
    arrays = {name: formula_array(name, shape) for name, shape in expected_variables(name).items()}
    folder = write_checkpoint(tmp_path / name / "model", arrays).parent
    objects = write_object_checkpoint(tmp_path / "objects" / "ckpt-300", arrays)
    for source, expected in (
        (write_archive(tmp_path / f"{name}.tar.gz", folder), averaged(arrays)),
        (write_h5(tmp_path / f"{name}.h5", arrays), arrays),
        (objects, averaged(arrays)),
    ):
        loaded = weight_sources.load(net, config, source)
        assert loaded.variables == len(arrays)
        assert same(values(net), expected)


@pytest.mark.slow
def test_an_imagenet_checkpoint_of_the_backbone_sets_the_backbone_alone(tmp_path):
    config = model_config("efficientdet-lite0", 3, (128, 128))
    net = build(config)
    before = values(net)
    raw = {name: array for name, array in raw_arrays(net).items() if name.startswith("efficientnet-lite0/")}
    classifier = {"efficientnet-lite0/head/dense/bias": np.zeros(1000, np.float32)}
    loaded = weight_sources.load(net, config, write_checkpoint(tmp_path / "model", {**raw, **classifier}))
    assert loaded.backbone_only
    assert "the backbone alone" in str(loaded)
    assert same(values(net), {**before, **averaged(raw)})
