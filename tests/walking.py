"""Walks a page: runs its commands as they stand there, in their order."""

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.test_documentation import FENCE

# What `make setup` leaves, out of the environment of the tests: make has nothing to do, and writes nothing into that.
STAND_IN = (
    f"mkdir .venv && ln -s {shlex.quote(sys.prefix)}/* .venv && rm -f .venv/packages-* .venv/horovod-* && "
    "make --touch setup"
)
DOCS = Path(__file__).parents[1] / "docs"
Words = Mapping[str, object]  # of a page -> in their place


@dataclass(frozen=True)
class Block:
    """What a page has between two fences."""

    heading: str
    language: str
    text: str


class Place(Protocol):
    """A folder where commands are run."""

    def run(self, *command: str) -> str: ...


def blocks(page: str, marker: str = "walk") -> list[Block]:
    """Those of a page below docs/ that bear the marker."""
    text = (DOCS / page).read_text()
    return [
        Block(re.findall(r"^#+ (.*)$", text[: fence.start()], re.MULTILINE)[-1], fence["language"], fence["content"])
        for fence in FENCE.finditer(text)
        if fence["marker"] == marker
    ]


def placed(text: str, words: Words) -> str:
    for word, place in words.items():
        text = text.replace(word, str(place))
    return text


def walk(place: Place, steps: Iterable[Block], words: Words) -> str:
    """What the commands print, each block in a shell of its own."""
    return "".join(place.run("bash", "-euo", "pipefail", "-c", placed(step.text, words)) for step in steps)
