"""The documents: what is generated is up to date, what is quoted exists, and every command is run somewhere.

A block of commands has a line of comment above it: `walk` (tests/test_guides.py, or the test behind a colon, reads it
from the page and runs it as it stands), `run:` and the tests that run such lines, or `not run here:` and the reason.
`yaml` is of params.yaml or local.yaml; of other files it is `yml`.
"""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from docs import parameters, third_party
from pipeline import local

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- (?P<marker>.*?) -->\n)?^```(?P<language>\w*)\n(?P<content>.*?)^```$", re.M | re.S)
COMMANDS = ("", "bash", "console", "sh")
FAMILIES = {"PipelineError", "EffdetError"}  # what a person is told; children of these too
TROUBLE = ROOT / "docs" / "troubleshooting.md"


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_run_by_a_test_or_marked_as_not_run(page: Path) -> None:
    for fence in FENCE.finditer(page.read_text()):
        if fence["language"] not in COMMANDS:
            continue
        kind, _, told = (fence["marker"] or "").partition(": ")
        where = f"{page.name}:\n{fence['content']}"
        assert kind in ("run", "walk", "not run here"), f"no comment above says who runs this: {where}"
        assert told or kind == "walk", where
        for test in told.split(", ") if told and kind != "not run here" else []:
            file, _, function = test.partition("::")
            assert f"def {function}(" in (ROOT / file).read_text(), f"there is no {test}"
        if kind == "walk":
            walker = told.partition("::")[0] or "tests/test_guides.py"
            name = page.relative_to(ROOT / "docs")
            assert f'"{name}"' in (ROOT / walker).read_text(), f"{walker} does not walk {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    for module in re.findall(r"python -m ((?:pipeline|benchmarks|docs)\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    code = "".join(path.read_text() for folder in ("pipeline", "benchmarks") for path in (ROOT / folder).glob("*.py"))
    for line in re.findall(r"python -m (?:pipeline|benchmarks)\.(.*)", text):
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", line.partition("`")[0].partition("|")[0]):
            assert f'"{option}"' in code, f"{option} in: {line}"
    keys = _keys()
    for key in re.findall(r"`((?:data|validate|shard|model|train|evaluate|promote)\.[a-z_.]+)`", text):
        assert key in keys or (ROOT / "pipeline" / key).exists() or (ROOT / "effdet" / key).exists(), key


def test_every_piece_of_yaml_has_known_keys() -> None:
    keys = _keys()
    fences = [fence for page in PAGES for fence in FENCE.finditer(page.read_text())]
    pieces = [fence["content"] for fence in fences if fence["language"] == "yaml"]
    assert pieces
    for piece in pieces:
        assert {key for key in _flat(YAML(typ="safe").load(piece)) if key not in keys} == set(), piece


def test_every_error_that_is_quoted_is_in_the_code() -> None:
    code = [text for path in _modules() for node in ast.walk(_tree(path)) if (text := _template(node))]
    code.append((ROOT / "Makefile").read_text())
    assert [quoted for quoted in _quoted() if not any(quoted in text for text in code)] == []


def test_every_error_that_a_person_may_meet_is_explained() -> None:
    children = {
        node.name: {ast.unparse(base) for base in node.bases}
        for path in _modules()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ClassDef)
    }
    told = {name for name in children if name in FAMILIES or children[name] & FAMILIES}
    told |= {name for name in children if children[name] & told}
    unexplained = []
    for path in _modules():
        for node in ast.walk(_tree(path)):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            text = _template(node.exc.args[0]) or ""
            ours = ast.unparse(node.exc.func) in told or path.name == "params.py"
            # One of names and figures alone hands on another's words.
            if ours and len(re.findall(r"[a-z]{2,}", text)) > 1 and not any(quoted in text for quoted in _quoted()):
                unexplained.append(f"{path.name}: {text}")
    assert unexplained == [], "docs/troubleshooting.md wants a row that quotes some words of it"


def _modules() -> list[Path]:
    return [*sorted((ROOT / "pipeline").glob("*.py")), *sorted((ROOT / "effdet").glob("*.py"))]


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _template(node: ast.AST) -> str | None:
    """A text or f-string with … for what it is given, and without `, which ends a quotation in Markdown."""
    if isinstance(node, ast.Constant):
        return node.value.replace("`", "") if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (_template(node.left) or "…") + (_template(node.right) or "…")
    return None


@functools.cache
def _quoted() -> list[str]:
    """What stands in the first column of the tables, quotation by quotation."""
    rows = re.findall(r"^\| (`.*?) \| ", TROUBLE.read_text(), re.MULTILINE)
    return [quoted for row in rows for quoted in re.findall(r"`([^`]+)`", row)]


@functools.cache
def _keys() -> set[str]:
    """Every key of params.yaml and of local.yaml, dotted, and the blocks that hold them."""
    found = set(re.findall(r"^\| `([^`]+)` \|", parameters.page(), re.MULTILINE)) | {"data.source"}
    return found | {key.partition(".")[0] for key in found}


def _flat(content: dict[str, Any], outer: str = "") -> set[str]:
    inner = [_flat(value, f"{outer}{key}.") for key, value in content.items() if isinstance(value, dict)]
    return {outer + key for key in content} | set().union(*inner)


def _yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())
