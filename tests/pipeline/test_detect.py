"""The detect command: which files the inputs name, and what it writes of images and of a video."""

import io
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effdet.postprocess import PostprocessConfig
from pipeline import params
from pipeline.coco_metrics import coco_rows
from pipeline.detect import Pen, find
from pipeline.detectors import decode_picture, keras_detection, open_detector
from pipeline.errors import PipelineError
from pipeline.model_files import read_model
from tests.pipeline.judged_model import CLASSES, picture, write_trained
from tests.pipeline.made_video import frames_of, write_video

ROOT = Path(__file__).parents[2]


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Empty files in folders, for what goes by names alone."""
    for name in (
        "pics/b.JPG",
        "pics/a.jpeg",
        "pics/notes.txt",
        "pics/clip.mp4",
        "pics/deep/er/c.Png",
        "pics/deep/a.jpeg",
        "more/a.jpeg",
        "more/A.JPEG",
        "none/readme.md",
        "pics/odd[1].jpg",
        "scan.bmp",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*inputs):
    return [source.name for source in find(inputs)[0]]


@pytest.mark.usefixtures("tree")
def test_folder_with_its_sub_folders_in_order():
    sources, passed_over = find(["pics"])
    assert [source.name for source in sources] == ["a.jpeg", "b.JPG", "odd[1].jpg", "deep/a.jpeg", "deep/er/c.Png"]
    assert [str(source.path) for source in sources] == [f"pics/{source.name}" for source in sources]
    assert passed_over == 2  # the notes, and the video: one that is meant is named


@pytest.mark.usefixtures("tree")
def test_several_folders_keep_their_names():
    assert names("pics/deep", "more", "scan.bmp") == [
        "deep/a.jpeg",
        "deep/er/c.Png",
        "more/A.JPEG",
        "more/a-2.jpeg",  # where letters' case does not count the two would be one file
        "scan.bmp.jpg",  # which is what is written
    ]


@pytest.mark.usefixtures("tree")
def test_same_name_twice_and_same_file_twice():
    assert names("pics/a.jpeg", "more/a.jpeg", "pics/deep/a.jpeg", "more/../pics/a.jpeg") == [
        "a.jpeg",
        "a-2.jpeg",
        "a-3.jpeg",
    ]


@pytest.mark.usefixtures("tree")
def test_globs():
    assert names("pics/*.jp*g") == ["a.jpeg", "odd[1].jpg"]
    assert names("pics/**/*.jpeg") == ["a.jpeg", "deep/a.jpeg"]
    assert names("*/a.jpeg") == ["more/a.jpeg", "pics/a.jpeg"]
    assert names("pics/odd[1].jpg") == ["odd[1].jpg"]  # a file of that very name
    sources, passed_over = find(["pics/d*"])  # a folder among the matches is searched
    assert ([source.name for source in sources], passed_over) == (["deep/a.jpeg", "deep/er/c.Png"], 0)
    with pytest.raises(PipelineError, match="a video goes alone"):
        find(["pics/*"])


@pytest.mark.usefixtures("tree")
def test_names_stay_below_the_output():
    Path("link").symlink_to("more", target_is_directory=True)
    assert names("link", "scan.bmp") == ["more/A.JPEG", "more/a-2.jpeg", "scan.bmp.jpg"]
    assert names("pics/../more/a.*") == ["a.jpeg"]
    assert names("pics/*/../../more/a.jpeg") == ["a.jpeg"]


@pytest.mark.usefixtures("tree")
def test_video_goes_alone():
    (source,), _ = find(["pics/clip.mp4"])
    assert source.is_video
    with pytest.raises(PipelineError, match=r"pics/clip\.mp4: a video goes alone"):
        find(["more", "pics/clip.mp4"])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["pics", "nowhere"], r"^nowhere: not found; expected an image"),
        (["none"], r"^none: no image or video found .*; 1 files there have none of these endings"),
        (["pics", "pics/*.gif"], r"^pics/\*\.gif: no image or video found"),
    ],
)
@pytest.mark.usefixtures("tree")
def test_input_that_names_nothing(inputs, words):
    with pytest.raises(PipelineError, match=words):
        find(inputs)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with params.yaml, data/model and pictures of several kinds, one of them broken."""
    root = tmp_path_factory.mktemp("detect")
    shutil.copy(ROOT / "params.yaml", root)
    write_trained(root / "data" / "model", apply_exif=True)
    rng = np.random.default_rng(4)
    (root / "pics" / "deep").mkdir(parents=True)
    for name, orientation in (("a.jpg", 1), ("b.JPEG", 6), ("deep/a.jpg", 1), ("e.jpg", 4)):
        (root / "pics" / name).write_bytes(picture(rng, orientation=orientation)[0])
    with Image.open(io.BytesIO(picture(rng)[0])) as image:
        for name, mode in (("c.png", "RGBA"), ("deep/grey.png", "L"), ("deep/print.jpg", "CMYK")):
            image.convert(mode).save(root / "pics" / name)
    (root / "pics" / "broken.jpg").write_bytes(picture(rng)[0][:900])
    (root / "pics" / "notes.txt").write_text("not a picture")
    write_video(root / "clip.mov", 11, rate=Fraction(12), size=(96, 128))
    return root


def command(workplace, *arguments):
    """Runs it as a person does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.detect", *map(str, arguments)],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
    )


def found_by(workplace, pictures, min_score):
    """What evaluation's functions find: rows of the pictures, numbered."""
    stored = read_model(workplace / "data" / "model")
    nms = PostprocessConfig(**params.load(workplace / "params.yaml").evaluate.nms.model_dump())
    found = keras_detection(stored, nms, 3)(list(pictures.values()))
    rows = [
        row for number, here in zip(pictures, found, strict=True) for row in coco_rows(number, here, stored.classes)
    ]
    return [row for row in rows if row["score"] >= min_score]


