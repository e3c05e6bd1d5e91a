"""The documents: what is generated is up to date, and what is quoted exists."""

from pathlib import Path

from docs import parameters
from pipeline import local

ROOT = Path(__file__).parents[1]


def test_the_reference_of_parameters_is_what_the_code_says() -> None:
    assert parameters.PAGE.read_text() == parameters.page(), "run `make docs`"


def test_every_parameter_has_a_word() -> None:
    rows = [line for line in parameters.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.split("|")[-2].strip() == ""] == []


def test_the_example_of_local_settings_is_one() -> None:
    settings = local.Local.model_validate(local.read_yaml(parameters.EXAMPLE))
    assert settings.model_fields_set == set(local.Local.model_fields)
