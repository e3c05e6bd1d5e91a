"""A report as Markdown and as HTML."""

import pytest

from pipeline.comparison import difference, figures, flat, table_of
from pipeline.errors import PipelineError
from pipeline.report_document import Chart, Code, Document, Paragraph, Picture, Section, Table, escape, html, markdown


def document(*blocks: object) -> Document:
    return Document("Title", [Paragraph("Lead.")], [Section("One", blocks), Section("Two", [Paragraph("End.")])])  # type: ignore[arg-type]


def test_text_is_shown_as_it_is() -> None:
    assert escape("a|b *c* _d_ [e](f) <g> `h` #1 & \\") == (
        "a\\|b \\*c\\* \\_d\\_ \\[e\\]\\(f\\) \\<g\\> \\`h\\` \\#\N{ZERO WIDTH SPACE}1 \\& \\\\"
    )
    assert escape("one\r\n# two\t three\x00") == "one \\#\N{ZERO WIDTH SPACE} two three"


def test_nobody_is_mentioned_and_nothing_linked() -> None:
    assert escape("@octocat https://x www.y") == "@\u200boctocat https://\u200bx www.\u200by"


def test_a_table_in_both() -> None:
    table = Table(["name", "figure"], [(Code("a|b`c\nd"), "▼ -1"), (Code(""), "<b>")])
    text = markdown(document(table), 9999, "More.")
    assert "| name | figure |\n| :-- | --: |\n| `a\\|b'c d` | ▼ -1 |\n|  | \\<b\\> |" in text
    page = html(document(table))
    assert '<td class="figure worse">▼ -1</td>' in page
    assert "&lt;b&gt;" in page
    assert "<code></code>" not in page


def test_pictures_and_charts_are_for_html() -> None:
    blocks = (Chart("<svg>x</svg>", Table(["t"], [("row",)])), Picture(b"jpeg", ("caption",)))
    text, page = markdown(document(*blocks), 9999, "More."), html(document(*blocks))
    assert "| row |" in text
    assert "caption" not in text
    assert "<svg>x</svg>" in page
    assert "base64,anBlZw==" in page  # b"jpeg"


def test_tables_are_cut_before_sections() -> None:
    table = Table(["n"], [(f"row {n}",) for n in range(100)])
    whole = markdown(document(table), 9999, "More.")
    assert "and 40 more rows" in whole  # 60 are the most
    cut = markdown(document(table), 150, "More.")
    assert len(cut) <= 150
    assert "and 96 more rows" in cut
    assert cut.endswith("## Two\n\nEnd.\n\nMore.\n")


def test_sections_are_cut_last() -> None:
    cut = markdown(document(Paragraph("x" * 500)), 300, "More.")
    assert len(cut) <= 300
    assert cut == "# Title\n\nLead.\n\nCut here: the whole is longer than a comment may be. More.\n"
    long = Document("T", [Paragraph("line"), Paragraph("y" * 500)], [])
    assert len(markdown(long, 300, "More.")) <= 300


def test_a_difference_has_an_arrow() -> None:
    assert [difference(0.4, 0.45), difference(0.45, 0.4), difference(0.4, 0.40004)] == ["▲ +0.0500", "▼ -0.0500", "0"]
    assert difference(None, 0.4) == difference(0.4, None) == ""
    assert figures(0.4, None) == ("0.4000", "none", "", "")
    assert figures(0.4, 0.41, (-0.01, 0.03))[3] == "-0.0100 to +0.0300"


def test_keys_are_dotted() -> None:
    assert flat({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}
    assert flat({"a": {}}) == {}


def test_a_table_of_figures() -> None:
    assert table_of("a,b\n1,2\n3,4\n") == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    for text in ("a,b\n1\n", "a\nx\n", ""):
        with pytest.raises(PipelineError, match="not a table of figures"):
            table_of(text)
