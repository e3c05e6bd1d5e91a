"""Weights by name, and safe files."""

import pickle
import struct
from collections import OrderedDict

import keras
import numpy as np
import pytest

from effdet import weights
from effdet.errors import EffdetError
from effdet.layers import FastFusion, FusedBatchNormalization, SeparableConvolution
from effdet.torch_file import MAGIC_NUMBER, PROTOCOL, read_torch_file


def small_net():
    """A few layers named as published ones."""
    images = keras.Input((4, 4, 2))
    x = SeparableConvolution(2, "glorot_uniform", name="class_net.class-0")(images)
    x = FusedBatchNormalization(0.99, 1e-3, name="class_net.class-0-bn-3")(x)
    x = FastFusion(name="fpn_cells.cell_0.fnode0")([x, images])
    return keras.Model(images, x, name="small")


def arrays_of(net):
    return {name: np.asarray(variable) for name, variable in weights.published_variables(net).items()}


def test_published_names():
    shapes = {name: tuple(variable.shape) for name, variable in weights.published_variables(small_net()).items()}
    assert shapes == {
        "class_net/class-0/depthwise_kernel": (3, 3, 2, 1),
        "class_net/class-0/pointwise_kernel": (1, 1, 2, 2),
        "class_net/class-0/bias": (2,),
        "class_net/class-0-bn-3/gamma": (2,),
        "class_net/class-0-bn-3/beta": (2,),
        "class_net/class-0-bn-3/moving_mean": (2,),
        "class_net/class-0-bn-3/moving_variance": (2,),
        "fpn_cells/cell_0/fnode0/WSM": (),
        "fpn_cells/cell_0/fnode0/WSM_1": (),
    }


def test_weights_survive_the_file(tmp_path):
    net, other = small_net(), small_net()
    weights.save_weights(tmp_path / "w.safetensors", arrays_of(net))
    weights.assign(other, weights.load_weights(tmp_path / "w.safetensors"))
    expected = arrays_of(net)
    assert all(np.array_equal(array, expected[name]) for name, array in arrays_of(other).items())


