"""What rank 0 shows and writes down while it trains: the terminal, DVCLive's files, TensorBoard's, a profile."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from effdet.training import StepRecord
from pipeline.training_log import (
    Events,
    History,
    Pace,
    Profiler,
    Progress,
    RankFigures,
    Row,
    rank_events,
    rank_lines,
)

DVCLIVE = "dvclive"


class View:
    """A run in sight."""

    def __init__(
        self,
        out: Path,
        log_dir: Path,
        rows: Sequence[Row],
        *,
        epochs: int,
        steps: tuple[int, int],
        global_batch: int,
        pace: Pace,
        profile: bool,
    ) -> None:
        """Begins `out` anew with the rows of the epochs done. `steps`: those done, and all; `global_batch`: images."""
        self._epochs = epochs
        shutil.rmtree(out, ignore_errors=True)
        self._history = History(out / DVCLIVE, rows)
        self._events = Events(log_dir / "tensorboard")
        self._profiler = Profiler(log_dir / "tensorboard") if profile else None
        done, total = steps
        self._progress = Progress(total, done, global_batch, pace)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._progress.say(text)

    def follow(self, epoch: int, records: Iterator[StepRecord]) -> Iterator[StepRecord]:
        """The records of an epoch, shown and written down."""
        if self._profiler:
            records = self._profiler.follow(records)
        return self._events.add_steps(self._progress.follow(f"{epoch}/{self._epochs}", records))

    def epoch_done(self, row: Row, step: int, told: Sequence[RankFigures]) -> None:
        """An epoch's figures, validation among them, to the terminal and the files; `told` by the ranks."""
        self._history.add(row)
        speed = self._progress.images_per_second
        figures = {name: value for name, value in row.items() if name.startswith("val/")}
        self._events.add(step, {**figures, "images_per_second": speed, **rank_events(told)})
        judged = f", val AP {row['val/AP']:.4f}, AP50 {row['val/AP50']:.4f}" if figures else ""
        loss = f"loss {row['train/loss']:.4f}" if "train/loss" in row else "no step"
        pace = f", {speed:.1f} images/s" if speed else ""
        self._progress.say(f"epoch {row['epoch']}/{self._epochs}: {loss}{pace}{judged}")
        for line in rank_lines(told):
            self._progress.say(f"  {line}")

    def close(self) -> None:
        """Leaves the lines where they stand, and ends the files."""
        if self._profiler:
            self._profiler.close()
        self._progress.close()
        self._events.close()
        self._history.close()
