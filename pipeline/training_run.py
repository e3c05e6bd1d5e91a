"""A training run from shards to data/model: epochs, validation, checkpoints, resume, early stopping.

Checkpoints lie below local `checkpoint_dir`, in a folder named by the fingerprint of what the result depends on: data,
model and train parameters, code. The same inputs go on where they ended, within an epoch too; others begin anew. Rank 0
alone reads and writes them, so ranks need no common folder.
"""

import contextlib
import copy
import dataclasses
import fcntl
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from effdet import checkpoint
from effdet.checkpoint import Checkpoint, CheckpointError
from effdet.checkpoint_saver import Saver
from effdet.config import ModelConfig
from effdet.distributed import Keep, Ranks
from effdet.errors import EffdetError
from effdet.folder import Folder
from effdet.inference import run_detection
from effdet.input_pipeline import evaluation_batches, train_batches
from effdet.model import build
from effdet.postprocess import PostprocessConfig
from effdet.sampling import steps_until
from effdet.train_state import TrainState, freeze
from effdet.training import Trainer, add_in_order
from pipeline.class_table import class_rows
from pipeline.coco_metrics import SUMMARY, coco_metrics, coco_results
from pipeline.errors import Preempted
from pipeline.files import write_json
from pipeline.fingerprint import differences, fingerprint, inputs_of
from pipeline.initial_weights import begin_with, identity
from pipeline.library_settings import augmentation_of, entries_of, optimization_of
from pipeline.local import Local
from pipeline.model_files import NETWORK_FILE, write_model, write_network
from pipeline.params import Params
from pipeline.provenance import hardware, provenance
from pipeline.shard_files import ground_truth_path, shard_paths
from pipeline.training_log import History, Pace, Row, epoch_row, step_figures
from pipeline.training_view import DVCLIVE, View

