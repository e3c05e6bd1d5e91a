"""Weight files in the layouts that others publish, written by their own means: TensorFlow's saver, h5py, tarfile."""

import io
import struct
import tarfile

import google_crc32c
import h5py
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto

from effdet.weights import published_variables
from tests.effdet.published import formula_array

EMA = "/ExponentialMovingAverage"


def raw_arrays(model):
    """Published name -> the formula's array, as trained."""
    return {name: formula_array(name, tuple(variable.shape)) for name, variable in published_variables(model).items()}


def averaged(raw):
    """The moving averages that stand beside them: others, so that it shows which were taken."""
    return {name: (0.5 * array + 0.25).astype(np.float32) for name, array in raw.items()}


def write_checkpoint(prefix, raw, twins=None, state=True):
    """A TensorFlow checkpoint as google/automl publishes it: twins, momentum slots, global_step, and the file that
    names it, with the folder it was made in."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(raw)
    for name, array in (averaged(raw) if twins is None else twins).items():
        tensors[name + EMA] = array
    if state:
        tensors |= {f"{name}/Momentum": np.zeros_like(raw[name]) for name in raw if "moving_" not in name}
        tensors["global_step"] = np.int64(1)
    save_tensors(prefix, tensors)
    (prefix.parent / "checkpoint").write_text(
        f'model_checkpoint_path: "/made/elsewhere/{prefix.name}"\n'
        f'all_model_checkpoint_paths: "/made/elsewhere/{prefix.name}"\n'
    )
    return prefix


def save_tensors(prefix, tensors):
    values = [tf.constant(array) for array in tensors.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(tensors), shape_and_slices=[""] * len(values), tensors=values
    )


def write_hostile_index(path, fault):
    """A checkpoint's .index (a table as LevelDB has it) with an array a/b, whole but for what it says of its shape.

    `fault`: "negative" and "huge" dimensions, "no entry": bytes that are none; None: one float32.
    """
    header, entry = BundleHeaderProto(num_shards=1), BundleEntryProto(dtype=1, size=4)
    header.version.producer = 1
    sizes = {"negative": [-5], "huge": [1 << 62, 1 << 62]}.get(fault, [1])
    for size in sizes:
        entry.shape.dim.add().size = size
    written = b"\xff\xff\xff" if fault == "no entry" else entry.SerializeToString()

    content = b""

    def add(entries):
        """A block, and where it is: offset and length."""
        nonlocal content
        keys = [bytes([0]) + _varint(len(key)) + _varint(len(value)) + key + value for key, value in entries]
        restarts = [sum(map(len, keys[:number])) for number in range(max(1, len(keys)))]
        block = b"".join(keys) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + b"\0"
        crc = google_crc32c.value(block)
        place = _varint(len(content)) + _varint(len(block) - 1)
        content += block + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
        return place

    data = add([(b"", header.SerializeToString()), (b"a/b", written)])
    footer = add([]) + add([(b"\xff", data)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))


def _varint(number):
    written = b""
    while number > 127:
        written += bytes([number & 127 | 128])
        number >>= 7
    return written + bytes([number])


def write_archive(path, folder, top="efficientdet-lite0"):
    """The folder's files as a .tar.gz, below `top`."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, top)
    return path


def write_members(path, *members):
    """A .tar.gz of (TarInfo, bytes)."""
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


class Trainer(tf.Module):
    """An optimizer whose slots TensorFlow writes into an object-based checkpoint, as those of Keras 2 do."""

    def __init__(self, slots):
        super().__init__()
        self.step = tf.Variable(3, name="SGD/iter", dtype=tf.int64)
        self.slots = lambda: slots  # slot -> name of variable -> variable; a dict would be tracked as part of the model

    def get_slot_names(self):
        return list(self.slots())

    def get_slot(self, variable, name):
        return self.slots()[name][variable.name.partition(":")[0]]

    _create_or_restore_slot_variable = None  # by having it TensorFlow knows an optimizer; only a restore calls it


def write_object_checkpoint(prefix, raw, scope=""):
    """A checkpoint of Keras 2 training: an object graph, the optimizer's slots "average" and "momentum"."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    variables = [tf.Variable(array, name=scope + name) for name, array in raw.items()]
    model = tf.Module()
    model.variables_of_layers = variables
    twins = averaged(raw)
    slots = {
        "average": {scope + name: tf.Variable(twins[name], name=f"{scope}{name}/average") for name in raw},
        "momentum": {scope + name: tf.Variable(0 * raw[name], name=f"{scope}{name}/momentum") for name in raw},
    }
    checkpoint = tf.train.Checkpoint(model=model, optimizer=Trainer(slots))
    return checkpoint.write(str(prefix))


def write_h5(path, raw, model_name="", whole=False):
    """A Keras 2 weight file: a group a layer, below it the variables' names with ":0"."""
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if whole else file
        layers = list(dict.fromkeys(name.partition("/")[0] for name in raw))
        group.attrs["layer_names"] = [layer.encode() for layer in layers]
        group.attrs["backend"] = b"tensorflow"
        for layer in layers:
            below = group.create_group(layer)
            names = [name for name in raw if name.partition("/")[0] == layer]
            below.attrs["weight_names"] = [f"{model_name}{name}:0".encode() for name in names[:500]]
            for name in names:
                below.create_dataset(f"{model_name}{name}:0", data=raw[name])
        group.create_group("top_level_model_weights").attrs["weight_names"] = []
    return path
