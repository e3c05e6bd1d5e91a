"""The tables of a split that pipeline.expectations looks at: the annotations file's, with what can be said of each row.

Columns ending in `_problem` hold words where something is wrong, else None.
"""

import numpy as np
import pandas as pd

from pipeline.coco import CocoTables
from pipeline.image_files import TURNED


def images_table(images: pd.DataFrame, facts: pd.DataFrame, apply_exif: bool) -> pd.DataFrame:
    """The images with what their files say; with `apply_exif` width and height are those of the turned pictures."""
    table = pd.concat([images.reset_index(drop=True), facts], axis=1)
    turned = apply_exif & (table["orientation"].fillna(1) >= TURNED)
    width = table["file_width"].where(~turned, table["file_height"])
    height = table["file_height"].where(~turned, table["file_width"])
    differs = table["file_width"].notna() & ((table["width"] != width) | (table["height"] != height))
    otherwise = (table["width"] == height) & (table["height"] == width) & (table["orientation"].fillna(1) >= TURNED)
    hint = f"; as with data.apply_exif: {str(not apply_exif).lower()}"
    table["size_problem"] = None
    table.loc[differs, "size_problem"] = [
        f"{row.width} x {row.height} in the annotations, {width[row.Index]} x {height[row.Index]} in the file"
        + ", turned" * bool(turned[row.Index])
        + hint * bool(otherwise[row.Index])
        for row in table[differs].itertuples()
    ]
    return table


def annotations_table(found: CocoTables, box_tolerance: float) -> pd.DataFrame:
    """The annotations with what can be said of each: missing where it cannot."""
    table = found.annotations.reset_index(drop=True)
    sizes = found.images.drop_duplicates("id").set_index("id")[["width", "height"]]
    image_width, image_height = sizes.reindex(table["image_id"]).to_numpy(np.float64).T
    x, y, w, h, area = (table[name].to_numpy() for name in ("x", "y", "w", "h", "area"))
    room = np.where((w > 0) & (h > 0), (w + box_tolerance) * (h + box_tolerance), np.nan)
    return table.assign(
        image_exists=table["image_id"].isin(found.images["id"]),
        category_exists=table["category_id"].isin(found.categories["id"]),
        finite=np.isfinite(np.stack([x, y, w, h])).all(axis=0),
        pixels_outside=np.max([-x, -y, x + w - image_width, y + h - image_height], axis=0),
        area_over_box=area / room,
        repeated=table.duplicated(["image_id", "category_id", "x", "y", "w", "h"]),
    )


def categories_table(categories: pd.DataFrame, of_train: pd.DataFrame) -> pd.DataFrame:
    """The categories, held against those of train, from which the class table is made."""
    names = dict(zip(of_train["id"], of_train["name"], strict=True))
    problems = [
        None if names.get(number) == name else f"in train {names[number]!r}" if number in names else "not in train"
        for number, name in zip(categories["id"], categories["name"], strict=True)
    ]
    return categories.assign(train_problem=pd.Series(problems, categories.index, dtype=object))