FINGERPRINT_FILE = "fingerprint.json"
PROVENANCE_FILE = "provenance.json"
KEEP_STEPS = 10  # between copies in memory, where ranks come and go: a lost rank costs the steps since the last
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass
class Standing:
    """How far the run is, beside the arrays."""

    epochs: int = 0  # done
    figures: list[list[float]] = dataclasses.field(default_factory=list)  # by step, of the epoch that is not done
    saves: int = 0  # multiples of checkpoint_every that are past
    sizes: list[list[int]] = dataclasses.field(default_factory=list)  # [step, ranks from there on]
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
        kept: Checkpoint | None = None,
        keep: Keep | None = None,
    ) -> None:
        """`kept`: what to go on from instead of a checkpoint, and `keep` takes such; of elastic training."""
        self.settings = settings.train
        self._keep = keep
        self.where = where
        self.config = config
        self.manifest = manifest
        self.shards = shards
        self.out = out
        self.ranks = ranks
        self.entries = entries_of(settings.train, manifest, shards)
        self.num_images = len(self.entries)  # that an epoch shows
        how = optimization_of(settings.train, ranks.size)
        self.global_batch = ranks.size * how.batch_size * how.accumulate
        if steps_until(self.settings.epochs, 0, self.num_images, self.global_batch) == 0:
            raise EffdetError(
                f"training: {self.settings.epochs} epochs of {self.num_images} images make no batch of "
                f"{self.global_batch} (ranks x batch_size x accumulate); take a smaller batch or more epochs"
            )
        # Rank 0 alone has the weights to begin with.
        begins_with = ranks.gather(identity(settings.train) if ranks.rank == 0 else None)[0]
        self.inputs = inputs_of(settings, shards, begins_with)
        self._agree()
        self.fingerprint = fingerprint(self.inputs)
        self.folder = Folder(f"{where.checkpoint_dir}/{self.fingerprint[:16]}")
        # What is of this machine alone: events, profiles, batches without a finite loss.
        self.log_dir = Path(where.checkpoint_dir if self.folder.is_here else "checkpoints") / self.fingerprint[:16]
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._saver: Saver | None = None  # rank 0's
        with contextlib.ExitStack() as stack:
            if ranks.rank == 0:
                stack.enter_context(_locked(self.log_dir))
                self._saver = stack.enter_context(Saver(self.folder, self.settings.keep_checkpoints))
                self._describe()
            self.standing, self.trainer = self._begin(kept)
            self._open = stack.pop_all()  # until training ends
        self.pace = Pace(self.global_batch // ranks.size)
        if where.profile:
            ranks.start_timeline(self.log_dir / "timeline.json")
        self._provenance = provenance(where, ranks.gather(hardware()), self.settings.precision, begins_with)

    @property
    def total_steps(self) -> int:
        """Steps done and to be done."""
        state = self.trainer.state
        return state.step + steps_until(self.settings.epochs, state.images, self.num_images, self.global_batch)

    def _agree(self) -> None:
        """EffdetError on all ranks where they have not the same inputs: names the ranks, and what differs."""
        told = self.ranks.gather(fingerprint(self.inputs))
        odd = [rank for rank, its in enumerate(told) if its != told[0]]
        if odd:
            all_inputs = self.ranks.gather(self.inputs)
            what = "; ".join(differences(all_inputs[0], all_inputs[odd[0]]))
            raise EffdetError(
                f"training: ranks {odd} have other shards, parameters or code than rank 0 ({what}); bring all hosts to "
                "the same git revision and data/shards"
            )

    def _describe(self) -> None:
        """Writes beside the checkpoints what they are of."""
        write_json(self.log_dir / FINGERPRINT_FILE, self.inputs)
        write_network(self.log_dir, self.config, class_rows(self.manifest["classes"]), self.manifest["apply_exif"])
        if not self.folder.is_here:
            for name in (FINGERPRINT_FILE, NETWORK_FILE):
                self.folder.write(name, (self.log_dir / name).read_bytes())
        if self.settings.augment.repeat_factor:
            once = self.manifest["splits"]["train"]["images"]
            print(f"repeat factor: an epoch shows {once:,} images {self.num_images:,} times in all", flush=True)

    def _begin(self, kept: Checkpoint | None) -> tuple[Standing, Trainer]:
        """The state that was kept, or that of the newest whole checkpoint, or a fresh one."""
        settings = self.settings
        tf.config.experimental.enable_tensor_float_32_execution(settings.tf32)
        if settings.deterministic:
            tf.config.experimental.enable_op_determinism()
        if settings.deterministic or not tf.config.list_physical_devices("GPU"):
            add_in_order()
        keras.utils.set_random_seed(settings.seed)
        model = build(self.config, settings.precision)
        found = (self._with_best(kept) if kept else self._found()) if self.ranks.rank == 0 else None
        if found is None and self.ranks.rank == 0 and settings.init_from is not None:
            print(f"begins with {begin_with(model, self.config, settings)}", flush=True)
        if settings.freeze is not None:
            freeze(model, settings.freeze)
        state = TrainState(model, settings.momentum, settings.precision == "mixed_float16")
        if found is not None:
            state.restore(found.step, found.arrays)
        standing = Standing(**copy.deepcopy(found.state["standing"])) if found else Standing()
        if found is not None and found.best_step is None:  # none yet, or lost
            standing = dataclasses.replace(standing, best_ap=None, best_epoch=0, best_step=0, stale=0)
        state.step, state.images, standing = self.ranks.gather((state.step, state.images, standing))[0]
        if not standing.sizes or standing.sizes[-1][1] != self.ranks.size:
            standing.sizes.append([state.step, self.ranks.size])
        optimization = optimization_of(settings, self.ranks.size)
        return standing, Trainer(state, self.config, optimization, self.ranks, self._keep_batch)

    def _with_best(self, kept: Checkpoint) -> Checkpoint:
        """What was kept; without the best weights where these are on the disk of a machine that is gone."""
        if kept.best_step is not None:
            try:
                checkpoint.load(self.folder, "best", kept.best_step)
            except CheckpointError as error:
                print(f"{error}; the best weights are sought anew", flush=True)
                return dataclasses.replace(kept, best_step=None)
        return kept

    def _found(self) -> Checkpoint | None:
        """The checkpoint to go on from: this run's own, or else one of `resume_from`; None where there is none."""
        found = checkpoint.latest(self.folder, report=print)
        if found is not None:
            self._accept(found, self.folder, other_ranks=False)
        elif self.where.resume_from is not None:
            source = Folder(self.where.resume_from)
            found = checkpoint.latest(source, report=print)
            if found is None:
                raise EffdetError(
                    f"resume_from: {source}: no checkpoint there; name the folder of a run, or leave it out"
                )
            self._accept(found, source, other_ranks=True)
            if found.best_step is not None:
                checkpoint.save(self.folder, "best", checkpoint.load(source, "best", found.best_step))
        return found

    def _accept(self, found: Checkpoint, folder: Folder, other_ranks: bool) -> None:
        """EffdetError where a checkpoint is of other inputs. Another number of ranks may be one; it is announced."""
        theirs = found.state["inputs"]
        comparable = theirs
        if other_ranks:
            comparable = {**theirs, "train": {**theirs["train"], "ranks": self.settings.ranks}}
        if what := differences(self.inputs, comparable):
            raise EffdetError(
                f"{folder}: its checkpoints are of other inputs: {'; '.join(what)}; bring back what differs to go on, "
                "or begin anew in another folder"
            )
        before = theirs["train"]["ranks"]
        if before != self.settings.ranks:
            rate = "follows" if self.settings.learning_rate_batch else "stays (learning_rate_batch is null)"
            print(
                f"goes on after step {found.step} of {before} ranks on {self.settings.ranks}: from here a step is of "
                f"{self.global_batch} images, and the learning rate {rate}; the result is bit for bit that of neither",
                flush=True,
            )

    def train(self) -> None:
        """Trains to the end, and writes the best weights by AP on val to `out`.

        Preempted where this rank or another was asked to stop by a signal: after the step, and with a checkpoint.
        """
        standing, state = self.standing, self.trainer.state
        batches = iter(self.training_data(state.images))
        with self._open as stack:
            stack.enter_context(_asked_to_stop(self.trainer))
            first = self.ranks.rank == 0
            view = stack.enter_context(contextlib.closing(self._view())) if first else None
            while standing.epochs < self.settings.epochs and not standing.stopped:
                self._do_steps(batches, view)
            if standing.best_ap is None:  # all epochs were done, but the best weights are lost
                self._validate()
                self._save()
            if self._saver:
                self._saver.wait()
        best = checkpoint.load(self.folder, "best", standing.best_step) if first else None
        if self._keep:  # rank 0 may be on another machine than the launcher
            best = self.ranks.gather(best)[0]
            if not first and self.ranks.local_rank == 0:
                History(self.out / DVCLIVE, standing.rows).close()
        if best and self.ranks.local_rank == 0:
            self._hand_on(best)

    def _view(self) -> View:
        """Opens it, and says where things are."""
        step = self.trainer.state.step
        view = View(
            self.out,
            self.log_dir,
            self.standing.rows,
            epochs=self.settings.epochs,
            steps=(step, self.total_steps),
            global_batch=self.global_batch,
            pace=self.pace,
            profile=self.where.profile,
        )
        if step:
            view.say(f"going on after epoch {self.standing.epochs}, step {step}, from {self.folder}")
        else:
            view.say(f"checkpoints: {self.folder}; TensorBoard: {self.log_dir / 'tensorboard'}")
        return view

    def _do_steps(self, batches: Iterator[Any], view: View | None) -> None:
        """Trains to the next checkpoint or the end of the epoch, whichever comes first."""
        standing, state = self.standing, self.trainer.state
        epoch, next_save = standing.epochs + 1, (standing.saves + 1) * self.settings.checkpoint_every
        until = min(epoch, next_save)
        left = steps_until(until, state.images, self.num_images, self.global_batch)
        steps = min(left, KEEP_STEPS) if self._keep else left
        records = self.pace.follow(self.trainer.run(batches, steps, self.num_images))
        asked = False
        for record in view.follow(epoch, records) if view else records:
            standing.figures.append(step_figures(record))
            asked = asked or record.stop
        if asked:
            self._stop()
        if steps == left:
            due = until > next_save - 1e-9
            standing.saves += due
            if until == epoch:
                self._end_epoch(epoch, due, view)
            elif steps:
                self._save()
        if self._keep:
            self._keep(self._checkpoint())

    def _end_epoch(self, epoch: int, due: bool, view: View | None) -> None:
        """Judges and writes down; saves where it is `due`, or nothing comes after."""
        standing = self.standing
        row = epoch_row(epoch, standing.figures)
        standing.epochs, standing.figures = epoch, []
        last = epoch == self.settings.epochs
        if last or epoch % self.settings.evaluate_every == 0:
            row |= self._validate()
        standing.rows.append(row)
        if due or last or standing.stopped:
            self._save()
        told = self.ranks.gather(self.pace.figures())
        if view:
            view.epoch_done(row, self.trainer.state.step, told)

    def _stop(self) -> None:
        """Saves, and ends all ranks: none before rank 0 has saved, for a launcher ends the rest when one ends."""
        self._save()
        if self._saver:
            self._saver.wait()
        self.ranks.gather(None)
        raise Preempted(
            f"training: asked to stop; saved after step {self.trainer.state.step}; the same command goes on from there"
        )

    def training_data(self, start: int) -> tf.data.Dataset:
        how = self.settings
        return train_batches(
            shard_paths(self.manifest, "train", self.shards),
            image_size=self.config.image_size,
            max_boxes=self.manifest["max_boxes"],
            batch_size=how.batch_size * how.accumulate,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            seed=how.seed,
            start=start,
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
            if self._saver:
                self._saver.save("best", Checkpoint(state.step, state.averaged_arrays(), {}))
        return {f"val/{name}": metrics[name] for name in SUMMARY}

    def _checkpoint(self) -> Checkpoint:
        standing, state = self.standing, self.trainer.state
        best = standing.best_step if standing.best_ap is not None else None
        content = {"standing": dataclasses.asdict(standing), "inputs": self.inputs}
        return Checkpoint(state.step, state.arrays(), content, best)

    def _save(self) -> None:
        if self._saver:
            self._saver.save("step", self._checkpoint())

    def _keep_batch(self, step: int, batch: dict[str, NDArray[Any]]) -> str:
        """Writes a batch for study, and says where."""
        path = self.log_dir / f"bad-step-{step:08d}-rank-{self.ranks.rank}.npz"
        np.savez(path, allow_pickle=False, **batch)
        return str(path)

    def _hand_on(self, best: Checkpoint) -> None:
        """Writes the best weights beside the history."""
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
        write_json(self.out / PROVENANCE_FILE, {**self._provenance, "ranks_from_step": self.standing.sizes})


@contextlib.contextmanager
def _asked_to_stop(trainer: Trainer) -> Iterator[None]:
    """A signal asks for an end after the step; a second one does what it did before, which is to end at once."""
    before = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        trainer.stop_asked = True
        signal.signal(number, before[number])

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for stopping, handler in before.items():
            signal.signal(stopping, handler)


def _locked(folder: Path) -> TextIO:
    """Holds the folder for this process until it ends: two that write the same checkpoints would spoil them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise EffdetError(f"{folder}: another process trains with these inputs; wait for it or end it") from None
    return file
