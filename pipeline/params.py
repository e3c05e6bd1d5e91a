"""params.yaml: every value that changes a result, read once, strictly, into frozen types.

No value has a default here: what is not in the file is an error, and so is a key that is not known.
"""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.settings import Section, read_yaml, validated

PARAMS_FILE = Path("params.yaml")
IMAGENET = "imagenet"  # as train.init_from: the backbone's ImageNet weights


def _below(path: str) -> str:
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"expected a path below data.base_url, got {path!r}")
    return path


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # what NumPy and TensorFlow both take
Format = Literal["saved_model", "onnx", "litert_float32", "litert_float16", "litert_int8"]
Below = Annotated[str, AfterValidator(_below)]
Sha256 = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Checksum = Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")]
Checksums = dict[str, Checksum | None]  # file name -> what its bytes must be; null: not known, an archive's CRCs decide
Severity = Literal["critical", "warning"]


class SyntheticData(Section):
    """The embedded data set: made by the download stage, the same for the same values."""

    source: Literal["synthetic"]
    seed: Seed
    train_images: Count
    val_images: Count
    apply_exif: bool  # as for the other sources; these pictures have no orientation
    max_images: Count | None  # a split, cut for trying out


class Coco2017Data(Section):
    """The official COCO 2017 archives, from their site or a mirror of it."""

    source: Literal["coco2017"]
    base_url: str  # http(s)://, file:// or a folder
    checksums: Checksums
    apply_exif: bool  # boxes refer to the pictures turned as their EXIF orientation says, instead of as stored
    max_images: Count | None


class SplitFiles(Section):
    """Where a split of a data set of one's own lies below base_url."""

    annotations: Below  # COCO json
    images: Below  # a .zip archive, or a folder where base_url is a folder


class CocoFormatData(Section):
    """A COCO-format data set of one's own."""

    source: Literal["coco_format"]
    base_url: str
    train: SplitFiles
    val: SplitFiles
    test: SplitFiles | None
    checksums: Checksums
    apply_exif: bool
    max_images: Count | None


class TfrecordsData(Section):
    """TFRecord files as the scripts of google/automl and NVIDIA DeepLearningExamples write them."""

    source: Literal["tfrecords"]
    base_url: str
    train: Below  # train-?????-of-00256.tfrecord: the number at the end tells how many there are
    val: Below
    num_classes: Count  # K; labels are 1..K, gaps allowed, and class_id is label - 1
    checksums: Checksums
    apply_exif: bool
    max_images: Count | None


Data = Annotated[SyntheticData | Coco2017Data | CocoFormatData | TfrecordsData, Field(discriminator="source")]


class Severities(Section):
    """What stops the pipeline, critical, and what does not, where teams differ."""

    duplicates: Severity  # images of the same bytes within a split
    leakage: Severity  # images of train that are in val or test too, or of val in test
    drift: Severity  # against data_baseline.json


class Validate(Section):
    """What the validate stage accepts."""

    decode_fraction: Fraction  # of the images, decoded in full; headers are always read
    min_boxes_per_class: Annotated[int, Field(ge=0)]  # in val, a warning below
    box_tolerance: NonNegative  # pixels that a box may stand over the image
    max_psi: Positive  # population stability index, of what drifts against data_baseline.json
    severity: Severities
    quarantine: bool  # leaves out images and annotations that fail a critical check, instead of stopping at them


class Reencode(Section):
    """Smaller pictures for training: smaller shards, faster decoding."""

    max_side: Count  # pixels; larger pictures are made as large, and smaller ones stay the files that came
    quality: Annotated[int, Field(ge=1, le=95)]  # of the JPEG


class Shard(Section):
    """How images become TFRecord shards."""

    images_per_shard: Count
    max_boxes: Count  # M; of an image with more, the largest are kept
    keep_empty_images: bool  # in train; val and test keep theirs
    reencode: Reencode | None  # of train; val and test stay as they came
    seed: Seed  # of the order in which images are laid down


