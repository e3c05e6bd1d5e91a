"""Rate of training batches against plain parallel JPEG decoding of the same pictures, in one run, taken in turn.

    python -m benchmarks.input_pipeline data/shards/train-*.tfrecord

Then the same with each augmentation that is off by default, of every picture. Each measure works in a process of its
own, which holds TensorFlow and, for plain decoding, the encoded pictures; the others wait meanwhile. Prints medians
over the rounds and each process's peak memory. Only the share is comparable between machines and hours. Batches are
uint8 whatever the precision of the training, so that AMP changes nothing here.
"""

import argparse
import dataclasses
import datetime
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from effdet.augment import Augmentation, RandAugment
from pipeline.provenance import hardware

IMAGE_SIZE = (512, 512)
MAX_BOXES = 100
PUBLISHED = Augmentation(horizontal_flip=True, jitter_min=0.1, jitter_max=2.0)
MAX_PICTURES = 1024  # of the plain decoding, which holds them in memory
PLAIN = "plain decode_jpeg"
MEASURES = {  # name -> augmentation of training batches; None: decoding alone
    PLAIN: None,
    "training batches": PUBLISHED,
    "with colour": dataclasses.replace(PUBLISHED, colour=1.0),
    "with RandAugment, 1 layer": dataclasses.replace(PUBLISHED, rand_augment=RandAugment(1, 5.0)),
    "with GridMask": dataclasses.replace(PUBLISHED, grid_mask=1.0),
    "with mosaic": dataclasses.replace(PUBLISHED, mosaic=1.0),
    "with mixup": dataclasses.replace(PUBLISHED, mixup=1.0),
}

Measure = Callable[[], int]  # does some work, and returns of how many images it was


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--batch-size", type=int, default=16, help="images (default 16)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default 7)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a measurement (default 2)")
    arguments = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    for name, augmentation in MEASURES.items():
        ours, theirs = spawn.Pipe()
        given = (theirs, augmentation, arguments.shards, arguments.batch_size, arguments.workers, arguments.seconds)
        spawn.Process(target=work, args=given, daemon=True).start()
        theirs.close()  # so that a worker's end is seen here
        ours.recv()  # it is warm
        workers[name] = ours
    rates: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            worker.send("run")
            rates[name].append(worker.recv())
    memory = {}
    for name, worker in workers.items():
        worker.send("end")
        memory[name] = worker.recv()
    print_table(rates, memory, arguments.batch_size, arguments.workers)


def work(
    pipe: Connection,
    augmentation: Augmentation | None,
    shard_paths: Sequence[Path],
    batch_size: int,
    workers: int,
    seconds: float,
) -> None:
    """Measures whenever it is asked to: images a second each time, peak memory in GiB at the end."""
    if augmentation is None:
        measure = plain_decoding(shard_paths, workers)
    else:
        measure = training_batches(shard_paths, augmentation, batch_size, workers)
    rate(measure, seconds)
    pipe.send("warm")
    while pipe.recv() == "run":
        pipe.send(rate(measure, seconds))
    status = Path("/proc/self/status").read_text()  # getrusage counts what the parent held, too
    pipe.send(int(status.partition("VmHWM:")[2].split()[0]) / 2**20)


def rate(measure: Measure, seconds: float) -> float:
    """Images a second, measured for at least so many seconds."""
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += measure()
    return images / (time.perf_counter() - start)


def plain_decoding(shard_paths: Sequence[Path], workers: int) -> Measure:
    """Decoding of the first records' pictures within tf.data, and nothing else."""
    import numpy as np
    import tensorflow as tf

    from effdet.input_pipeline import Shards
    from effdet.records import parse_examples

    shards = Shards(shard_paths)
    numbers = np.arange(min(len(shards), MAX_PICTURES))
    encoded = parse_examples(tf.constant(shards.read(numbers)), MAX_BOXES)["encoded"]
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    options.autotune.enabled = False
    pictures = tf.data.Dataset.from_tensor_slices(encoded)
    decoded = pictures.map(lambda data: tf.io.decode_jpeg(data, channels=3), num_parallel_calls=workers)
    counted = decoded.prefetch(workers).with_options(options)
    return lambda: int(counted.reduce(np.int64(0), lambda number, _: number + 1))


def training_batches(shard_paths: Sequence[Path], augmentation: Augmentation, batch_size: int, workers: int) -> Measure:
    """The input pipeline's batches, 128 images or a little more at a time."""
    from effdet.input_pipeline import train_batches

    batches = iter(
        train_batches(
            shard_paths,
            image_size=IMAGE_SIZE,
            max_boxes=MAX_BOXES,
            batch_size=batch_size,
            rank=0,
            num_ranks=1,
            seed=1,
            start=0,
            augmentation=augmentation,
            workers=workers,
        )
    )
    return lambda: sum(len(batch["image"]) for batch in itertools.islice(batches, 128 // batch_size + 1))


def print_table(rates: dict[str, list[float]], memory: dict[str, float], batch_size: int, workers: int) -> None:
    """Prints medians, ranges, the share of plain decoding and peak memory, with machine and date."""
    import tensorflow as tf

    medians = {name: statistics.median(values) for name, values in rates.items()}
    height, width = IMAGE_SIZE
    machine = hardware()
    print(
        f"{datetime.date.today()}, {machine['cpu']}, {machine['cpus']} cores, TensorFlow {tf.__version__}\n"
        f"{height}x{width}, batch {batch_size}, {workers} workers\n\n"
        "| measure | images/s, median | range | share | peak GiB |\n| --- | --- | --- | --- | --- |"
    )
    for name, values in rates.items():
        spread = f"{min(values):,.0f}-{max(values):,.0f}"
        share = medians[name] / medians[PLAIN]
        print(f"| {name} | {medians[name]:,.0f} | {spread} | {share:.2f} | {memory[name]:.2f} |")


if __name__ == "__main__":
    main()
