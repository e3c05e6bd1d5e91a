"""The train stage: what it hands on, resumes and refuses."""

import json
import re
import signal
import subprocess
import sys
from unittest import mock

import pytest

from effdet.config import BACKBONES, Backbone
from effdet.errors import EffdetError
from pipeline import train, training_run
from pipeline.coco_metrics import SUMMARY
from pipeline.errors import PipelineError
from pipeline.fingerprint import inputs_of
from pipeline.model_files import read_description, read_model, read_network
from tests.pipeline.tiny_training import CLASSES, ROOT, make_run, make_shards, settings

pytestmark = pytest.mark.slow


def contents(folder):
    """Every file's bytes, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_a_process(folder, *arguments):
    """Runs the tiny training in a process of its own."""
    line = [sys.executable, "-m", "tests.pipeline.tiny_training", str(folder), *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)


def trained(folder, *arguments):
    """Trains to the end, and gives the bytes of what is handed on."""
    done = in_a_process(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return contents(folder / "model"), done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end: its folder and the run."""
    folder = tmp_path_factory.mktemp("run")
    make_shards(folder / "shards")
    made = make_run(folder)
    made.train()
    return folder, made


def test_hands_on_the_best_weights(finished):
    folder, made = finished
    with mock.patch.dict(BACKBONES, {"tiny": Backbone(width=0.25, depth=0.3, lite=True)}):
        stored = read_model(folder / "model")
    assert stored.config == made.config
    assert [row.model_dump() for row in stored.classes] == CLASSES
    assert stored.apply_exif is read_network(made.log_dir)[2] is True
    best = max((row for row in made.standing.rows if "val/AP" in row), key=lambda row: (row["val/AP"], row["epoch"]))
    assert (stored.weights.kind, stored.weights.selected_by) == ("ema", "val AP")
    assert stored.weights.epoch == best["epoch"]


