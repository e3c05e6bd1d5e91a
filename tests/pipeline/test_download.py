"""The download stage over real files and a real web server: every source, and every way in which one can be wrong."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import checksums, params, transfer
from pipeline.coco import AnnotationError, ArchiveError, ImageArchive, read_annotations
from pipeline.download import download
from pipeline.errors import PipelineError
from pipeline.http_transfer import TransferError
from pipeline.params import Coco2017Data, CocoFormatData, SplitFiles, SyntheticData

Serve = Callable[[Path], Any]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "data" / "raw"


def own(base: object, **changes: Any) -> CocoFormatData:
    """The data set of one's own at `base`, with the checksums of what lies there."""
    fields: dict[str, Any] = {
        "source": "coco_format",
        "base_url": str(base),
        "train": SplitFiles(annotations="instances_train.json", images="train.zip"),
        "val": SplitFiles(annotations="instances_val.json", images="val.zip"),
        "test": None,
        "apply_exif": False,
        "max_images": None,
        "checksums": {},
        **changes,
    }
    data = CocoFormatData(**fields)
    return data if data.checksums else CocoFormatData(**{**fields, "checksums": checksums.compute(data)})


def coco2017(base: object, **changes: Any) -> Coco2017Data:
    fields = {"source": "coco2017", "base_url": str(base), "apply_exif": False, "max_images": None, "checksums": {}}
    fields |= changes
    data = Coco2017Data(**fields)
    return data if data.checksums else Coco2017Data(**{**fields, "checksums": checksums.compute(data)})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Sources


def test_synthetic(raw: Path) -> None:
    data = SyntheticData(source="synthetic", seed=3, train_images=6, val_images=3, apply_exif=False, max_images=4)
    download(data, [], raw)
    first = tree(raw)
    assert set(first) == {
        *("instances_train.json", "instances_val.json", "train.zip", "val.zip"),
        *("source/instances_train.json", "source/instances_val.json"),
    }
    assert len(read_annotations(raw / "instances_train.json").images) == 4
    assert len(ImageArchive(raw / "train.zip").names) == 6  # the archive is not cut
    shutil.rmtree(raw)
    download(data, [], raw)
    assert tree(raw) == first


def test_coco2017_as_its_site_lays_it_out(coco_site: Path, own_data: Path, raw: Path, serve: Serve) -> None:
    server = serve(coco_site)
    data = coco2017(server.url)
    server.asked.clear()
    download(data, [], raw)
    assert server.asked == [
        "/annotations/annotations_trainval2017.zip",
        "/zips/train2017.zip",
        "/zips/val2017.zip",
    ]
    for split in ("train", "val"):
        assert (raw / f"{split}.zip").read_bytes() == (own_data / f"{split}.zip").read_bytes()
        assert (raw / f"instances_{split}.json").read_bytes() == (own_data / f"instances_{split}.json").read_bytes()
    assert all(checksum.startswith("md5:") for checksum in data.checksums.values())


def test_coco2017_from_a_mirror_with_all_files_in_one_folder(coco_site: Path, raw: Path, serve: Serve) -> None:
    for folder in ("annotations", "zips"):
        for path in (coco_site / folder).iterdir():
            path.rename(coco_site / path.name)
        (coco_site / folder).rmdir()
    server = serve(coco_site)
    data = coco2017(server.url)
    server.asked.clear()
    download(data, [], raw)
    assert server.asked[:2] == ["/annotations/annotations_trainval2017.zip", "/annotations_trainval2017.zip"]
    assert len(read_annotations(raw / "instances_train.json").images) == 5


