"""The validate stage: the tables of every split, and the image files themselves, held against pipeline.expectations.

data/reports/validation/
  report.json   success, what failed with the first offending records, every check, counts, distributions, drift
  index.html    the same for a person, offline, with pictures of the first offenders
data/exclusions.json   what the stages after this one leave out

A critical failure ends the stage with exit 1; the report stands nevertheless, the exclusions do not. With
validate.quarantine the images and annotations that fail are left out instead, where that mends the data set.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline import local, params
from pipeline.coco import CocoTables, ImageArchive, read_annotations, without
from pipeline.data_baseline import REPORT, read_baseline
from pipeline.drift import Distributions, class_counts, distributions, drift_table
from pipeline.duplicates import with_twins
from pipeline.errors import PipelineError
from pipeline.expectations import check
from pipeline.files import write_json, written_whole
from pipeline.image_files import chosen, file_facts
from pipeline.offender_pictures import Picture, pictures
from pipeline.outcomes import CRITICAL, Outcome, advice, messages, stops
from pipeline.raw_data import EXCLUSIONS, annotations_file, archive_file, splits
from pipeline.timings import run_stage
from pipeline.validation_page import page
from pipeline.validation_report import drift_of, report_of
from pipeline.validation_tables import annotations_table, categories_table, images_table

OUT = REPORT.parent
Exclusions = dict[str, dict[str, list[int]]]  # exclusions.json: {split: {"images": [ids], "annotations": [ids]}}


# Quarantine -----------------------------------------------------------------------------------------------------------


def quarantine(outcomes: Sequence[Outcome], found: Mapping[str, CocoTables]) -> Exclusions:
    """The records that fail, by split; none of a split of which no image or no annotation would be left."""
    exclusions = nothing_of(found)
    for split, tables in found.items():
        ids: dict[str, list[int]] = {}
        for table in ("images", "annotations"):
            failing = [outcome.ids for outcome in outcomes if (outcome.split, outcome.table) == (split, table)]
            ids[table] = np.unique(np.concatenate(failing)).tolist()
        left = without(tables, ids)
        if len(left.images) and len(left.annotations):
            exclusions[split] = ids
    return exclusions


def nothing_of(found: Mapping[str, CocoTables]) -> Exclusions:
    """Exclusions that leave everything in."""
    return {split: {"images": [], "annotations": []} for split in found}


# The stage ------------------------------------------------------------------------------------------------------------


def tables_of(
    found: Mapping[str, CocoTables],
    archives: Mapping[str, ImageArchive],
    decode: Mapping[str, NDArray[np.bool_]],
    settings: params.Params,
    workers: int,
) -> dict[str, dict[str, pd.DataFrame]]:
    """{split: {table: data frame}} for pipeline.expectations; the marked files are decoded in full."""
    images = {}
    for split, coco in found.items():
        facts = file_facts(archives[split], split, coco.images["file_name"].tolist(), decode[split], workers)
        images[split] = images_table(coco.images, facts, settings.data.apply_exif)
    return {
        split: {
            "images": table,
            "annotations": annotations_table(found[split], settings.validation.box_tolerance),
            "categories": categories_table(found[split].categories, found["train"].categories),
        }
        for split, table in with_twins(images, archives).items()
    }


def validate(
    settings: params.Params, baseline: Distributions, workers: int
) -> tuple[dict[str, Any], list[list[Picture]], Exclusions]:
    """Reads data/raw; returns the report, the pictures of each failure, and what is to be left out."""
    rules, apply_exif = settings.validation, settings.data.apply_exif
    found = {split: read_annotations(annotations_file(split)) for split in splits()}
    decode = {split: chosen(len(coco.images), rules.decode_fraction) for split, coco in found.items()}
    with ExitStack() as stack:
        archives = {split: stack.enter_context(ImageArchive(archive_file(split))) for split in found}
        tables = tables_of(found, archives, decode, settings, workers)
        outcomes = check(tables, rules, apply_exif)
        exclusions = quarantine(outcomes, found) if rules.quarantine else nothing_of(found)
        left = {split: without(coco, exclusions[split]) for split, coco in found.items()}
        counts = {split: distributions(coco) for split, coco in left.items()}
        drift = {split: drift_table(counts[split], baseline[split]) for split in left if split in baseline}
        of_left = {split: {"drift": table} for split, table in drift.items()}
        of_left["val"] = {"classes": class_counts(left["val"]), **of_left.get("val", {})}
        outcomes += check(of_left, rules, apply_exif)
        decoded = {split: int(marks.sum()) for split, marks in decode.items()}
        report = report_of(outcomes, found, left, decoded, counts)
        report["drift"] = drift_of(drift, rules, bool(baseline))
        return report, pictures(report["failed"], tables, archives, apply_exif), exclusions


def main() -> None:
    """Writes the report, and the list of what is left out unless something critical failed."""
    settings = params.load()
    report, shown, exclusions = validate(settings, read_baseline(), local.load().loader_workers)
    with written_whole(OUT) as folder:
        folder.mkdir()
        write_json(folder / "report.json", report)
        (folder / "index.html").write_text(page(report, shown), encoding="utf-8")
    critical = [failure for failure in report["failed"] if stops(failure)]
    warnings = [failure for failure in report["failed"] if failure["severity"] != CRITICAL]
    quarantined = [failure for failure in report["failed"] if failure["quarantined"]]
    for kind, failures in (("warning", warnings), ("quarantined", quarantined)):
        for line in messages(failures):
            print(f"{kind}: {line}", file=sys.stderr)
    if critical:
        lines = [
            f"the data set fails {len(critical)} critical checks; see {OUT / 'index.html'}",
            *messages(critical),
            *advice(critical, settings.validation.quarantine),
        ]
        EXCLUSIONS.unlink(missing_ok=True)
        raise PipelineError("\n  ".join(lines))
    write_json(EXCLUSIONS, exclusions)
    for split, counts in report["splits"].items():
        images, annotations = counts["quarantined_images"], counts["quarantined_annotations"]
        if images or annotations:
            print(f"{split}: {images} images and {annotations} annotations left out; see {EXCLUSIONS}")
    print(f"{len(report['checks'])} checks, {len(warnings)} warnings; see {OUT / 'index.html'}")


if __name__ == "__main__":
    run_stage("validate", main)
