"""params.yaml: what is read, and what a person is told of a mistake."""

import shutil
from pathlib import Path

import pytest

from pipeline import params
from pipeline.errors import PipelineError
from pipeline.params_check import check

ROOT = Path(__file__).parents[2]


def _errors_after(tmp_path: Path, *replacements: tuple[str, str]) -> list[str]:
    text = (ROOT / "recipes" / "synthetic.yaml").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError) as error:
        check(params.load(path), path)
    return [line.removeprefix(f"{path}: ") for line in str(error.value).splitlines()]


def test_a_wrong_type_is_named_with_what_was_found(tmp_path: Path) -> None:
    errors = _errors_after(tmp_path, ("ranks: 1", "ranks: two"))
    assert errors == ["train.ranks: expected an integer, got 'two'"]


def test_an_integer_is_not_rounded_and_text_is_not_converted(tmp_path: Path) -> None:
    errors = _errors_after(tmp_path, ("ranks: 1", "ranks: 1.5"), ("momentum: 0.9", "momentum: '0.9'"))
    assert errors == [
        "train.ranks: expected an integer, got 1.5",
        "train.momentum: expected a number, got '0.9'",
    ]


def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    errors = _errors_after(tmp_path, ("  momentum:", "  momentun:"))
    assert errors == [
        "train.momentum: missing; every key must be given",
        "train.momentun: unknown key; did you mean momentum?",
    ]


def test_keys_of_another_source_are_unknown(tmp_path: Path) -> None:
    errors = _errors_after(tmp_path, ("source: synthetic", "source: synthetic\n  base_url: x"))
    assert errors == ["data.base_url: unknown key; did you mean base_url?"]


def test_an_unknown_source_is_named_with_the_known_ones(tmp_path: Path) -> None:
    errors = _errors_after(tmp_path, ("source: synthetic", "source: imagenet"))
    assert errors == ["data.source: expected 'synthetic', 'coco2017', 'coco_format', 'tfrecords', got 'imagenet'"]
    assert _errors_after(tmp_path, ("  source: synthetic\n", "")) == ["data.source: missing"]


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("  seed: 1", "  seed: -1", "data.seed: "),
        ("learning_rate: 0.08", "learning_rate: .inf", "train.learning_rate: "),
        ("min_gain: 0.0", "min_gain: .nan", "promote.min_gain: "),
        ("formats: [saved_model, onnx,", "formats: [saved_model, onxx,", "promote.formats.1: "),
        ("formats: [", "formats: []  # [", "promote.formats: "),
        ("formats: [", "formats: onnx  # [", "promote.formats: "),
        ("score_threshold: 0.001", "score_threshold: 1.0", "evaluate.nms.score_threshold: "),
        ("freeze: ^efficientnet", "freeze: '['  #", "train.freeze: "),
    ],
)
def test_values_that_no_stage_can_take(tmp_path: Path, old: str, new: str, where: str) -> None:
    (error,) = _errors_after(tmp_path, (old, new))
    assert error.startswith(where)


def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path: Path) -> None:
    # YAML 1.1 takes 1e-4, as `dvc exp run -S` may write it, for text
    text = (ROOT / "recipes" / "synthetic.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("weight_decay: 4.0e-5", "weight_decay: 1e-4"))
    assert params.load(path).train.weight_decay == 1e-4


def test_values_that_contradict_each_other(tmp_path: Path) -> None:
    (error,) = _errors_after(tmp_path, ("  jitter_min: ", "  jitter_min: 9"))
    assert error.startswith("train.augment: jitter_min 9")


def test_collectives_that_cannot_be_so(tmp_path: Path) -> None:
    (error,) = _errors_after(tmp_path, ("  ranks: 1 ", "  ranks: 6 "), ("reduction: average", "reduction: adasum"))
    assert error.startswith("train: reduction adasum takes 1, 2, 4, 8, ... ranks and compression none, got 6 ranks")
    (error,) = _errors_after(tmp_path, ("compression: none", "compression: bf16"), ("n: average", "n: adasum"))
    assert "compression bf16" in error
    (error,) = _errors_after(
        tmp_path, ("sync_batch_norm: false", "sync_batch_norm: true"), ("jit_compile: false", "jit_compile: true")
    )
    assert error.startswith("train: sync_batch_norm true asks ranks")


def test_an_unknown_model_and_an_image_size_that_no_level_divides(tmp_path: Path) -> None:
    (error,) = _errors_after(tmp_path, ("efficientdet-lite0", "efficientdet-d9"))
    assert "efficientdet-d9" in error
    assert "efficientdet-d7x" in error
    text = (ROOT / "recipes" / "synthetic.yaml").read_text()
    size = next(line for line in text.splitlines() if "image_size: [" in line)
    (error,) = _errors_after(tmp_path, (size, "  image_size: [200, 128]"))
    assert "200" in error
    assert "128" in error


def test_an_int8_file_is_for_lite_models(tmp_path: Path) -> None:
    others = ("efficientdet-lite0", "efficientdet-d0"), ("[160, 160]", "[128, 128]")
    (error,) = _errors_after(tmp_path, *others)
    assert error.startswith("promote.formats: litert_int8 is for lite models, efficientdet-d0 is none")
    text = (ROOT / "recipes" / "synthetic.yaml").read_text()
    for old, new in (*others, (", litert_int8]", "]")):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "params.yaml"
    path.write_text(text)
    settings = params.load(path)
    check(settings, path)
    assert settings.promote.formats == ("saved_model", "onnx", "litert_float32", "litert_float16")


def test_a_file_that_is_no_yaml_or_missing(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="not found"):
        params.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("train: [")
    with pytest.raises(PipelineError, match="not YAML"):
        params.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(PipelineError, match="expected a block of keys, got None"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path, tmp_path: Path) -> None:
    shutil.copy(recipe, tmp_path / "params.yaml")
    check(params.load(tmp_path / "params.yaml"))
