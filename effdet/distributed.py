"""The processes that train together: one alone, or the ranks of a Horovod job (Horovod 0.28).

The only file that imports Horovod, and only where it is chosen. Both classes have the same methods; a step written
with them is the same step on one process and on many.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from effdet.errors import EffdetError

if TYPE_CHECKING:
    import tensorflow as tf

Value = TypeVar("Value")
Keep: TypeAlias = Callable[[Any], None]

# What launchers tell the processes they start about how many there are.
SIZE_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


class RankLostError(EffdetError):
    """Another rank ended while this one was to exchange something with it."""

    def __init__(self, message: str) -> None:
        """`message`: what Horovod says of it, in many words."""
        told = [line.strip() for line in message.splitlines() if re.search(r"Horovod|Timed out|\{\{node", line)]
        super().__init__(
            "ranks: another rank ended, or gives no answer; its own words stand above, or in its host's log "
            f"({'; '.join(told)[:400]})"
        )


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turns the failure of a collective into a RankLostError."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:  # of an operation in a graph
        if "Horovod" not in error.message:
            raise
        raise RankLostError(error.message) from error
    except RuntimeError as error:  # HorovodInternalError, of which only Horovod's own module tells
        if type(error).__name__ != "HorovodInternalError":
            raise
        raise RankLostError(str(error)) from error


class OneProcess:
    """This process alone."""

    rank = 0
    size = 1
    local_rank = 0  # among the ranks of this machine

    def average(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """The tensors' means over all ranks, reduced together. `name` is what an error calls them."""
        return list(tensors)

    def average_fp16(self, vector: tf.Tensor) -> tf.Tensor:
        """The mean of float32 [P] over all ranks, sent and summed in float16."""
        return vector

    def average_bf16(self, vector: tf.Tensor) -> tf.Tensor:
        """The mean of float32 [P] over all ranks, sent in bfloat16 and summed in float32."""
        return vector

    def adasum(self, vector: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
        """The ranks' gradients float32 [P] added by Adasum (arXiv:2006.02924), each of its parts for itself.

        Equal gradients give their mean, orthogonal ones their sum. `sizes` of the parts add up to P.
        """
        return vector

    def sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensor's sum over all ranks."""
        return tensor

    def stack(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensors of all ranks, all of one shape: [size, ...], by rank. Without a gradient."""
        return tensor[None]

    def broadcast(self, variables: Iterable[tf.Variable]) -> None:
        """Gives the variables of every rank the values of rank 0."""

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, by rank; anything that pickles."""
        return [value]

    def start_timeline(self, path: Path) -> None:
        """Writes from now on what collectives did when, for chrome://tracing; one process has none."""


class Horovod:
    """A rank of a job that a Horovod launcher started."""

    def __init__(self) -> None:
        import horovod.tensorflow as hvd

        hvd.init()
        self._hvd: Any = hvd
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self.local_rank: int = hvd.local_rank()

    def average(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """The tensors' means over all ranks, reduced together. `name` is what an error calls them.

        One group: how single reductions fall into fusion buffers differs from run to run, and so would the order of
        their sums from three ranks on.
        """
        means: list[tf.Tensor] = self._hvd.grouped_allreduce(list(tensors), op=self._hvd.Average, name=name)
        return means

    def average_fp16(self, vector: tf.Tensor) -> tf.Tensor:
        """The mean of float32 [P] over all ranks, sent and summed in float16.

        Divided first: in Horovod's own compression a sum overflows though its mean does not.
        """
        import tensorflow as tf

        share = tf.cast(vector / self.size, tf.float16)
        return tf.cast(self._hvd.allreduce(share, op=self._hvd.Sum, name="gradient"), tf.float32)

    def average_bf16(self, vector: tf.Tensor) -> tf.Tensor:
        """The mean of float32 [P] over all ranks, sent in bfloat16 and summed in float32.

        Each rank sums a part in the ranks' order and gives it to all, which sends what a ring sends: Horovod moves
        bytes, but reduces no bfloat16.
        """
        import tensorflow as tf

        length, share = vector.shape[0], -(-vector.shape[0] // self.size)
        padded = tf.pad(vector, [[0, self.size * share - length]])
        bits = tf.bitcast(tf.cast(padded, tf.bfloat16), tf.uint16)
        parts, _ = self._hvd.alltoall(bits, tf.fill([self.size], share), name="gradient.parts")
        parts = tf.cast(tf.reshape(tf.bitcast(parts, tf.bfloat16), [self.size, share]), tf.float32)
        mean = tf.add_n(tf.unstack(parts)) / self.size
        means = self._hvd.allgather(tf.bitcast(tf.cast(mean, tf.bfloat16), tf.uint16), name="gradient.means")
        return tf.ensure_shape(tf.cast(tf.bitcast(means, tf.bfloat16), tf.float32)[:length], [length])

    def adasum(self, vector: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
        """The ranks' gradients float32 [P] added by Adasum (arXiv:2006.02924), each of its parts for itself.

        Equal gradients give their mean, orthogonal ones their sum. `sizes` of the parts add up to P. The number of
        ranks is a power of two. Horovod's own needs MPI.
        """
        import tensorflow as tf

        part_of = tf.repeat(tf.range(len(sizes)), list(sizes))  # [P]

        def added(one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
            dots = (tf.math.segment_sum(x, part_of) for x in (one * other, one * one, other * other))
            both, first, second = dots
            of_one, of_other = (1.0 - tf.math.divide_no_nan(both, 2.0 * own) for own in (first, second))
            return tf.gather(of_one, part_of) * one + tf.gather(of_other, part_of) * other

        distance = 1
        while distance < self.size:
            partner = self.rank ^ distance
            splits = tf.one_hot(partner, self.size, vector.shape[0], 0, dtype=tf.int32)
            theirs, _ = self._hvd.alltoall(vector, splits, name=f"gradient.adasum.{distance}")
            theirs = tf.ensure_shape(theirs, vector.shape)
            # In the ranks' order: both come to the same bits.
            vector = added(vector, theirs) if self.rank < partner else added(theirs, vector)
            distance *= 2
        return vector

    def sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensor's sum over all ranks."""
        return self._hvd.allreduce(tensor, op=self._hvd.Sum, name=name)

    def stack(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensors of all ranks, all of one shape: [size, ...], by rank. Without a gradient."""
        return self._hvd.allgather(tensor[None])

    def broadcast(self, variables: Iterable[tf.Variable]) -> None:
        """Gives the variables of every rank the values of rank 0."""
        self._hvd.broadcast_variables(list(variables), root_rank=0)

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, by rank; anything that pickles."""
        values: list[Value] = self._hvd.allgather_object(value)
        return values

    def start_timeline(self, path: Path) -> None:
        """Writes from now on what the ranks' collectives did when, for chrome://tracing; rank 0 does."""
        self._hvd.start_timeline(str(path))


Ranks: TypeAlias = OneProcess | Horovod


def connect(ranks: int) -> Ranks:
    """Joins the other ranks, and takes this rank's GPU, where there are any. Call it before TensorFlow's first work.

    `ranks` is how many processes are to train together. EffdetError where another number was started.
    """
    announced = {name: os.environ[name] for name in SIZE_VARIABLES if name in os.environ}
    if ranks == 1:
        others = [f"{name}={size}" for name, size in announced.items() if size != "1"]
        if others:
            raise EffdetError(f"ranks: a launcher started several processes ({', '.join(others)}), but ranks is 1")
        connected: Ranks = OneProcess()
    else:
        connected = Horovod()
        if connected.size != ranks:
            raise EffdetError(
                f"ranks is {ranks}, but Horovod counts {connected.size} (launcher: {announced or 'none'})"
            )
    _take_gpu(connected.local_rank)
    return connected


def train_elastically(train: Callable[[Ranks, Any, Keep], None]) -> None:
    """Runs `train` on ranks that come and go (Horovod's elastic mode): anew after each change of them.

    train(ranks, kept, keep): `kept` is what this rank gave to `keep` last, None where it is new; rank 0 is never new
    unless all are. `keep` is called by all ranks after the same step, and is where newcomers are let in. A lost rank
    must come out of it as RankLostError. GPUs are taken by the rank's first place on its machine.
    """
    import horovod.tensorflow as hvd
    from horovod.common.elastic import State
    from horovod.common.exceptions import HorovodInternalError

    class Kept(State):  # type: ignore[misc]
        """What a rank kept. `train` itself gives rank 0's to the others."""

        kept: Any = None

        def save(self) -> None:
            pass

        def restore(self) -> None:
            pass

        def sync(self) -> None:
            pass

    state = Kept(bcast_object=hvd.broadcast_object, get_rank=hvd.rank)

    def keep(value: Any) -> None:
        state.kept = value
        state.commit()

    def attempt(state: Kept) -> None:
        try:
            train(Horovod(), state.kept, keep)
        except RankLostError as error:
            raise HorovodInternalError(str(error)) from error

    _take_gpu(Horovod().local_rank)
    hvd.elastic.run(attempt)(state)


def _take_gpu(local_rank: int) -> None:
    """One GPU a rank; memory is taken as needed, so that ranks of other jobs can start beside it."""
    import tensorflow as tf  # here: who only starts ranks needs no TensorFlow

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    if local_rank >= len(gpus):
        raise EffdetError(f"ranks: local rank {local_rank} has no GPU, this machine has {len(gpus)}")
    tf.config.set_visible_devices(gpus[local_rank], "GPU")
    tf.config.experimental.set_memory_growth(gpus[local_rank], True)
