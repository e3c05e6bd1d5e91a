"""Which pictures make a mosaic or a mixture, and where they come to lie."""

import numpy as np
import pytest
import tensorflow as tf

from effdet import composites, sampling
from effdet.augment import Augmentation
from effdet.boxes import PADDING
from effdet.composites import EMPTY, MIXED, OWN
from effdet.distortions import FILL

SIZE = (64, 96)


def augmentation(**options):
    return Augmentation(horizontal_flip=False, jitter_min=1.0, jitter_max=1.0, **options)


BOTH = augmentation(mosaic=0.4, mixup=0.3)


def test_slots_are_those_that_are_needed():
    assert composites.slots(augmentation()) == [OWN]
    assert composites.slots(augmentation(mosaic=0.1)) == [OWN, 1, 2, 3]
    assert composites.slots(augmentation(mixup=0.1)) == [OWN, MIXED]
    assert composites.slots(BOTH) == [OWN, 1, 2, 3, MIXED]


def test_shares_and_partners():
    positions = np.arange(10_000)
    entries, centre = composites.choose(1, positions, 1000, BOTH)
    np.testing.assert_array_equal(entries[OWN], sampling.entries(1, 1000, positions)[1])
    mosaic, mixed = entries[1] != EMPTY, entries[-1] != EMPTY
    assert mosaic.mean() == pytest.approx(0.4, abs=0.02)  # 4 standard deviations
    assert mixed.mean() == pytest.approx(0.3, abs=0.02)
    assert (mosaic & mixed).mean() == pytest.approx(0.12, abs=0.013)
    for slot in (2, 3):
        np.testing.assert_array_equal(entries[slot] != EMPTY, mosaic)
    np.testing.assert_array_equal(centre[~mosaic], 1.0)
    assert centre[mosaic].min() >= 0.25
    assert centre[mosaic].max() < 0.75
    np.testing.assert_allclose(centre[mosaic].mean(axis=0), 0.5, atol=0.01)
    # partners are all entries alike, and independent of each other
    partners = entries[1:, mosaic & mixed]
    assert (partners.min(), partners.max()) >= (0, 990)
    assert np.bincount(partners.ravel(), minlength=1000).max() < 20  # of about 4.8
    assert np.abs(np.corrcoef(np.concatenate([entries[:1, mosaic & mixed], partners])) - np.eye(5)).max() < 0.12


def test_one_kind_does_not_change_the_other():
    positions = np.arange(500)
    both, centre = composites.choose(1, positions, 100, BOTH)
    mosaic, its_centre = composites.choose(1, positions, 100, augmentation(mosaic=0.4))
    np.testing.assert_array_equal(mosaic, both[:4])
    np.testing.assert_array_equal(its_centre, centre)
    np.testing.assert_array_equal(composites.choose(1, positions, 100, augmentation(mixup=0.3))[0], both[[0, 4]])


def test_partners_stay_in_the_window_that_is_read():
    num_entries = sampling.WINDOW + 100
    for start in (0, sampling.WINDOW):  # the last window begins earlier, so that it is whole
        partners = sampling.partners(1, num_entries, np.arange(start, start + 100), sampling.Chance.MOSAIC, 3)
        places = np.argsort(sampling.epoch_order(1, 0, num_entries))[partners]
        first = min(start, 100)
        assert first <= places.min() < first + 200
        assert first + sampling.WINDOW - 200 < places.max() < first + sampling.WINDOW
    # of the second epoch, and of an epoch of one entry
    assert sampling.partners(1, 5, np.arange(5, 10), sampling.Chance.MOSAIC, 3).max() < 5
    np.testing.assert_array_equal(sampling.partners(1, 1, np.arange(3), sampling.Chance.MIXUP, 6), [0, 0, 0])


# Places ---------------------------------------------------------------------------------------------------------------

CENTRE = tf.constant([[0.25, 0.5], [1.0, 1.0]], tf.float64)  # a mosaic that meets at (16, 48), and a single picture


@pytest.mark.parametrize(
    ("slot", "goal", "corner"),
    [
        # a picture of 10 x 20, pushed to (16, 48)
        (OWN, (16, 48), (6, 28)),
        (1, (16, 48), (6, 48)),
        (2, (48, 48), (16, 28)),
        (3, (48, 48), (16, 48)),
        (MIXED, SIZE, (0, 0)),
    ],
)
def test_places_by_hand(slot, goal, corner):
    np.testing.assert_array_equal(composites.quarter(slot, CENTRE, SIZE)[0], goal)
    found = composites.corner(slot, CENTRE, tf.constant([[10, 20]] * 2), SIZE)
    np.testing.assert_array_equal(found, [corner, (0, 0)])
    if slot in (OWN, MIXED):
        np.testing.assert_array_equal(composites.quarter(slot, CENTRE, SIZE)[1], SIZE)


