"""The accepted data set, against which the validate stage measures drift: data_baseline.json, a file in git.

    python -m pipeline.data_baseline     # accepts the data of data/reports/validation/report.json

It holds the report's `distributions`, or is `{}` where nothing is accepted. A new one changes the report of the next
`dvc repro`, and nothing after it.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from pipeline.drift import CLASSES, LABELS, Distributions
from pipeline.errors import PipelineError, run
from pipeline.files import read_json, write_json
from pipeline.outcomes import stops
from pipeline.settings import Section, validated

BASELINE = Path("data_baseline.json")
REPORT = Path("data/reports/validation/report.json")


class Baseline(Section):
    """The file's content."""

    distributions: dict[str, dict[str, dict[str, NonNegativeInt]]]  # {split: {quantity: {bin: count}}}


def read_baseline(path: Path = BASELINE) -> Distributions:
    """The accepted counts, empty where there are none. PipelineError for a file of anything else."""
    content = read_json(path, "baseline of the data") if path.exists() else {}
    if content == {}:
        return {}
    accepted = validated(Baseline, content, path).distributions
    for split, quantities in accepted.items():
        found = {name: sorted(counts) for name, counts in quantities.items() if name != CLASSES}
        if CLASSES not in quantities or found != {name: sorted(labels) for name, labels in LABELS.items()}:
            raise PipelineError(
                f"{path}: {split}: not the quantities and bins of this version; accept the data of the current report"
                " anew (`python -m pipeline.data_baseline`), or write {} for no baseline"
            )
    return accepted


def accept(report: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline that a report.json makes. PipelineError where the data fails by more than its drift."""
    stopping = [failure for failure in report["failed"] if stops(failure) and failure["table"] != "drift"]
    if stopping:
        raise PipelineError(
            f"{REPORT}: the data fails {len(stopping)} critical checks, so it is no baseline; the first:"
            f" {stopping[0]['split']} {stopping[0]['table']}: {stopping[0]['expectation']}"
        )
    return {"distributions": report["distributions"]}


def main() -> None:
    """Writes data_baseline.json."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    baseline = accept(read_json(REPORT, "report of the validate stage"))
    write_json(BASELINE, baseline)
    splits = ", ".join(baseline["distributions"])
    print(f"{BASELINE}: now the data of {REPORT} ({splits}); commit it")


if __name__ == "__main__":
    run(main)
