"""The journal of a part file: what it says is on disk, whatever state it was left in."""

import json
from pathlib import Path

import pytest

from pipeline.part_file import LINE, PartFile


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "x"


def journal(target: Path) -> Path:
    return target.with_name(".x.part.state")


def begin(target: Path) -> None:
    """Bytes 0 to 10 and 20 to 35 of 40."""
    with PartFile(target) as part:
        part.begin({"size": 40, "url": "http://ä"})
        assert part.put(20, 20, b"b" * 10) == 30
        assert part.put(0, 0, b"a" * 10) == 10
        assert part.put(20, 30, b"c" * 5) == 35
        assert (part.here, part.prefix, part.continued) == (25, 10, False)


def test_what_is_on_disk_is_known_afterwards(target: Path) -> None:
    begin(target)
    with PartFile(target) as part:
        assert part.of == {"size": 40, "url": "http://ä"}
        assert (part.here, part.prefix, part.continued) == (25, 10, True)
        assert part.gaps(40, 100) == [(10, 20), (35, 40)]
        assert part.gaps(40, 4) == [(10, 14), (14, 18), (18, 20), (35, 39), (39, 40)]
        part.put(10, 10, b"d" * 10)
        assert part.prefix == 35
    with PartFile(target) as part:
        part.put(35, 35, b"e" * 5)
        assert (part.prefix, part.gaps(40, 4)) == (40, [])
        part.finish(target)
    assert target.read_bytes() == b"a" * 10 + b"d" * 10 + b"b" * 10 + b"c" * 5 + b"e" * 5
    assert list(target.parent.iterdir()) == [target]


def test_lines_have_their_length_so_that_no_write_is_torn(target: Path) -> None:
    begin(target)
    lines = journal(target).read_bytes().splitlines(keepends=True)
    assert len(lines[0]) % LINE == 0
    assert [len(line) for line in lines[1:]] == [LINE, LINE]


def test_a_last_line_that_is_torn_counts_as_none(target: Path) -> None:
    begin(target)
    journal(target).write_bytes(journal(target).read_bytes()[:-1])  # the line of bytes 0 to 10
    with PartFile(target) as part:
        assert part.gaps(40, 100) == [(0, 20), (35, 40)]
        part.put(0, 0, b"a" * 20)
    with PartFile(target) as part:
        assert part.gaps(40, 100) == [(35, 40)]


@pytest.mark.parametrize("damage", ["cut part", "no part", "no journal", "garbage", "garbage line"])
def test_what_does_not_fit_together_is_thrown_away(target: Path, damage: str) -> None:
    begin(target)
    part_path = target.with_name(".x.part")
    if damage == "cut part":
        part_path.write_bytes(part_path.read_bytes()[:34])
    elif damage == "no part":
        part_path.unlink()
    elif damage == "no journal":
        journal(target).unlink()
    elif damage == "garbage":
        journal(target).write_bytes(b"\xff\x00" * 50)
    else:
        journal(target).write_text(json.dumps({"size": 40}) + "\n" + "x" * (LINE - 1) + "\n")
    with PartFile(target) as part:
        assert (part.of, part.here, part.gaps(40, 100)) == ({}, 0, [(0, 40)])
        assert part_path.stat().st_size == 0
    assert list(target.parent.iterdir()) == []


def test_only_what_holds_bytes_stays(target: Path) -> None:
    with PartFile(target) as part:
        part.begin({"size": 40})
    assert list(target.parent.iterdir()) == []
    begin(target)
    assert len(list(target.parent.iterdir())) == 2
