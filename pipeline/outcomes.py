"""What came of the checks of a data set, and what is said of those that fail."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CRITICAL, WARNING = "critical", "warning"
NAMED = 5  # offending records in a message


@dataclass(frozen=True)
class Outcome:
    """A rule held against one split."""

    split: str
    table: str
    expectation: str
    severity: str
    success: bool
    count: int  # offending records
    first: list[dict[str, Any]]  # of the first of them, what names it and what was found
    mendable: bool  # by leaving the offending records out
    ids: NDArray[np.int64]  # [count] of the offending records; empty where it is not mendable


# Of a row of the report's `checks` and `failed` -----------------------------------------------------------------------


def stops(failure: Mapping[str, Any]) -> bool:
    """Whether the data set cannot be used for this failure."""
    return bool(failure["severity"] == CRITICAL and not failure["quarantined"])


def messages(failed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each failure, with the first ids, or the quantities that drifted and how."""
    for failure in failed:
        first = failure["first"][:NAMED]
        if failure["table"] == "drift":
            named = ", ".join(
                f"{record['quantity']} ({record.get('class_problem') or record['moved_most']})" for record in first
            )
        else:
            named = f"ids {', '.join(str(record['id']) for record in first)}" if first else ""
        yield (
            f"{failure['split']} {failure['table']}: expected that {failure['expectation']}: {failure['count']} fail"
            + (f", {named}" if named else "")
            + (", ..." if failure["count"] > NAMED else "")
        )


def advice(failures: Sequence[Mapping[str, Any]], quarantined: bool) -> Iterator[str]:
    """What validate.quarantine would do, or why it did nothing, about failures that stop the stage."""
    mendable = [failure for failure in failures if failure["mendable"]]
    if quarantined:
        for split in dict.fromkeys(failure["split"] for failure in mendable):
            yield (
                f"{split}: validate.quarantine leaves nothing out, since no image or no annotation would be left;"
                " correct the data set"
            )
    elif mendable:
        yield (
            "correct these records, or leave them out with validate.quarantine: true in params.yaml"
            f" (mends {len(mendable)} of {len(failures)} checks)"
        )
    if any(failure["table"] == "drift" for failure in failures):
        yield "if the data is meant to be so, accept it: `python -m pipeline.data_baseline`"
