"""This project's name and version, which pyproject.toml tells: what a release says that it was made by."""

import tomllib
from pathlib import Path

PYPROJECT = Path("pyproject.toml")


def name_and_version(text: str) -> str:
    """Of pyproject.toml's text, here or at another commit."""
    project = tomllib.loads(text)["project"]
    return f"{project['name']} {project['version']}"
