"""report.json of the validate stage: every check, what failed, counts, distributions and how far they drifted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from pipeline import params
from pipeline.coco import CocoTables
from pipeline.drift import BOX_EDGES, BOX_SIZES, FLOOR, Distributions, class_counts
from pipeline.outcomes import Outcome, stops

Splits = Mapping[str, CocoTables]


def report_of(
    outcomes: Sequence[Outcome],
    found: Splits,
    left: Splits,
    decoded: Mapping[str, int],
    distributions: Distributions,
) -> dict[str, Any]:
    """All but drift, its counts those of what is `left`; `decoded` counts the files that were decoded in full."""
    checks = [_check(outcome, found[outcome.split], left[outcome.split]) for outcome in outcomes]
    failed = [row for row in checks if not row["success"]]
    return {
        "success": not any(stops(failure) for failure in failed),
        "failed": failed,
        "checks": checks,
        "splits": {
            split: {
                **_counts(tables),
                "quarantined_images": len(found[split].images) - len(tables.images),
                "quarantined_annotations": len(found[split].annotations) - len(tables.annotations),
                "files_decoded": decoded[split],
            }
            for split, tables in left.items()
        },
        "classes": _classes(left),
        "box_sizes": {
            "edges": list(BOX_EDGES),
            "boxes": {split: list(quantities[BOX_SIZES].values()) for split, quantities in distributions.items()},
        },
        "distributions": distributions,
    }


def drift_of(tables: Mapping[str, pd.DataFrame], settings: params.Validate, baseline: bool) -> dict[str, Any]:
    """The report's `drift`, of the drift tables of the splits that the baseline has."""
    rows = {split: table.astype(object).where(table.notna(), None) for split, table in tables.items()}
    return {
        "baseline": baseline,
        "max_psi": settings.max_psi,
        "severity": settings.severity.drift,
        "share_floor": FLOOR,
        "splits": {split: table.to_dict("records") for split, table in rows.items()},
    }


def _check(outcome: Outcome, found: CocoTables, left: CocoTables) -> dict[str, Any]:
    row = {key: value for key, value in asdict(outcome).items() if key != "ids"}
    # Of a split all records that fail are left out, or none.
    whole = (len(left.images), len(left.annotations)) == (len(found.images), len(found.annotations))
    return {**row, "quarantined": 0 if whole else len(outcome.ids)}


def _counts(found: CocoTables) -> dict[str, int]:
    an_image = found.annotations["image_id"].value_counts()
    return {
        "images": len(found.images),
        "images_without_annotations": int((~found.images["id"].isin(an_image.index)).sum()),
        "annotations": len(found.annotations),
        "crowds": int((found.annotations["iscrowd"] == 1).sum()),
        "most_annotations_in_an_image": int(an_image.max()) if len(an_image) else 0,
        "categories": len(found.categories),
    }


def _classes(found: Splits) -> list[dict[str, Any]]:
    """Boxes of each category of train in each split, by id."""
    counts = {
        split: class_counts(tables).drop_duplicates("id").set_index("id")["boxes"] for split, tables in found.items()
    }
    rows = found["train"].categories.drop_duplicates("id").sort_values("id")
    return [
        {
            "id": int(row.id),
            "name": row.title,
            "boxes": {split: int(boxes.get(row.id, 0)) for split, boxes in counts.items()},
        }
        for row in rows.rename(columns={"name": "title"}).itertuples()
    ]
