"""A training run from shards to data/model: epochs, validation, checkpoints, resume, early stopping.

Checkpoints lie below local `checkpoint_dir`, in a folder named by the fingerprint of what the result depends on: data,
model and train parameters, code. The same inputs go on where they ended; others begin anew. Rank 0 alone reads and
writes them, so ranks need no common folder.
"""

import dataclasses
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet import checkpoint
from effdet.augment import Augmentation, RandAugment
from effdet.checkpoint import Checkpoint
from effdet.config import ModelConfig
from effdet.distributed import Ranks
from effdet.errors import EffdetError
from effdet.inference import run_detection
from effdet.input_pipeline import evaluation_batches, train_batches
from effdet.losses import LossConfig
from effdet.model import build
from effdet.postprocess import PostprocessConfig
from effdet.sampling import first_step, index_list, repeat_factors
from effdet.schedule import Schedule
from effdet.training import Optimization, StepRecord, Trainer, TrainState, freeze
from pipeline.class_table import class_rows
from pipeline.coco_metrics import SUMMARY, coco_metrics, coco_results
from pipeline.errors import PipelineError
from pipeline.files import checksum, write_json
from pipeline.initial_weights import begin_with, identity
from pipeline.local import Local
from pipeline.model_files import write_model, write_network
from pipeline.params import Augment, Params
from pipeline.params import Train as TrainParams
from pipeline.provenance import hardware, provenance
from pipeline.shard_files import ground_truth_path, shard_paths, train_classes
from pipeline.training_log import Events, History, Progress, Row, epoch_row

FINGERPRINT_FILE = "fingerprint.json"
PROVENANCE_FILE = "provenance.json"
DVCLIVE = "dvclive"


@dataclasses.dataclass
class Standing:
    """How far the run is, beside the arrays."""

    epochs: int = 0  # done
    rows: list[Row] = dataclasses.field(default_factory=list)
    best_ap: float | None = None
    best_epoch: int = 0
    best_step: int = 0
    stale: int = 0  # evaluations since the best AP rose
    stopped: bool = False  # early


