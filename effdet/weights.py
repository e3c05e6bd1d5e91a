"""Weights by their published names (google/automl efficientdet, Keras variables), in and out.

A layer's name holds '.' where the published names hold '/', so one rule gives every name:
`fpn_cells.cell_0.fnode0.op_after_combine5.bn` + `gamma` -> fpn_cells/cell_0/fnode0/op_after_combine5/bn/gamma.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from effdet.errors import EffdetError
from effdet.stored_arrays import StoredArrays

WEIGHTS_FILE = "weights.safetensors"  # in a model's folder

Arrays = Mapping[str, NDArray[Any]]


def published_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Every variable of the model by its published name."""
    return {variable.path.replace(".", "/"): variable for variable in model.variables}


def assign(model: keras.Model, arrays: Arrays, scope: str = "", left_out: Collection[str] = ()) -> None:
    """Sets all variables of the model whose published name begins with scope, from arrays of just these.

    Variables of `left_out` keep their values. EffdetError, with nothing set, where names are missing, unexpected or
    differ in shape (each listed), or where a number is not finite.
    """
    check_fit(model, {name: array.shape for name, array in arrays.items()}, scope, left_out)
    _refuse_non_finite(arrays, f"weights for {model.name}")
    for name, variable in _asked_for(model, scope, left_out).items():
        variable.assign(arrays[name])


def check_fit(
    model: keras.Model, shapes: Mapping[str, tuple[int, ...]], scope: str = "", left_out: Collection[str] = ()
) -> None:
    """EffdetError listing every name that `assign` would refuse, before an array is read."""
    variables = _asked_for(model, scope, left_out)
    faults = [f"missing: {name}" for name in variables if name not in shapes]
    faults += [f"unexpected: {name}" for name in shapes if name not in variables]
    faults += [
        f"shape of {name}: expected {list(variable.shape)}, got {list(shapes[name])}"
        for name, variable in variables.items()
        if name in shapes and tuple(variable.shape) != tuple(shapes[name])
    ]
    if faults:
        raise EffdetError("\n".join([f"weights for {model.name}: {len(faults)} do not fit", *faults]))


def _asked_for(model: keras.Model, scope: str, left_out: Collection[str]) -> dict[str, keras.Variable]:
    variables = published_variables(model).items()
    return {name: variable for name, variable in variables if name.startswith(scope) and name not in left_out}


def save_weights(path: Path, arrays: Arrays) -> None:
    """Writes the arrays as .safetensors; the same arrays give the same bytes, and a fault leaves no file.

    EffdetError where a number is not finite, or the file cannot be written.
    """
    _refuse_non_finite(arrays, str(path))
    partial = path.with_name(f"{path.name}.partial")
    try:
        safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, partial)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise EffdetError(f"{path}: cannot be written: {error}") from error


def load_weights(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .safetensors file. EffdetError where it is missing, damaged, or a number is not finite."""
    try:
        arrays: dict[str, NDArray[Any]] = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise EffdetError(f"{path}: cannot be read as .safetensors: {error}") from error
    _refuse_non_finite(arrays, str(path))
    return arrays


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[StoredArrays]:
    """The arrays of a .safetensors file, readable as long as the block runs. EffdetError where it is damaged."""
    try:
        opened = safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise EffdetError(f"{path}: cannot be read as .safetensors: {error}") from error
    with opened as file:

        def read(name: str) -> NDArray[Any]:
            try:
                return np.asarray(file.get_tensor(name))
            except (OSError, AttributeError, TypeError, safetensors.SafetensorError) as error:  # float8: NumPy has none
                raise EffdetError(f"{path}: {name}: cannot be read: {error}") from None

        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 not a dict
        yield StoredArrays(f"weights {path.parent.name}/{path.name}", shapes, read)


def _refuse_non_finite(arrays: Arrays, where: str) -> None:
    names = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if names:
        raise EffdetError("\n".join([f"{where}: NaN or infinite numbers in {len(names)}", *names]))
