"""A training run in sight: progress on the terminal, DVCLive's history, TensorBoard's events, TensorFlow's profiler.

What is measured (speed, waiting, memory) differs from run to run: it goes to the terminal and TensorBoard, never into
DVCLive's files, which are a stage's out.
"""

import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from dvclive.live import Live
from tqdm import tqdm

from effdet.training import StepRecord

AVERAGED = ("loss", "class_loss", "box_loss", "l2_loss", "learning_rate", "gradient_norm")
STEP_FIGURES = (*AVERAGED, "bad")
STEP_EVENTS = (*STEP_FIGURES, "loss_scale", "waited")
SPEED_WINDOW = 100  # steps over which the terminal's images per second are taken
LINE_SECONDS = 30  # between lines where there is no terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # without steps a second: 80 columns hold it
FEW_RANKS = 8  # are shown one by one
PROFILED = range(10, 20)  # steps of this process; those before are tracing, and filling up
STATUS = Path("/proc/self/status")
GIB = 2**30

Row = dict[str, Any]  # an epoch's figures: {"epoch": counted from 1, "train/loss": ..., "val/AP": ...}


def step_figures(record: StepRecord) -> list[float]:
    """What an epoch's row takes of a step, as numbers that JSON gives back to the last bit."""
    return [float(getattr(record, name)) for name in STEP_FIGURES]


def epoch_row(epoch: int, figures: Iterable[Sequence[float]]) -> Row:
    """An epoch's means over the figures of its steps, and how many of them were bad.

    A value that is not finite does not count: a step that loss scaling skipped has no gradient norm.
    """
    steps = list(figures)
    if not steps:  # fewer images than a step takes: some epochs have none
        return {"epoch": epoch}
    values = np.array([step[: len(AVERAGED)] for step in steps], np.float64)
    means = np.ma.masked_invalid(values).mean(axis=0).filled(0.0).tolist()
    averages = {f"train/{name}": mean for name, mean in zip(AVERAGED, means, strict=True)}
    return {"epoch": epoch, **averages, "train/bad_steps": int(sum(step[-1] for step in steps))}


@dataclasses.dataclass(frozen=True)
class RankFigures:
    """What a rank measured over an epoch."""

    images_per_second: float  # of its own, while it had a batch; 0 where the epoch was too short to tell
    waited: float  # share of the time, for batches
    memory: int  # bytes, the most that the process ever held
    gpu_memory: int | None  # bytes, the most that TensorFlow ever held on its GPU; None without one


class Pace:
    """How fast an epoch's steps come on this rank, and how long it waits for their batches."""

    def __init__(self, images: int) -> None:
        """`images`: of this rank, a step."""
        self._images = images
        self._parts: list[tuple[list[float], list[float]]] = []  # when records came, and what they waited; seconds
        self._told = False

    def follow(self, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
        """The records of an epoch, or of a part of it, as they come, timed. Once its figures are told, it is over."""
        if self._told:
            self._parts, self._told = [], False
        came: list[float] = []
        waited: list[float] = []
        self._parts.append((came, waited))  # what lies between two parts was no training
        for record in records:
            came.append(time.monotonic())
            waited.append(record.waited)
            yield record

    def last(self, steps: int) -> tuple[int, float, float]:
        """(steps, seconds they took, seconds of these waited) of the epoch's last steps; zeros before its third."""
        done, seconds, idle = 0, 0.0, 0.0
        for came, waited in reversed(self._parts):
            # A record comes once the next step was handed out: between records i - 1 and i, batch i + 1 was waited
            # for. After the last one none is, so it comes too early to be timed.
            end = len(came) - 2
            first = max(0, end - (steps - done))
            if first < end:
                done += end - first
                seconds += came[end] - came[first]
                idle += sum(waited[first + 2 :])
        return done, seconds, idle

    def figures(self) -> RankFigures:
        """Of the epoch."""
        self._told = True
        steps, seconds, waited = self.last(sum(len(came) for came, _ in self._parts))
        busy = seconds - waited
        return RankFigures(
            images_per_second=self._images * steps / busy if busy > 0 else 0.0,
            waited=waited / seconds if seconds > 0 else 0.0,
            memory=peak_memory(),
            gpu_memory=_peak_gpu_memory(),
        )


def peak_memory() -> int:
    """Bytes, the most that this process held at a time."""
    # getrusage would count what the process held that this one was forked from.
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    return 1024 * int(found[1]) if found else 0


def _peak_gpu_memory() -> int | None:
    if not tf.config.get_visible_devices("GPU"):  # a rank sees its own at most
        return None
    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])


def rank_lines(told: Sequence[RankFigures]) -> list[str]:
    """A line a rank; of many ranks the least, the median and the most, and which rank is the worst."""
    if len(told) <= FEW_RANKS:
        return [f"rank {rank}: {_rank_text(figures)}" for rank, figures in enumerate(told)]
    return [f"{len(told)} ranks: {text}" for text in _spread_texts(told)]


def _rank_text(figures: RankFigures) -> str:
    gpu = "" if figures.gpu_memory is None else f", {figures.gpu_memory / GIB:.1f} GiB of the GPU"
    speed = f"{figures.images_per_second:.1f} images/s, waited {100 * figures.waited:.0f} %, "
    return f"{speed if figures.images_per_second else ''}{figures.memory / GIB:.1f} GiB{gpu}"


