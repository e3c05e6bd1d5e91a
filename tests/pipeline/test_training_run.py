"""What a run takes from the parameters and the shards before it trains."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from effdet.augment import Augmentation, RandAugment
from effdet.config import model_config
from effdet.distributed import connect
from effdet.schedule import Schedule
from pipeline import params
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json
from pipeline.library_settings import augmentation_of, entries_of, optimization_of
from pipeline.local import Local
from pipeline.model_files import WEIGHTS_FILE
from pipeline.training_run import Run
from tests.pipeline.tiny_training import ROOT, make_run, make_shards, settings

AUGMENT = params.load(ROOT / "params.yaml").train.augment
MANIFEST = {"splits": {"train": {"images": 4}}}


def with_factor(repeat_factor):
    return settings(augment=AUGMENT.model_copy(update={"repeat_factor": repeat_factor})).train


def test_each_record_once_without_a_repeat_factor(tmp_path):
    np.testing.assert_array_equal(entries_of(with_factor(0.0), MANIFEST, tmp_path), [0, 1, 2, 3])  # no file is read


def test_records_of_rare_classes_come_more_often(tmp_path):
    # class 1 stands in one image of four: sqrt(1 / 0.25) = 2; class 0 in all
    write_json(tmp_path / "classes_train.json", [[0], [0], [0, 1], [0]])
    np.testing.assert_array_equal(entries_of(with_factor(1.0), MANIFEST, tmp_path), [0, 1, 2, 2, 3])


def test_classes_of_other_shards_are_named(tmp_path):
    write_json(tmp_path / "classes_train.json", [[0], [0]])
    with pytest.raises(PipelineError, match=r"has 2 images, the manifest 4; run `dvc repro shard`"):
        entries_of(with_factor(1.0), MANIFEST, tmp_path)


def test_every_augment_parameter_reaches_the_library():
    given = AUGMENT.model_copy(
        update={
            "horizontal_flip": False,
            "jitter_min": 0.3,
            "jitter_max": 1.7,
            "colour": 0.4,
            "rand_augment": params.RandAugment(layers=2, magnitude=7.5),
            "grid_mask": 0.25,
            "mosaic": 0.5,
            "mixup": 0.1,
        }
    )
    assert augmentation_of(given) == Augmentation(False, 0.3, 1.7, 0.4, RandAugment(2, 7.5), 0.25, 0.5, 0.1)
    assert augmentation_of(AUGMENT) == Augmentation(AUGMENT.horizontal_flip, AUGMENT.jitter_min, AUGMENT.jitter_max)
    passed_on = {"repeat_factor", *vars(augmentation_of(given))}
    assert set(params.Augment.model_fields) == passed_on


def test_every_optimization_parameter_reaches_the_library():
    given = settings(learning_rate=0.3, warmup_learning_rate=0.1, accumulate=3, compression="bf16", reduction="adasum")
    how = optimization_of(given.train, num_ranks=2)
    named = {name: value for name, value in dataclasses.asdict(how).items() if name not in ("schedule", "losses")}
    assert named == {name: getattr(given.train, name) for name in named}
    assert how.schedule == Schedule(0.3, 0.1, given.train.warmup_epochs, given.train.schedule_epochs)
    losses = dataclasses.asdict(how.losses)
    assert losses == {name: getattr(given.train, name) for name in losses}


def test_learning_rate_follows_the_images_a_step_where_it_is_asked_to():
    given = settings(learning_rate=0.3, warmup_learning_rate=0.1, batch_size=4, accumulate=2, learning_rate_batch=64)
    schedule = optimization_of(given.train, num_ranks=16).schedule  # 128 images a step
    assert (schedule.learning_rate, schedule.warmup_learning_rate) == (0.6, 0.2)
    schedule = optimization_of(given.train, num_ranks=4).schedule
    assert (schedule.learning_rate, schedule.warmup_learning_rate) == (0.15, 0.05)


@pytest.mark.slow
def test_epochs_are_as_long_as_their_list_of_entries(tmp_path, capsys):
    make_shards(tmp_path / "shards")
    classes = [[0, 1]] + [[0]] * 9  # of 10 images: sqrt(0.4 / 0.1) = 2
    write_json(tmp_path / "shards" / "classes_train.json", classes)
    made = make_run(tmp_path, augment=AUGMENT.model_copy(update={"repeat_factor": 0.4, "mosaic": 0.5}))
    assert "repeat factor: an epoch shows 10 images 11 times in all" in capsys.readouterr().out
    assert made.total_steps == 11  # 4 epochs of 11 entries, 4 a step
    ids = [batch["image_id"] for batch in made.training_data(0).take(11).as_numpy_iterator()]
    counts = np.unique(np.concatenate(ids), return_counts=True)[1]
    np.testing.assert_array_equal(counts, [8] + [4] * 9)


def trained(folder, shards):
    """The weights' file of a few steps of a published network, at a size at which TensorFlow reorders sums."""
    given = settings(epochs=1, schedule_epochs=1, evaluate_every=1)
    where = Local(checkpoint_dir=str(folder / "checkpoints"), loader_workers=1)
    config = model_config("efficientdet-lite0", 3, (384, 384))
    Run(given, where, config, read_json(shards / "manifest.json", "manifest"), shards, folder, connect(1)).train()
    return (folder / WEIGHTS_FILE).read_bytes()


@pytest.mark.slow
def test_a_network_of_real_size_gives_the_same_bits_in_every_process(tmp_path):
    make_shards(tmp_path / "shards")
    folders = [tmp_path / "one", tmp_path / "two"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        one, two = pool.map(trained, folders, [tmp_path / "shards"] * 2)
    assert one == two