def part(content_size, boxes, class_ids):
    """A mosaic's and a single sample's picture with these boxes."""
    return {
        "content_size": tf.constant([content_size] * 2),
        "boxes": tf.constant([boxes] * 2, tf.float32),
        "class_ids": tf.constant([class_ids] * 2),
    }


def test_boxes_of_all_pictures_are_joined_and_the_largest_kept():
    nothing = [PADDING, PADDING]
    parts = {
        OWN: part([10, 20], [[1, 2, 4, 5], [0, 0, 0, 0]], [1, PADDING]),  # 9 pixels
        1: part([16, 30], [[0, 0, 4, 4], [0, 0, 1, 1]], [2, 3]),  # 16 and 1
        2: part([48, 48], [[0, 0, 5, 5], [0, 0, 0, 0]], [4, PADDING]),  # 25
        3: part([48, 40], [[0, 0, 0, 0], [0, 0, 0, 0]], nothing),
        MIXED: part([30, 90], [[7, 8, 9, 9], [0, 0, 0, 0]], [6, PADDING]),  # 2
    }
    joined = composites.join(parts, CENTRE, tf.constant([True, True]), SIZE, 4)
    np.testing.assert_array_equal(joined["class_ids"][0], [4, 2, 1, 6])
    # corners: (16, 0), (0, 48), (6, 28), (0, 0)
    expected = [[16, 0, 21, 5], [0, 48, 4, 52], [7, 30, 10, 33], [7, 8, 9, 9]]
    np.testing.assert_array_equal(joined["boxes"][0], expected)
    np.testing.assert_array_equal(joined["content_size"], [SIZE, (30, 90)])
    empty = part([60, 60], [[0, 0, 0, 0]] * 2, nothing)  # a place where nothing is put
    alone = composites.join({OWN: parts[OWN], MIXED: empty}, CENTRE[1:], tf.constant([False, False]), SIZE, 4)
    np.testing.assert_array_equal(alone["class_ids"][1], [1, PADDING, PADDING, PADDING])
    np.testing.assert_array_equal(alone["boxes"][1], [[1, 2, 4, 5], [0] * 4, [0] * 4, [0] * 4])
    np.testing.assert_array_equal(alone["content_size"][1], [10, 20])


def flat(height, width, value):
    return tf.fill([height, width, 3], tf.constant(value, tf.uint8))


def compose(pictures, options, centre=(1.0, 1.0), mixed=False):
    makers = [lambda picture=picture: picture for picture in pictures]
    return composites.compose(makers, tf.constant(centre, tf.float64), tf.constant(mixed), options, SIZE).numpy()


def test_mosaic_of_flat_pictures():
    sizes = [(10, 20), (16, 30), (48, 48), (40, 48)]
    pictures = [flat(*size, value) for size, value in zip(sizes, (1, 2, 3, 4), strict=True)]
    expected = np.full((*SIZE, 3), FILL, np.uint8)
    expected[6:16, 28:48] = 1
    expected[0:16, 48:78] = 2
    expected[16:64, 0:48] = 3
    expected[16:56, 48:96] = 4
    np.testing.assert_array_equal(compose(pictures, augmentation(mosaic=1.0), (0.25, 0.5)), expected)


def test_mixture_is_the_mean_and_grey_counts_where_one_ends():
    found = compose([flat(10, 20, 100), flat(30, 5, 201)], augmentation(mixup=1.0), mixed=True)
    expected = np.full((30, 20, 3), FILL, np.uint8)
    expected[:10, 5:] = 107  # (100 + 114) / 2
    expected[10:, :5] = 158  # (201 + 114) / 2 = 157.5
    expected[:10, :5] = 151  # (100 + 201) / 2 = 150.5
    np.testing.assert_array_equal(found, expected)
    bright = flat(3, 4, 255)
    np.testing.assert_array_equal(compose([bright, bright], augmentation(mixup=1.0), mixed=True), bright)


def test_pictures_of_empty_slots_are_not_asked_for():
    def refuse():
        raise AssertionError("decoded")

    makers = [lambda: flat(10, 20, 1), refuse, refuse, refuse, refuse]
    single = tf.constant([1.0, 1.0], tf.float64)
    found = composites.compose(makers, single, tf.constant(False), augmentation(mosaic=0.5, mixup=0.5), SIZE)
    np.testing.assert_array_equal(found, flat(10, 20, 1))
