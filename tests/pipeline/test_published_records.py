"""TFRecords of the published layout, written by TensorFlow itself: what is trained on is what they say."""

import contextlib
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from ruamel.yaml import YAML

from effdet.augment import Augmentation
from effdet.input_pipeline import train_batches
from pipeline import checksums, download, shard, validate
from pipeline.coco import ImageArchive
from pipeline.errors import PipelineError
from pipeline.params import TfrecordsData
from pipeline.published_records import convert, file_names
from pipeline.shard_files import shard_paths, train_classes
from tests.pipeline.made_data import PARAMS, picture

WIDTH, HEIGHT = 64, 48  # of made_data.picture


def feature(values: Sequence[Any], is_float: bool) -> tf.train.Feature:
    if values and isinstance(values[0], bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if (values and isinstance(values[0], float)) or (is_float and not values):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def example(
    number: int, boxes: Sequence[Sequence[float]] = (), labels: Sequence[int] = (), **changed: Sequence[Any] | None
) -> bytes:
    """A record as the published scripts write it; boxes xywh in pixels; `changed`: by a key's last part."""
    encoded = picture(number)
    features: dict[str, Sequence[Any] | None] = {
        "image/height": [HEIGHT],
        "image/width": [WIDTH],
        "image/filename": [f"{number}.jpg".encode()],
        "image/source_id": [str(number).encode()],
        "image/key/sha256": [hashlib.sha256(encoded).hexdigest().encode()],
        "image/encoded": [encoded],
        "image/format": [b"jpeg"],
        "image/object/bbox/xmin": [x / WIDTH for x, y, w, h in boxes],
        "image/object/bbox/xmax": [(x + w) / WIDTH for x, y, w, h in boxes],
        "image/object/bbox/ymin": [y / HEIGHT for x, y, w, h in boxes],
        "image/object/bbox/ymax": [(y + h) / HEIGHT for x, y, w, h in boxes],
        "image/object/class/text": [f"name {label}".encode() for label in labels],
        "image/object/class/label": labels,
        "image/object/is_crowd": [0] * len(labels),
        "image/object/area": [0.5 * w * h for x, y, w, h in boxes],
    }
    for key in features:
        if key.rpartition("/")[2] in changed:
            features[key] = changed[key.rpartition("/")[2]]
    held = {
        key: feature(values, "bbox" in key or "area" in key) for key, values in features.items() if values is not None
    }
    return bytes(tf.train.Example(features=tf.train.Features(feature=held)).SerializeToString())


def write(path: Path, records: Sequence[bytes]) -> Path:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


def converted(folder: Path, train: Sequence[bytes], val: Sequence[bytes] = (), **options: Any) -> dict[str, Any]:
    """train's json of these records; val has one of its own unless others are given."""
    folder.mkdir(exist_ok=True)
    files = {
        "train": [write(folder / "t.tfrecord", train)],
        "val": [write(folder / "v.tfrecord", val or [example(900, [[1, 2, 3, 4]], [2])])],
    }
    convert(files, options.get("num_classes", 90), options.get("max_images"), folder)
    content: dict[str, Any] = json.loads((folder / "instances_train.json").read_text())
    return content


def test_file_names() -> None:
    names = file_names("a/train-?????-of-00256.tfrecord")
    assert (len(names), names[0], names[-1]) == (
        256,
        "a/train-00000-of-00256.tfrecord",
        "a/train-00255-of-00256.tfrecord",
    )
    assert file_names("val-*-of-00002") == ["val-00000-of-00002", "val-00001-of-00002"]
    assert file_names("val.tfrecord") == ["val.tfrecord"]


@pytest.mark.parametrize(
    "pattern", ["train-*", "train-?????.tfrecord", "train-?????-of-00000", "train-0000[01]-of-00002"]
)
def test_pattern_without_a_number_of_files_is_refused(pattern: str) -> None:
    with pytest.raises(PipelineError, match=r"does not say how many files there are; write \?\?\?\?\?-of-00256"):
        file_names(pattern)


def test_records_become_a_coco_data_set(tmp_path: Path) -> None:
    boxes = [[4.25, 6.5, 20.75, 10], [0, 0, 64, 48]]
    train = [
        example(7, boxes, [3, 90], is_crowd=[0, 1]),
        example(5),
        example(6, [[1, 2, 3, 4]], [1], is_crowd=None, area=None, text=None),
    ]
    val = [example(8, [[1, 2, 3, 4]], [44])]
    content = converted(tmp_path, train, val)
    assert content["images"] == [
        {"id": number, "file_name": f"00000000000{number}.jpg", "height": 48, "width": 64} for number in (7, 5, 6)
    ]
    found = content["annotations"]
    keys = ("id", "image_id", "category_id", "iscrowd", "area")
    assert [tuple(row[key] for key in keys) for row in found] == [
        (1, 7, 3, 0, 0.5 * 20.75 * 10),
        (2, 7, 90, 1, 1536),
        (3, 6, 1, 0, pytest.approx(12, rel=1e-6)),  # the box's
    ]
    # A share of 64 or 48 pixels in float32 is off by 2^-25 of 1, half of the spacing below 1.
    np.testing.assert_allclose([row["bbox"] for row in found], [*boxes, [1, 2, 3, 4]], rtol=0, atol=2 * 64 * 2**-25)
    categories = [
        {"id": 1, "name": "class 1"},
        {"id": 3, "name": "name 3"},
        {"id": 44, "name": "name 44"},  # of val
        {"id": 90, "name": "name 90"},
    ]
    assert content["categories"] == categories
    assert json.loads((tmp_path / "instances_val.json").read_text())["categories"] == categories
    with ImageArchive(tmp_path / "train.zip") as archive:
        assert archive.names == [f"00000000000{number}.jpg" for number in (5, 6, 7)]
        assert all(archive.read(f"00000000000{number}.jpg") == picture(number) for number in (5, 6, 7))


def test_what_is_missing_is_filled_in(tmp_path: Path) -> None:
    png = picture(3, "PNG", width=40, height=30)
    train = [
        example(1, source_id=[b"a9"]),
        example(2, source_id=None, height=None, width=None, encoded=[png]),
        example(3, source_id=[b"77"]),
        example(4, source_id=[b"9" * 5000]),  # which Python takes for an attack
    ]
    images = converted(tmp_path, train)["images"]
    assert [(row["id"], row["file_name"]) for row in images] == [
        (1, "000000000001.jpg"),
        (2, "000000000002.png"),
        (3, "000000000003.jpg"),  # counted, as the first is
        (4, "000000000004.jpg"),
    ]
    assert (images[1]["height"], images[1]["width"]) == (30, 40)


def test_max_images_asks_for_no_more_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [example(1, [[1, 2, 3, 4]], [1]), example(2)])

    def files() -> Any:
        yield first
        raise AssertionError("another file was asked for")

    convert({"train": files(), "val": [first]}, 90, 2, tmp_path)
    assert len(json.loads((tmp_path / "instances_train.json").read_text())["images"]) == 2
    convert({"train": [first], "val": [first]}, 90, 1, tmp_path)
    assert [row["id"] for row in json.loads((tmp_path / "instances_train.json").read_text())["images"]] == [1]