def test_same_arrays_give_the_same_bytes(tmp_path):
    arrays = arrays_of(small_net())
    weights.save_weights(tmp_path / "a", arrays)
    weights.save_weights(tmp_path / "b", dict(reversed(arrays.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_assign_lists_every_fault_and_sets_nothing():
    net = small_net()
    before = arrays_of(net)
    arrays = {name: array + 1 for name, array in before.items()}
    del arrays["class_net/class-0/bias"], arrays["fpn_cells/cell_0/fnode0/WSM"]
    arrays["class_net/class-9/bias"] = np.zeros(3, np.float32)
    arrays["class_net/class-0/pointwise_kernel"] = np.zeros((1, 1, 2, 5), np.float32)
    with pytest.raises(EffdetError) as caught:
        weights.assign(net, arrays)
    assert str(caught.value).splitlines() == [
        "weights for small: 4 do not fit",
        "missing: class_net/class-0/bias",
        "missing: fpn_cells/cell_0/fnode0/WSM",
        "unexpected: class_net/class-9/bias",
        "shape of class_net/class-0/pointwise_kernel: expected [1, 1, 2, 2], got [1, 1, 2, 5]",
    ]
    assert all(np.array_equal(array, before[name]) for name, array in arrays_of(net).items())


def test_assign_within_a_scope():
    net = small_net()
    scope = "class_net/class-0-bn-3/"
    arrays = {name: array + 1 for name, array in arrays_of(net).items() if name.startswith(scope)}
    weights.assign(net, arrays, scope)
    after = arrays_of(net)
    assert np.array_equal(after["class_net/class-0-bn-3/gamma"], [2, 2])
    assert after["fpn_cells/cell_0/fnode0/WSM"] == 1


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_non_finite_numbers_are_refused(tmp_path, number):
    net = small_net()
    arrays = arrays_of(net) | {"class_net/class-0/bias": np.array([0, number], np.float32)}
    path = tmp_path / "w.safetensors"
    with pytest.raises(EffdetError, match="NaN or infinite numbers in 1\nclass_net/class-0/bias"):
        weights.save_weights(path, arrays)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EffdetError, match="NaN"):
        weights.assign(net, arrays)
    weights.safetensors.numpy.save_file(arrays, path)
    with pytest.raises(EffdetError, match="NaN"):
        weights.load_weights(path)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\xff" * 64])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(EffdetError, match=r"w\.safetensors: cannot be read"):
        weights.load_weights(path)


def test_file_that_cannot_be_written(tmp_path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(EffdetError, match="cannot be written"):
        weights.save_weights(tmp_path / "w.safetensors", arrays_of(small_net()))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_missing_file(tmp_path):
    with pytest.raises(EffdetError, match="cannot be read"):
        weights.load_weights(tmp_path / "none.safetensors")


# --- the torch file -----------------------------------------------------------------------------


class Named:
    """Pickles as a call of module.name with arguments, whatever that is."""

    def __init__(self, module, name, *arguments):
        self.target, self.arguments = f"c{module}\n{name}\n", arguments


class Pickler(pickle._Pickler):
    """Writes Named calls, and storages by persistent id as torch does."""

    def persistent_id(self, item):
        return item[1:] if isinstance(item, tuple) and item[:1] == ("persistent",) else None

    def save(self, item, save_persistent_id=True):
        if not isinstance(item, Named):
            super().save(item, save_persistent_id)
            return
        self.write(item.target.encode())
        if item.arguments:
            super().save(item.arguments)
            self.write(pickle.REDUCE)


def tensor(key, offset, shape, strides, numbers, kind="FloatStorage"):
    storage = ("persistent", "storage", Named("torch", kind), key, "cpu", numbers, None)
    return Named("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, OrderedDict())


def write_torch_file(path, tensors, storages, magic=MAGIC_NUMBER):
    """storages: key -> array."""
    with path.open("wb") as file:
        for part in (magic, PROTOCOL, {"little_endian": True}, OrderedDict(tensors), list(storages)):
            Pickler(file, protocol=2).dump(part)
        for numbers in storages.values():
            file.write(struct.pack("<q", numbers.size) + numbers.tobytes())
    return path


def test_torch_file_of_strided_views(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    path = write_torch_file(
        tmp_path / "w.pth",
        {
            "rows": tensor("7", 0, (3, 4), (4, 1), 12),
            "transposed": tensor("7", 4, (4, 2), (1, 4), 12),  # of rows 1 and 2
            "count": tensor("8", 0, (), (), 1, "LongStorage"),
        },
        {"7": numbers, "8": np.array([5])},
    )
    tensors = read_torch_file(path)
    assert np.array_equal(tensors["rows"], numbers.reshape(3, 4))
    assert np.array_equal(tensors["transposed"], numbers.reshape(3, 4)[1:].T)
    assert (tensors["count"], tensors["count"].dtype) == (5, np.int64)


def test_torch_file_that_asks_for_code(tmp_path):
    victim = tmp_path / "victim"
    path = write_torch_file(tmp_path / "w.pth", {"w": Named("os", "mkdir", str(victim))}, {})
    with pytest.raises(EffdetError, match=r"w\.pth: not a weights file that can be read: it asks for os\.mkdir"):
        read_torch_file(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(1, (3, 4), (4, 1)), (0, (4, 4), (4, 1)), (0, (3, 4), (5, 1)), (-1, (2,), (1,)), (8, (2,), (-4,))],
)
def test_torch_file_that_reads_outside_of_its_storage(tmp_path, offset, shape, strides):
    path = write_torch_file(
        tmp_path / "w.pth", {"w": tensor("7", offset, shape, strides, 12)}, {"7": np.zeros(12, np.float32)}
    )
    with pytest.raises(EffdetError, match="outside its storage"):
        read_torch_file(path)


def test_torch_file_that_makes_much_of_little(tmp_path):
    views = {"w": tensor("7", 0, (1 << 20, 1 << 20), (0, 0), 1)}
    path = write_torch_file(tmp_path / "w.pth", views, {"7": np.zeros(1, np.float32)})
    with pytest.raises(EffdetError, match="more numbers than its storage"):
        read_torch_file(path)


def test_torch_file_cut_short(tmp_path):
    path = write_torch_file(tmp_path / "w.pth", {"w": tensor("7", 0, (12,), (1,), 12)}, {"7": np.zeros(12, np.float32)})
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(EffdetError, match="not a weights file"):
            read_torch_file(path)


def test_torch_file_with_a_storage_longer_than_itself(tmp_path):
    path = write_torch_file(tmp_path / "w.pth", {"w": tensor("7", 0, (0,), (1,), 0)}, {"7": np.zeros(0, np.float32)})
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<q", 2**61))
    with pytest.raises(EffdetError, match="longer than the file"):
        read_torch_file(path)


def test_torch_file_of_another_magic_number(tmp_path):
    with pytest.raises(EffdetError, match="another format"):
        read_torch_file(write_torch_file(tmp_path / "w.pth", {}, {}, magic=1))
