"""Weights from wherever people have them, into a model: one function, `load`.

Sources: a TensorFlow checkpoint of google/automl or NVIDIA (folder, prefix, .tar.gz), a Keras weight file (.h5), an
EfficientNet of keras.applications (object or .h5), "imagenet", efficientnet-lite0's .pth, and our own: a bundle's
folder, .safetensors, a training checkpoint (best-..., step-...) or a run's folder, of which it is the best.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import keras

from effdet import backbone_weights
from effdet.checkpoint import is_checkpoint
from effdet.config import ModelConfig
from effdet.errors import EffdetError
from effdet.h5_weights import open_h5
from effdet.stored_arrays import StoredArrays
from effdet.tf_archive import unpacked
from effdet.tf_checkpoint import newest_prefix, open_checkpoint
from effdet.training_weights import best_of, open_training_checkpoint
from effdet.weights import WEIGHTS_FILE, assign, check_fit, open_weights, published_variables

ARCHIVES = (".tar.gz", ".tgz")
FILES = (".safetensors", ".h5", ".hdf5", ".pth")
HEAD = "class_net/class-predict/"
HEAD_BIAS = f"{HEAD}bias"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` took."""

    what: str  # kind and place
    variables: int  # set
    averaged: int  # of them, from moving averages
    backbone_only: bool
    left_out: tuple[str, ...]  # variables of the model that keep their values though the source has them otherwise
    classes: tuple[int, int] | None  # there and here, where they differ

    def __str__(self) -> str:
        words = [f"{self.what}: {self.variables} variables set, {self.averaged} of them moving averages"]
        if self.backbone_only:
            words.append("the backbone alone; what stands on it starts fresh")
        if self.classes:
            there, here = self.classes
            words.append(f"class head left out: {there} classes there, {here} here; it starts fresh ({HEAD}*)")
        return "\n".join(words)


def load(
    model: keras.Model,
    config: ModelConfig,
    source: str | Path | keras.Model | StoredArrays,
    ema: bool = True,
    allow_head_mismatch: bool = False,
) -> Loaded:
    """Sets the model's variables, or those of its backbone where the source has no others.

    `source`: also what `opened` gives. `ema`: moving averages are taken where there are any. `allow_head_mismatch`:
    where the number of classes differs, the last layer of the class head keeps its values. EffdetError, with nothing
    set, where the source is damaged or hostile, a number is not finite or no floating-point one, or names are missing,
    unexpected or differ in shape (each is listed).
    """
    if isinstance(source, StoredArrays):
        return _give(model, config, _by_our_names(source, config), allow_head_mismatch)
    if isinstance(source, keras.Model):
        return _give(model, config, backbone_weights.of_object(source, config), allow_head_mismatch)
    if str(source) == "imagenet":
        return _give(model, config, backbone_weights.imagenet(config), allow_head_mismatch)
    path = _resolved(Path(source))
    if is_checkpoint(path):
        return _give(model, config, open_training_checkpoint(path, model, config, ema), allow_head_mismatch)
    if path.suffix == ".pth":
        return _give(model, config, backbone_weights.lite0(path, config), allow_head_mismatch)
    with _named(path, ema) as found:
        return _give(model, config, _by_our_names(found, config), allow_head_mismatch)


def _by_our_names(found: StoredArrays, config: ModelConfig) -> StoredArrays:
    application = backbone_weights.is_application(found.shapes)
    return backbone_weights.of_application(found, config) if application else found


def _give(model: keras.Model, config: ModelConfig, found: StoredArrays, allow_head_mismatch: bool) -> Loaded:
    backbone = f"{config.backbone}/"
    backbone_only = bool(found.shapes) and all(name.startswith(backbone) for name in found.shapes)
    if backbone_only:  # an ImageNet checkpoint has its classifier below this name too
        found = found.renamed({name: name for name in found.shapes if not name.startswith(f"{backbone}head/")})
    scope = backbone if backbone_only else ""
    classes = _class_counts(model, config, found)
    left_out: tuple[str, ...] = ()
    if classes and allow_head_mismatch:
        left_out = tuple(name for name in published_variables(model) if name.startswith(HEAD))
        found = found.renamed({name: name for name in found.shapes if name not in left_out})
    try:
        check_fit(model, found.shapes, scope, left_out)
    except EffdetError as error:
        raise EffdetError(f"{found.what}: {error}{_hint(classes) if not left_out else ''}") from None
    arrays = {name: found.read(name) for name in found.shapes}
    odd = [
        f"{name}: {array.dtype}" for name, array in arrays.items() if not keras.backend.is_float_dtype(array.dtype.name)
    ]
    if odd:
        raise EffdetError("\n".join([f"{found.what}: expected floating-point numbers, got others in {len(odd)}", *odd]))
    try:
        assign(model, arrays, scope, left_out)
    except EffdetError as error:
        raise EffdetError(f"{found.what}: {error}") from None
    return Loaded(
        found.what,
        len(arrays),
        len(found.averaged & arrays.keys()),
        backbone_only,
        left_out,
        classes if left_out else None,
    )