@pytest.mark.parametrize("kind", ["http", "file", "folder"])
def test_data_of_ones_own_with_a_test_split(own_data: Path, raw: Path, serve: Serve, kind: str) -> None:
    shutil.copy(own_data / "instances_val.json", own_data / "held out.json")
    base = {"http": lambda: serve(own_data).url, "file": own_data.as_uri, "folder": lambda: own_data}[kind]()
    download(own(base, test=SplitFiles(annotations="held out.json", images="val.zip")), [], raw)
    for split, number in (("train", 5), ("val", 3), ("test", 3)):
        images = read_annotations(raw / f"instances_{split}.json").images
        assert len(images) == number
        with ImageArchive(raw / f"{split}.zip") as archive:
            assert all(archive.read(name)[:2] == b"\xff\xd8" for name in images["file_name"])  # JPEG


def test_folders_of_images(own_data: Path, raw: Path) -> None:
    both = {split: SplitFiles(annotations=f"instances_{split}.json", images="pictures") for split in ("train", "val")}
    data = own(own_data, **both)
    download(data, [], raw)
    assert ImageArchive(raw / "val.zip").read("201.jpg") == (own_data / "pictures" / "201.jpg").read_bytes()
    shutil.move(own_data / "pictures", own_data / "elsewhere")
    download(data, [], raw)  # both archives are there: nothing is read again


def test_mirrors_are_asked_first_and_in_order(own_data: Path, tmp_path: Path, raw: Path, serve: Serve) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    for name in ("train.zip", "instances_train.json"):
        shutil.copy(own_data / name, partial)
    origin, first, second = serve(own_data), serve(partial), serve(own_data)
    data = own(origin.url)
    origin.asked.clear()
    download(data, [first.url, second.url], raw)
    assert sorted(first.asked) == ["/instances_train.json", "/instances_val.json", "/train.zip", "/val.zip"]
    assert sorted(second.asked) == ["/instances_val.json", "/val.zip"]
    assert origin.asked == []


# What is there already


def test_a_second_run_asks_for_nothing_and_changes_nothing(coco_site: Path, raw: Path, serve: Serve) -> None:
    server = serve(coco_site)
    data = coco2017(server.url)
    download(data, [], raw)
    before, archive_time = tree(raw), (raw / "train.zip").stat().st_mtime_ns
    server.asked.clear()
    download(data, [], raw)
    assert server.asked == []
    assert tree(raw) == before
    assert (raw / "train.zip").stat().st_mtime_ns == archive_time


def test_only_what_is_wrong_is_fetched_again(coco_site: Path, raw: Path, serve: Serve) -> None:
    server = serve(coco_site)
    data = coco2017(server.url)
    download(data, [], raw)
    (raw / "val.zip").write_bytes(b"damaged")
    server.asked.clear()
    download(data, [], raw)
    assert server.asked == ["/zips/val2017.zip"]


def test_files_of_another_source_and_of_a_killed_run_go(own_data: Path, raw: Path) -> None:
    test = SplitFiles(annotations="instances_val.json", images="val.zip")
    download(own(own_data, test=test), [], raw)
    (raw / ".train.zip.123.part").write_bytes(b"half")
    (raw / "old" / "empty").mkdir(parents=True)
    download(own(own_data), [], raw)
    assert sorted(str(path.relative_to(raw)) for path in raw.rglob("*")) == [
        *("instances_train.json", "instances_val.json", "source"),
        *("source/instances_train.json", "source/instances_val.json", "train.zip", "val.zip"),
    ]


# Files without a checksum


def unknown(base: object, **changes: Any) -> CocoFormatData:
    names = ("instances_train.json", "train.zip", "instances_val.json", "val.zip")
    return own(base, checksums=dict.fromkeys(names), **changes)


def test_what_came_without_a_checksum_stays(own_data: Path, raw: Path, serve: Serve) -> None:
    server = serve(own_data)
    data = unknown(server.url)
    download(data, [], raw)
    assert len(server.asked) == 4
    found = json.loads((raw / "source" / "checksums.json").read_text())
    assert found == {"base_url": server.url, "checksums": own(own_data).checksums}
    before = tree(raw)
    download(data, ["/no/such/mirror"], raw)
    assert len(server.asked) == 4
    assert tree(raw) == before
    (raw / "val.zip").write_bytes(b"damaged")
    download(data, [], raw)
    assert server.asked[4:] == ["/val.zip"]
    assert tree(raw) == before


