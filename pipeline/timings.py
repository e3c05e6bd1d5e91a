"""How long a stage and its parts took: in files that are no output of it, and enter no hash and no comparison."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import run
from pipeline.files import write_json

STAGES = Path("data/timings/stages")  # NAME.json {seconds}: of a stage's last run here that came to its end


class Pace:
    """The time that batches of images took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._batches: list[tuple[int, float]] = []  # images, seconds

    def batch(self, images: int) -> None:
        """A batch was done."""
        now = time.perf_counter()
        self._batches.append((images, now - self._last))
        self._last = now

    def figures(self, ranks: int) -> dict[str, Any]:
        """Of one of `ranks` equal ones. The first batch, in which the program is built, counts in `seconds` alone.

        image_ms: a batch's time over its images. batch_ms: how long one waits for the detections of a batch.
        """
        steady = [(images, seconds) for images, seconds in self._batches[1:] if images]
        found: dict[str, Any] = {"ranks": ranks, "seconds": round(sum(seconds for _, seconds in self._batches), 3)}
        if steady:
            each = [1e3 * seconds / images for images, seconds in steady]
            images, seconds = (sum(values) for values in zip(*steady, strict=True))
            found["images_per_second"] = round(ranks * images / seconds, 2)
            found["image_ms"] = {"median": round(statistics.median(each), 3), "max": round(max(each), 3)}
            found["batch_ms"] = round(1e3 * statistics.median(seconds for _, seconds in steady), 3)
        return found


@contextlib.contextmanager
def timed(seconds: dict[str, Any], name: str) -> Iterator[None]:
    """Notes how long the block took, as seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


def run_stage(name: str, main: Callable[[], None]) -> None:
    """As pipeline.errors.run; leaves how long the stage took. A rank of it, which has arguments, leaves nothing."""

    def noted() -> None:
        start = time.perf_counter()
        main()
        if not sys.argv[1:]:
            write_json(STAGES / f"{name}.json", {"seconds": round(time.perf_counter() - start, 1)})

    run(noted)
