"""The training step: its arithmetic, what a state holds, and what it does with numbers that are none."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf

from effdet import checkpoint
from effdet.checkpoint import Checkpoint
from effdet.errors import EffdetError
from effdet.layers import FusedBatchNormalization
from effdet.train_state import TrainState
from tests.effdet.tiny import IMAGES_AN_EPOCH, OPTIMIZATION, tiny_batch, tiny_model, tiny_trainer

pytestmark = pytest.mark.slow


def new_trainer(precision="float32", **changes):
    state = TrainState(tiny_model(precision=precision), OPTIMIZATION.momentum, precision == "mixed_float16")
    return tiny_trainer(state, **changes)


def run(trainer, steps):
    """Steps on the batches that belong to them."""
    batches = map(tiny_batch, itertools.count(trainer.state.step))
    return list(trainer.run(batches, steps, IMAGES_AN_EPOCH))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name, array in expected.items() if found[name].tobytes() != array.tobytes()]
    assert different == []


@pytest.fixture(scope="module")
def trained():
    """A trainer, traced once; its arrays before the first step."""
    trainer = new_trainer()
    return trainer, trainer.state.arrays()


@pytest.fixture
def trainer(trained):
    """The trainer, before its first step."""
    found, start = trained
    found.state.restore(0, start)
    return found


@pytest.fixture
def tolerant(trainer):
    """The trainer, which takes one bad step in a row."""
    before = trainer.optimization
    trainer.optimization = dataclasses.replace(before, max_bad_steps=1)
    yield trainer
    trainer.optimization = before
    trainer._bad = trainer._skipped = 0


def test_loss_falls(trainer):
    losses = [record.loss for record in run(trainer, 20)]
    assert trainer.state.step == 20
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])


def test_records(trainer):
    first, second = run(trainer, 2)
    assert (first.step, second.step) == (0, 1)
    assert first.learning_rate == 0.01
    assert second.learning_rate == pytest.approx(
        0.01 + 0.04 * (1 / 5) / 0.5
    )  # a fifth of an epoch, of a warm-up of 1/2
    assert first.loss == pytest.approx(first.class_loss + 50 * first.box_loss + first.l2_loss, rel=1e-6)


def test_l2_is_of_the_kernels(trainer):
    names = {variable.path.replace(".", "/"): variable for variable in trainer.state.model.trainable_variables}
    kernels = [np.asarray(v, np.float64) for name, v in names.items() if name.endswith("kernel")]
    others = {name.rpartition("/")[2] for name in names if not name.endswith("kernel")}
    assert others == {"beta", "bias", "gamma"}
    expected = 4e-5 * sum(np.sum(kernel**2) / 2 for kernel in kernels)
    assert run(trainer, 1)[0].l2_loss == pytest.approx(expected, rel=1e-5)


def test_step_is_momentum_sgd_on_the_clipped_gradient(trainer):
    before = trainer.state.arrays()
    (record,) = run(trainer, 1)
    norm = record.gradient_norm
    assert 0 < norm < 10.0  # the first step is not clipped
    once = trainer.state.arrays()
    velocity = {name: array for name, array in once.items() if "momentum" in name}
    ((name, first),) = velocity.items()
    # From rest: velocity = -rate * gradient.
    assert np.linalg.norm(first.astype(np.float64)) == pytest.approx(0.01 * norm, rel=1e-4)
    np.testing.assert_array_equal(once["weights"], before["weights"] + first)
    (record,) = run(trainer, 1)
    assert record.gradient_norm > 10.0  # the second is: to a norm of 10, while what is told is the norm before
    twice = trainer.state.arrays()
    np.testing.assert_allclose(twice["weights"], once["weights"] + twice[name], rtol=0, atol=1e-7)
    step = twice[name] - 0.9 * first
    assert np.linalg.norm(step.astype(np.float64)) == pytest.approx(record.learning_rate * 10.0, rel=1e-4)


def test_gradient_is_the_slope_of_the_loss(trainer):
    start = trainer.state.arrays()
    rate = run(trainer, 1)[0].learning_rate
    (velocity,) = (array for name, array in trainer.state.arrays().items() if "momentum" in name)
    direction = (velocity / np.linalg.norm(velocity)).astype(np.float32)

    def loss_at(distance):
        trainer.state.restore(0, {**start, "weights": start["weights"] + np.float32(distance) * direction})
        return run(trainer, 1)[0].loss

    slope = (loss_at(0.0005) - loss_at(-0.0005)) / 0.001
    assert slope == pytest.approx(-np.linalg.norm(velocity) / rate, rel=0.02)


def test_average_follows_with_rising_decay(trainer):
    start = trainer.state.arrays()
    run(trainer, 1)
    once = trainer.state.arrays()
    # decay 1/10 at the first step, 2/11 at the second
    np.testing.assert_allclose(once["ema_weights"], 0.1 * start["weights"] + 0.9 * once["weights"], rtol=0, atol=1e-6)
    assert not np.array_equal(once["ema_statistics"], start["ema_statistics"])
    run(trainer, 1)
    twice = trainer.state.arrays()
    np.testing.assert_allclose(
        twice["ema_weights"], 2 / 11 * once["ema_weights"] + 9 / 11 * twice["weights"], rtol=0, atol=1e-6
    )


def test_averaged_weights_are_lent_to_the_model_and_taken_back(trainer):
    run(trainer, 3)
    state = trainer.state
    before = [variable.numpy() for variable in state.model.variables]
    with state.averaged() as model:
        lent = {variable.path.replace(".", "/"): variable.numpy() for variable in model.variables}
    for variable, value in zip(state.model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert_same_bits(state.averaged_arrays(), lent)
    own = [array.tobytes() for array in before]
    assert own != [array.tobytes() for array in lent.values()]


def test_resumed_is_bit_identical(trainer, tmp_path):
    """Killed after step 4 and resumed in a fresh model, from the disk, against seven steps at a stretch."""
    uninterrupted = run(trainer, 4)
    state = trainer.state
    checkpoint.save(tmp_path, "step", Checkpoint(state.step, state.arrays(), {}))
    uninterrupted += run(trainer, 3)

    found = checkpoint.latest(tmp_path, report=pytest.fail)
    fresh = new_trainer()
    fresh.state.restore(found.step, found.arrays)
    assert run(fresh, 3) == uninterrupted[4:]
    assert_same_bits(fresh.state.arrays(), state.arrays())
    assert_same_bits(fresh.state.averaged_arrays(), state.averaged_arrays())


def test_checkpoint_of_another_model_is_refused(trainer):
    arrays = trainer.state.arrays()
    with pytest.raises(EffdetError, match="checkpoint: of another model or optimizer: ema_weights"):
        trainer.state.restore(1, {**arrays, "ema_weights": arrays["ema_weights"][1:]})
    with pytest.raises(EffdetError, match="weights and 0 more"):
        trainer.state.restore(1, {name: array for name, array in arrays.items() if name != "weights"})


def spoilt(batch):
    return {**batch, "image": tf.cast(batch["image"], tf.float32) * float("nan")}


def bad_steps(trainer, steps):
    """Steps from here on, all on batches whose loss is no number."""
    batches = (spoilt(tiny_batch(step)) for step in itertools.count(trainer.state.step))
    return trainer.run(batches, steps, IMAGES_AN_EPOCH)


def test_bad_step_changes_nothing_and_the_next_one_does(tolerant, capsys):
    run(tolerant, 2)
    before = tolerant.state.arrays()
    (record,) = bad_steps(tolerant, 1)
    assert record.bad
    assert np.isnan(record.loss)
    assert "training: step 2: not finite" in capsys.readouterr().out
    after = tolerant.state.arrays()
    assert (before.pop("images"), after.pop("images")) == (8, 12)  # its images are past
    assert_same_bits(after, before)
    (record,) = run(tolerant, 1)
    assert not record.bad
    assert not np.array_equal(tolerant.state.arrays()["weights"], before["weights"])


def test_too_many_bad_steps_name_step_rank_images_and_where_the_batch_is(tolerant):
    run(tolerant, 2)
    before = tolerant.state.arrays()["weights"]
    assert len(list(bad_steps(tolerant, 1))) == 1  # max_bad_steps 1
    with pytest.raises(
        EffdetError,
        match=r"step 3: not finite .* rank 0: loss nan, image ids \[3000, 3001, 3002, 3003\]; 2 such steps in a row .* "
        r"the batch is in batch 3",
    ):
        list(bad_steps(tolerant, 1))
    np.testing.assert_array_equal(tolerant.state.arrays()["weights"], before)


def test_good_step_between_bad_ones_begins_the_count_anew(tolerant):
    for _ in range(3):
        list(bad_steps(tolerant, 1))
        run(tolerant, 1)
    assert tolerant.state.step == 6


def test_asked_to_stop_ends_after_the_steps_that_were_handed_out(trainer):
    records = []
    for record in trainer.run(map(tiny_batch, itertools.count()), 9, IMAGES_AN_EPOCH):
        records.append(record.stop)
        trainer.stop_asked = len(records) >= 2  # of steps 0 and 1: step 2 is at work, 3 is the first that knows
    trainer.stop_asked = False
    assert records == [False, False, False, True, True]
    assert trainer.state.step == 5


def test_accumulated_steps_equal_steps_of_a_larger_batch():
    """BatchNorm frozen. One step of 2 x 2 images, and one of 4."""
    whole, parts = frozen_trainer(batch_size=4), frozen_trainer(batch_size=2, accumulate=2)
    start = whole.state.arrays()["weights"]
    for expected, found in zip(run(whole, 3), run(parts, 3), strict=True):
        for name in ("learning_rate", "loss", "class_loss", "box_loss", "l2_loss", "gradient_norm"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
    expected, found = whole.state.arrays(), parts.state.arrays()
    moved = np.abs(expected["weights"] - start).max()
    assert moved > 0
    np.testing.assert_allclose(found["weights"], expected["weights"], rtol=0, atol=1e-4 * moved)
    assert found["images"] == expected["images"] == 12


def test_checkpointed_gradients_are_the_same(trainer):
    kept, again = run(trainer, 3), run(new_trainer(gradient_checkpointing=True), 3)
    for expected, found in zip(kept, again, strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("box_loss", ["giou", "ciou"])
def test_iou_losses_train(box_loss):
    losses = dataclasses.replace(OPTIMIZATION.losses, box_loss=box_loss, box_loss_weight=1.0)
    found = [record.box_loss for record in run(new_trainer(losses=losses), 20)]
    assert np.mean(found[-5:]) < np.mean(found[:5]) < 2.0


def frozen_trainer(**changes):
    model = tiny_model()
    for layer in model.layers:
        if isinstance(layer, FusedBatchNormalization):
            layer.trainable = False
    return tiny_trainer(TrainState(model, OPTIMIZATION.momentum, loss_scaling=False), **changes)


def test_images_without_boxes_train(trainer):
    batch = tiny_batch(0)
    empty = {**batch, "boxes": tf.zeros_like(batch["boxes"]), "class_ids": tf.fill(batch["class_ids"].shape, -1)}
    (record,) = trainer.run(iter([empty]), 1, IMAGES_AN_EPOCH)
    assert record.box_loss == 0
    assert np.isfinite(record.loss)


def test_float16_skips_a_step_that_overflows(trainer):
    (expected,) = run(trainer, 1)
    half = new_trainer("mixed_float16")
    state = half.state
    assert state.optimizer.dynamic_scale.numpy() == 2.0**15
    before = state.arrays()
    state.optimizer.dynamic_scale.assign(2.0**60)  # far beyond float16
    (record,) = run(half, 1)
    after = state.arrays()
    assert np.isfinite(record.loss)
    assert not np.isfinite(record.gradient_norm)
    assert state.optimizer.dynamic_scale.numpy() == 2.0**59
    np.testing.assert_array_equal(after["weights"], before["weights"])

    state.restore(0, before)
    (record,) = run(half, 1)
    assert record.loss == pytest.approx(expected.loss, rel=1e-2)
    assert record.gradient_norm == pytest.approx(expected.gradient_norm, rel=5e-2)
    assert not np.array_equal(state.arrays()["weights"], before["weights"])


def test_bfloat16_is_near_float32(trainer):
    (record,) = run(new_trainer("mixed_bfloat16"), 1)
    (expected,) = run(trainer, 1)
    assert record.loss == pytest.approx(expected.loss, rel=3e-2)
    assert record.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.2)


def test_compiled_equals_uncompiled(trainer):
    (record,) = run(new_trainer(jit_compile=True), 1)
    (expected,) = run(trainer, 1)
    assert record.loss == pytest.approx(expected.loss, rel=1e-5)
    assert record.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-3)
