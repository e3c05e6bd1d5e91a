"""Reads a weights file of torch.save's first format (torch 1.5 and older) without torch.

The format is a row of pickles (magic number, protocol, system, the tensors by name, the keys of their
storages), then each storage as an int64 count and its bytes. A pickle can name any function to be
called on loading: here it may name four, and none of them is run.
"""

import collections
import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effdet.errors import EffdetError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


class _Storage(NamedTuple):
    """A run of numbers that tensors are views of."""

    dtype: str
    key: str
    length: int  # numbers


class _View(NamedTuple):
    """A tensor before the numbers are read; offset and strides in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


# what the file may name, and what stands for it here
MEANINGS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


class _Unpickler(pickle.Unpickler):
    """Gives plain values, ordered dicts and the views above; anything else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in MEANINGS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights file needs")
        return MEANINGS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, length, _ = pid  # "storage", type, key, device, length, no view
        return _Storage(dtype, key, length)


def read_torch_file(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of the file by name, each in its own memory: float32 or int64.

    EffdetError where the file is missing, truncated, of another format, or asks for any code.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size)
    except Exception as error:  # unpickling what is no pickle may raise anything
        raise EffdetError(f"{path}: not a weights file that can be read: {error}") from error


def _read(file: BinaryIO, size: int) -> dict[str, NDArray[Any]]:
    magic, protocol, _, views, keys = (_Unpickler(file).load() for _ in range(5))
    if (magic, protocol) != (MAGIC_NUMBER, PROTOCOL):
        raise EffdetError("it is of another format")
    dtypes = {view.storage.key: view.storage.dtype for view in views.values()}
    numbers = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        length = count * np.dtype(dtypes[key]).itemsize
        if length > size:
            raise EffdetError(f"storage {key} is longer than the file")
        numbers[key] = np.frombuffer(file.read(length), dtypes[key], count)
    return {name: _array(view, numbers[view.storage.key]) for name, view in views.items()}


def _array(view: _View, numbers: NDArray[Any]) -> NDArray[Any]:
    extents = [(side - 1) * stride for side, stride in zip(view.shape, view.strides, strict=True)]
    if min((view.offset, *view.shape, *view.strides)) < 0 or view.offset + sum(extents) >= numbers.size:
        raise EffdetError("a tensor reaches outside its storage")
    if math.prod(view.shape) > numbers.size:  # a stride of 0 makes any size of one number
        raise EffdetError("a tensor has more numbers than its storage")
    strides = [stride * numbers.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(numbers[view.offset :], view.shape, strides).copy()
