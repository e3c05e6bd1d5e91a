"""data.checksums is written into params.yaml, and nothing else in it changes."""

import hashlib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline import checksums, params
from pipeline.download import check_checksums
from pipeline.errors import PipelineError
from pipeline.params import CocoFormatData

SPLITS = """\
  train: {annotations: instances_train.json, images: train.zip}
  val:
    annotations:   'instances_val.json'   # odd   spacing
    images: pictures
  test: null
"""
REST = "  apply_exif: false\n  max_images: null\n"
OLD = "md5:" + 32 * "0"


def with_data(block: str) -> str:
    """The default params.yaml with another data block."""
    text = (Path(__file__).parents[2] / "params.yaml").read_text()
    return "# On top.\n" + block + "\n" + text[text.index("validate:") :]


@pytest.fixture
def here(tmp_path: Path, own_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    own_data.rename(tmp_path / "own")
    return tmp_path


@pytest.mark.parametrize(
    ("before", "key_line"),
    [
        ("  checksums: {}\n", "  checksums:\n"),
        ("  checksums: {}   # as they came\n", "  checksums:      # as they came\n"),
        (f"  checksums: {{train.zip: {OLD}}}\n", "  checksums:\n"),
        ("  checksums: {train.zip: null}\n", "  checksums:\n"),
        ("  checksums:\n    train.zip: null\n    b:\n", "  checksums:\n"),
        (f"  checksums:   # as they came\n    train.zip: {OLD}\n    b: {OLD}\n", "  checksums:   # as they came\n"),
    ],
)
def test_only_the_checksums_change(here: Path, before: str, key_line: str, capsys: pytest.CaptureFixture[str]) -> None:
    head = f"data:\n  source: coco_format\n  base_url: own   # mine\n{SPLITS}"
    tail = f"  # of a split\n{REST}\n"
    Path("params.yaml").write_text(with_data(head + before + tail))
    checksums.main()
    data = params.load().data
    assert isinstance(data, CocoFormatData)
    check_checksums(data)
    entries = "".join(f"    {name}: {checksum}\n" for name, checksum in data.checksums.items())
    assert Path("params.yaml").read_text() == with_data(head + key_line + entries + tail)
    assert list(data.checksums) == ["instances_train.json", "train.zip", "instances_val.json", "pictures"]
    assert "data.checksums now holds these" in capsys.readouterr().out

    written = Path("params.yaml").read_bytes()
    checksums.main()
    assert Path("params.yaml").read_bytes() == written
    assert "data.checksums holds these" in capsys.readouterr().out


def test_changed_data_is_another_checksum(here: Path) -> None:
    head = f"data:\n  source: coco_format\n  base_url: own\n{SPLITS}{REST}  checksums: {{}}\n"
    Path("params.yaml").write_text(with_data(head))
    checksums.main()
    before = params.load().data.checksums
    assert {str(checksum).partition(":")[0] for checksum in before.values()} == {"sha256"}
    (here / "own" / "pictures" / "201.jpg").write_bytes(b"other")
    checksums.main()
    after = params.load().data.checksums
    assert {name for name in before if before[name] != after[name]} == {"pictures"}


def test_a_checksum_stays_of_its_kind(here: Path) -> None:
    digest = hashlib.md5((here / "own" / "train.zip").read_bytes()).hexdigest()
    head = f"data:\n  source: coco_format\n  base_url: own\n{SPLITS}{REST}  checksums: {{train.zip: md5:{digest}}}\n"
    Path("params.yaml").write_text(with_data(head))
    checksums.main()
    assert params.load().data.checksums["train.zip"] == f"md5:{digest}"


def test_file_names_that_yaml_would_misread(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("data:\n    checksums: {}\n    x: 1\n")
    found = {"12": OLD, "it's: #1.zip": OLD, "a b.zip": OLD, "null": OLD}
    checksums.write(path, found)
    assert YAML(typ="safe", pure=True).load(path.read_text()) == {"data": {"checksums": found, "x": 1}}


def test_checksums_amid_a_line_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = "# top\ndata: {source: coco2017, checksums: {}}\n"
    path.write_text(text)
    with pytest.raises(PipelineError, match=r"line 2: write `checksums: \{\}` on a line of its own"):
        checksums.write(path, {"a": OLD})
    assert path.read_text() == text


def test_a_missing_file_leaves_params_as_they_are(here: Path) -> None:
    (here / "own" / "train.zip").unlink()
    Path("params.yaml").write_text(
        with_data(f"data:\n  source: coco_format\n  base_url: own\n{SPLITS}{REST}  checksums: {{}}\n")
    )
    before = Path("params.yaml").read_bytes()
    with pytest.raises(PipelineError, match=r"own/train\.zip: no such file"):
        checksums.main()
    assert Path("params.yaml").read_bytes() == before


def test_synthetic_data_has_none(here: Path) -> None:
    Path("params.yaml").write_text((Path(__file__).parents[2] / "params.yaml").read_text())
    with pytest.raises(PipelineError, match=r"data\.source: synthetic data is made, not fetched"):
        checksums.main()


# --- train.init_checksum ------------------------------------------------------------------------

NEW = "sha256:" + 64 * "a"


def with_init(line: str) -> str:
    """The default params.yaml with another line of train.init_checksum."""
    text = (Path(__file__).parents[2] / "params.yaml").read_text()
    (old,) = (found for found in text.splitlines() if found.startswith("  init_checksum:"))
    return text.replace(old, line)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  init_checksum: null       # of weights", f"  init_checksum: {NEW}       # of weights"),
        ("  init_checksum:", f"  init_checksum: {NEW}"),
        ("  init_checksum: ", f"  init_checksum: {NEW} "),
        ("  init_checksum:   # of weights", f"  init_checksum: {NEW}   # of weights"),
        ("  init_checksum: # of weights", f"  init_checksum: {NEW} # of weights"),
        ("  init_checksum: ~", f"  init_checksum: {NEW}"),
        (f"  init_checksum:   'sha256:{64 * '0'}'  # '", f"  init_checksum: {NEW}  # '"),
    ],
)
def test_an_init_checksum_is_written_whatever_stands_there(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(with_init(before))
    checksums.write_init(path, NEW)
    assert path.read_text() == with_init(after)
    checksums.write_init(path, NEW)
    assert path.read_text() == with_init(after)


@pytest.mark.parametrize(
    "line", ["  init_checksum:\n    null", "  init_checksum: &here null", "  'init_checksum': null"]
)
def test_an_init_checksum_that_cannot_be_written_is_said(tmp_path: Path, line: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(with_init(line))
    with pytest.raises(
        PipelineError, match=r"params\.yaml: line \d+: write `init_checksum: null` on a line of its own"
    ):
        checksums.write_init(path, NEW)
    assert path.read_text() == with_init(line)
