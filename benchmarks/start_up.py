"""Seconds from a process's start to the end of its first training step, by what they go into.

    python -m benchmarks.start_up
    python -m benchmarks.start_up --model efficientdet-lite0 --size 160 --shards data/shards/train-*.tfrecord

What `python -m pipeline.train` does before it trains, without reading parameters and checkpoints: imports, joining the
other ranks, building model and optimizer and giving them rank 0's values, the first batch (of the real input pipeline
where shards are given), the first step, which traces or compiles, and a second one. Each time in fresh processes, in
turn. Prints medians of rank 0's.
"""

import argparse
import itertools
import statistics
import sys
import time

from benchmarks.rank_job import WORKER, Job, machine, serve, worker_task

PHASES = ("launch", "imports", "join", "build", "first batch", "first step", "second step")
ENDLESS = 10**6  # images an epoch: the learning rate hardly moves


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientdet-d0", help="default efficientdet-d0")
    parser.add_argument("--size", type=int, default=512, help="side of the input, pixels (default 512)")
    parser.add_argument("--batch-size", type=int, default=4, help="images a rank (default 4)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--jit", choices=("off", "on"), nargs="+", default=["off"], help="XLA (default off)")
    parser.add_argument("--shards", nargs="*", default=[], help="of train; without them a batch is made up")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    arguments = parser.parse_args()

    cases = list(itertools.product(arguments.ranks, arguments.jit))
    measured: dict[tuple[int, str], list[list[float]]] = {case: [] for case in cases}
    for _, (ranks, jit) in itertools.product(range(arguments.rounds), cases):
        task = {**vars(arguments), "ranks": ranks, "jit": jit == "on", "started": time.time()}
        job = Job("benchmarks.start_up", ranks, task)
        try:
            measured[ranks, jit].append(job.tell("times"))
        finally:
            job.end()

    print(f"{arguments.model}, {arguments.size} x {arguments.size}, batch {arguments.batch_size} a rank\n{machine()}\n")
    print(f"| ranks | jit | {' | '.join(PHASES)} | to the first step's end |\n|{' ---: |' * (len(PHASES) + 3)}")
    for (ranks, jit), times in measured.items():
        medians = [statistics.median(phase) for phase in zip(*times, strict=True)]
        total = statistics.median(sum(phases[:-1]) for phases in times)
        print(f"| {ranks} | {jit} | {' | '.join(f'{seconds:.1f}' for seconds in medians)} | {total:.1f} |")


def work() -> None:
    """A rank's life: gets as far as two steps, and tells the seconds of each phase."""
    task = worker_task()
    marks = [task["started"], time.time()]  # on one machine, one clock
    from benchmarks.training_case import Case, build_trainer, constant_batches, real_batches
    from effdet.distributed import connect

    marks.append(time.time())
    ranks = connect(task["ranks"])
    marks.append(time.time())
    case = Case(task["model"], task["size"], task["batch_size"], jit_compile=task["jit"])
    trainer = build_trainer(case, ranks)
    marks.append(time.time())
    batches = real_batches(case, ranks, task["shards"], 1) if task["shards"] else constant_batches(case)
    first = next(batches)
    marks.append(time.time())
    for batch in (first, next(batches)):
        list(trainer.run(iter([batch]), 1, ENDLESS))
        marks.append(time.time())
    serve(ranks, lambda command: [after - before for before, after in itertools.pairwise(marks)])


if __name__ == "__main__":
    work() if WORKER in sys.argv else main()