class Model(Section):
    """Which model of the family."""

    name: str
    image_size: tuple[Count, Count]  # height, width; pixels

    @model_validator(mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:  # yaml has no tuples, and strict types take no list for one
        if isinstance(value, dict) and isinstance(value.get("image_size"), list):
            return {**value, "image_size": tuple(value["image_size"])}
        return value


class RandAugment(Section):
    """RandAugment (arXiv:1909.13719)."""

    layers: Count  # operations, one after the other
    magnitude: Annotated[float, Field(ge=0, le=10)]  # their strength


class Augment(Section):
    """What happens to a training image."""

    horizontal_flip: bool
    jitter_min: Positive  # scale of the picture against the input
    jitter_max: Positive
    colour: Fraction  # strength of brightness, contrast, saturation and hue; 0 leaves colours alone
    rand_augment: RandAugment | None
    grid_mask: Fraction  # share of the pictures; so the next two
    mosaic: Fraction
    mixup: Fraction
    repeat_factor: Fraction  # share of images below which a class's images come more than once an epoch; 0: none do

    @model_validator(mode="after")
    def _ordered(self) -> "Augment":
        if self.jitter_min > self.jitter_max:
            raise ValueError(f"jitter_min {self.jitter_min} is above jitter_max {self.jitter_max}")
        return self


class Train(Section):
    """Optimisation. Everything here changes the weights."""

    ranks: Count  # Horovod processes
    batch_size: Count  # images a rank works on at a time
    accumulate: Count  # such batches a step
    epochs: Count  # trained
    schedule_epochs: Count  # over which the cosine falls to zero; at least `epochs`
    learning_rate: Positive  # after the warm-up
    learning_rate_batch: Count | None  # images a step that it is meant for: others scale it; null: taken as it is
    warmup_epochs: NonNegative
    warmup_learning_rate: NonNegative  # at step 0
    momentum: Fraction
    weight_decay: NonNegative  # L2 on kernels, in the loss
    clip_norm: Positive  # of the global gradient
    ema_decay: Fraction  # min(ema_decay, (1 + t) / (10 + t)), of all variables
    focal_alpha: Fraction
    focal_gamma: NonNegative
    label_smoothing: Fraction
    huber_delta: Positive
    box_loss_weight: NonNegative
    box_loss: Literal["huber", "giou", "ciou"]
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"]
    jit_compile: bool
    tf32: bool  # NVIDIA GPUs from A100 on: float32 products of 10 bits
    gradient_checkpointing: bool  # what stands inside of blocks is computed twice, instead of kept
    sync_batch_norm: bool  # statistics over the images of all ranks
    compression: Literal["none", "fp16", "bf16"]  # of the gradient between ranks
    reduction: Literal["average", "adasum"]  # of the ranks' gradients
    deterministic: bool  # on GPUs too; operations that cannot be so end the run
    max_bad_steps: Annotated[int, Field(ge=0)]  # in a row, without a finite loss and gradient
    init_from: str | None  # "imagenet", or a path of weights: the whole model or its backbone begins with them
    init_checksum: Sha256 | None  # of what lies at that path; null takes what is there
    allow_head_mismatch: bool  # where the classes are others, the class head begins fresh
    freeze: str | None  # regular expression: layers with a variable of such a name stay as they are
    seed: Seed
    augment: Augment
    evaluate_every: Count  # epochs; the best by AP on val is what train hands on
    early_stopping: Count | None  # evaluations without a better AP
    checkpoint_every: Positive  # epochs
    keep_checkpoints: Count

    @model_validator(mode="after")
    def _consistent(self) -> "Train":
        if self.schedule_epochs < self.epochs:
            raise ValueError(f"schedule_epochs {self.schedule_epochs} is below epochs {self.epochs}")
        if self.warmup_epochs >= self.schedule_epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is not below schedule_epochs {self.schedule_epochs}")
        if self.reduction == "adasum" and (self.ranks & (self.ranks - 1) or self.compression != "none"):
            raise ValueError(
                f"reduction adasum takes 1, 2, 4, 8, ... ranks and compression none, got {self.ranks} ranks and "
                f"compression {self.compression}"
            )
        if self.sync_batch_norm and self.jit_compile:
            raise ValueError("sync_batch_norm true asks ranks while the network runs, which jit_compile true cannot")
        if self.init_checksum is not None and self.init_from in (None, IMAGENET):
            raise ValueError(f"init_checksum is of a path's content, and init_from is {self.init_from}; set it to null")
        return self


class Nms(Section):
    """Non-maximum suppression."""

    method: Literal["hard", "gaussian"]
    iou_threshold: Fraction  # hard
    sigma: Positive  # gaussian
    score_threshold: Annotated[float, Field(ge=0, lt=1)]
    max_detections: Count  # an image
    pre_nms_top_k: Count


class Evaluate(Section):
    """How the model is judged."""

    batch_size: Count
    nms: Nms
    pictures: Annotated[int, Field(ge=0)]  # images drawn with truth and detections side by side
    picture_score: Fraction  # detections drawn from this score on


class Licences(Section):
    """What a release owes to others, in words for the model card; null where nobody stated it."""

    data: str | None
    initial_weights: str | None


class Promote(Section):
    """The gate, and what goes out."""

    min_ap: Fraction  # where there is no champion
    min_gain: float  # AP over the champion's
    formats: Annotated[tuple[Format, ...], Field(min_length=1)]  # that the model goes out in
    licences: Licences

    @model_validator(mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("formats"), list):
            return {**value, "formats": tuple(value["formats"])}
        return value

    @model_validator(mode="after")
    def _different(self) -> "Promote":
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats: one stands there twice: {', '.join(self.formats)}")
        return self


class Params(Section):
    """The whole file."""

    data: Data
    validation: Validate = Field(alias="validate")  # BaseModel has a method of that name
    shard: Shard
    model: Model
    train: Train
    evaluate: Evaluate
    promote: Promote


def load(path: Path = PARAMS_FILE) -> Params:
    """Reads and checks the whole file. PipelineError names every value that is wrong."""
    return validated(Params, read_yaml(path), path)
