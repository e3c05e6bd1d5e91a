"""The contact sheet: which rows there are, and that a person can look at it."""

import sys

import numpy as np
import pytest
from PIL import Image

from effdet.boxes import PADDING
from effdet.distortions import OPERATIONS
from pipeline import contact_sheet, params
from pipeline.contact_sheet import CAPTION, GAP, REPEATED, TILE, most_repeated, rows, sheet
from pipeline.errors import PipelineError
from tests.pipeline.tiny_training import ROOT, make_shards

OFF = params.load(ROOT / "params.yaml").train.augment
ON = OFF.model_copy(
    update={
        "colour": 0.4,
        "rand_augment": params.RandAugment(layers=2, magnitude=7.5),
        "grid_mask": 0.25,
        "mosaic": 0.5,
        "mixup": 0.1,
        "repeat_factor": 0.5,
    }
)


def test_a_row_for_each_augmentation():
    shown = dict(rows(OFF))
    assert len(shown) == 6 + len(OPERATIONS)  # as it is, jitter, colour, 13 operations, GridMask, mosaic, mixup, all
    names = list(shown)
    assert names[0] == "as it is"
    assert "flip" in names[1]
    assert names[2] == "colour, strength 1 (off in params.yaml)"
    assert "RandAugment translate x, magnitude 5 (off in params.yaml)" in names
    assert names[-4:-1] == [f"{name}, of all (off in params.yaml)" for name in ("GridMask", "mosaic", "mixup")]
    whole = shown["all, as params.yaml says"]
    assert (whole.colour, whole.rand_augment, whole.grid_mask, whole.mosaic, whole.mixup) == (0, None, 0, 0, 0)
    assert (whole.horizontal_flip, whole.jitter_max) == (OFF.horizontal_flip, OFF.jitter_max)


def test_rows_are_as_strong_as_the_parameters_say():
    shown = dict(rows(ON))
    assert shown["colour, strength 0.4"].colour == 0.4
    turned = shown["RandAugment rotate, magnitude 7.5"].rand_augment
    assert (turned.layers, turned.magnitude, turned.operations) == (1, 7.5, ("rotate",))
    assert shown["GridMask, of 25% of the pictures"].grid_mask == 1.0
    assert shown["mosaic, of 50% of the pictures"].mosaic == 1.0
    whole = shown["all, as params.yaml says"]
    assert (whole.rand_augment.layers, whole.rand_augment.operations) == (2, None)
    assert (whole.grid_mask, whole.mosaic, whole.mixup) == (0.25, 0.5, 0.1)
    assert list(shown)[-1] == REPEATED
    assert REPEATED not in dict(rows(OFF))


def test_the_most_repeated_come_first():
    entries = np.array([0, 1, 1, 2, 3, 3, 3])
    assert most_repeated(entries, 3).tolist() == [3, 1, 0]
    assert most_repeated(entries, 6).tolist() == [3, 1, 0, 2, 3, 1]


def samples(height, width):
    """Two samples in an input of 32 x 64: grey pictures of this size; the first has a box."""
    image = np.zeros((2, 32, 64, 3), np.uint8)
    image[:, :height, :width] = 128
    boxes = np.zeros((2, 1, 4), np.float32)
    boxes[0] = 4, 8, 12, 24
    class_ids = np.array([[1], [PADDING]], np.int32)
    return {"image": image, "content_size": np.array([[height, width]] * 2), "boxes": boxes, "class_ids": class_ids}


def test_pictures_stand_in_rows_with_their_boxes():
    drawn = np.asarray(sheet([("first", samples(16, 32)), ("second", samples(32, 64))], {1: "cat"})).astype(int)
    scale = TILE // 64
    first = CAPTION + 16 * scale + GAP
    assert drawn.shape == (first + CAPTION + 32 * scale + GAP, GAP + 2 * (TILE + GAP), 3)
    top, left = CAPTION, GAP + TILE + GAP
    second_picture = drawn[top : top + 16 * scale, left : left + 32 * scale]
    assert (second_picture == 128).all()
    assert (drawn[top : top + 16 * scale, left + 32 * scale :] == 255).all()  # padding is not shown
    below = drawn[first + CAPTION :, GAP : GAP + TILE]
    grey = (below == 128).all(axis=2)
    assert grey[: 32 * scale].mean() > 0.8
    assert not grey[12 * scale, 8 * scale + 2 : 24 * scale].any()  # the box's lower edge
    assert grey[12 * scale + 3, 8 * scale + 2 : 24 * scale].all()
    assert (drawn[:CAPTION].min(axis=2) < 100).any()  # the row's name


def command(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["contact_sheet", *arguments])
    contact_sheet.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "sheet.pdf"], r"ends in \.jpg, \.jpeg, \.png, got sheet\.pdf"),
        (["--images", "0"], "--images: expected 1 or more, got 0"),
        (["blur"], "no row's name has 'blur' in it; the rows are: as it is; .*mixup"),
        ([], r"manifest of the shards not found; run `dvc repro`"),
    ],
)
def test_mistakes_are_named(monkeypatch, tmp_path, arguments, message):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    with pytest.raises(PipelineError, match=message):
        command(monkeypatch, tmp_path, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.slow
def test_the_command_writes_the_rows_that_are_asked_for(monkeypatch, tmp_path, capsys):
    make_shards(tmp_path / "data" / "shards")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    command(monkeypatch, tmp_path, "as it", "mosaic", "--images", "3", "--out", "looked/at.png")
    assert "looked/at.png: 2 rows of 3 pictures" in capsys.readouterr().out
    with Image.open(tmp_path / "looked" / "at.png") as picture:
        assert picture.width == GAP + 3 * (TILE + GAP)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