def test_without_a_checksum_another_address_is_asked(own_data: Path, raw: Path, serve: Serve) -> None:
    download(unknown(own_data), [], raw)
    server = serve(own_data)
    download(unknown(server.url), [], raw)
    assert len(server.asked) == 4
    train, val = (
        SplitFiles(annotations=f"instances_{split}.json", images=f"{split}.zip") for split in ("val", "train")
    )
    download(unknown(server.url, train=train, val=val), [], raw)
    assert (raw / "val.zip").read_bytes() == (own_data / "train.zip").read_bytes()
    assert (raw / "train.zip").read_bytes() == (own_data / "val.zip").read_bytes()


def test_a_run_that_stopped_keeps_what_came_without_a_checksum(own_data: Path, raw: Path, serve: Serve) -> None:
    server = serve(own_data)
    (own_data / "val.zip").rename(own_data / "later")
    with pytest.raises(TransferError, match=r"/val\.zip: the server answers 404"):
        download(unknown(server.url), [], raw)
    (own_data / "later").rename(own_data / "val.zip")
    server.asked.clear()
    download(unknown(server.url), [], raw)
    assert server.asked == ["/val.zip"]


def test_checksums_that_are_set_ask_for_nothing(own_data: Path, raw: Path, serve: Serve) -> None:
    server = serve(own_data)
    download(unknown(server.url), [], raw)
    data = own(own_data)
    download(own(server.url, checksums=data.checksums), [], raw)
    assert len(server.asked) == 4
    assert not (raw / "source" / "checksums.json").exists()


# max_images