@pytest.fixture(scope="module")
def images_run(workplace):
    out = workplace / "out"
    done = command(workplace, "data/model", "pics", "--out", out, "--batch", 3, "--min-score", 0.25)
    return done, out


@pytest.mark.slow
def test_unreadable_image_is_named_and_the_others_are_done(images_run):
    done, out = images_run
    assert done.returncode == 1
    assert "left out: pics/broken.jpg: cannot be decoded: " in done.stderr
    assert done.stderr.endswith("error: 1 of 8 images could not be read; they are named above\n")
    assert done.stdout.endswith(f"7 images, in {out}; 1 other files passed over\n")
    drawn = sorted(path.relative_to(out / "pictures").as_posix() for path in (out / "pictures").rglob("*.*"))
    assert drawn == ["a.jpg", "b.JPEG", "c.png", "deep/a.jpg", "deep/grey.png", "deep/print.jpg", "e.jpg"]
    assert [path.name for path in out.parent.glob(".*")] == []  # nothing half-written


@pytest.mark.slow
def test_results_are_those_of_evaluation(workplace, images_run):
    _, out = images_run
    images = json.loads((out / "images.json").read_text())
    assert [(image["id"], image["file_name"]) for image in images] == [
        (1, "a.jpg"),
        (2, "b.JPEG"),
        (4, "c.png"),  # 3 is the broken one
        (5, "e.jpg"),
        (6, "deep/a.jpg"),
        (7, "deep/grey.png"),
        (8, "deep/print.jpg"),
    ]
    pictures = {
        image["id"]: decode_picture((workplace / image["source"]).read_bytes(), image["source"], True)
        for image in images
    }
    for image in images:
        assert pictures[image["id"]].shape == (image["height"], image["width"], 3)
    with Image.open(workplace / images[1]["source"]) as stored:
        assert stored.size == (images[1]["height"], images[1]["width"])  # a turn to the side
    expected = found_by(workplace, pictures, 0.25)
    assert {row["image_id"] for row in expected} >= {1, 2, 5, 6}
    assert json.loads((out / "detections.json").read_text()) == expected


@pytest.mark.slow
def test_pictures_keep_size_and_kind_and_show_the_boxes(workplace, images_run):
    _, out = images_run
    results = json.loads((out / "detections.json").read_text())
    for entry in json.loads((out / "images.json").read_text()):
        with Image.open(out / "pictures" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"])
            assert image.format == ("PNG" if entry["file_name"].endswith("png") else "JPEG")
            drawn = np.asarray(image.convert("RGB")).astype(int)
        plain = decode_picture((workplace / entry["source"]).read_bytes(), entry["source"], True)
        difference = abs(drawn - plain).max()
        assert (difference > 60) == any(row["image_id"] == entry["id"] for row in results), entry


@pytest.mark.slow
def test_video(workplace):
    out = workplace / "video"
    done = command(workplace, "data/model", "clip.mov", "--out", out, "--batch", 4, "--min-score", 0.2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"11 frames, in {out}\n")
    assert sorted(path.name for path in out.iterdir()) == ["clip.mp4", "detections.json", "images.json"]
    source, drawn = frames_of(workplace / "clip.mov"), frames_of(out / "clip.mp4")
    assert [time for time, _ in drawn] == [Fraction(n, 12) for n in range(11)]
    assert all(frame.shape == (96, 128, 3) for _, frame in drawn)
    assert abs(drawn[3][1].astype(int) - source[3][1]).max() > 100  # boxes
    images = json.loads((out / "images.json").read_text())
    assert [image["id"] for image in images] == list(range(1, 12))
    assert (images[0]["file_name"], images[0]["width"], images[0]["height"]) == ("clip.mov#1", 128, 96)
    expected = found_by(workplace, {number: frame for number, (_, frame) in enumerate(source, start=1)}, 0.2)
    assert json.loads((out / "detections.json").read_text()) == expected
    assert {row["image_id"] for row in expected} == set(range(1, 12))


@pytest.mark.slow
def test_damaged_video_leaves_nothing(workplace):
    content = (workplace / "clip.mov").read_bytes()
    (workplace / "cut.mov").write_bytes(content[: len(content) * 2 // 3])
    done = command(workplace, "data/model", "cut.mov", "--out", "cut", "--batch", 2)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: cut.mov: damaged after frame ")
    assert [path.name for path in workplace.iterdir() if "cut" in path.name] == ["cut.mov"]


@pytest.mark.slow
def test_folder_that_is_not_empty_is_refused_before_any_work(workplace):
    done = command(workplace, "no/model", "pics", "--out", "pics")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: pics: is there already; give another --out, or remove it"


@pytest.mark.slow
def test_best_detection_lies_on_top(workplace):
    nms = PostprocessConfig()
    pen = Pen(open_detector(str(workplace / "data" / "model"), nms), 0.3)
    grey = np.full((200, 200, 3), 128, np.uint8)
    box = {"bbox": [50, 50, 60, 60], "image_id": 1}
    cat, dog = ({**box, "category_id": row["category_id"]} for row in CLASSES[:2])
    one = np.asarray(pen.draw(grey, [{**cat, "score": 0.9}, {**dog, "score": 0.4}]))
    other = np.asarray(pen.draw(grey, [{**dog, "score": 0.9}, {**cat, "score": 0.4}]))
    alone = np.asarray(pen.draw(grey, [{**cat, "score": 0.9}]))
    edge = (slice(60, 100), 50)  # of the box
    np.testing.assert_array_equal(one[edge], alone[edge])
    assert (other[edge] != alone[edge]).any()
