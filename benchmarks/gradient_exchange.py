"""Time and bytes of a step's gradient exchange between ranks of this machine, by compression and Horovod's settings.

    python -m benchmarks.gradient_exchange
    python -m benchmarks.gradient_exchange --settings default --floats 1    # its latency, for benchmarks.scaling

As effdet.training sends it: one vector of all of EfficientDet-D0's gradient, through effdet.distributed; and, to
compare, its 493 tensors as they are, in one group and one by one, which is how Horovod is mostly used. Each setting of
Horovod is a job of its own, which stands still while another works. Prints medians, the bytes that a rank sends by the
ring's formula, and those that the loopback device counted for a rank, with headers and all else that went over it.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.rank_job import WORKER, Job, machine, serve, worker_task
from effdet.distributed import Ranks, connect

MODEL, SIZE = "efficientdet-d0", 512
SETTINGS = {
    "default": {},
    "fusion off": {"HOROVOD_FUSION_THRESHOLD": "0"},
    "cycle 0.1 ms": {"HOROVOD_CYCLE_TIME": "0.1"},
    "cycle 10 ms": {"HOROVOD_CYCLE_TIME": "10"},
}
WAYS = {  # name -> bytes a number on the wire
    "one vector": 4,
    "one vector, fp16": 2,
    "one vector, bf16": 2,
    "its tensors, one group": 4,
    "its tensors, one by one": 4,
}
WARM_UP = 3  # exchanges: Horovod remembers what the ranks agreed on


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="default 2")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--floats", type=int, help="length of a vector instead of the gradient, sent in one piece")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default 7)")
    parser.add_argument("--exchanges", type=int, default=10, help="of a measurement (default 10)")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks: one alone exchanges nothing")
    ways = list(WAYS)[:3] if arguments.floats else list(WAYS)

    jobs: dict[str, Job] = {}
    cases = list(itertools.product(arguments.settings, ways))
    measured: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    try:
        for setting in arguments.settings:
            task = {"ranks": arguments.ranks, "floats": arguments.floats, "exchanges": arguments.exchanges}
            jobs[setting] = Job("benchmarks.gradient_exchange", arguments.ranks, task, SETTINGS[setting])
        numbers = next(iter(jobs.values())).tell("numbers")
        for _, (setting, way) in itertools.product(range(arguments.rounds), cases):
            measured[setting, way].append(jobs[setting].tell(way))
    finally:
        for job in jobs.values():
            job.end()

    print(f"{numbers:,} numbers, {arguments.ranks} ranks, Gloo on one machine\n{machine()}\n")
    print("| Horovod | sent as | ms | MB a rank, ring | MB a rank, counted |\n| --- | --- | ---: | ---: | ---: |")
    for setting, way in cases:
        milliseconds = statistics.median(seconds for seconds, _ in measured[setting, way]) * 1e3
        counted = statistics.median(sent for _, sent in measured[setting, way]) / 1e6
        ring = 2 * (arguments.ranks - 1) / arguments.ranks * numbers * WAYS[way] / 1e6
        print(f"| {setting} | {way} | {milliseconds:.1f} | {ring:.2f} | {counted:.2f} |")


def work() -> None:
    """A rank's life: exchanges in the way that it is told; answers with seconds and loopback's bytes a rank, of one."""
    task = worker_task()
    ranks = connect(task["ranks"])
    exchanges, numbers = ways_to_exchange(ranks, task["floats"])

    def answer(command: str) -> float | tuple[float, float]:
        if command == "numbers":
            return numbers
        exchange, times = exchanges[command], task["exchanges"]
        for _ in range(WARM_UP):
            exchange()
        ranks.gather(None)  # they begin together
        sent, start = loopback_bytes(), time.perf_counter()
        for _ in range(times):
            exchange()
        seconds = time.perf_counter() - start
        return seconds / times, (loopback_bytes() - sent) / ranks.size / times

    serve(ranks, answer)


def ways_to_exchange(ranks: Ranks, floats: int | None) -> tuple[dict[str, Callable[[], object]], int]:
    """A function for each of WAYS that exchanges once and waits for the result, and how many numbers it sends."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    sizes = [floats] if floats else gradient_sizes()
    start = 1e-3 * tf.random.stateless_normal([sum(sizes)], seed=[ranks.rank, 0])

    def one_by_one(vector: tf.Tensor) -> tf.Tensor:
        parts = [
            hvd.allreduce(part, op=hvd.Average, name=f"part.{i}") for i, part in enumerate(tf.split(vector, sizes))
        ]
        return tf.concat(parts, axis=0)

    ways = {
        "one vector": lambda vector: ranks.average([vector], "vector")[0],
        "one vector, fp16": ranks.average_fp16,
        "one vector, bf16": ranks.average_bf16,
        "its tensors, one group": lambda vector: tf.concat(ranks.average(tf.split(vector, sizes), "group"), axis=0),
        "its tensors, one by one": one_by_one,
    }
    functions = {name: tf.function(way, autograph=False) for name, way in ways.items()}
    return {name: lambda f=function: f(start).numpy() for name, function in functions.items()}, sum(sizes)


def gradient_sizes() -> list[int]:
    """Numbers in each tensor of the gradient."""
    import math

    from effdet.config import model_config
    from effdet.model import build

    model = build(model_config(MODEL, 90, (SIZE, SIZE)), "float32")
    return [math.prod(variable.shape) for variable in model.trainable_variables]


def loopback_bytes() -> int:
    """That the loopback device has sent so far; ranks of one machine use it whatever their address."""
    table = Path("/proc/net/dev").read_text()
    return int(table.partition("lo:")[2].split()[8])  # eight columns of what was received come first


if __name__ == "__main__":
    work() if WORKER in sys.argv else main()
