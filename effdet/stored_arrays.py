"""Named arrays that lie somewhere, with their shapes known before a number is read.

What does not fit a model is refused by its shapes, so that no file decides how much memory is taken.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class StoredArrays:
    """Arrays by name."""

    what: str  # for a person: kind and place
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], NDArray[Any]]  # by a name of `shapes`; EffdetError where that fails
    averaged: frozenset[str] = frozenset()  # names whose array is a moving average

    def renamed(self, theirs: Mapping[str, str]) -> "StoredArrays":
        """Only these, by other names: new name -> name here."""
        return StoredArrays(
            self.what,
            {name: self.shapes[their] for name, their in theirs.items()},
            lambda name: self.read(theirs[name]),
            frozenset(name for name, their in theirs.items() if their in self.averaged),
        )


def in_memory(what: str, arrays: Mapping[str, NDArray[Any]], averaged: Iterable[str] = ()) -> StoredArrays:
    """Arrays that were read already."""
    shapes = {name: array.shape for name, array in arrays.items()}
    return StoredArrays(what, shapes, lambda name: arrays[name], frozenset(averaged))