def test_max_images_keeps_the_first_by_id(own_data: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((own_data / "instances_train.json").read_text())
    download(own(own_data, max_images=3), [], raw)
    cut = json.loads((raw / "instances_train.json").read_text())
    assert sorted(image["id"] for image in cut["images"]) == [101, 102, 103]  # of 101..105
    assert cut["images"] == [image for image in whole["images"] if image["id"] <= 103]
    assert cut["annotations"] == [box for box in whole["annotations"] if box["image_id"] <= 103]
    assert (cut["categories"], cut["info"]) == (whole["categories"], whole["info"])
    said = capsys.readouterr().out
    assert "data.max_images: train: the first 3 of 5 images, 6 of 10 annotations" in said
    assert "data.max_images: val" not in said  # it has no more than 3
    assert (raw / "instances_val.json").read_bytes() == (own_data / "instances_val.json").read_bytes()
    assert (raw / "train.zip").read_bytes() == (own_data / "train.zip").read_bytes()


def test_another_max_images_fetches_nothing(own_data: Path, raw: Path, serve: Serve) -> None:
    server = serve(own_data)
    data = own(server.url, max_images=3)
    download(data, [], raw)
    server.asked.clear()
    download(own(server.url, max_images=None, checksums=data.checksums), [], raw)
    assert server.asked == []
    assert len(read_annotations(raw / "instances_train.json").images) == 5


# What can be wrong


def test_changed_bytes_are_refused(own_data: Path, raw: Path, serve: Serve) -> None:
    server = serve(own_data)
    data = own(server.url)
    change_json(own_data / "instances_val.json", lambda content: content["info"].update(year=2026))
    with pytest.raises(TransferError) as error:
        download(data, [], raw)
    expected = data.checksums["instances_val.json"]
    got = transfer.checksum([server.url], transfer.SourceFile("", ("instances_val.json",)), "sha256")
    assert f"{server.url}/instances_val.json: checksum differs" in str(error.value)
    assert f"data.checksums.instances_val.json is {expected}, got {got}" in str(error.value)
    assert "`python -m pipeline.checksums`" in str(error.value)
    assert not list(raw.rglob("*.part"))


def test_a_missing_checksum_names_the_command(own_data: Path, raw: Path) -> None:
    some = {name: text for name, text in own(own_data).checksums.items() if name != "val.zip"}
    with pytest.raises(PipelineError) as error:
        download(own(own_data, checksums={**some, "old.zip": some["train.zip"]}), [], raw)
    assert str(error.value) == (
        "params.yaml: data.checksums: no checksum of val.zip; old.zip is no file of this source; "
        "`python -m pipeline.checksums` writes them from the files at data.base_url; null takes whatever comes"
    )
    assert not raw.exists()


def test_a_missing_archive_is_named(coco_site: Path, raw: Path, serve: Serve) -> None:
    server = serve(coco_site)
    data = coco2017(server.url)
    (coco_site / "zips" / "val2017.zip").unlink()
    with pytest.raises(TransferError) as error:
        download(data, [], raw)
    assert str(error.value).splitlines() == [
        "val2017.zip could not be had:",
        f"- {server.url}/zips/val2017.zip: the server answers 404 File not found",
        f"- {server.url}/val2017.zip: the server answers 404 File not found",
    ]


def test_annotations_that_are_not_json_are_named_before_images_are_fetched(own_data: Path, raw: Path) -> None:
    (own_data / "instances_train.json").write_text("<html>")
    with pytest.raises(AnnotationError, match=r"source/instances_train\.json: not JSON: "):
        download(own(own_data), [], raw)
    assert not (raw / "instances_train.json").exists()
    assert not (raw / "train.zip").exists()


def test_a_lacking_key_is_named(own_data: Path, raw: Path) -> None:
    change_json(own_data / "instances_train.json", lambda content: content["annotations"][2].pop("bbox"))
    with pytest.raises(AnnotationError, match=r"annotations\[2\] \(id 1040\): lacks key 'bbox'"):
        download(own(own_data), [], raw)


def test_annotations_missing_from_their_archive_are_named(coco_site: Path, raw: Path) -> None:
    with zipfile.ZipFile(coco_site / "annotations" / "annotations_trainval2017.zip", "w") as archive:
        archive.writestr("instances_train2017.json", "{}")
    with pytest.raises(ArchiveError) as error:
        download(coco2017(coco_site), [], raw)
    assert "annotations_trainval2017.zip: 'annotations/instances_train2017.json' is not in the archive" in str(
        error.value
    )


def test_an_archive_that_is_none_is_named(own_data: Path, raw: Path) -> None:
    (own_data / "val.zip").write_bytes(b"Rar!")
    with pytest.raises(ArchiveError, match=r"raw/val\.zip: not a zip archive"):
        download(own(own_data), [], raw)


def test_a_split_without_images_is_named(own_data: Path, raw: Path) -> None:
    change_json(own_data / "instances_val.json", lambda content: content.update(images=[], annotations=[]))
    with pytest.raises(
        PipelineError, match=r"instances_val\.json: images: empty; split 'val' needs at least one image"
    ):
        download(own(own_data, max_images=2), [], raw)


@pytest.mark.parametrize("path", ["/etc/passwd", "../train.zip", ""])
def test_a_path_that_leaves_the_base_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"expected a path below data\.base_url"):
        SplitFiles(annotations="a.json", images=path)


# What the recipes say


OFFICIAL = {  # COCO's own list, http://images.cocodataset.org
    "train2017.zip": "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
    "val2017.zip": "md5:442b8da7639aecaf257c1dceb8ba8c80",
    "annotations_trainval2017.zip": "md5:f4bbac642086de4f52a3fdda2de5fa2c",
}


def test_recipes_for_coco_hold_the_official_checksums() -> None:
    sources = [params.load(path).data for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")]
    official = [data for data in sources if isinstance(data, Coco2017Data)]
    assert len(official) == 6
    assert all(data.checksums == OFFICIAL for data in official)
