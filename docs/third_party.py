"""Writes THIRD_PARTY.md, the packages that the project is run with and their licences: `python -m docs.third_party`.

Names and versions are the pins of requirements/*.txt, licences what the installed packages say of themselves.
"""

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "THIRD_PARTY.md"
LICENCES = re.compile(r"\b(Apache|Artistic|BSD|EPL|FreeBSD|GPL|GPLv2|ISC|LGPL|MIT|MPL|PSF|Unlicense|ZPL)\b")
ENVIRONMENTS = {  # title -> environment, the files of its pins
    "The ML environment": (".venv", ("ml.txt", "horovod.txt")),
    "The Airflow environment": (".venv-airflow", ("airflow.txt",)),
}
INTRODUCTION = """\
# Packages that this project is run with

Made by `make docs` from the pins and from what the installed packages say of themselves; a test compares. None of them
is in this repository: set-up fetches them, and images that are built from the pins hold them. What is copyleft among
them, and what follows: [docs/supply_chain.md](docs/supply_chain.md).
"""


def page() -> str:
    """The whole of THIRD_PARTY.md. Both environments have to be there."""
    return INTRODUCTION + "".join(section(title) for title in ENVIRONMENTS)


def section(title: str) -> str:
    """The table of one environment."""
    environment, files = ENVIRONMENTS[title]
    rows = [f"| {name} | {version} | {licence(name, environment)} |\n" for name, version in pins(files)]
    return f"\n## {title}\n\n| package | version | licence |\n| --- | --- | --- |\n" + "".join(rows)


def pins(files: tuple[str, ...]) -> list[tuple[str, str]]:
    """Name and version of each pin, by name."""
    text = "\n".join((ROOT / "requirements" / name).read_text() for name in files)
    return sorted(re.findall(r"^([a-z0-9-]+)(?:\[\S+\])?==([^\s;]+)", text, re.MULTILINE))


def licence(name: str, environment: str) -> str:
    """What the package says of itself: an SPDX expression, a short text, or the classifiers."""
    site = str(ROOT / environment / "lib/python3.11/site-packages")
    found = next(iter(importlib.metadata.Distribution.discover(name=name, path=[site])), None)
    if found is None:
        raise SystemExit(f"error: {environment}: {name} is not installed; run `make setup airflow-setup`")
    said = {key: found.metadata.get_all(key) or [""] for key in ("License-Expression", "License", "Classifier")}
    if expression := str(said["License-Expression"][0]):
        return expression
    text = str(said["License"][0]).strip()
    if len(text) <= 40 and LICENCES.search(text):
        return text.replace("|", "or")
    classifiers = [str(line).split(" :: ") for line in said["Classifier"]]
    names = [words[2] for words in classifiers if words[:2] == ["License", "OSI Approved"] and len(words) > 2]
    return ", ".join(names) or "not stated"


if __name__ == "__main__":
    PAGE.write_text(page())
