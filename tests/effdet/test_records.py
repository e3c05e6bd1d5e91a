"""The record schema against TensorFlow's own writer and reader, and the framing against damage."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from effdet import records
from effdet.errors import EffdetError

PICTURE = b"\xff\xd8" + bytes(range(256)) * 300  # 76,802 bytes, of which the parser looks at none
BOXES = np.array([[1.5, 2.25, 10, 20], [0, 0, 100.125, 640]], np.float32)


def example(image_id: int = 7, num_objects: int = 2) -> bytes:
    return records.encode_example(
        PICTURE,
        image_id,
        480,
        640,
        BOXES[:num_objects],
        np.array([0, 300])[:num_objects],  # 300 needs two varint bytes
        np.array([0, 1])[:num_objects],
        np.array([99.5, 2e9])[:num_objects],
    )


def write(path: Path, payloads: list[bytes]) -> Path:
    path.write_bytes(b"".join(piece for payload in payloads for piece in records.framed(payload)))
    return path


def test_encoded_example_is_what_tensorflow_reads_and_would_write() -> None:
    feature = tf.train.Example.FromString(example(image_id=581_929)).features.feature
    assert feature["image/encoded"].bytes_list.value[:] == [PICTURE]
    assert feature["image/id"].int64_list.value[:] == [581_929]
    assert feature["image/height"].int64_list.value[:] == [480]
    assert feature["image/width"].int64_list.value[:] == [640]
    assert feature["objects/boxes"].float_list.value[:] == BOXES.ravel().tolist()
    assert feature["objects/class_ids"].int64_list.value[:] == [0, 300]
    assert feature["objects/is_crowd"].int64_list.value[:] == [0, 1]
    assert feature["objects/area"].float_list.value[:] == [99.5, 2e9]
    assert len(feature) == 8
    # The order of a map's entries is free, so the lengths are compared: no field is laid out differently.
    assert len(tf.train.Example.FromString(example()).SerializeToString()) == len(example())


@pytest.mark.parametrize("image_id", [0, -1, 127, 128, 2**31, 2**63 - 1, -(2**63)])
def test_int64_ids_survive(image_id: int) -> None:
    parsed = records.parse_examples(tf.constant([example(image_id)]), max_boxes=2)
    assert parsed["image_id"].numpy().tolist() == [image_id]


def check_parsed(parsed: dict[str, tf.Tensor]) -> None:
    assert parsed["encoded"].numpy().tolist() == [PICTURE, PICTURE]
    assert parsed["image_id"].numpy().tolist() == [3, 4]
    assert parsed["height"].numpy().tolist() == [480, 480]
    assert parsed["width"].numpy().tolist() == [640, 640]
    assert parsed["orientation"].numpy().tolist() == [1, 1]
    np.testing.assert_array_equal(parsed["boxes"][0], [*BOXES.tolist(), [0, 0, 0, 0]])
    np.testing.assert_array_equal(parsed["boxes"][1], np.zeros([3, 4]))
    np.testing.assert_array_equal(parsed["class_ids"], [[0, 300, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(parsed["is_crowd"], [[False, True, False], [False] * 3])
    np.testing.assert_array_equal(parsed["area"], np.float32([[99.5, 2e9, 0], [0, 0, 0]]))
    assert parsed["boxes"].dtype == parsed["area"].dtype == tf.float32
    assert parsed["class_ids"].dtype == parsed["height"].dtype == tf.int32


def test_parse_pads_to_max_boxes_eager_and_in_tf_data() -> None:
    serialized = [example(3), example(4, num_objects=0)]
    check_parsed(records.parse_examples(tf.constant(serialized), max_boxes=3))
    dataset = tf.data.Dataset.from_tensor_slices(serialized).batch(2)
    dataset = dataset.map(lambda batch: records.parse_examples(batch, max_boxes=3))
    assert dataset.element_spec["boxes"].shape.as_list() == [None, 3, 4]
    check_parsed(next(iter(dataset)))


def test_parse_leaves_out_objects_beyond_max_boxes() -> None:
    parsed = records.parse_examples(tf.constant([example()]), max_boxes=1)
    np.testing.assert_array_equal(parsed["boxes"], BOXES[None, :1])


def test_objects_that_do_not_match_are_named() -> None:
    with pytest.raises(EffdetError, match="image 5: got 2 boxes, 1 class ids, 2 crowd marks and 2 areas"):
        records.encode_example(PICTURE, 5, 10, 10, BOXES, [1], [0, 0], [1, 1])


def test_orientation_is_written_where_it_says_something() -> None:
    def oriented(orientation: int) -> bytes:
        return records.encode_example(PICTURE, 7, 480, 640, BOXES, [0, 300], [0, 1], [99.5, 2e9], orientation)

    assert oriented(1) == example()
    feature = tf.train.Example.FromString(oriented(8)).features.feature
    assert feature["image/orientation"].int64_list.value[:] == [8]
    parsed = records.parse_examples(tf.constant([oriented(8), example()]), max_boxes=2)["orientation"]
    assert (parsed.dtype, parsed.numpy().tolist()) == (tf.int32, [8, 1])
    for wrong in (0, 9):
        with pytest.raises(EffdetError, match=f"image 7: expected an EXIF orientation of 1 to 8, got {wrong}"):
            oriented(wrong)


def test_framing_is_what_tensorflow_writes_and_reads(tmp_path: Path) -> None:
    payloads = [b"", b"x", example()]
    theirs = tmp_path / "theirs.tfrecord"
    with tf.io.TFRecordWriter(str(theirs)) as writer:
        for payload in payloads:
            writer.write(payload)
    ours = write(tmp_path / "ours.tfrecord", payloads)
    assert ours.read_bytes() == theirs.read_bytes()
    assert list(tf.data.TFRecordDataset(str(ours)).as_numpy_iterator()) == payloads


def test_record_spans_lead_to_the_payloads(tmp_path: Path) -> None:
    payloads = [example(1), b"", example(2)]
    path = write(tmp_path / "a.tfrecord", payloads)
    spans = records.record_spans(path)
    assert spans.dtype == np.int64
    assert spans[0, 0] == 12  # after the first header
    content = path.read_bytes()
    assert [content[offset : offset + length] for offset, length in spans] == payloads


def test_record_spans_of_an_empty_file(tmp_path: Path) -> None:
    assert records.record_spans(write(tmp_path / "a.tfrecord", [])).shape == (0, 2)


@pytest.mark.parametrize("cut", [1, 4, 5, 12 + 10 + 4 - 12, 12 + 10 + 4 - 8, 12 + 10 + 4 - 1])
def test_truncated_file_is_named_with_the_offset_of_the_record(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "cut.tfrecord", [b"12345", b"1234567890"])
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    second = 12 + 5 + 4  # header, payload and footer of the first
    with pytest.raises(EffdetError, match=rf"cut\.tfrecord: the record at byte {second} is cut off") as error:
        records.record_spans(path)
    assert f"byte {len(content) - cut}" in str(error.value)


def test_damaged_length_is_named_with_its_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.tfrecord", [b"12345", b"1234567890"])
    content = bytearray(path.read_bytes())
    content[21:29] = struct.pack("<Q", 11)
    path.write_bytes(content)
    with pytest.raises(EffdetError, match=r"bad\.tfrecord: byte 21: .* checksum differs"):
        records.record_spans(path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(EffdetError, match=r"byte 0: .* no TFRecord file"):
        records.record_spans(path)