class Run:
    """One training run on this rank."""

    def __init__(
        self,
        settings: Params,
        where: Local,
        config: ModelConfig,
        manifest: Mapping[str, Any],
        shards: Path,
        out: Path,
        ranks: Ranks,
    ) -> None:
        self.settings = settings.train
        self.where = where
        self.config = config
        self.manifest = manifest
        self.shards = shards
        self.out = out
        self.ranks = ranks
        self.entries = entries_of(settings.train, manifest, shards)
        self.num_images = len(self.entries)  # that an epoch shows
        self.global_batch = self.settings.batch_size * ranks.size
        self.total_steps = first_step(self.settings.epochs, self.num_images, self.global_batch)
        if self.total_steps == 0:
            raise EffdetError(
                f"training: {self.settings.epochs} epochs of {self.num_images} images make no batch of "
                f"{self.global_batch} (ranks x batch_size); take a smaller batch or more epochs"
            )
        # Rank 0 alone has the weights to begin with.
        begins_with = ranks.gather(identity(settings.train) if ranks.rank == 0 else None)[0]
        content = fingerprint_content(settings, shards, begins_with)
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.folder = Path(where.checkpoint_dir) / self.fingerprint[:16]
        told = ranks.gather(self.fingerprint)
        if len(set(told)) > 1:
            odd = [rank for rank, fingerprint in enumerate(told) if fingerprint != told[0]]
            raise EffdetError(
                f"training: ranks {odd} have other shards, parameters or code than rank 0; bring all hosts to the same "
                "git revision and data/shards"
            )
        if ranks.rank == 0:
            self._lock = _locked(self.folder)
            if self.settings.augment.repeat_factor:
                once = manifest["splits"]["train"]["images"]
                print(f"repeat factor: an epoch shows {once:,} images {self.num_images:,} times in all", flush=True)
            write_json(self.folder / FINGERPRINT_FILE, content)
            write_network(self.folder, config, class_rows(manifest["classes"]), manifest["apply_exif"])
        self.standing, self.trainer = self._begin()
        self._provenance = provenance(where, ranks.gather(hardware()), self.settings.precision, begins_with)

    def _begin(self) -> tuple[Standing, Trainer]:
        """The state from the newest whole checkpoint, or a fresh one."""
        keras.utils.set_random_seed(self.settings.seed)
        model = build(self.config, self.settings.precision)
        found = checkpoint.latest(self.folder, report=print) if self.ranks.rank == 0 else None
        if found is None and self.ranks.rank == 0 and self.settings.init_from is not None:
            print(f"begins with {begin_with(model, self.config, self.settings)}", flush=True)
        if self.settings.freeze is not None:
            freeze(model, self.settings.freeze)
        state = TrainState(model, self.settings.momentum, self.settings.precision == "mixed_float16")
        if found is not None:
            state.restore(found.step, found.arrays)
        standing = Standing(**found.state) if found else Standing()
        if found is not None and found.best_step is None:  # none yet, or lost
            standing = dataclasses.replace(standing, best_ap=None, best_epoch=0, best_step=0, stale=0)
        state.step, standing = self.ranks.gather((found.step if found else 0, standing))[0]
        optimization = optimization_of(self.settings)
        return standing, Trainer(state, self.config, optimization, self.ranks)

    def train(self) -> None:
        """Trains to the end, and writes the best weights by AP on val to `out`."""
        state, standing = self.trainer.state, self.standing
        batches = iter(self.training_data(state.step))
        view = _View(self) if self.ranks.rank == 0 else None
        for epoch in range(standing.epochs + 1, self.settings.epochs + 1):
            if standing.stopped:
                break
            steps = first_step(epoch, self.num_images, self.global_batch) - state.step
            records = self.trainer.run(batches, steps, self.num_images / self.global_batch)
            row = epoch_row(epoch, view.follow(epoch, records) if view else records)
            standing.epochs = epoch
            last = epoch == self.settings.epochs
            if last or epoch % self.settings.evaluate_every == 0:
                row |= self._validate()
            standing.rows.append(row)
            if last or standing.stopped or epoch % self.settings.checkpoint_every == 0:
                self._save()
            if view:
                view.epoch_done(row, state.step)
        if standing.best_ap is None:  # all epochs were done, but the best weights are lost
            self._validate()
            self._save()
        if view:
            view.close()
            self._hand_on()
            self._lock.close()

    def training_data(self, start_step: int) -> tf.data.Dataset:
        how = self.settings
        return train_batches(
            shard_paths(self.manifest, "train", self.shards),
            image_size=self.config.image_size,
            max_boxes=self.manifest["max_boxes"],
            batch_size=how.batch_size,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            seed=how.seed,
            start_step=start_step,
            augmentation=augmentation_of(how.augment),
            workers=self.where.loader_workers,
            entries=self.entries,
        )

    def _validate(self) -> Row:
        """Judges the averaged weights on val, each rank its part, and notes whether they are the best so far."""
        standing, state = self.standing, self.trainer.state
        batches = evaluation_batches(
            shard_paths(self.manifest, "val", self.shards),
            image_size=self.config.image_size,
            max_boxes=self.manifest["max_boxes"],
            batch_size=self.settings.batch_size,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            workers=self.where.loader_workers,
        )
        with state.averaged() as model:
            # The published settings, not those of the evaluate stage: these must not change what training hands on.
            found = run_detection(model, self.config, batches, PostprocessConfig())
        parts = self.ranks.gather(coco_results(found, class_rows(self.manifest["classes"])))
        metrics: dict[str, float] = {}
        if self.ranks.rank == 0:
            ground_truth = ground_truth_path("val", self.shards)
            metrics = coco_metrics(ground_truth, [result for part in parts for result in part])
        metrics = self.ranks.gather(metrics)[0]
        rises = standing.best_ap is None or metrics["AP"] > standing.best_ap
        waiting = not standing.best_ap  # nothing was found yet: that AP does not rise is no sign of an end
        standing.stale = 0 if rises or waiting else standing.stale + 1
        patience = self.settings.early_stopping
        standing.stopped = patience is not None and standing.stale >= patience
        if rises or metrics["AP"] == standing.best_ap:  # of equals the later: the first AP is often 0
            standing.best_ap = metrics["AP"]
            standing.best_epoch, standing.best_step = standing.epochs, state.step
            if self.ranks.rank == 0:
                checkpoint.save(self.folder, "best", Checkpoint(state.step, state.averaged_arrays(), {}))
        return {f"val/{name}": metrics[name] for name in SUMMARY}

    def _save(self) -> None:
        if self.ranks.rank == 0:
            standing, state = self.standing, self.trainer.state
            best = standing.best_step if standing.best_ap is not None else None
            checkpoint.save(
                self.folder, "step", Checkpoint(state.step, state.arrays(), dataclasses.asdict(standing), best)
            )
            checkpoint.prune(self.folder, self.settings.keep_checkpoints, state.step)

    def _hand_on(self) -> None:
        """Writes the best weights beside the history."""
        best = checkpoint.load(self.folder, "best", self.standing.best_step)
        write_model(
            self.out,
            self.config,
            class_rows(self.manifest["classes"]),
            best.arrays,
            kind="ema",
            epoch=self.standing.best_epoch,
            step=self.standing.best_step,
            selected_by="val AP",
            apply_exif=self.manifest["apply_exif"],
        )
        write_json(self.out / PROVENANCE_FILE, self._provenance)


