"""Pictures: what is drawn where, and the same bytes for the same boxes."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.rendering import CAPTION, GAP, LONG_SIDE, Drawn, side_by_side, with_boxes
from tests.effdet.made_exif import TURNS, jpeg, turned


def grey(width, height, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (width, height), 128 if mode == "L" else (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


def pixels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)


def test_size_keeps_the_aspect():
    shape = pixels(side_by_side(grey(100, 50), [], [])).shape
    assert shape == (LONG_SIDE // 2 + CAPTION, 2 * LONG_SIDE + GAP, 3)


def test_truth_is_left_and_detections_are_right():
    box = Drawn(np.array([20.0, 20.0, 80.0, 80.0]), 0, "cat")
    plain = pixels(side_by_side(grey(100, 100), [], []))
    for truth, found, drawn, empty in (
        ([box], [], slice(0, LONG_SIDE), slice(LONG_SIDE + GAP, None)),
        ([], [box], slice(LONG_SIDE + GAP, None), slice(0, LONG_SIDE)),
    ):
        difference = abs(pixels(side_by_side(grey(100, 100), truth, found)) - plain).sum(axis=2)
        assert difference[:, drawn].max() > 100
        assert difference[:, empty].max() == 0


def test_box_stands_where_it_is():
    box = Drawn(np.array([25.0, 50.0, 75.0, 75.0]), 0, "")  # yxyx of 100 x 100: a scale of 5.12
    difference = pixels(side_by_side(grey(100, 100), [box], [])) - pixels(side_by_side(grey(100, 100), [], []))
    rows, columns = np.nonzero(abs(difference).sum(axis=2) > 60)
    assert abs(rows.max() - CAPTION - 75 * 5.12) < 3
    assert (abs(columns.min() - 50 * 5.12) < 3) & (abs(columns.max() - 75 * 5.12) < 3)


def test_boxes_over_the_border_and_turned_inside_out_are_drawn():
    boxes = [
        Drawn(np.array([-500.0, -9.0, 900.0, 1e6]), 1, "a very long name of a class that is wider than the picture"),
        Drawn(np.array([30.0, 30.0, 20.0, 20.0]), 2, "b"),
    ]
    assert side_by_side(grey(40, 90), boxes, boxes)


def test_grey_pictures_are_drawn():
    assert pixels(side_by_side(grey(64, 64, "L"), [], [])).shape[2] == 3


@pytest.mark.parametrize("number", range(1, 9))
def test_picture_is_turned_for_boxes_that_refer_to_it_so(number):
    box = Drawn(np.array([5.0, 5.0, 20.0, 15.0]), 0, "")
    upright = Image.fromarray(np.ascontiguousarray(TURNS[number](np.asarray(Image.open(io.BytesIO(jpeg()))))))
    plain = io.BytesIO()
    upright.save(plain, "PNG")
    assert side_by_side(turned(number), [box], [], apply_exif=True) == side_by_side(plain.getvalue(), [box], [])
    assert side_by_side(turned(number), [box], []) == side_by_side(jpeg(), [box], [])


def test_bytes_are_the_same_everywhere():
    picture = side_by_side(grey(64, 48), [Drawn(np.array([5, 5, 40, 40]), 3, "vélo")], [])
    assert hashlib.sha256(picture).hexdigest() == "bfd02a73ba6bde98437599246f2b895c49474d2a9ce309578798bdbd15acd90c"


# A picture in its own size --------------------------------------------------------------------------------------------


def drawn_on(height, width, *boxes):
    return np.asarray(with_boxes(np.full((height, width, 3), 128, np.uint8), boxes)).astype(int)


def test_own_size_and_pixels_are_kept():
    plain = np.random.default_rng(1).integers(0, 256, (90, 70, 3), np.uint8)
    before = plain.copy()
    drawn = np.asarray(with_boxes(plain, [Drawn(np.array([40.0, 10.0, 80.0, 60.0]), 0, "cat")]))
    assert drawn.shape == (90, 70, 3)
    np.testing.assert_array_equal(plain, before)
    np.testing.assert_array_equal(drawn[81:], plain[81:])  # below the box


@pytest.mark.parametrize(("side", "line"), [(100, 1), (640, 2), (3200, 10)])
def test_lines_grow_with_the_picture(side, line):
    drawn = drawn_on(side, side, Drawn(np.array([0.5, 0.2, 0.9, 0.8]) * side, 0, ""))
    middle = drawn[round(0.7 * side), : side // 2].sum(axis=1) != 3 * 128
    assert middle.sum() == line
    assert abs(np.flatnonzero(middle)[0] - 0.2 * side) <= 1


def test_labels_lie_above_all_boxes():
    # the second box's edge would cut through the first one's label
    first, second = (
        Drawn(np.array([50.0, 20.0, 90.0, 80.0]), 0, "first"),
        Drawn(np.array([44.0, 10.0, 95.0, 90.0]), 1, ""),
    )
    label = drawn_on(100, 100, first)[37:50, 20:45]
    np.testing.assert_array_equal(drawn_on(100, 100, first, second)[37:50, 20:45], label)
