"""dvc.yaml lists the code that each stage runs, no more and no less."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.dvc_graph import modules_behind, stage_module

ROOT = Path(__file__).parents[2]
STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_it_runs(name: str) -> None:
    stage = STAGES[name]
    listed = [dep for dep in stage["deps"] if dep.endswith(".py")]
    behind = modules_behind(ROOT / stage_module(stage["cmd"]))
    assert listed == [str(path.relative_to(ROOT)) for path in behind], "run python -m pipeline.dvc_graph"


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_module_behind_a_stage_is_what_python_loads(name: str) -> None:
    """The list read off the source holds every module that an import of the stage really brings in."""
    module = ".".join(stage_module(STAGES[name]["cmd"]).with_suffix("").parts)
    code = (
        f"import sys, {module}; "
        "print('\\n'.join(m.__file__ for n, m in sys.modules.items() if n.startswith(('effdet.', 'pipeline.'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    loaded = {Path(line).relative_to(ROOT) for line in done.stdout.split()}
    assert loaded <= {Path(dep) for dep in STAGES[name]["deps"]}


def test_which_stage_the_losses_concern() -> None:
    concerned = {name for name, stage in STAGES.items() if "effdet/losses.py" in stage["deps"]}
    assert concerned == {"train"}


def test_packages_hold_nothing_that_a_stage_could_run() -> None:
    for package in ("effdet", "pipeline"):
        body = ast.parse((ROOT / package / "__init__.py").read_text()).body
        assert len(body) == 1
        assert isinstance(body[0], ast.Expr)


def test_imports_are_followed_however_they_are_written(tmp_path: Path) -> None:
    package = tmp_path / "pipeline"
    package.mkdir()
    for name, text in {
        "stage": "from pipeline import a\nimport os",
        "a": "def later():\n    import pipeline.b",
        "b": "from pipeline.c import thing",
        "c": "from pipeline import stage  # a circle ends",
        "d": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    found = [path.stem for path in modules_behind(package / "stage.py")]
    assert found == ["a", "b", "c", "stage"]
