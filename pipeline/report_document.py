"""A report as blocks, and the two ways it is written: Markdown for a comment on the forge, HTML that opens offline.

What stands in the blocks comes from branches of others: all of it is escaped, in both.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import jinja2
from markupsafe import Markup

ROWS = (60, 25, 10, 4)  # of a table in Markdown, at most: as many as fit into the limit


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file: a name, a value."""

    text: str


Cell = str | Code


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two; `warning`: to be seen first."""

    text: Cell | Sequence[Cell]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Columns but the first `texts` are figures, which stand to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1


@dataclass(frozen=True)
class Chart:
    """An SVG of our own, for HTML; Markdown shows the table."""

    svg: str
    table: Table


@dataclass(frozen=True)
class Picture:
    """A JPEG, for HTML alone."""

    jpeg: bytes
    caption: Sequence[Cell]


Block = Paragraph | Table | Chart | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section]


# Markdown (GitHub's) --------------------------------------------------------------------------------------------------


def markdown(document: Document, limit: int, more: str) -> str:
    """The report in at most `limit` characters: tables are cut first, then sections, and `more` says where the rest is.

    `more` is Markdown of our own.
    """
    for rows in ROWS:
        parts = [_section_markdown(section, rows) for section in document.sections]
        head = "\n\n".join([f"# {escape(document.title)}", *_blocks_markdown(document.lead, rows)])
        text = "\n\n".join([head, *parts, more]) + "\n"
        if len(text) <= limit:
            return text
    note = f"Cut here: the whole is longer than a comment may be. {more}\n"
    kept = head[: limit - len(note) - 2].rpartition("\n")[0] if len(head) + len(note) + 2 > limit else head
    for part in parts:
        if len(kept) + len(part) + len(note) + 4 > limit:
            break
        kept += f"\n\n{part}"
    return f"{kept}\n\n{note}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, and in which nobody is mentioned and nothing linked."""
    flat = re.sub(r"\s+", " ", "".join(character if character.isprintable() else " " for character in text)).strip()
    flat = re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", flat)
    return re.sub(r"(?i)(@|\\#|://|www\.)", "\\1\N{ZERO WIDTH SPACE}", flat)


def _cell_markdown(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(cell)
    flat = re.sub(r"\s+", " ", "".join(one if one.isprintable() else " " for one in cell.text)).strip()
    flat = flat.replace("`", "'").replace("|", "\\|")
    return f"`{flat}`" if flat else ""


def _words_markdown(text: Cell | Sequence[Cell]) -> str:
    return " ".join(map(_cell_markdown, (text,) if isinstance(text, (str, Code)) else text))


def _section_markdown(section: Section, rows: int) -> str:
    return "\n\n".join([f"## {escape(section.title)}", *_blocks_markdown(section.blocks, rows)])


def _blocks_markdown(blocks: Iterable[Block], rows: int) -> list[str]:
    texts = []
    for block in blocks:
        match block:
            case Paragraph():
                texts.append(("> [!WARNING]\n> " if block.warning else "") + _words_markdown(block.text))
            case Table():
                texts.append(_table_markdown(block, rows))
            case Chart():
                texts.append(_table_markdown(block.table, rows))
            case Picture():
                pass
    return texts


def _table_markdown(table: Table, most: int) -> str:
    lines = [[escape(name) for name in table.head]]
    lines.append([":--" if place < table.texts else "--:" for place in range(len(table.head))])
    lines += [[_cell_markdown(cell) for cell in row] for row in table.rows[:most]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    left = len(table.rows) - most
    return text + (f"\n\nand {left} more rows" if left > 0 else "")


UP, DOWN = "▲", "▼"  # before a difference, in both
SHADES = {UP: " better", DOWN: " worse"}  # of a table's cell

# HTML -----------------------------------------------------------------------------------------------------------------

TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ document.title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1f2328 }
  h1 { line-height: 1.25 }
  h2 { margin-top: 2.2rem; border-bottom: 1px solid #d1d9e0; padding-bottom: .2rem }
  nav a { margin-right: 1rem }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #d1d9e0; vertical-align: top }
  th { border-bottom: 2px solid #59636e; white-space: nowrap }
  .text { text-align: left; overflow-wrap: anywhere; min-width: 5rem }
  .figure { text-align: right; font-variant-numeric: tabular-nums; padding-left: .8rem }
  .better { color: #1a7f37 }
  .worse { color: #c0332b }
  .warning { border-left: 4px solid #bf8700; background: #fff8c5; padding: .5rem .8rem; overflow-wrap: anywhere }
  code { font: 13px ui-monospace, monospace; background: #f0f2f4; padding: .1rem .25rem; border-radius: 3px }
  figure { margin: 0 0 1.5rem }
  figure img { max-width: 100%; display: block }
  figcaption { color: #59636e }
  svg { max-width: 100%; height: auto }
</style>
{% macro words(cell) %}
{%- if cell is string %}{{ cell }}{% elif cell.text %}<code>{{ cell.text }}</code>{% endif %}
{%- endmacro %}
{% macro line(text) %}{% for cell in text %}{{ words(cell) }} {% endfor %}{% endmacro %}
{% macro block(one) %}
{% if kind(one) == "Paragraph" %}
<p{% if one.warning %} class="warning"{% endif %}>{{ line(listed(one.text)) }}</p>
{% elif kind(one) == "Table" %}
<div class="wide"><table>
<thead><tr>
{% for name in one.head %}<th class="{{ "text" if loop.index0 < one.texts else "figure" }}">{{ name }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for row in one.rows %}
<tr>{% for cell in row %}<td class="{{ "text" if loop.index0 < one.texts else "figure" }}{{ shade(cell) }}">
{{- words(cell) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% elif kind(one) == "Chart" %}
{{ drawn(one.svg) }}
{% else %}
<figure>
<img alt="detections before and after" src="data:image/jpeg;base64,{{ coded(one.jpeg) }}">
<figcaption>{{ line(one.caption) }}</figcaption>
</figure>
{% endif %}
{% endmacro %}
<h1>{{ document.title }}</h1>
{% for one in document.lead %}{{ block(one) }}{% endfor %}
<nav>{% for section in document.sections %}<a href="#s{{ loop.index }}">{{ section.title }}</a>{% endfor %}</nav>
{% for section in document.sections %}
<h2 id="s{{ loop.index }}">{{ section.title }}</h2>
{% for one in section.blocks %}{{ block(one) }}{% endfor %}
{% endfor %}
</html>
"""


def html(document: Document) -> str:
    """One file, pictures and charts inside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        document=document,
        kind=lambda block: type(block).__name__,
        shade=lambda cell: next((name for sign, name in SHADES.items() if isinstance(cell, str) and sign in cell), ""),
        listed=lambda text: [text] if isinstance(text, (str, Code)) else text,
        coded=lambda jpeg: base64.b64encode(jpeg).decode(),
        drawn=Markup,
    )
