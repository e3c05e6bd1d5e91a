"""What a data set must hold, as Great Expectations (1.24), one suite a table. The only module that loads that library.

A table of one split is a data frame: `images`, `annotations`, `categories`, `drift` where there is a baseline, and
`classes` of the split that is judged on. pipeline.validation_tables, .duplicates and .drift make the columns; those
ending in `_problem` hold words where something is wrong, else None.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline import params
from pipeline.outcomes import CRITICAL, WARNING, Outcome

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # the library reads it while it loads

import great_expectations as gx
import great_expectations.expectations as gxe
from great_expectations.core.expectation_validation_result import ExpectationValidationResult
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.expectations.metadata_types import FailureSeverity

FIRST = 20  # offending records that are listed
# What names a record of a table, beside the column that is looked at.
NAMED_BY = {
    "images": ["id", "file_name"],
    "annotations": ["id", "image_id", "category_id"],
    "categories": ["id", "name"],
    "classes": ["id", "name"],
    "drift": ["quantity", "moved_most"],
}
FORMATS = ["JPEG", "MPO", "PNG"]  # MPO: a JPEG with further pictures behind it, as telephones write it


@dataclass(frozen=True)
class Rule:
    """A row of the table of expectations."""

    table: str
    severity: str
    words: str  # what is expected
    expectation: type[gxe.Expectation]
    arguments: dict[str, Any]

    @property
    def mendable(self) -> bool:
        """Whether it would hold without the records that fail; one of two that share an id cannot be told apart."""
        of_records = self.expectation not in (gxe.ExpectTableRowCountToBeBetween, gxe.ExpectColumnValuesToBeUnique)
        return self.severity == CRITICAL and self.table in ("images", "annotations") and of_records


def rules(settings: params.Validate, apply_exif: bool) -> list[Rule]:
    """Every expectation, in the order in which they are reported."""
    return [
        *_image_rules(settings, apply_exif),
        *_annotation_rules(settings),
        Rule("categories", CRITICAL, "ids are unique", *_unique("id")),
        Rule("categories", CRITICAL, "the category is one of train's", *_null("train_problem")),
        Rule("categories", WARNING, "names are unique", *_unique("name")),
        Rule(
            "classes",
            WARNING,
            f"the class has at least {settings.min_boxes_per_class} boxes",
            *_between("boxes", min_value=settings.min_boxes_per_class),
        ),
        Rule("drift", settings.severity.drift, "the classes are the baseline's", *_null("class_problem")),
        Rule(
            "drift",
            settings.severity.drift,
            f"the population stability index is at most {settings.max_psi:g}",
            *_between("psi", max_value=settings.max_psi),
        ),
    ]


def _image_rules(settings: params.Validate, apply_exif: bool) -> list[Rule]:
    boxes_of = f"{'turned' if apply_exif else 'stored'} picture, data.apply_exif: {str(apply_exif).lower()}"
    return [
        Rule("images", CRITICAL, "there is an image", *AT_LEAST_ONE_ROW),
        Rule("images", CRITICAL, "ids are unique", *_unique("id")),
        Rule("images", CRITICAL, "width is at least 1", *_between("width", min_value=1)),
        Rule("images", CRITICAL, "height is at least 1", *_between("height", min_value=1)),
        Rule("images", CRITICAL, "the file is in the archive", *_null("archive_problem")),
        Rule("images", CRITICAL, "the file's header can be read", *_null("header_problem")),
        Rule("images", CRITICAL, "the file is a JPEG or PNG", *_in("format", *FORMATS)),
        Rule("images", CRITICAL, "width and height are the file's", *_null("size_problem")),
        Rule("images", CRITICAL, "the file can be decoded", *_null("decode_problem")),
        Rule("images", settings.severity.duplicates, "the image is there once", *_null("duplicate_problem")),
        Rule("images", settings.severity.leakage, "the image is in no later split", *_null("leakage_problem")),
        Rule("images", WARNING, "the picture is 8-bit grey or RGB", *_null("mode")),
        Rule(
            "images",
            WARNING,
            f"the EXIF orientation is 1 (boxes of others: of the {boxes_of})",
            *_in("orientation", 1),
        ),
    ]


def _annotation_rules(settings: params.Validate) -> list[Rule]:
    pixels = f"{settings.box_tolerance:g} px"
    return [
        Rule("annotations", CRITICAL, "there is an annotation", *AT_LEAST_ONE_ROW),
        Rule("annotations", CRITICAL, "ids are unique", *_unique("id")),
        Rule("annotations", CRITICAL, "the image exists", *_in("image_exists", True)),
        Rule("annotations", CRITICAL, "the category exists", *_in("category_exists", True)),
        Rule("annotations", CRITICAL, "the box is finite", *_in("finite", True)),
        Rule("annotations", CRITICAL, "the box's width is above 0", *_between("w", **ABOVE_0)),
        Rule("annotations", CRITICAL, "the box's height is above 0", *_between("h", **ABOVE_0)),
        Rule(
            "annotations",
            CRITICAL,
            f"the box is inside the image, give or take {pixels}",
            *_between("pixels_outside", max_value=settings.box_tolerance),
        ),
        Rule("annotations", CRITICAL, "iscrowd is 0 or 1", *_in("iscrowd", 0, 1)),
        Rule("annotations", CRITICAL, "area is above 0", *_between("area", **ABOVE_0)),
        Rule(
            "annotations",
            CRITICAL,
            f"area is at most that of the box with {pixels} added",
            *_between("area_over_box", max_value=1),
        ),
        Rule("annotations", WARNING, "no object is annotated twice", *_in("repeated", False)),
    ]


# An expectation and its arguments -------------------------------------------------------------------------------------

Held = tuple[type[gxe.Expectation], dict[str, Any]]
AT_LEAST_ONE_ROW: Held = (gxe.ExpectTableRowCountToBeBetween, {"min_value": 1})
ABOVE_0 = {"min_value": 0, "strict_min": True}


def _unique(column: str) -> Held:
    return gxe.ExpectColumnValuesToBeUnique, {"column": column}


def _null(column: str) -> Held:
    return gxe.ExpectColumnValuesToBeNull, {"column": column}


def _in(column: str, *values: Any) -> Held:
    """In these values, or missing."""
    return gxe.ExpectColumnValuesToBeInSet, {"column": column, "value_set": list(values)}


def _between(column: str, **bounds: Any) -> Held:
    """Within the bounds, or missing."""
    return gxe.ExpectColumnValuesToBeBetween, {"column": column, **bounds}


# Checks ---------------------------------------------------------------------------------------------------------------


def check(
    tables: Mapping[str, Mapping[str, pd.DataFrame]], settings: params.Validate, apply_exif: bool
) -> list[Outcome]:
    """Holds every rule against every split: `tables` is {split: {table: data frame}}."""
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_pandas("tables")
    all_rules = rules(settings, apply_exif)
    outcomes: list[Outcome] = []
    for split, frames in tables.items():
        for table, frame in frames.items():
            of_table = [rule for rule in all_rules if rule.table == table]
            looked_at = {rule.arguments["column"]: None for rule in of_table if "column" in rule.arguments}
            asset = source.add_dataframe_asset(f"{split} {table}")
            # Without the other columns: the library hashes all that it is given.
            batch = asset.add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": frame[[*looked_at]]})
            outcomes += _outcomes(batch, split, frame, of_table)
    return outcomes


def _outcomes(batch: Any, split: str, frame: pd.DataFrame, suite_rules: list[Rule]) -> Iterator[Outcome]:
    suite = gx.ExpectationSuite(
        name=suite_rules[0].table,
        expectations=[
            rule.expectation(**rule.arguments, severity=FailureSeverity(rule.severity), description=rule.words)
            for rule in suite_rules
        ],
    )
    # Every offending row by its index alone: what names a row would be a dictionary each, gigabytes where all fail.
    result_format = {
        "result_format": "COMPLETE",
        "exclude_unexpected_values": True,
        "return_unexpected_index_query": False,
    }
    found = {
        result.expectation_config.description: result
        for result in batch.validate(suite, result_format=result_format).results
    }
    for rule in suite_rules:
        yield _outcome(split, rule, frame, found[rule.words])


def _outcome(split: str, rule: Rule, frame: pd.DataFrame, result: ExpectationValidationResult) -> Outcome:
    figures = result.result
    if not figures:  # the library could not compute it: a fault of this program, not of the data
        raise RuntimeError(f"{split} {rule.table}: {rule.words}: {result.exception_info}")
    offending = frame.loc[figures.get("unexpected_index_list", [])]
    shown = list(dict.fromkeys([*NAMED_BY[rule.table], rule.arguments.get("column", "id")]))
    return Outcome(
        split=split,
        table=rule.table,
        expectation=rule.words,
        severity=rule.severity,
        success=bool(result.success),
        count=0 if result.success else int(figures.get("unexpected_count", 1)),
        first=[_plain(record) for record in offending[shown].head(FIRST).astype(object).to_dict("records")],
        mendable=rule.mendable,
        ids=offending["id"].to_numpy(np.int64) if rule.mendable else np.empty(0, np.int64),
    )


def _plain(record: Mapping[Any, Any]) -> dict[str, Any]:
    """The record in JSON's types: a number that is not finite by its name."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in plain.items()
    }
