"""What is seen of a training run: figures by epoch, files that repeat, lines where there is no terminal."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import pty
import re
import struct
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from effdet.training import StepRecord
from pipeline import training_log
from pipeline.training_log import (
    Events,
    History,
    Pace,
    Profiler,
    Progress,
    RankFigures,
    epoch_row,
    peak_memory,
    rank_events,
    rank_lines,
    step_figures,
)

ROWS = [
    {"epoch": 1, "train/loss": 2.5},
    {"epoch": 2, "train/loss": 0.1 + 0.2, "val/AP": 0.25},
    {"epoch": 3, "train/loss": 1.0},
]


def record(step, loss=1.0, norm=1.0, scale=1.0, waited=0.0, bad=False):
    return StepRecord(
        step,
        0.1,
        loss,
        class_loss=0.5,
        box_loss=0.01,
        l2_loss=0.25,
        gradient_norm=norm,
        loss_scale=scale,
        waited=waited,
        bad=bad,
        stop=False,
    )


@pytest.fixture
def times(monkeypatch):
    """A list of seconds that the clock gives, one after the other."""
    told = []
    monkeypatch.setattr(training_log, "time", SimpleNamespace(monotonic=lambda: told.pop(0)))
    return told


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_epoch_row_holds_means():
    row = epoch_row(3, map(step_figures, [record(0, loss=1.0, norm=2.0), record(1, loss=2.0, norm=4.0)]))
    assert row["epoch"] == 3
    assert row["train/loss"] == 1.5
    assert row["train/gradient_norm"] == 3.0
    assert row["train/bad_steps"] == 0


def test_skipped_steps_do_not_count_in_the_norm():
    records = [record(0, norm=math.inf, bad=True), record(1, norm=4.0), record(2, norm=math.nan, bad=True)]
    row = epoch_row(1, map(step_figures, records))
    assert row["train/gradient_norm"] == 4.0
    assert row["train/loss"] == 1.0
    assert row["train/bad_steps"] == 2


def test_row_of_an_epoch_that_a_checkpoint_divided_has_the_same_bits():
    random = np.random.default_rng(0)
    records = [record(step, *random.lognormal(size=2).tolist()) for step in range(1000)]
    records[3] = record(3, norm=math.inf, bad=True)
    whole = epoch_row(1, map(step_figures, records))
    kept = json.loads(json.dumps([step_figures(record) for record in records[:617]]))
    assert epoch_row(1, [*kept, *map(step_figures, records[617:])]) == whole
    # As NumPy sums an array of all of them.
    assert whole["train/loss"] == np.mean([[record.loss, 0.0] for record in records], axis=0)[0]


def test_epoch_without_steps():
    assert epoch_row(1, []) == {"epoch": 1}


def test_history_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path):
    whole = History(tmp_path / "whole", [])
    for row in ROWS:
        whole.add(row)
    whole.close()
    broken_off = History(tmp_path / "resumed", [])
    broken_off.add(ROWS[0])
    resumed = History(tmp_path / "resumed", ROWS[:1])
    for row in ROWS[1:]:
        resumed.add(row)
    resumed.close()
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    table = (tmp_path / "whole" / "plots" / "metrics" / "train" / "loss.tsv").read_text()
    assert table == "step\tloss\n1\t2.5\n2\t0.30000000000000004\n3\t1.0\n"
    assert "metrics.json" in contents(tmp_path / "whole")


def test_pace_is_of_what_lies_between_the_records(times):
    times[:] = [10.0, 12.0, 16.0, 16.5]  # the last comes at once: no step is handed out after it
    pace = Pace(images=8)
    waits = [99.0, 99.0, 1.0, 2.0]  # for the first two batches before the first record
    list(pace.follow(record(step, waited=wait) for step, wait in enumerate(waits)))
    assert pace.last(100) == (2, 6.0, 3.0)
    assert pace.last(1) == (1, 4.0, 2.0)
    figures = pace.figures()
    assert figures.images_per_second == 8 * 2 / (6 - 3)
    assert figures.waited == 3 / 6


def test_pace_of_an_epoch_in_parts(times):
    pace = Pace(images=8)
    for times[:] in ([0.0, 2.0, 2.1], [100.0, 104.0, 104.1], [200.0, 200.1]):  # saving lies between
        list(pace.follow(record(step, waited=1.0) for step in range(len(times))))
    assert pace.last(100) == (2, 6.0, 2.0)
    assert pace.last(1) == (1, 4.0, 1.0)
    assert pace.figures().waited == 2 / 6
    assert pace.last(100) == (2, 6.0, 2.0)  # still there for the epoch's line
    times[:] = [300.0, 303.0, 303.1]
    list(pace.follow(map(record, range(3))))
    assert pace.last(100) == (1, 3.0, 0.0)  # another epoch


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_epoch_too_short_to_be_timed(steps, times):
    times[:] = [1.0] * steps
    pace = Pace(images=8)
    list(pace.follow(map(record, range(steps))))
    figures = pace.figures()
    assert (figures.images_per_second, figures.waited) == (0.0, 0.0)
    assert rank_lines([figures]) == [f"rank 0: {figures.memory / 2**30:.1f} GiB"]


def test_peak_memory_is_of_this_process_and_stays():
    before, now = peak_memory(), psutil.Process().memory_info().rss
    assert before >= now
    block = np.ones(before - now + 2**26, np.uint8)  # 64 MiB above what was ever held
    held = peak_memory()
    del block
    assert 2**25 < held - before < 2**27
    assert abs(peak_memory() - held) < 2**20  # the kernel counts in batches


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = itertools.count(0.0, 4.0)  # seconds; Progress asks at the beginning, and then both do once a step
    monkeypatch.setattr(training_log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    pace = Pace(images=4)
    progress = Progress(total_steps=100, done=0, batch=16, pace=pace)
    records = (record(step, scale=1024.0, waited=2.0) for step in range(5))
    shown = list(progress.follow("1/2", pace.follow(records)))
    progress.close()
    assert [found.step for found in shown] == list(range(5))
    # A step takes 8 s, of 16 images on all ranks. The first line comes after 30 s, at the fourth step; 96 are left.
    assert capsys.readouterr().out == (
        "epoch 1/2, step 4/100: loss 1.000 (class 0.500, box 0.0100, l2 0.250), lr 0.1, norm 1, scale 1024, "
        "2.0 images/s, waited 25 %, 12:48 left\n"
    )


def test_line_of_a_step_that_is_too_early_for_a_speed(times, capsys):
    times[:] = [0.0, 31.0, 31.0, 31.0]
    pace = Pace(images=4)
    progress = Progress(total_steps=100, done=0, batch=16, pace=pace)
    list(progress.follow("1/2", pace.follow([record(0)])))
    line = "epoch 1/2, step 1/100: loss 1.000 (class 0.500, box 0.0100, l2 0.250), lr 0.1, norm 1\n"
    assert capsys.readouterr().out == line


def test_images_per_second_are_of_all_ranks(times):
    pace = Pace(images=8)
    times[:] = [0.0, 0.0, 1.0, 2.0]
    progress = Progress(total_steps=5, done=0, batch=16, pace=pace)
    assert progress.images_per_second == 0.0
    list(pace.follow(map(record, range(3))))
    assert progress.images_per_second == 16.0


def screen(written):
    """The lines that a terminal shows in the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\x1b[A":
            row -= 1
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_two_lines_stay_on_a_terminal(monkeypatch):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        patched.setattr(sys, "stdout", terminal)
        pace = Pace(images=8)
        progress = Progress(total_steps=6, done=1, batch=16, pace=pace)
        for found in progress.follow("1/2", pace.follow(map(record, range(1, 6)))):
            time.sleep(0.02)
            if found.step == 4:
                progress.say("a line of its own")
        progress.close()
    written = b""
    with contextlib.suppress(OSError):  # EIO: all is read, and the other side closed
        while True:
            written += os.read(ours, 4096)
    os.close(ours)
    own, bar, figures = [line for line in screen(written.decode()) if line]
    assert own == "a line of its own"
    assert re.fullmatch(r"epoch 1/2: 100%\|█+\| 6/6 \[.*, \d+\.\d images/s, waited \d+ %\]", bar)
    assert len(bar) < 80
    assert figures == "loss 1.000 (class 0.500, box 0.0100, l2 0.250), lr 0.1, norm 1"


def test_few_ranks_are_told_one_by_one():
    told = [RankFigures(12.34, 0.04, int(1.9 * 2**30), None), RankFigures(8.0, 0.0, 2**31, 3 * 2**30)]
    assert rank_lines(told) == [
        "rank 0: 12.3 images/s, waited 4 %, 1.9 GiB",
        "rank 1: 8.0 images/s, waited 0 %, 2.0 GiB, 3.0 GiB of the GPU",
    ]
    assert rank_events(told) == {
        "rank_0/images_per_second": 12.34,
        "rank_0/waited": 0.04,
        "rank_0/memory": int(1.9 * 2**30),
        "rank_1/images_per_second": 8.0,
        "rank_1/waited": 0.0,
        "rank_1/memory": 2**31,
        "rank_1/gpu_memory": 3 * 2**30,
    }


def test_many_ranks_are_told_by_their_spread():
    told = [RankFigures(10.0 + rank, rank / 100, 2**30 * (10 - rank), None) for rank in range(9)]
    told[5] = RankFigures(1.5, 0.6, 2**30, None)
    assert rank_lines(told) == [
        "9 ranks: 1.5 to 18.0 images/s, median 13.0; rank 5 has the least",
        "9 ranks: 0.0 to 60.0 % waited, median 4.0; rank 5 has the most",
        "9 ranks: 1.0 to 10.0 GiB, median 6.0; rank 0 has the most",
    ]


def scalars(folder, step):
    """Tag -> value of a step, as TensorBoard reads its files."""
    accumulator = EventAccumulator(str(folder)).Reload()
    events = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    return {tag: event.value for tag, found in events.items() for event in found if event.step == step}


def test_tensorboard_has_every_step_and_what_was_measured(tmp_path):
    events = Events(tmp_path)
    steps = [record(3, scale=512.0, waited=0.25), record(4, loss=2.0, norm=math.inf, bad=True)]
    assert list(events.add_steps(steps)) == steps
    events.add(5, rank_events([RankFigures(8.0, 0.5, 2**30, None)]))
    events.close()
    expected = {"loss": 1, "class_loss": 0.5, "box_loss": 0.01, "l2_loss": 0.25, "learning_rate": 0.1}
    expected |= {"gradient_norm": 1, "loss_scale": 512, "waited": 0.25, "bad": 0}
    assert scalars(tmp_path, 3) == {f"step/{name}": pytest.approx(value) for name, value in expected.items()}
    bad = scalars(tmp_path, 4)
    assert (bad["step/bad"], bad["step/loss"], bad["step/gradient_norm"]) == (1, 2, math.inf)
    measured = {"rank_0/images_per_second": 8, "rank_0/waited": 0.5, "rank_0/memory": 2**30}
    assert scalars(tmp_path, 5) == measured


@pytest.mark.parametrize("last", [15, 25])  # training may end before the profiler does
def test_profile_of_some_steps_over_two_epochs(last, tmp_path):
    profiler = Profiler(tmp_path)

    def steps(of):
        for step in of:
            with tf.profiler.experimental.Trace("a_step", step_num=step):
                tf.ones([4]) + step
            yield record(step)

    seen = [found.step for epoch in (range(12), range(12, last)) for found in profiler.follow(steps(epoch))]
    profiler.close()
    assert seen == list(range(last))
    (profile,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert steps_in(profile) == set(range(10, min(last, 20)))


def steps_in(profile):
    """The numbers of the steps that a profile names."""
    (plane,) = (p for p in xplane_pb2.XSpace.FromString(profile.read_bytes()).planes if p.name == "/host:CPU")
    named = {key for key, event in plane.event_metadata.items() if event.name == "a_step"}
    events = [event for line in plane.lines for event in line.events if event.metadata_id in named]
    return {stat.int64_value for event in events for stat in event.stats}