def _spread_texts(told: Sequence[RankFigures]) -> Iterator[str]:
    kinds = [
        ("images_per_second", 1.0, "images/s", min),
        ("waited", 100.0, "% waited", max),
        ("memory", 1 / GIB, "GiB", max),
    ]
    if all(figures.gpu_memory is not None for figures in told):
        kinds.append(("gpu_memory", 1 / GIB, "GiB of the GPU", max))
    for name, factor, unit, worst in kinds:
        values = [factor * getattr(figures, name) for figures in told]
        middle = statistics.median(values)
        at = f"rank {values.index(worst(values))} has the {'least' if worst is min else 'most'}"
        yield f"{min(values):.1f} to {max(values):.1f} {unit}, median {middle:.1f}; {at}"


def rank_events(told: Sequence[RankFigures]) -> dict[str, float]:
    """The same for Events.add: each rank's figures by themselves, also of many ranks."""
    return {
        f"rank_{rank}/{name}": value
        for rank, figures in enumerate(told)
        for name, value in dataclasses.asdict(figures).items()
        if value is not None
    }


class _Files(Live):
    """DVCLive's files and nothing else: a stage's out is tracked by DVC.

    Live itself opens the repository, makes one where there is none, and fails where Git has no commit yet.
    """

    def _init_dvc(self) -> None:
        pass


class History:
    """DVCLive's files, a step an epoch: the same bytes for the same figures."""

    def __init__(self, folder: Path, rows: Iterable[Row]) -> None:
        """Begins anew and writes the rows of what was done before, so that a resumed run's files are whole."""
        self._live = _Files(str(folder), report=None, save_dvc_exp=False, dvcyaml=None)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """An epoch more."""
        self._live.step = row["epoch"]
        for name, value in row.items():
            if name != "epoch":
                self._live.log_metric(name, value)
        self._live.make_summary()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Writes what is left."""
        self._live.end()  # type: ignore[no-untyped-call]


class Events:
    """TensorBoard's event files: losses and what goes with them by step; speed, memory and metrics by epoch."""

    def __init__(self, folder: Path) -> None:
        self._writer = tf.summary.create_file_writer(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step."""
        # One write: tf.summary.scalar takes 0.3 ms for each, on the way to the next step.
        summary = tf.compat.v1.Summary()
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=value)
        with self._writer.as_default(step=step):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString())

    def add_steps(self, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
        """The records as they come, written down."""
        for record in records:
            self.add(record.step, {f"step/{name}": float(getattr(record, name)) for name in STEP_EVENTS})
            yield record

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class Progress:
    """Two lines that stay on a terminal, plain lines elsewhere: losses, learning rate, images per second, time left."""

    def __init__(self, total_steps: int, done: int, batch: int, pace: Pace) -> None:
        """`batch`: images a step, all ranks. `pace` follows the same records, before this does."""
        self._total = total_steps
        self._batch = batch
        self._pace = pace
        self._said = time.monotonic()
        plain = not sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=done, bar_format=BAR, disable=plain, dynamic_ncols=True)
        # A line of its own: beside the bar most of it would be cut off.
        self._below = tqdm(position=1, bar_format="{desc}", disable=plain, dynamic_ncols=True)

    @property
    def images_per_second(self) -> float:
        """Of all ranks, over the last steps of this epoch; 0 where there were too few."""
        steps, seconds, _ = self._pace.last(SPEED_WINDOW)
        return self._batch * steps / seconds if seconds > 0 else 0.0

    def follow(self, epoch: str, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
        """The records of an epoch as they come, shown. `epoch` is its name, as "3/12"."""
        for record in records:
            if not self._bar.disable:
                self._bar.set_description(f"epoch {epoch}", refresh=False)
                self._bar.set_postfix_str(self._speed(), refresh=False)
                self._below.set_description_str(_figures(record), refresh=False)
                if self._bar.update():
                    self._below.refresh()
            elif time.monotonic() - self._said > LINE_SECONDS:
                self._line(epoch, record)
            yield record

    def say(self, text: str) -> None:
        """A line of its own."""
        tqdm.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves the lines where they stand."""
        self._bar.close()
        self._below.close()

    def _speed(self) -> str:
        steps, seconds, waited = self._pace.last(SPEED_WINDOW)
        return f"{self.images_per_second:.1f} images/s, waited {100 * waited / seconds:.0f} %" if steps else ""

    def _line(self, epoch: str, record: StepRecord) -> None:
        self._said = time.monotonic()
        text = f"epoch {epoch}, step {record.step + 1}/{self._total}: {_figures(record)}"
        if speed := self._speed():
            left = tqdm.format_interval((self._total - record.step - 1) * self._batch / self.images_per_second)
            text = f"{text}, {speed}, {left} left"
        self.say(text)


def _figures(record: StepRecord) -> str:
    parts = f"class {record.class_loss:.3f}, box {record.box_loss:.4f}, l2 {record.l2_loss:.3f}"
    text = f"loss {record.loss:.3f} ({parts}), lr {record.learning_rate:.2g}, norm {record.gradient_norm:.3g}"
    return text if record.loss_scale == 1.0 else f"{text}, scale {record.loss_scale:g}"


class Profiler:
    """TensorFlow's profiler over some steps of this process; TensorBoard's profile page reads what it writes."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where Events writes, or another."""
        self._folder = folder
        self._done = 0  # steps
        self._running = False

    def follow(self, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
        """The records of an epoch as they come; the profiler is on from PROFILED's first step to its last."""
        for record in records:
            self._done += 1
            if self._done == PROFILED.start:
                tf.profiler.experimental.start(str(self._folder))
                self._running = True
            elif self._done == PROFILED.stop:
                self.close()
            yield record

    def close(self) -> None:
        """Writes what there is, where training ends before."""
        if self._running:
            self._running = False
            tf.profiler.experimental.stop()
