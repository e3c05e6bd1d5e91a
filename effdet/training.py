"""The training step: SGD with momentum, L2 on kernels, one clip by the global norm, EMA of all variables.

As google/automl efficientdet @6a54c87 (tf2/train_lib.py), with the loss normalized over the images of all ranks. A step
whose loss or gradient is not finite changes nothing but the loss scale.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.eager import context

from effdet import layers
from effdet.anchors import anchors
from effdet.assign import Targets, assign_targets
from effdet.config import ModelConfig
from effdet.distributed import Ranks
from effdet.errors import EffdetError
from effdet.input_pipeline import Batch
from effdet.losses import LossConfig, detection_loss
from effdet.preprocess import normalize
from effdet.recompute import recomputing
from effdet.schedule import Schedule, ema_decay, learning_rate
from effdet.train_state import TrainState

MAX_SKIPPED = 50  # steps in a row: a scale halved so often is 0, and no step would ever be done again


def add_in_order() -> None:
    """Before the first step: more than two gradients of a variable are added up in the same order in every run.

    Grappler would add them up as they arrive where it takes the step for larger than the device, as it does on CPUs for
    all but small pictures (TensorFlow 2.21, grappler/optimizers/memory_optimizer.cc, SchedulingPass). tf.config has no
    option that turns this off.
    """
    config = tf.compat.v1.ConfigProto()
    rewrites = config.graph_options.rewrite_options
    rewrites.memory_optimization = rewrites.NO_MEM_OPT
    context.context()._config = config
    tf.config.optimizer.set_experimental_options({})  # it is read anew


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How the weights are found. Times are in epochs."""

    batch_size: int  # images that a rank works on at a time
    accumulate: int  # such batches a step
    schedule: Schedule
    momentum: float
    weight_decay: float  # times half the sum of squares of all kernels
    clip_norm: float
    ema_decay: float
    losses: LossConfig
    jit_compile: bool  # the network and the losses; on one rank the whole step
    gradient_checkpointing: bool
    sync_batch_norm: bool
    compression: Literal["none", "fp16", "bf16"]  # of the gradient between ranks
    reduction: Literal["average", "adasum"]
    max_bad_steps: int  # in a row
    seed: int  # of stochastic depth


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What a step was like; losses are means over all ranks."""

    step: int  # counted from 0
    learning_rate: float
    loss: float  # class_loss + weighted box_loss + l2_loss
    class_loss: float
    box_loss: float  # before its weight
    l2_loss: float
    gradient_norm: float  # before clipping
    loss_scale: float  # with which the step was done
    waited: float = dataclasses.field(compare=False)  # seconds that this rank waited for its batch
    bad: bool  # loss or gradient are not finite: the step changed nothing
    stop: bool  # a rank was asked to stop; the same on all


class Trainer:
    """Training steps on the batches of this rank."""

    def __init__(
        self,
        state: TrainState,
        config: ModelConfig,
        optimization: Optimization,
        ranks: Ranks,
        keep_batch: Callable[[int, dict[str, NDArray[Any]]], str],
    ) -> None:
        """`keep_batch` writes a step's batch that has no finite loss, when training ends at it, and says where."""
        self.state = state
        self.config = config
        self.optimization = optimization
        self.ranks = ranks
        self.images_a_step = ranks.size * optimization.batch_size * optimization.accumulate
        self.stop_asked = False  # of this rank, by a signal
        self._keep_batch = keep_batch
        self._skipped = self._bad = 0  # steps in a row
        self._anchors = tf.constant(anchors(config))
        self._depths = layers.num_stochastic_depths(state.model)
        self._kernels = [
            variable
            for variable in state.trainable.variables
            if state.names[variable.path].endswith(("kernel", "weight"))
        ]
        self._network = recomputing(state.model) if optimization.gradient_checkpointing else state.model
        # Compiled it is one pass over the pixels, in a tenth of the time and to the same bits.
        self._normalize = tf.function(
            lambda images, content_size: normalize(images, content_size, config), jit_compile=True, autograph=False
        )
        compiled, alone = optimization.jit_compile, ranks.size == 1
        self._losses_and_gradient = tf.function(self._differentiate, jit_compile=compiled, autograph=False)
        # Horovod's grouped reduction is none of XLA's operations: with it only what stands before is compiled.
        self._do_step = tf.function(self._step, jit_compile=compiled and alone, autograph=False)
        ranks.broadcast([*state.variables().values(), *(v.value for v in state.trainable.variables)])

    def run(self, batches: Iterator[Batch], steps: int, images_an_epoch: int) -> Iterator[StepRecord]:
        """Does steps and gives their records, each while the step after it is at work.

        A record with `stop` ends it on all ranks after the same step. EffdetError where more steps in a row than
        `max_bad_steps` had no finite loss or gradient: names step, ranks and images.
        """
        pending = None
        for _ in range(steps):
            issued = self._issue(batches, images_an_epoch)
            stop = False
            if pending is not None:
                record = self._record(*pending)
                stop = record.stop
                yield record
            pending = issued
            if stop:
                break
        if pending is not None:
            yield self._record(*pending)

    def _issue(self, batches: Iterator[Batch], images_an_epoch: int) -> tuple[Any, ...]:
        """Hands the next step to the device, and gives what its record is made from."""
        state, began = self.state, time.monotonic()
        try:
            batch = next(batches)
        except tf.errors.OpError as error:  # how what tf.data meets in a shard comes out
            raise EffdetError(f"training: step {state.step}, rank {self.ranks.rank}: {error.message}") from None
        waited = time.monotonic() - began
        rate = learning_rate(self.optimization.schedule, state.images / images_an_epoch)
        decay = ema_decay(self.optimization.ema_decay, state.step)
        figures = (tf.constant(value) for value in (rate, decay, float(self.stop_asked)))
        measured = self._do_step(batch, self._depth_noise(state.step), *figures)
        issued = state.step, rate, waited, batch, measured
        state.step += 1
        state.images += self.images_a_step
        return issued

    def _step(
        self, batch: Batch, noise: tf.Tensor, rate: tf.Tensor, decay: tf.Tensor, stop: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One step: the losses of this rank [4] and, over all ranks, losses, gradient norm, loss scale, stops [7]."""
        state, ranks, how = self.state, self.ranks, self.optimization
        targets = assign_targets(self._anchors, batch["boxes"], batch["class_ids"])
        positives, stops = tf.unstack(ranks.sum(tf.stack([tf.reduce_sum(targets.num_positives), stop]), "positives"))
        # The mean over ranks of losses so normalized is the loss of the whole batch.
        normalizer = (positives + 1.0) / ranks.size
        statistics_before = state.statistics.values()
        losses, gradient = self._accumulated(batch, targets, normalizer, noise)

        gradient, mean_losses, statistics = self._reduced(gradient, losses, state.statistics.values())
        scale = state.optimizer.scale_loss(tf.ones([]))
        norm = tf.norm(gradient) / scale

        def update() -> tf.Tensor:
            state.optimizer.learning_rate.assign(rate)
            state.optimizer.apply([gradient * tf.minimum(1.0, how.clip_norm / norm)], [state.weights])
            state.trainable.assign(state.weights.value)
            state.ema_weights.assign_sub((1.0 - decay) * (state.ema_weights - state.weights.value))
            state.ema_statistics.assign_sub((1.0 - decay) * (state.ema_statistics - statistics))
            if ranks.size > 1:  # each rank's are of its own images; with their mean all ranks hold the same state
                state.statistics.assign(statistics)
            return norm

        def skip() -> tf.Tensor:
            state.statistics.assign(statistics_before)
            if state.loss_scaling:  # the optimizer halves the scale where it is given no number
                state.optimizer.apply([tf.fill(tf.shape(gradient), np.float32(np.nan))], [state.weights])
            return norm

        norm = tf.cond(tf.math.is_finite(norm + mean_losses[0]), update, skip)
        return losses, tf.concat([mean_losses, tf.stack([norm, scale, stops])], axis=0)

    def _accumulated(
        self, batch: Batch, targets: Targets, normalizer: tf.Tensor, noise: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The losses [4] and the gradient [P] of this rank's images of a step."""
        inputs = batch["image"], batch["content_size"], targets, noise
        num_parts = self.optimization.accumulate
        if num_parts == 1:
            return self._losses_and_gradient(*inputs, normalizer)  # type: ignore[no-any-return]
        parts = tf.nest.map_structure(lambda x: tf.reshape(x, [num_parts, -1, *x.shape[1:]]), inputs)

        def add(part: tf.Tensor, losses: tf.Tensor, gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
            own = tf.nest.map_structure(lambda x: x[part], parts)
            more_losses, more_gradient = self._losses_and_gradient(*own, normalizer)
            return part + 1, losses + more_losses, gradient + more_gradient

        start = tf.constant(0), tf.zeros([4]), tf.zeros_like(self.state.weights.value)
        # One after the other: each moves BatchNorm's statistics, and only one shall be in memory.
        _, losses, gradient = tf.while_loop(lambda part, *_: part < num_parts, add, start, parallel_iterations=1)
        return losses, gradient

    def _differentiate(
        self, images: tf.Tensor, content_size: tf.Tensor, targets: Targets, noise: tf.Tensor, normalizer: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Losses [4] (total, class, box, L2) and the gradient [P] of the scaled total."""
        how, ranks = self.optimization, self.ranks
        images = self._normalize(images, content_size)
        synchronized = how.sync_batch_norm and ranks.size > 1
        with (
            layers.depth_noise(noise),
            layers.synchronized(ranks.stack, ranks.size) if synchronized else contextlib.nullcontext(),
        ):
            with tf.GradientTape() as tape:
                outputs = self._network(images, training=True)
                detection = detection_loss(
                    outputs["class_logits"], outputs["box_deltas"], targets, normalizer, how.losses, self._anchors
                )
                norms = [tf.nn.l2_loss(kernel.value) for kernel in self._kernels]
                l2 = how.weight_decay / how.accumulate * tf.add_n([tf.zeros([]), *norms])
                total = detection["total"] + l2
                scaled = self.state.optimizer.scale_loss(total)
            gradients = tape.gradient(scaled, [variable.value for variable in self.state.trainable.variables])
        losses = tf.stack([total, detection["class"], detection["box"], l2])
        return losses, self.state.trainable.join(gradients)

    def _reduced(
        self, gradient: tf.Tensor, losses: tf.Tensor, statistics: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Gradient, losses and BatchNorm's statistics over all ranks."""
        ranks, how = self.ranks, self.optimization
        if how.reduction == "average" and how.compression == "none":
            return tuple(ranks.average([gradient, losses, statistics], "gradient"))
        if how.reduction == "adasum":
            gradient = ranks.adasum(gradient, self.state.trainable.sizes)
        else:
            gradient = {"fp16": ranks.average_fp16, "bf16": ranks.average_bf16}[how.compression](gradient)
        return gradient, *ranks.average([losses, statistics], "losses")

    def _depth_noise(self, step: int) -> tf.Tensor:
        """[images, depths] in [0, 1): this rank's rows of what the step draws for the images of all ranks.

        Not within the step: XLA makes other numbers of the same seed.
        """
        own = self.images_a_step // self.ranks.size
        drawn = tf.random.stateless_uniform([self.images_a_step, self._depths], [self.optimization.seed, step])
        return drawn[self.ranks.rank * own :][:own]

    def _record(
        self, step: int, rate: float, waited: float, batch: Batch, measured: tuple[tf.Tensor, tf.Tensor]
    ) -> StepRecord:
        own_loss = float(measured[0][0])
        loss, class_loss, box_loss, l2_loss, norm, scale, stops = measured[1].numpy().tolist()
        bad = not np.isfinite(loss + norm)
        self._skipped = self._skipped + 1 if bad else 0
        # Loss scaling looks for the largest scale whose gradient is finite: only a loss that is none is a bad sign.
        self._bad = self._bad + 1 if bad and not (self.state.loss_scaling and np.isfinite(loss)) else 0
        if self._bad:
            self._tell(step, own_loss, norm, batch)
        if self._skipped > MAX_SKIPPED:
            raise EffdetError(
                f"training: step {step}: {self._skipped} steps in a row overflowed, the loss scale is {scale}; lower "
                "learning_rate or train in mixed_bfloat16 or float32"
            )
        return StepRecord(step, rate, loss, class_loss, box_loss, l2_loss, norm, scale, waited, bad, stops > 0)

    def _tell(self, step: int, loss: float, norm: float, batch: Batch) -> None:
        """Names a step without a finite loss or gradient; EffdetError on all ranks where it was one too many."""
        told = self.ranks.gather((self.ranks.rank, loss, batch["image_id"].numpy().tolist()))
        guilty = [about for about in told if not np.isfinite(about[1])] or told
        where = "; ".join(f"rank {rank}: loss {loss}, image ids {ids}" for rank, loss, ids in guilty)
        what = f"training: step {step}: not finite (gradient norm {norm}): {where}"
        if self._bad <= self.optimization.max_bad_steps:
            if self.ranks.rank == 0:
                print(f"{what}; left out", flush=True)
            return
        kept = None
        if self.ranks.rank in [rank for rank, *_ in guilty]:
            kept = self._keep_batch(step, {name: tensor.numpy() for name, tensor in batch.items()})
        places = [place for place in self.ranks.gather(kept) if place]
        raise EffdetError(
            f"{what}; {self._bad} such steps in a row (max_bad_steps {self.optimization.max_bad_steps}); the batch is "
            f"in {', '.join(places)}: look at these images; else lower learning_rate or lengthen the warm-up"
        )
