"""EfficientDet (arXiv:1911.09070): backbone, BiFPN, heads."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state

from effdet.backbone import features
from effdet.bifpn import pyramid
from effdet.config import ModelConfig
from effdet.errors import EffdetError
from effdet.heads import box_head, class_head

DTYPE_POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def build(config: ModelConfig, dtype_policy: str = "float32") -> keras.Model:
    """The network of config, with fresh weights.

    Takes normalized images float32 [B,H,W,3], H and W as config.image_size. Gives
    {"class_logits": float32 [B,A,K], "box_deltas": float32 [B,A,4] (ty, tx, th, tw)}; anchors are
    ordered by level, row, column, anchor of the cell. dtype_policy is what it computes in: "float32",
    "mixed_float16" or "mixed_bfloat16"; variables and outputs are float32 in each.
    EffdetError for another policy.
    """
    if dtype_policy not in DTYPE_POLICIES:
        raise EffdetError(f"dtype policy: expected one of {', '.join(DTYPE_POLICIES)}, got {dtype_policy!r}")
    with _dtype_policy(dtype_policy), _layers_numbered_from_the_first():
        images = keras.Input((*config.image_size, 3), name="images", dtype="float32")
        fused = pyramid(features(images, config), config)
        outputs = {
            # losses, decoding and NMS need float32
            "class_logits": keras.ops.cast(class_head(fused, config), "float32"),
            "box_deltas": keras.ops.cast(box_head(fused, config), "float32"),
        }
        model = keras.Model(images, outputs, name=config.name)
    if outputs["box_deltas"].shape != (None, config.num_anchors, 4):
        raise AssertionError(f"{outputs['box_deltas'].shape} is not of {config.num_anchors} anchors")
    return model


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Layers made inside take the policy; Keras' global one is as before afterwards."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextlib.contextmanager
def _layers_numbered_from_the_first() -> Iterator[None]:
    """Layers without a name get the same automatic names in every model; Keras goes on numbering as before afterwards.

    TensorFlow orders a graph's operations by name, re_lu_9 after re_lu_10, and with the order go a result's last bits:
    they shall not depend on how many models the process has built. Keras' only public way is clear_session, which
    drops the state of all other models.
    """
    counters = "object_name_uids"
    before = global_state.get_global_attribute(counters)
    global_state.set_global_attribute(counters, defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute(counters, before)
