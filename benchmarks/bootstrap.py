"""Time and memory of the gate's bootstrap at val2017's size.

    python -m benchmarks.bootstrap

The data set of benchmarks.evaluation: 5,000 images, 80 classes, 36,781 objects, 100 detections an image; the champion's
scores are moved a little. Prints the seconds of the whole call, ground truth and both models, and the peak of the
process, of which detections as COCO results take the most.
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.evaluation import gibibytes, make
from pipeline.bootstrap import difference
from pipeline.provenance import hardware


def main() -> None:
    """Reads the command line, makes the data set, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resamples", type=int, nargs="+", default=[100, 1000], help="draws (default 100 1000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        truth = Path(name) / "truth.json"
        candidate = json.loads((Path(name) / "detections.json").read_text())
        moves = np.random.default_rng(2).normal(0, 0.05, len(candidate))
        champion = [
            {**row, "score": round(min(max(row["score"] + move, 0.0), 1.0), 6)}
            for row, move in zip(candidate, moves.tolist(), strict=True)
        ]
        machine = hardware()
        print(
            f"{datetime.date.today()}, {machine['cpu']}, {machine['cpus']} cores; before: {gibibytes('VmRSS'):.2f} GiB"
        )
        print("\n| draws | seconds | GiB at the peak | AP's difference, interval |\n| ---: | ---: | ---: | --- |")
        for resamples in arguments.resamples:
            start = time.perf_counter()
            found = difference(truth, candidate, champion, resamples=resamples, seed=1, confidence=0.95).metrics["AP"]
            seconds = time.perf_counter() - start
            told = f"{found.difference:+.4f}, {found.low:+.4f} to {found.high:+.4f}"
            print(f"| {resamples:,} | {seconds:.1f} | {gibibytes('VmHWM'):.2f} | {told} |")


if __name__ == "__main__":
    main()
