"""Versions as a table and as a page: order, figures, where the points of the chart stand, and what is escaped."""

import datetime
import re

from pipeline.history_page import Assignment, Judged, Version, page, table

DAY = datetime.datetime(2026, 5, 1, 23, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))


def version(name):
    return Version(name, name[1] * 40, DAY, "Ann <a>", "why & how\n\nmore")


def judged(ap, data="d" * 32):
    return Judged("accepted", "val (also used for selection)", {"AP": ap, "AP50": None}, data)


def test_table_has_the_newest_first_and_dates_in_utc():
    made = [Assignment("prod", "v0.9.0", DAY, "Ann", "first\n\nx", "detector#prod#1")]
    words = table(
        [version("v0.9.0"), version("v0.10.0")],
        {"v0.9.0": judged(0.25), "v0.10.0": judged(None)},
        {"prod": "v0.9.0"},
        made,
    )
    rows = [re.split(" {2,}", line) for line in words.splitlines()]
    told = ["val", "dddddddd", "prod", "2026-05-01 21:30", "Ann <a>", "0" * 10, "why & how"]
    assert rows[2] == ["v0.9.0", "0.2500", "none", *told]
    assert rows[1][:2] == ["v0.10.0", "none"]
    assert rows[-1] == ["2026-05-01 21:30", "prod", "v0.9.0", "Ann", "first"]


def test_numbers_of_versions_are_numbers():
    assert version("v0.10.0").number > version("v0.9.0").number


def test_points_of_the_chart():
    """AP 0.30 to 0.40 is five steps of 0.02, so lines stand at 0.30, 0.32, ... 0.42, from y 260 up to y 40."""
    figures = {
        "v0.1.0": judged(0.30),
        "v0.2.0": judged(0.40),
        "v0.3.0": judged(0.35, data="other"),
        "v0.4.0": judged(None),
    }
    drawn = page("detector", [version(name) for name in figures], figures, {"prod": "v0.2.0"}, [])
    # 860 - 48 - 40 = 772 pixels for three points: 257.33 each, in the middle of it; (0.40 - 0.30) / 0.12 of 220 pixels
    # is 183.3.
    assert re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn) == [
        ("176.7", "260.0"),
        ("434.0", "76.7"),
        ("691.3", "168.3"),
    ]
    assert re.findall(r'points="([^"]*)"', drawn) == ["176.7,260.0 434.0,76.7", "691.3,168.3"]  # other data, no line
    assert re.findall(r'text-anchor="end">([\d.]+)<', drawn) == [
        "0.300",
        "0.320",
        "0.340",
        "0.360",
        "0.380",
        "0.400",
        "0.420",
    ]
    assert drawn.count('class="now"') == 1
    assert "Ann &lt;a&gt;" in drawn
    assert "<a>" not in drawn


def test_nothing_registered():
    assert table([], {}, {}, []) == "no version is registered"
    assert "No version with a measured AP is registered." in page("detector", [], {}, {}, [])
