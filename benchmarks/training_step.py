"""Time of a training step against the same step on stock Keras layers, in one run, taken in turn.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --kinds stock float32-jit bfloat16-jit
    python -m benchmarks.training_step --kinds float32 float32-fed --shards data/shards/train-*.tfrecord

The step is effdet.training's, whole: target assignment, forward, loss, backward, exchange, clip, update, EMA, on uint8
pictures. A kind is a precision and, behind it: `stock`: keras.layers.BatchNormalization and Keras' swish; `jit`:
compiled with XLA; `2ranks`: a Horovod job of two, each with half of the batch and half of the cores; `half`: one
process with just those, which is what a rank would take were there no other; `fed`: on batches of the real input
pipeline; `recompute`: with gradient checkpointing; `deterministic`: with TensorFlow's op determinism. Each kind runs in
processes of its own, which stand still while another works. Prints medians, the share of the first kind's time an
image, the share of the time that was waited for batches, and a process's peak memory; only shares are comparable
between machines and hours.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import time
from typing import Any

from benchmarks.rank_job import WORKER, Job, local_rank, machine, peak_gib, serve, worker_task
from effdet.distributed import connect

PRECISIONS = {"stock": "float32", "float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
DEFAULT = ("stock", "float32", "bfloat16", "float32-half", "float32-2ranks", "bfloat16-half", "bfloat16-2ranks")
WORDS = ("jit", "half", "2ranks", "fed", "recompute", "deterministic")
WARM_UP = 2  # steps before the first that is timed
ENDLESS = 10**6  # images an epoch: the learning rate hardly moves


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to do the step."""

    precision: str
    stock: bool
    jit: bool
    ranks: int
    parts: int  # of the batch and the cores; a rank has one
    fed: bool
    recompute: bool
    deterministic: bool


def kind_of(name: str) -> Kind:
    """ "bfloat16-2ranks" and the like."""
    first, *more = name.split("-")
    if first not in PRECISIONS or set(more) - set(WORDS):
        raise argparse.ArgumentTypeError(
            f"{name!r}: expected {', '.join(PRECISIONS)}, behind it {', '.join(f'-{word}' for word in WORDS)}"
        )
    ranks = 2 if "2ranks" in more else 1
    return Kind(
        precision=PRECISIONS[first],
        stock=first == "stock",
        jit="jit" in more,
        ranks=ranks,
        parts=2 if "half" in more else ranks,
        fed="fed" in more,
        recompute="recompute" in more,
        deterministic="deterministic" in more,
    )


def checked(name: str) -> str:
    """A kind's name."""
    kind_of(name)
    return name


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientdet-d0", help="default efficientdet-d0")
    parser.add_argument("--size", type=int, default=512, help="side of the input, pixels (default 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="images, of all ranks (default 8)")
    parser.add_argument("--kinds", nargs="+", type=checked, default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--shards", nargs="*", default=[], help="of train, for kinds with -fed")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default 7)")
    parser.add_argument("--steps", type=int, default=1, help="of a measurement (default 1)")
    arguments = parser.parse_args()
    kinds = {name: kind_of(name) for name in arguments.kinds}
    if any(kind.fed for kind in kinds.values()) and not arguments.shards:
        parser.error("-fed needs --shards")
    if any(arguments.batch_size % kind.parts for kind in kinds.values()):
        parser.error(f"--batch-size {arguments.batch_size}: expected an even number for -half and -2ranks")

    jobs: dict[str, Job] = {}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    try:
        for name, kind in kinds.items():
            jobs[name] = Job("benchmarks.training_step", kind.ranks, {**vars(arguments), "kind": name})
        for _, name in itertools.product(range(arguments.rounds), kinds):
            measured[name].append(jobs[name].tell(arguments.steps))
        memory = {name: job.tell("memory") for name, job in jobs.items()}
    finally:
        for job in jobs.values():
            job.end()
    print_table(arguments, kinds, measured, memory)


def print_table(
    arguments: argparse.Namespace,
    kinds: dict[str, Kind],
    measured: dict[str, list[tuple[float, float]]],
    memory: dict[str, float],
) -> None:
    """Medians, images per second, share of the first kind."""
    print(
        f"{arguments.model}, {arguments.size} x {arguments.size}, batch {arguments.batch_size}\n{machine()}\n\n"
        "| step | images | ms | images/s | share an image | waited | peak GiB |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    stock = None
    for name, kind in kinds.items():
        seconds = statistics.median(seconds for seconds, _ in measured[name])
        waited = statistics.median(waited / seconds for seconds, waited in measured[name])
        images = arguments.batch_size * kind.ranks // kind.parts
        stock = stock or seconds / images
        figures = f"{images} | {seconds * 1e3:,.0f} | {images / seconds:.1f} | {seconds / images / stock:.2f}"
        print(f"| {name} | {figures} | {waited:.2f} | {memory[name]:.1f} |")


def work() -> None:
    """A rank's life: does the steps that it is told to; answers with the seconds a step, and those of them waited."""
    task = worker_task()
    kind = kind_of(task["kind"])
    cores = sorted(os.sched_getaffinity(0))
    own = cores[local_rank() * len(cores) // kind.parts :][: max(1, len(cores) // kind.parts)]
    os.sched_setaffinity(0, own)  # before TensorFlow counts them
    ranks = connect(kind.ranks)
    import tensorflow as tf

    from benchmarks.training_case import Case, build_trainer, constant_batches, real_batches
    from effdet.training import add_in_order

    batch_size = task["batch_size"] // kind.parts
    if kind.deterministic:
        tf.config.experimental.enable_op_determinism()
    if kind.deterministic or not tf.config.list_physical_devices("GPU"):  # as pipeline.training_run
        add_in_order()
    case = Case(task["model"], task["size"], batch_size, kind.precision, kind.stock, kind.jit, kind.recompute)
    trainer = build_trainer(case, ranks)
    batches = real_batches(case, ranks, task["shards"], len(own)) if kind.fed else constant_batches(case)

    def answer(command: Any) -> Any:
        if command == "memory":
            return max(ranks.gather(peak_gib()))
        start = time.perf_counter()
        records = list(trainer.run(batches, command, ENDLESS))
        return (time.perf_counter() - start) / command, sum(record.waited for record in records) / command

    answer(WARM_UP)
    serve(ranks, answer)


if __name__ == "__main__":
    work() if WORKER in sys.argv else main()
