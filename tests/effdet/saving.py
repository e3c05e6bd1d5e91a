"""A process that saves checkpoints in a loop until it is killed: `python -m tests.effdet.saving PLACE FIRST_STEP`."""

import itertools
import sys

import numpy as np

from effdet import checkpoint
from effdet.checkpoint import Checkpoint

KEEP = 2
SIZE = 50_000  # numbers; so long in writing that kills meet every part of a save


def made(step, generation):
    """All numbers are one, so that a mixture of two checkpoints would show."""
    numbers = np.full(SIZE, step * 1000 + generation, np.int64)
    return Checkpoint(step, {"a": numbers, "b": -numbers}, {"generation": generation}, best_step=step)


def main(place, first):
    for step in itertools.count(first):
        checkpoint.save(place, "best", Checkpoint(step, {"a": np.full(SIZE, step)}, {}))
        for generation in range(2):  # the second is written over the first
            checkpoint.save(place, "step", made(step, generation))
            checkpoint.prune(place, KEEP, step)
            print(step, generation, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
