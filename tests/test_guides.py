"""The guide to data of one's own, run as it stands: its commands in its order, on a small set."""

import json
import re
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline import synthetic
from tests.test_documentation import FENCE
from tests.test_repro import ROOT, SMALL, Repository, work_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GUIDE = ROOT / "docs" / "guides" / "own_data.md"


def test_from_pictures_to_a_model_in_production(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 24), ("val", 8)):
        synthetic.write_split(split, count, 1, data / f"{split}.zip", data / f"instances_{split}.json")
    with zipfile.ZipFile(data / "val.zip") as archive:
        archive.extractall(tmp_path / "photos")
    places = {
        "/data/blood-cells": data,
        "ssh://store.local/dvc": tmp_path / "store",
        "ssh://git.local/team/detector.git": tmp_path / "detector.git",
        " photos ": f" {tmp_path / 'photos'} ",
    }
    repository = _checkout(tmp_path)
    said = []
    for fence in FENCE.finditer(GUIDE.read_text()):
        text = fence["content"]
        for address, place in places.items():
            text = text.replace(address, str(place))
        if fence["marker"] == "walk: data":
            _put_in_place(repository.path / "params.yaml", text)
        elif fence["marker"] == "walk":
            said.append(repository.run("bash", "-euo", "pipefail", "-c", text))

    checksums = YAML(typ="safe").load((repository.path / "params.yaml").read_text())["data"]["checksums"]
    assert set(checksums) == {"instances_train.json", "train.zip", "instances_val.json", "val.zip"}
    assert None not in checksums.values()
    assert (repository.path / "contact_sheet.jpg").exists()
    assert "v0.1.0" in said[-2]
    assert "the first model of ours" in said[-2]
    assert repository.run("git", "status", "--porcelain", "--untracked-files=no") == ""
    # What a consumer got is what was released, and it detects on every picture.
    bundle = (repository.path / "model" / "checksums.sha256").read_bytes()
    assert bundle == (repository.path / "data" / "release" / "checksums.sha256").read_bytes()
    images = (repository.path / "found" / "images.json").read_text()
    assert len(json.loads(images)) == 8


def _checkout(folder: Path) -> Repository:
    """A stranger's, with an origin."""
    repository = work_tree(folder / "checkout")
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.run("git", "add", ".")
    repository.run("git", "commit", "--quiet", "--message", "as it is")
    repository.run("git", "clone", "--quiet", "--bare", ".", str(folder / "detector.git"))
    repository.run("git", "remote", "add", "origin", str(folder / "detector.git"))
    return repository


def _put_in_place(params: Path, data: str) -> None:
    """The guide's `data:` in place of the recipe's, and values with which a run takes seconds."""
    text, count = re.subn(r"^data:\n(?: .*\n)+", data, params.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1
    for key, value in SMALL.items():
        text = re.sub(rf"^( +){key}.*$", rf"\g<1>{key}{value}", text, flags=re.MULTILINE)
    params.write_text(text)