def _class_counts(model: keras.Model, config: ModelConfig, found: StoredArrays) -> tuple[int, int] | None:
    """Classes of the source's head and of the model's, where they differ."""
    ours = published_variables(model).get(HEAD_BIAS)
    theirs = found.shapes.get(HEAD_BIAS, ())
    if ours is None or len(theirs) != 1 or theirs == tuple(ours.shape) or theirs[0] % config.anchors_a_cell:
        return None
    return theirs[0] // config.anchors_a_cell, config.num_classes


def _hint(classes: tuple[int, int] | None) -> str:
    if classes is None:
        return ""
    there, here = classes
    return f"\n{there} classes there, {here} here: with allow_head_mismatch the class head is left out and starts fresh"


@contextlib.contextmanager
def opened(source: str | Path, ema: bool = True) -> Iterator[StoredArrays]:
    """What a weight file or a TensorFlow checkpoint holds, for `num_classes` and `load`, as long as the block runs.

    So it is unpacked but once for both. EffdetError as `load` has them.
    """
    path = _resolved(Path(source))
    if path.suffix == ".pth":
        raise EffdetError(f"{source}: holds a backbone alone; expected a detector's weights")
    with _named(path, ema) as found:
        yield found


def num_classes(found: StoredArrays, config: ModelConfig) -> int:
    """The classes of a detector's head, before a model is built. EffdetError where there is none."""
    shape = found.shapes.get(HEAD_BIAS, ())
    if len(shape) != 1 or shape[0] < config.anchors_a_cell or shape[0] % config.anchors_a_cell:
        raise EffdetError(f"{found.what}: expected a detector's weights, and it has no {HEAD_BIAS}")
    return shape[0] // config.anchors_a_cell


def files(source: str | Path) -> list[Path]:
    """The files that `load` reads of a path. EffdetError where there are none."""
    path = _resolved(Path(source))
    if path.is_file():
        return [path]
    parts = [file for file in path.parent.iterdir() if file.name.startswith(f"{path.name}.data-")]
    return [_index(path), *sorted(parts)]


def _resolved(path: Path) -> Path:
    """The file or the TensorFlow prefix that a path means. EffdetError where it means none."""
    if path.is_dir():
        if (path / WEIGHTS_FILE).is_file():
            return path / WEIGHTS_FILE
        return best_of(path) or newest_prefix(path)
    if path.is_file():
        if path.name.endswith((*ARCHIVES, *FILES)):
            return path
        raise EffdetError(f"{path}: expected weights ({', '.join((*ARCHIVES, *FILES))}, a folder or a prefix)")
    if _index(path).is_file():
        return path
    raise EffdetError(f"{path}: no such file or folder, and no TensorFlow checkpoint of that prefix ({_index(path)})")


def _index(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


@contextlib.contextmanager
def _named(path: Path, ema: bool) -> Iterator[StoredArrays]:
    """What a file holds by published name, or keras.applications', readable as long as the block runs."""
    with contextlib.ExitStack() as stack:
        if path.name.endswith(ARCHIVES):
            folder = stack.enter_context(unpacked(path))
            found = open_checkpoint(newest_prefix(folder, path), ema, path)
            found = dataclasses.replace(found, what=f"{path.name}: {found.what}")
        elif path.suffix == ".safetensors":
            found = stack.enter_context(open_weights(path))
        elif path.suffix in (".h5", ".hdf5"):
            found = stack.enter_context(open_h5(path))
        else:
            found = open_checkpoint(path, ema)
        yield _without_model_name(found)


def _without_model_name(found: StoredArrays) -> StoredArrays:
    """The arrays without a first part of their names that all have, where published names stand behind it."""
    first = {name.partition("/")[0] for name in found.shapes}
    rest = {name.partition("/")[2]: name for name in found.shapes}
    return found.renamed(rest) if len(first) == 1 and any(name.startswith(HEAD) for name in rest) else found
