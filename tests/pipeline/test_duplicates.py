"""Images that are there more than once."""

import zipfile
from pathlib import Path

import pandas as pd
import pytest

from pipeline.coco import ImageArchive
from pipeline.duplicates import COLUMNS, with_twins
from tests.pipeline.made_data import facts, picture

# Bytes of the same length and CRC-32: CRC-32 is linear, so a multiple of its polynomial may be added anywhere.
POLYNOMIAL = 0x104C11DB7


def same_crc(content: bytes) -> bytes:
    """Other bytes of the same length and CRC-32."""
    # Bits travel least significant first in each byte; so does the polynomial's highest bit.
    bits = int(f"{POLYNOMIAL:033b}"[::-1], 2)
    changed = bytearray(content)
    for place, byte in enumerate(bits.to_bytes(5, "little")):
        changed[100 + place] ^= byte
    return bytes(changed)


def found(folder: Path, splits: dict[str, dict[int, tuple[str, bytes | None]]]) -> dict[str, pd.DataFrame]:
    """The tables of splits given as {image id: (file name, content, None where no file is to be written)}."""
    tables, archives = {}, {}
    for split, images in splits.items():
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for name, content in images.values():
                if content is not None:
                    archive.writestr(f"{split}/{name}", content)
        archives[split] = ImageArchive(folder / f"{split}.zip")
        names = [name for name, _ in images.values()]
        table = pd.DataFrame({"id": list(images), "file_name": names})
        tables[split] = pd.concat([table, facts(archives[split], names)], axis=1)
    result = with_twins(tables, archives)
    for archive in archives.values():
        archive.close()
    return {split: table.set_index("id") for split, table in result.items()}


def problems(table: pd.DataFrame, column: str) -> dict[int, str]:
    return table[column].dropna().to_dict()


def test_all_but_the_first_in_a_split_and_the_earlier_of_two_splits(tmp_path: Path) -> None:
    one, two, three = picture(1), picture(2), picture(3)
    tables = found(
        tmp_path,
        {
            "train": {7: ("a", one), 5: ("b", two), 6: ("c", one), 4: ("d", one), 3: ("e", picture(9))},
            "val": {1: ("f", two), 2: ("g", three), 9: ("h", two)},
            "test": {7: ("i", three), 8: ("j", two)},
        },
    )
    assert problems(tables["train"], "duplicate_problem") == {6: "image 7, a", 4: "image 7, a"}
    assert problems(tables["train"], "leakage_problem") == {5: "in val too: image 1, f"}
    assert problems(tables["val"], "duplicate_problem") == {9: "image 1, f"}
    assert problems(tables["val"], "leakage_problem") == {
        1: "in test too: image 8, j",
        2: "in test too: image 7, i",
        9: "in test too: image 8, j",
    }
    assert problems(tables["test"], "duplicate_problem") == problems(tables["test"], "leakage_problem") == {}
    assert tables["train"].loc[6, ["twin_split", "twin_id"]].tolist() == ["train", 7]
    assert tables["train"].loc[5, ["leak_split", "leak_id"]].tolist() == ["val", 1]


def test_records_of_one_file_are_duplicates_also_where_it_cannot_be_read(tmp_path: Path) -> None:
    tables = found(tmp_path, {"train": {1: ("a", picture(1)), 2: ("a", None), 3: ("train/a", None), 4: ("gone", None)}})
    assert list(problems(tables["train"], "duplicate_problem")) == [2, 3]
    archive = tmp_path / "train.zip"
    content = bytearray(archive.read_bytes())
    content[1000] ^= 1
    archive.write_bytes(content)
    with ImageArchive(archive) as damaged:
        images = tables["train"].reset_index().drop(columns=COLUMNS)
        again = with_twins({"train": images}, {"train": damaged})
    assert again["train"]["duplicate_problem"].notna().tolist() == [False, True, True, False]


def test_same_checksum_and_size_are_not_enough(tmp_path: Path) -> None:
    content = picture(1)
    other = same_crc(content)
    tables = found(tmp_path, {"train": {1: ("a", content), 2: ("b", other)}, "val": {3: ("c", other)}})
    assert tables["train"]["checksum"].nunique() == tables["train"]["bytes"].nunique() == 1
    assert problems(tables["train"], "duplicate_problem") == {}
    assert problems(tables["train"], "leakage_problem") == {2: "in val too: image 3, c"}


@pytest.mark.parametrize("images", [{}, {1: ("gone", None)}])
def test_split_without_files(tmp_path: Path, images: dict[int, tuple[str, bytes | None]]) -> None:
    tables = found(tmp_path, {"train": {1: ("a", picture(1))}, "val": images})
    assert len(tables["val"]) == len(images)
    assert problems(tables["val"], "duplicate_problem") == problems(tables["train"], "leakage_problem") == {}