def test_unpacked_numbers_are_read(tmp_path: Path) -> None:
    """Protobuf 2 wrote one tag a number; readers must take both."""

    def field(number: int, body: bytes) -> bytes:
        return bytes([number << 3 | 2, len(body)]) + body

    whole = example(1, [[1, 2, 3, 4]], [1], label=None)
    label = field(1, field(1, b"image/object/class/label") + field(2, field(3, b"\x08\x57")))  # 0x57 == 87
    assert [row["category_id"] for row in converted(tmp_path, [whole + field(1, label)])["annotations"]] == [87]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_id": [b"900"]}, "image/source_id 900 came before"),
        ({"source_id": [b"x"]}, "image/source_id is no integer, and the first record's was"),
        ({"xmin": [0.5, 0.5]}, "1 of image/object/class/label and 2 of xmin"),
        ({"is_crowd": [0, 0]}, "1 of image/object/class/label and 2 of is_crowd"),
        ({"ymax": [float("nan")]}, "a value is not finite"),
        ({"area": [12 / (HEIGHT * WIDTH)]}, "image/object/area: are shares of the picture, not square pixels"),
        ({"label": [1.0]}, "image/object/class/label: expected a int64_list, got a float_list"),
        ({"text": [b"other"]}, "text of label 2: 'other', and 'name 2' before"),
        ({"encoded": None}, "image/encoded: expected one JPEG or PNG"),
        ({"encoded": [b"GIF89a"]}, "image/encoded: expected one JPEG or PNG"),
        ({"encoded": [b"\xff\xd8\xff"], "height": None}, "no image/height and image/width, and image/encoded cannot"),
    ],
)
def test_faulty_record_is_named_by_file_and_byte(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    first = example(900, [[1, 2, 3, 4]], [2])
    with pytest.raises(PipelineError) as error:
        converted(tmp_path, [first, example(901, [[1, 2, 3, 4]], [2], **change)])
    assert str(error.value).startswith(f"{tmp_path / 't.tfrecord'}: record at byte {len(first) + 16}: ")
    assert words in str(error.value)
    assert not list(tmp_path.glob("*.json")) + list(tmp_path.glob("*.zip")) + list(tmp_path.glob(".*"))


def test_a_picture_whose_boxes_are_empty_is_taken(tmp_path: Path) -> None:
    empty = [example(900, [[1, 2, 0, 4]], [2]), example(901, [[1, 2, 0, 4]], [2], area=None)]
    assert [row["area"] for row in converted(tmp_path, empty)["annotations"]] == [0, 0]


@pytest.mark.parametrize(("label", "num_classes"), [(0, 90), (91, 90), (3, 2)])
def test_label_outside_of_the_classes_is_named(tmp_path: Path, label: int, num_classes: int) -> None:
    with pytest.raises(
        PipelineError, match=rf"byte 0: .*label: got {label}, .*num_classes .* allows 1 to {num_classes}"
    ):
        converted(tmp_path, [example(1, [[1, 2, 3, 4]], [label])], num_classes=num_classes)


def test_splits_without_records_or_objects_are_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"data\.train: its files hold no record"):
        converted(tmp_path, [])
    with pytest.raises(PipelineError, match="no record has an object"):
        converted(tmp_path, [example(1)], [example(2)])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "whole", [example(1, [[1, 2, 3, 4]], [1]), example(2)])
    whole = path.read_bytes()
    faults = {
        "cut": (whole[:-3], r"the record at byte \d+ is cut off"),
        "flipped": (whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:], r"the record at byte \d+ is damaged"),
        "packed": (gzip.compress(whole), "is gzip; only plain TFRecords are read"),
        "text": (b"x" * 99, "byte 0: expected the header of a TFRecord"),
    }
    for name, (content, words) in faults.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PipelineError, match=rf"{name}: .*{words}"):
            convert({"train": [tmp_path / name], "val": [path]}, 90, None, tmp_path)
    with pytest.raises(PipelineError, match=r"record at byte 0: no tf\.Example"):
        convert({"train": [write(tmp_path / "no example", [b"\x0a\xff"])], "val": [path]}, 90, None, tmp_path)
    with pytest.raises(PipelineError, match=r"'t-\?-of-2\.tfrecord\.gz' is compressed"):
        file_names("t-?-of-2.tfrecord.gz")


