"""The documents: what is generated is up to date, and what is quoted exists."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from docs import parameters, third_party
from pipeline import local

ROOT = Path(__file__).parents[1]


def test_the_reference_of_parameters_is_what_the_code_says() -> None:
    assert parameters.PAGE.read_text() == parameters.page(), "run `make docs`"


def test_every_parameter_has_a_word() -> None:
    rows = [line for line in parameters.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.split("|")[-2].strip() == ""] == []


def test_the_example_of_local_settings_is_one() -> None:
    settings = local.Local.model_validate(_yaml(parameters.EXAMPLE))
    assert settings.model_fields_set == set(local.Local.model_fields)


def test_the_list_of_packages_is_that_of_the_environments() -> None:
    text = third_party.PAGE.read_text()
    assert third_party.section("The ML environment") in text, "run `make docs`"
    # Not every checkout has the Airflow environment: where it is missing, names and versions of its pins are compared.
    if (ROOT / ".venv-airflow").exists():
        assert text == third_party.page(), "run `make docs`"
    listed = re.findall(
        r"^\| (\S+) \| ([0-9]\S*) \| .+ \|$", text.partition("## The Airflow environment")[2], re.MULTILINE
    )
    assert listed == third_party.pins(("airflow.txt",)), "run `make docs`"


def test_the_version_is_that_of_the_newest_release_notes() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == version


def test_hooks_are_those_of_lint_and_run_from_the_locked_environment() -> None:
    hooks = [hook for repo in _yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}  # nothing is fetched
    programs = [Path(hook["entry"].split()[0]) for hook in hooks]
    assert {program.parent for program in programs} == {Path(".venv/bin")}
    assert [program for program in programs if not (Path(sys.executable).parent / program.name).exists()] == []
    lint = re.search(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    assert {line.split()[0] for line in lint[1].splitlines()} <= {program.name for program in programs}


def _yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())