def _locked(folder: Path) -> TextIO:
    """Holds the folder for this process until it ends: two that write the same checkpoints would spoil them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise EffdetError(f"{folder}: another process trains with these inputs; wait for it or end it") from None
    return file


class _View:
    """What rank 0 shows and writes down while it trains."""

    def __init__(self, run: Run) -> None:
        self._epochs = run.settings.epochs
        shutil.rmtree(run.out, ignore_errors=True)
        self._history = History(run.out / DVCLIVE, run.standing.rows)
        self._events = Events(run.folder / "tensorboard")
        self._progress = Progress(run.total_steps, run.trainer.state.step, run.global_batch)
        if run.standing.epochs:
            self._progress.say(f"going on after epoch {run.standing.epochs} from {run.folder}")
        else:
            self._progress.say(f"checkpoints and TensorBoard events: {run.folder}")

    def follow(self, epoch: int, records: Iterator[StepRecord]) -> Iterator[StepRecord]:
        """The records of an epoch, shown and written down."""
        return self._events.add_steps(self._progress.follow(f"{epoch}/{self._epochs}", records))

    def epoch_done(self, row: Row, step: int) -> None:
        """An epoch's figures, validation among them, to the terminal and the files."""
        self._history.add(row)
        speed = self._progress.images_per_second
        figures = {name: value for name, value in row.items() if name.startswith("val/")}
        self._events.add(step, {**figures, "images_per_second": speed})
        judged = f", val AP {row['val/AP']:.4f}, AP50 {row['val/AP50']:.4f}" if figures else ""
        loss = f"loss {row['train/loss']:.4f}, " if "train/loss" in row else ""
        self._progress.say(f"epoch {row['epoch']}/{self._epochs}: {loss}{speed:.1f} images/s{judged}")

    def close(self) -> None:
        self._progress.close()
        self._events.close()
        self._history.close()


def entries_of(settings: TrainParams, manifest: Mapping[str, Any], shards: Path) -> NDArray[np.int64]:
    """The record that each entry of an epoch shows: int64 [entries]; each record once, or rare classes' more often."""
    records = int(manifest["splits"]["train"]["images"])
    threshold = settings.augment.repeat_factor
    if not threshold:
        return np.arange(records)
    classes = train_classes(shards)
    if len(classes) != records:
        raise PipelineError(
            f"{shards}: the list of the classes in each image has {len(classes)} images, the manifest {records}; run "
            "`dvc repro shard`"
        )
    return index_list(settings.seed, repeat_factors(classes, threshold))


def augmentation_of(settings: Augment) -> Augmentation:
    """The augment parameters as the library takes them."""
    rand_augment = settings.rand_augment
    return Augmentation(
        horizontal_flip=settings.horizontal_flip,
        jitter_min=settings.jitter_min,
        jitter_max=settings.jitter_max,
        colour=settings.colour,
        rand_augment=RandAugment(rand_augment.layers, rand_augment.magnitude) if rand_augment else None,
        grid_mask=settings.grid_mask,
        mosaic=settings.mosaic,
        mixup=settings.mixup,
    )


def optimization_of(settings: TrainParams) -> Optimization:
    """The train parameters as the library takes them."""
    return Optimization(
        batch_size=settings.batch_size,
        schedule=Schedule(
            settings.learning_rate,
            settings.warmup_learning_rate,
            settings.warmup_epochs,
            settings.schedule_epochs,
        ),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        ema_decay=settings.ema_decay,
        losses=LossConfig(
            focal_alpha=settings.focal_alpha,
            focal_gamma=settings.focal_gamma,
            label_smoothing=settings.label_smoothing,
            huber_delta=settings.huber_delta,
            box_loss_weight=settings.box_loss_weight,
        ),
        jit_compile=settings.jit_compile,
        seed=settings.seed,
    )


def fingerprint_content(settings: Params, shards: Path, begins_with: str | None) -> dict[str, Any]:
    """What a run's result depends on: data by the manifest's hash, parameters, the code that this process loaded.

    `begins_with`: the weights of train.init_from by their content (pipeline.initial_weights.identity), not their path.
    """
    root = Path(__file__).parents[1]
    loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    code = {path for path in loaded if path.parent in (root / "effdet", root / "pipeline")}
    return {
        "manifest": checksum(shards / "manifest.json", "sha256"),
        "model": settings.model.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json", exclude={"init_from", "init_checksum"}),
        "begins_with": begins_with,
        "code": {str(path.relative_to(root)): checksum(path, "sha256") for path in code},
    }