def test_random_bytes_are_named_and_nothing_else(tmp_path: Path) -> None:
    """Records with right checksums and wrong content: a PipelineError or a data set, and nothing else."""
    random = np.random.default_rng(0)
    whole = bytearray(example(1, [[1, 2, 3, 4]], [1]))
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(0, 700, 3):  # what is not the picture, mostly
            damaged[place] = random.integers(256)
        with contextlib.suppress(PipelineError):
            converted(tmp_path, [bytes(damaged)])


# Through the stages


def write_source(folder: Path) -> None:
    """Three images of train in two files, labels 1, 3 and 90, and one of val."""
    folder.mkdir(parents=True)
    write(folder / "train-00000-of-00002.tfrecord", [example(11, [[4.3, 6.7, 20.1, 10.9]], [90]), example(12)])
    crowd = example(13, [[0, 0, 64, 48], [3, 5, 7, 11]], [1, 3], is_crowd=[1, 0], area=None)
    write(folder / "train-00001-of-00002.tfrecord", [crowd])
    write(folder / "val-00000-of-00001.tfrecord", [example(21, [[1, 2, 30, 40]], [3], is_crowd=None)])


def source(**changed: Any) -> TfrecordsData:
    fields: dict[str, Any] = {
        "source": "tfrecords",
        "base_url": "published",
        "train": "train-?????-of-00002.tfrecord",
        "val": "val-?????-of-00001.tfrecord",
        "num_classes": 91,
        "checksums": {},
        "apply_exif": False,
        "max_images": None,
        **changed,
    }
    data = TfrecordsData(**fields)
    return data if data.checksums else TfrecordsData(**{**fields, "checksums": checksums.compute(data)})


