"""Reads Keras' HDF5 weight files by variable name, with h5py alone: no object of the file is ever built.

Keras 2 (and .h5 of Keras 3): LAYER/NAME:0, below model_weights/ in a file of a whole model.
Keras 3's .weights.h5: layers/CLASS_COUNT/vars/INDEX, the layer's name among the attributes of vars.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from effdet.errors import EffdetError
from effdet.stored_arrays import StoredArrays

# what Keras 3 numbers, by the number of arrays that the layer has
LEAVES = {
    1: ("kernel",),
    2: ("kernel", "bias"),
    3: ("mean", "variance", "count"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}
MAX_CHUNK = 1 << 24  # numbers that HDF5 may unpack at once beyond what a dataset has
READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError)


@contextlib.contextmanager
def open_h5(path: Path) -> Iterator[StoredArrays]:
    """The arrays of the file by the variables' names, without ":0"; readable as long as the block runs.

    EffdetError where the file is damaged, of another layout, or leads to other files: links that are not plain, data
    kept outside, virtual data sets.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise EffdetError(f"{path}: cannot be read as HDF5: {error}") from None
    with file:
        try:
            datasets = _datasets(file, path)
            names = _names_of_keras3(file, datasets) if "layers" in file else _names_of_keras2(datasets)
        except EffdetError:
            raise
        except READ_ERRORS as error:
            raise EffdetError(f"{path}: damaged HDF5: {error}") from None
        if len(set(names.values())) != len(names):
            raise EffdetError(f"{path}: has two arrays of one name; it is no weight file of Keras")
        by_name = {name: datasets[where] for where, name in names.items()}

        def read(name: str) -> NDArray[Any]:
            try:
                kind = by_name[name].dtype
                if kind.kind == "f":
                    return np.asarray(by_name[name][()], np.float32)
            except READ_ERRORS as error:
                raise EffdetError(f"{path}: {name}: cannot be read: {error}") from None
            raise EffdetError(f"{path}: {name}: expected floating-point numbers, got {kind}")

        yield StoredArrays(f"Keras weight file {path.name}", {name: d.shape for name, d in by_name.items()}, read)


def _datasets(file: h5py.File, path: Path) -> dict[str, h5py.Dataset]:
    """Every data set of the file by its place, once it is known that all lies in this file."""
    found: dict[str, h5py.Dataset] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, h5py.Group]] = [("", file)]
    while waiting:
        parent, group = waiting.pop()
        for key in group:
            where = f"{parent}/{key}" if parent else key
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise EffdetError(f"{path}: {where} is a link to elsewhere, which no weight file needs")
            item = group[key]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                raise EffdetError(f"{path}: {where} is there twice")
            seen.add(address)
            if isinstance(item, h5py.Group):
                waiting.append((where, item))
            elif isinstance(item, h5py.Dataset):
                _check_dataset(item, f"{path}: {where}")
                found[where] = item
    return found


def _check_dataset(dataset: h5py.Dataset, where: str) -> None:
    if dataset.external or dataset.is_virtual:
        raise EffdetError(f"{where}: its numbers lie in other files, which no weight file needs")
    if dataset.shape is None:
        raise EffdetError(f"{where}: has no numbers")
    if dataset.chunks and math.prod(dataset.chunks) > dataset.size + MAX_CHUNK:
        raise EffdetError(f"{where}: unpacks to far more than its {dataset.size} numbers")


def _names_of_keras2(datasets: dict[str, h5py.Dataset]) -> dict[str, str]:
    """Place -> variable's name."""
    whole = "model_weights/" if any(where.startswith("model_weights/") for where in datasets) else ""
    inside = [where for where in datasets if where.startswith(whole) and not where.startswith("optimizer_weights/")]
    return {where: where.removeprefix(whole).partition("/")[2].removesuffix(":0") for where in inside}


def _names_of_keras3(file: h5py.File, datasets: dict[str, h5py.Dataset]) -> dict[str, str]:
    """Place -> LAYER/LEAF, for layers of the kinds that an EfficientNet is made of."""
    names: dict[str, str] = {}
    for key, group in file["layers"].items():
        variables = sorted(where for where in datasets if where.startswith(f"layers/{key}/vars/"))
        if not variables:
            continue
        layer = group["vars"].attrs.get("name")
        if not isinstance(layer, str):
            raise EffdetError(f"{file.filename}: of an older Keras, its layers have no names; save it with this one")
        leaves = LEAVES.get(len(variables), ())
        names |= {where: f"{layer}/{leaf}" for where, leaf in zip(variables, leaves, strict=False)}
    return names
