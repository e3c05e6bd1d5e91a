"""Images that a data set holds more than once, within a split and between splits."""

import hashlib
from collections.abc import Mapping
from typing import Any

import pandas as pd
from tqdm import tqdm

from pipeline.coco import ArchiveError, ImageArchive

COLUMNS = ["duplicate_problem", "twin_split", "twin_id", "leakage_problem", "leak_split", "leak_id"]


def with_twins(tables: Mapping[str, pd.DataFrame], archives: Mapping[str, ImageArchive]) -> dict[str, pd.DataFrame]:
    """The images' tables of the splits, with COLUMNS; they have id, file_name, member, checksum and bytes.

    Of the images of the same bytes in one split all but the first have a `duplicate_problem`, and that first one as
    their twin. Those that are in a later split too (train, val, test) have a `leakage_problem`: what is judged on
    stays, what is trained on goes.
    """
    rows = pd.concat([table.assign(split=split) for split, table in tables.items()], ignore_index=True)
    rows = rows.assign(content=_contents(rows, archives))
    found: dict[str, dict[int, tuple[Any, ...]]] = {split: {} for split in tables}
    for _, same in rows[rows["content"].notna()].groupby("content", sort=False):
        firsts = {row.split: row for row in same[::-1].itertuples()}
        for row in same.itertuples():
            twin, later = firsts[row.split], _later(row.split, firsts, list(tables))
            duplicate = (_words(twin), row.split, twin.id) if twin.id != row.id else (None,) * 3
            leak = (f"in {later.split} too: {_words(later)}", later.split, later.id) if later else (None,) * 3
            found[row.split][row.id] = duplicate + leak
    return {
        split: table.join(pd.DataFrame.from_dict(found[split], orient="index", columns=COLUMNS, dtype=object), on="id")
        for split, table in tables.items()
    }


def _later(split: str, firsts: Mapping[str, Any], order: list[str]) -> Any:
    """The first image of the next split that has one, None where there is none."""
    return next((firsts[other] for other in order[order.index(split) + 1 :] if other in firsts), None)


def _words(row: Any) -> str:
    return f"image {row.id}, {row.file_name}"


def _contents(rows: pd.DataFrame, archives: Mapping[str, ImageArchive]) -> list[str | None]:
    """What tells a file's bytes, for those that may be another's too: their SHA-256; None for all others.

    Candidates have CRC-32 and size in common. A file that cannot be read is the same as itself alone.
    """
    there = rows[rows["member"].notna()]
    candidates = there[there.duplicated(["checksum", "bytes"], keep=False)]
    digests: dict[tuple[str, str], str] = {}
    places = list(dict.fromkeys(zip(candidates["split"], candidates["member"], strict=True)))
    for split, member in tqdm(places, desc="compare", unit=" images", disable=None, leave=False):
        try:
            digests[split, member] = hashlib.sha256(archives[split].read(member)).hexdigest()
        except ArchiveError:
            digests[split, member] = f"{split}/{member}"
    return [digests.get(place) for place in zip(rows["split"], rows["member"], strict=True)]