@pytest.mark.slow
def test_published_records_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_source(Path("published"))
    params = YAML(typ="safe").load(PARAMS)
    with Path("params.yaml").open("w") as file:
        YAML(typ="safe").dump({**params, "data": source().model_dump()}, file)
    download.main()
    validate.main()
    shard.main()
    manifest = json.loads(Path("data/shards/manifest.json").read_text())
    assert manifest["num_classes"] == 91
    assert [(row["class_id"], row["name"]) for row in manifest["classes"]] == [
        (0, "name 1"),
        (2, "name 3"),
        (89, "name 90"),
    ]
    paths = shard_paths(manifest, "train", Path("data/shards"))
    batches = train_batches(
        paths,
        image_size=(64, 64),
        max_boxes=3,
        batch_size=3,
        rank=0,
        num_ranks=1,
        seed=1,
        start=0,
        augmentation=Augmentation(horizontal_flip=False, jitter_min=1.0, jitter_max=1.0),
        workers=1,
    )
    batch = {key: value.numpy() for key, value in next(iter(batches)).items()}
    row = {int(number): index for index, number in enumerate(batch["image_id"])}
    assert sorted(row) == [11, 12, 13]
    assert [batch["class_ids"][row[number]].tolist() for number in (11, 12, 13)] == [
        [89, -1, -1],
        [-1, -1, -1],
        [2, -1, -1],  # a crowd is no target
    ]
    # x, y, w, h of the source as yxyx; in and out of float32 shares
    np.testing.assert_allclose(batch["boxes"][row[11], 0], [6.7, 4.3, 17.6, 24.4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(batch["boxes"][row[13], 0], [5, 3, 16, 10], rtol=0, atol=1e-5)
    shown = np.asarray(Image.open(io.BytesIO(picture(11)))).astype(int)
    assert np.abs(batch["image"][row[11], :48] - shown).mean() < 1
    assert sorted(map(tuple, train_classes(Path("data/shards")))) == [(), (2,), (89,)]


def test_files_are_fetched_once_and_held_to_their_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_source(Path("published"))
    data = source()
    assert list(data.checksums) == [
        "train-00000-of-00002.tfrecord",
        "train-00001-of-00002.tfrecord",
        "val-00000-of-00001.tfrecord",
    ]
    raw = Path("raw")
    download.download(data, [], raw)
    first = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    assert {str(path.relative_to(raw)) for path in first} == {
        *(f"source/{name}" for name in data.checksums),
        *("train.zip", "val.zip", "instances_train.json", "instances_val.json"),
    }
    capsys.readouterr()
    download.download(data, [], raw)
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == first
    assert "published" not in capsys.readouterr().out  # nothing is fetched again
    Path("published/train-00001-of-00002.tfrecord").write_bytes(b"other")
    (raw / "source" / "train-00001-of-00002.tfrecord").unlink()
    with pytest.raises(PipelineError, match=r"train-00001-of-00002\.tfrecord: checksum differs"):
        download.download(data, [], raw)
    with pytest.raises(PipelineError, match=r"no checksum of val-00000-of-00001\.tfrecord"):
        download.download(
            source(checksums={"train-00000-of-00002.tfrecord": None, "train-00001-of-00002.tfrecord": None}), [], raw
        )