def test_history_is_of_epochs(finished):
    folder, made = finished
    assert [row["epoch"] for row in made.standing.rows] == [1, 2, 3, 4]
    assert [row["epoch"] for row in made.standing.rows if "val/AP" in row] == [2, 4]
    lines = (folder / "model" / "dvclive" / "plots" / "metrics" / "val" / "AP.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["step", "2", "4"]
    metrics = json.loads((folder / "model" / "dvclive" / "metrics.json").read_text())
    assert metrics["step"] == 4
    assert metrics["train"].keys() == {
        "loss",
        "class_loss",
        "box_loss",
        "l2_loss",
        "learning_rate",
        "gradient_norm",
        "bad_steps",
    }


def test_steps_follow_the_images(finished):
    assert finished[1].trainer.state.step == finished[1].total_steps == 10  # 4 epochs x 10 images / 4


def test_provenance_has_no_names(finished):
    folder, _ = finished
    content = json.loads((folder / "model" / "provenance.json").read_text())
    assert content["versions"]["tensorflow"]
    assert content["precision"] == "float32"
    assert content["begins_with"] is None
    assert content["ranks"][0]["cpus"] >= 1
    assert str(folder) not in json.dumps(content)


def test_checkpoints_stay_beside_the_model(finished):
    _, made = finished
    kept = {path.name for path in made.log_dir.iterdir()}
    assert {"step-00000007.safetensors", "step-00000010.safetensors"} <= kept
    assert {"fingerprint.json", "network.json", "tensorboard"} <= kept
    assert "step-00000005.safetensors" not in kept
    assert list((made.log_dir / "tensorboard").glob("events.out.tfevents.*"))


def test_run_again_hands_on_the_same_bytes_without_a_step(finished):
    folder, made = finished
    before = contents(folder / "model")
    again = make_run(folder)
    assert again.fingerprint == made.fingerprint
    assert again.standing == made.standing
    again.train()
    assert contents(folder / "model") == before


def test_early_stopping_counts_evaluations_without_a_better_ap(tmp_path, monkeypatch):
    make_shards(tmp_path / "shards")
    made = make_run(tmp_path, epochs=9, schedule_epochs=9, evaluate_every=1, early_stopping=2)
    aps = iter([0.2, 0.3, 0.3, 0.1])
    monkeypatch.setattr(made.trainer, "run", lambda *arguments: iter([]))
    monkeypatch.setattr(training_run, "run_detection", lambda *arguments: None)
    monkeypatch.setattr(training_run, "coco_results", lambda *arguments: [])
    metrics = dict.fromkeys(SUMMARY, 0.0)
    monkeypatch.setattr(training_run, "coco_metrics", lambda *arguments: {**metrics, "AP": next(aps)})
    made.train()
    assert made.standing.stopped
    assert made.standing.epochs == 4
    assert (made.standing.best_ap, made.standing.best_epoch) == (0.3, 3)  # of equals the later
    assert read_description(made.out).weights.epoch == 3


@pytest.mark.parametrize(("key", "value"), [("seed", 5), ("learning_rate", 0.01), ("batch_size", 2)])
def test_other_parameters_are_another_run(finished, key, value):
    shards = finished[0] / "shards"
    fingerprint = inputs_of
    assert fingerprint(settings(), shards, None) == fingerprint(settings(), shards, None)
    assert fingerprint(settings(**{key: value}), shards, None) != fingerprint(settings(), shards, None)


def test_other_data_and_code_are_another_run(finished, tmp_path, monkeypatch):
    content = inputs_of(settings(), finished[0] / "shards", None)
    assert {"effdet/losses.py", "effdet/training.py", "pipeline/training_run.py"} <= content["code"].keys()
    (tmp_path / "manifest.json").write_text("{}")
    assert inputs_of(settings(), tmp_path, None)["manifest"] != content["manifest"]


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    make_shards(tmp_path / "shards")
    with pytest.raises(EffdetError, match="2 epochs of 10 images make no batch of 64"):
        make_run(tmp_path, batch_size=64, epochs=2)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository's root with params.yaml and a manifest."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "manifest.json").write_text('{"num_classes": 3}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    return tmp_path


def edit(root, key, value):
    """Gives the first `key` of params.yaml another value."""
    path = root / "params.yaml"
    text, count = re.subn(rf"^( +{key}:) .*", rf"\1 {value}", path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(text)


def test_unknown_model_is_refused_first(root):
    edit(root, "name", "efficientdet-d9")
    with pytest.raises(PipelineError, match=r"params.yaml: model: unknown name 'efficientdet-d9'"):
        train.main()


def test_image_size_that_does_not_fit_is_refused_first(root):
    edit(root, "image_size", "[250, 256]")
    with pytest.raises(PipelineError, match=r"params.yaml: .*got \[250, 256\]; nearest are \[256, 256\]"):
        train.main()


def test_missing_shards_are_named(root):
    (root / "data" / "shards" / "manifest.json").unlink()
    with pytest.raises(PipelineError, match=r"data/shards/manifest.json: manifest of the shards not found"):
        train.main()


def test_arguments_are_refused(root, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--epochs", "3"])
    with pytest.raises(PipelineError, match="takes --dry-run or nothing, got --epochs 3"):
        train.main()


def test_many_ranks_are_launched(root, monkeypatch):
    edit(root, "ranks", "2")
    started = []
    monkeypatch.setattr(train, "launch", lambda *arguments: started.append(arguments))
    train.main()
    assert [(module, ranks) for module, ranks, _ in started] == [("pipeline.train", 2)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run in a process of its own hands on."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    make_shards(folder / "shards")
    return trained(folder)[0]


def test_two_processes_hand_on_the_same_bytes(uninterrupted, tmp_path):
    make_shards(tmp_path / "shards")
    assert trained(tmp_path)[0] == uninterrupted


@pytest.mark.parametrize("step", [3, 8])  # within epochs 2 and 4; validation follows each
def test_killed_and_resumed_hands_on_the_same_bytes(uninterrupted, tmp_path, step):
    make_shards(tmp_path / "shards")
    killed = in_a_process(tmp_path, "--at", step, "kill")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "model" / "model.json").exists()
    model, output = trained(tmp_path)
    assert "going on after epoch" in output
    assert model == uninterrupted


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(uninterrupted, tmp_path):
    make_shards(tmp_path / "shards")
    assert in_a_process(tmp_path, "--at", 8, "kill").returncode == -signal.SIGKILL
    (newest,) = tmp_path.glob("checkpoints/*/step-00000007.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1])
    model, output = trained(tmp_path)
    assert f"{newest}: damaged" in output
    assert "going on after epoch 2" in output
    assert model == uninterrupted


def test_a_second_run_in_one_checkpoint_folder_is_refused(tmp_path):
    make_shards(tmp_path / "shards")
    first = make_run(tmp_path)
    with pytest.raises(EffdetError, match="another process trains with these inputs"):
        make_run(tmp_path)
    assert first.standing.epochs == 0
