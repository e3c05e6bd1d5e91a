"""train.init_from: what training begins with, how its bytes are known, and fine-tuning from published weights."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from effdet.config import BACKBONES, Backbone
from effdet.errors import EffdetError
from effdet.weights import published_variables
from pipeline import checksums, params
from pipeline.errors import PipelineError
from pipeline.fingerprint import inputs_of
from pipeline.initial_weights import content_checksum, identity
from pipeline.model_files import read_model
from pipeline.model_source import open_model
from tests.effdet.published import expected_variables, formula_array
from tests.effdet.published_files import averaged, raw_arrays, write_archive, write_checkpoint, write_h5
from tests.effdet.tiny import CONFIG, tiny_model
from tests.pipeline.tiny_training import CLASSES, ROOT, make_run, make_shards, settings

pytestmark = pytest.mark.slow

HEAD = "class_net/class-predict/"
TINY = {"tiny": Backbone(width=0.25, depth=0.3, lite=True)}


@pytest.fixture(scope="module")
def raw():
    """The published network, tiny, for 90 classes."""
    return raw_arrays(tiny_model(dataclasses.replace(CONFIG, num_classes=90)))


@pytest.fixture
def archive(tmp_path, raw):
    write_checkpoint(tmp_path / "made" / "model", raw)
    return write_archive(tmp_path / "efficientdet-tiny.tar.gz", tmp_path / "made")


def values(model):
    return {name: np.asarray(variable) for name, variable in published_variables(model).items()}


def test_fine_tuning_of_published_weights(tmp_path, raw, archive, capsys):
    make_shards(tmp_path / "shards")
    made = make_run(tmp_path, init_from=str(archive), allow_head_mismatch=True, freeze="^tiny/", epochs=2)
    printed = capsys.readouterr().out
    assert "begins with efficientdet-tiny.tar.gz: TensorFlow checkpoint model" in printed
    assert "class head left out: 90 classes there, 3 here; it starts fresh" in printed
    begun = values(made.trainer.state.model)
    twins = averaged(raw)
    assert all(np.array_equal(begun[name], twins[name]) for name in begun if not name.startswith(HEAD))
    assert begun[f"{HEAD}bias"].shape == (27,)
    assert np.allclose(begun[f"{HEAD}bias"], -np.log(99))  # a fresh head gives every class 0.01

    made.train()
    with mock.patch.dict(BACKBONES, TINY):
        handed_on = values(read_model(tmp_path / "model").model)
    frozen = [name for name in handed_on if name.startswith("tiny/")]
    assert len(frozen) > 20
    assert all(np.array_equal(handed_on[name], twins[name]) for name in frozen)
    assert not np.array_equal(handed_on["box_net/box-predict/bias"], twins["box_net/box-predict/bias"])
    assert not np.array_equal(handed_on[f"{HEAD}bias"], begun[f"{HEAD}bias"])
    provenance = (tmp_path / "model" / "provenance.json").read_text()
    assert json.loads(provenance)["begins_with"] == content_checksum(archive)
    assert str(tmp_path) not in provenance


def test_three_lines_of_params_in_a_process_of_its_own(tmp_path):
    """The README's three lines: the train stage on the published lite0 and one's own three classes."""
    name = "efficientdet-lite0"
    arrays = {name: formula_array(name, shape) for name, shape in expected_variables(name).items()}
    write_checkpoint(tmp_path / "made" / "model", arrays)
    write_archive(tmp_path / f"{name}.tar.gz", tmp_path / "made")
    make_shards(tmp_path / "data" / "shards")
    text = (ROOT / "params.yaml").read_text()
    for key, value in {
        "init_from": f"{name}.tar.gz",
        "allow_head_mismatch": "true",
        "freeze": "^efficientnet-lite0/",
        "image_size": "[64, 64]",
        "epochs": 1,
        "batch_size": 4,
        "learning_rate": 0.001,
    }.items():
        text, count = re.subn(rf"^(  {key}:).*$", rf"\1 {value}", text, count=1, flags=re.MULTILINE)
        assert count == 1
    (tmp_path / "params.yaml").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pipeline.train"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"begins with {name}.tar.gz: TensorFlow checkpoint model" in done.stdout
    assert "class head left out: 90 classes there, 3 here; it starts fresh" in done.stdout
    handed_on = values(read_model(tmp_path / "data" / "model").model)
    twins = averaged(arrays)
    frozen = [name for name in arrays if name.startswith("efficientnet-lite0/")]
    assert all(np.array_equal(handed_on[name], twins[name]) for name in frozen)
    assert handed_on[f"{HEAD}bias"].shape == (27,)
    assert not np.array_equal(handed_on["box_net/box-predict/bias"], twins["box_net/box-predict/bias"])


def test_another_class_head_is_refused_unless_it_is_allowed(tmp_path, archive):
    make_shards(tmp_path / "shards")
    with pytest.raises(EffdetError, match="90 classes there, 3 here"):
        make_run(tmp_path, init_from=str(archive), freeze="^tiny/")


def test_a_run_and_a_checkpoint_of_it_are_beginnings_too(tmp_path):
    make_shards(tmp_path / "shards")
    first = make_run(tmp_path, epochs=2)
    first.train()
    handed_on = values(first.trainer.state.model) | {}
    for source in (tmp_path / "model", first.folder):
        (tmp_path / "again").mkdir(exist_ok=True)
        second = make_run(tmp_path, init_from=str(source), epochs=2, seed=7)
        begun = values(second.trainer.state.model)
        with mock.patch.dict(BACKBONES, TINY):
            expected = values(read_model(tmp_path / "model").model)
        assert all(np.array_equal(begun[name], expected[name]) for name in expected)
        assert not all(np.array_equal(begun[name], handed_on[name]) for name in expected)  # those were averages
        second._open.close()


def test_a_bare_checkpoint_opens_as_a_detector(tmp_path):
    make_shards(tmp_path / "shards")
    made = make_run(tmp_path, epochs=2)
    made.train()
    with mock.patch.dict(BACKBONES, TINY):
        handed_on = values(read_model(tmp_path / "model").model)
        for name in ("", f"best-{made.standing.best_step:08d}.safetensors"):
            stored = open_model(f"{made.folder}/{name}")
            assert stored.config == CONFIG
            assert [row.model_dump() for row in stored.classes] == CLASSES
            assert all(np.array_equal(array, handed_on[key]) for key, array in values(stored.model).items())
        last = open_model(f"{made.folder}/step-{made.trainer.state.step:08d}.safetensors", ema=False)
    trained = values(made.trainer.state.model)
    assert all(np.array_equal(array, trained[name]) for name, array in values(last.model).items())
    assert (last.weights.kind, last.weights.selected_by) == ("raw", "last")


def test_rank_0_alone_reads_the_weights_and_both_ranks_begin_with_them(tmp_path, raw, archive):
    make_shards(tmp_path / "shards")
    line = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "tests.pipeline.tiny_training", str(tmp_path)]
    own, others = {"init_from": str(archive), "allow_head_mismatch": True}, {"init_from": "nowhere"}
    options = ["--train", json.dumps(own), "--others", json.dumps(others)]
    done = subprocess.run([*line, *options], cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("class head left out: 90 classes there, 3 here") == 1
    with mock.patch.dict(BACKBONES, TINY):
        handed_on = values(read_model(tmp_path / "model").model)
    twins, fresh = averaged(raw), values(tiny_model())
    name = "tiny/stem/conv2d/kernel"  # ten steps do not lead far away
    assert np.abs(handed_on[name] - twins[name]).mean() < 0.2 * np.abs(fresh[name] - twins[name]).mean()


# --- which bytes --------------------------------------------------------------------------------


def test_the_fingerprint_holds_the_content_and_not_the_path(tmp_path, raw):
    make_shards(tmp_path / "shards")
    one, other = write_h5(tmp_path / "a.h5", raw), tmp_path / "elsewhere.h5"
    other.write_bytes(one.read_bytes())

    def content(path):
        given = settings(init_from=str(path))
        return inputs_of(given, tmp_path / "shards", identity(given.train))

    assert content(one) == content(other)
    other.write_bytes(other.read_bytes() + b"x")
    assert content(one) != content(other)
    assert str(tmp_path) not in str(content(one))


def test_a_name_is_its_own_identity():
    assert identity(settings(init_from="imagenet").train) == "imagenet"
    assert identity(settings(init_from=None).train) is None


def test_other_bytes_than_the_parameters_say_are_refused(tmp_path, archive):
    make_shards(tmp_path / "shards")
    wrong = "sha256:" + 64 * "0"
    with pytest.raises(PipelineError, match=rf"is sha256:\w+, and params\.yaml says {wrong}"):
        make_run(tmp_path, init_from=str(archive), init_checksum=wrong, allow_head_mismatch=True)
    right = content_checksum(archive)
    assert (
        make_run(tmp_path, init_from=str(archive), init_checksum=right, allow_head_mismatch=True).standing.epochs == 0
    )


def test_a_folder_of_a_damaged_model_is_refused(tmp_path):
    make_shards(tmp_path / "shards")
    make_run(tmp_path, epochs=2).train()
    file = tmp_path / "model" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(PipelineError, match=r"and model\.json says sha256"):
        make_run(tmp_path, init_from=str(tmp_path / "model"), epochs=2)


def test_a_checkpoint_of_files_has_one_checksum(tmp_path, raw):
    prefix = write_checkpoint(tmp_path / "a" / "model", raw)
    moved = write_checkpoint(tmp_path / "b" / "model", raw)
    assert content_checksum(prefix) == content_checksum(tmp_path / "a") == content_checksum(moved)
    other = write_checkpoint(tmp_path / "c" / "model", {name: array + 1 for name, array in raw.items()})
    assert content_checksum(other) != content_checksum(prefix)


def test_a_checksum_needs_a_path(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("init_checksum: null", "init_checksum: sha256:" + 64 * "0"))
    with pytest.raises(PipelineError, match="train: init_checksum is of a path's content, and init_from is imagenet"):
        params.load(path)


def test_the_command_writes_the_checksum(tmp_path, raw, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_h5(Path("w.h5"), raw)
    before = (ROOT / "params.yaml").read_text().replace("init_from: imagenet", "init_from: w.h5")
    Path("params.yaml").write_text(before)
    checksums.main()
    found = content_checksum("w.h5")
    assert params.load().train.init_checksum == found
    assert Path("params.yaml").read_text() == before.replace("init_checksum: null", f"init_checksum: {found}")
    assert f"train.init_checksum is {found}, of w.h5" in capsys.readouterr().out
    written = Path("params.yaml").read_bytes()
    checksums.main()
    assert Path("params.yaml").read_bytes() == written
