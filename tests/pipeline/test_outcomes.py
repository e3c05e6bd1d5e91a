"""What is said of failed checks."""

from typing import Any

from pipeline.outcomes import advice, messages, stops

DRIFT = [{"quantity": "classes", "moved_most": "3 cat: 50.0% to 20.0%", "psi": 0.4}]


def failure(table: str = "images", ids: int = 1, **other: Any) -> dict[str, Any]:
    row = {"split": "val", "table": table, "expectation": "it is so", "severity": "critical", "mendable": True}
    return {**row, "count": ids, "quarantined": 0, "first": [{"id": 7 + number} for number in range(ids)], **other}


def test_first_ids_are_named_and_that_there_are_more() -> None:
    few, many, none = failure(ids=5), failure(ids=6), failure(count=1, first=[])
    assert list(messages([few, many, none])) == [
        "val images: expected that it is so: 5 fail, ids 7, 8, 9, 10, 11",
        "val images: expected that it is so: 6 fail, ids 7, 8, 9, 10, 11, ...",
        "val images: expected that it is so: 1 fail",
    ]


def test_of_drift_is_said_what_moved_most() -> None:
    other = [{**DRIFT[0], "class_problem": "not in the baseline: 9 cow"}]
    assert list(messages([failure("drift", first=DRIFT), failure("drift", first=other)])) == [
        "val drift: expected that it is so: 1 fail, classes (3 cat: 50.0% to 20.0%)",
        "val drift: expected that it is so: 1 fail, classes (not in the baseline: 9 cow)",
    ]


def test_drift_that_stops_comes_with_the_way_to_accept_it() -> None:
    accept = "if the data is meant to be so, accept it: `python -m pipeline.data_baseline`"
    drift = failure("drift", first=DRIFT, mendable=False)
    assert list(advice([drift], quarantined=False)) == [accept]
    assert list(advice([drift], quarantined=True)) == [accept]
    mendable = "correct these records, or leave them out with validate.quarantine: true in params.yaml"
    assert list(advice([failure(), drift], quarantined=False)) == [f"{mendable} (mends 1 of 2 checks)", accept]
    assert accept not in list(advice([failure()], quarantined=False))


def test_what_stops() -> None:
    assert stops(failure())
    assert not stops(failure(quarantined=1))
    assert not stops(failure(severity="warning"))
